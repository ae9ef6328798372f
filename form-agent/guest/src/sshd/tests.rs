//! The server against OpenSSH's client, over the loopback interface. Users have the number of whoever runs the tests; root has others, too.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{getegid, geteuid};

use super::{
    rules::{Rules, UserRules},
    server::Server,
};

/// `password`, as crypt(3) has it.
const HASH: &str = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/";

/// A machine in a directory, with a server. ada and eve have a key each; both have a password, which only ada may use.
struct Setting {
    root: PathBuf,
    address: SocketAddr,
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Setting {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("form-guest-sshd-{}-{number}", std::process::id()));
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let mut passwd = String::new();
        for (name, uid, gid) in [("ada", uid, gid), ("eve", uid, gid), ("old", uid, gid), ("bob", 54_321, 54_322)] {
            let home = root.join(name);
            fs::create_dir_all(home.join(".ssh")).unwrap();
            fs::set_permissions(home.join(".ssh"), fs::Permissions::from_mode(0o755)).unwrap();
            make_key(&root.join(format!("{name}.key")), "ed25519");
            fs::copy(root.join(format!("{name}.key.pub")), home.join(".ssh/authorized_keys")).unwrap();
            passwd += &format!("{name}:x:{uid}:{gid}::{}:/bin/sh\n", home.display());
        }
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        fs::write(root.join("etc/group"), "others:x:54323:eve,bob\nmore:x:54324:bob\n").unwrap();
        fs::write(root.join("etc/shadow"), format!("ada:{HASH}:20000::::::\neve:{HASH}:20000::::::\nold:{HASH}:0::::::\n")).unwrap();
        let user = |password, colour: &str| UserRules { password, env: [("COLOUR".to_owned(), colour.to_owned())].into() };
        let users = [("ada".to_owned(), user(true, "red")), ("eve".to_owned(), user(false, "blue"))];
        let env = [("PLACE".to_owned(), "here and there".to_owned())];
        let rules = Rules { root_login: true, passwords: true, users: users.into(), env: env.into() };
        let address = serve(&root, rules);
        let public = fs::read_to_string(root.join("etc/ssh/ssh_host_ed25519_key.pub")).unwrap();
        fs::write(root.join("known_hosts"), format!("[127.0.0.1]:{} {public}", address.port())).unwrap();
        Self { root, address }
    }

    /// OpenSSH's client with nothing of this machine's in it. The host key is known before.
    fn ssh(&self, user: &str, key: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        let option = |name: &str, value: String| format!("-o{name}={value}");
        command.args(["-F", "none", "-p", &self.address.port().to_string(), "-l", user]);
        command.arg("-i").arg(self.root.join(format!("{key}.key")));
        command.arg(option("UserKnownHostsFile", self.root.join("known_hosts").display().to_string()));
        for (name, value) in [
            ("GlobalKnownHostsFile", "/dev/null"),
            ("StrictHostKeyChecking", "yes"),
            ("IdentitiesOnly", "yes"),
            ("IdentityAgent", "none"),
            ("LogLevel", "ERROR"),
            ("ConnectTimeout", "20"),
        ] {
            command.arg(option(name, value.to_owned()));
        }
        command.args(arguments).env_remove("SSH_AUTH_SOCK").env_remove("DISPLAY");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A command of a user with his key.
    fn run(&self, user: &str, line: &str) -> Ran {
        self.ssh(user, user, &["-oBatchMode=yes", "127.0.0.1", line]).output().unwrap().into()
    }

    fn refuses(&self, user: &str, key: &str) {
        let ran: Ran = self.ssh(user, key, &["-oBatchMode=yes", "127.0.0.1", "true"]).output().unwrap().into();
        assert!(ran.code == Some(255) && ran.err.contains("Permission denied"), "{user} with {key}'s key: {ran:?}");
    }

    /// Without a key.
    fn with_password(&self, user: &str, password: &str) -> Ran {
        let ask = self.root.join("ask");
        fs::write(&ask, "#!/bin/sh\necho \"$PASSWORD\"\n").unwrap();
        fs::set_permissions(&ask, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = self.ssh(user, user, &["-oPubkeyAuthentication=no", "-oNumberOfPasswordPrompts=1", "127.0.0.1", "echo in"]);
        command.env("SSH_ASKPASS", ask).env("SSH_ASKPASS_REQUIRE", "force").env("PASSWORD", password);
        command.output().unwrap().into()
    }

    fn authorized_keys(&self, user: &str) -> PathBuf {
        self.root.join(user).join(".ssh/authorized_keys")
    }

    /// Puts options before the user's key.
    fn restrict(&self, user: &str, options: &str) {
        let key = fs::read_to_string(self.root.join(format!("{user}.key.pub"))).unwrap();
        fs::write(self.authorized_keys(user), format!("{options} {key}")).unwrap();
    }
}

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Starts a server that lives as long as the test's process.
fn serve(root: &Path, rules: Rules) -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    let root = root.to_owned();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Server::new(&root, rules).unwrap();
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            server.listen(listener).await;
        });
    });
    receiver.recv_timeout(Duration::from_secs(20)).unwrap()
}

fn make_key(path: &Path, kind: &str) {
    let made = Command::new("ssh-keygen").args(["-q", "-N", "", "-t", kind, "-f"]).arg(path).status().unwrap();
    assert!(made.success());
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_key_opens_its_users_account_and_no_other() {
    let setting = Setting::new();
    let ran = setting.run("ada", "echo $USER $HOME $SHELL; pwd; echo $PLACE, $COLOUR; echo oh >&2; exit 7");
    let home = setting.root.join("ada").display().to_string();
    assert_eq!((ran.code, ran.out, ran.err), (Some(7), format!("ada {home} /bin/sh\n{home}\nhere and there, red\n"), "oh\n".to_owned()));
    assert_eq!(setting.run("eve", "echo $COLOUR").out, "blue\n");
    setting.refuses("ada", "eve");
    setting.refuses("eve", "ada");
    setting.refuses("nobody-of-this-name", "ada");
    setting.refuses("ada:eve", "ada");
    let client = setting.run("ada", "echo $SSH_CONNECTION; echo $SSH_CLIENT; echo ${SSH_TTY:-none}").out;
    let port = setting.address.port();
    assert!(client.contains(&format!(" 127.0.0.1 {port}\n")) && client.ends_with(&format!(" {port}\nnone\n")), "{client}");
    // A file that others may write lets nobody in.
    fs::set_permissions(setting.authorized_keys("eve"), fs::Permissions::from_mode(0o666)).unwrap();
    setting.refuses("eve", "eve");
}

#[test]
fn keys_of_other_kinds() {
    let setting = Setting::new();
    for kind in ["rsa", "ecdsa"] {
        make_key(&setting.root.join(format!("{kind}.key")), kind);
        let public = fs::read_to_string(setting.root.join(format!("{kind}.key.pub"))).unwrap();
        fs::OpenOptions::new().append(true).open(setting.authorized_keys("ada")).unwrap().write_all(public.as_bytes()).unwrap();
        let ran: Ran = setting.ssh("ada", kind, &["-oBatchMode=yes", "127.0.0.1", "echo in"]).output().unwrap().into();
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "in\n"), "{kind}: {}", ran.err);
    }
}

#[test]
fn passwords_are_for_those_who_may_use_them() {
    let setting = Setting::new();
    let ran = setting.with_password("ada", "password");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "in\n"), "{}", ran.err);
    let began = Instant::now();
    let ran = setting.with_password("ada", "Password");
    assert!(ran.code == Some(255) && ran.err.contains("Permission denied"), "{ran:?}");
    assert!(began.elapsed() >= Duration::from_secs(1), "guessing takes its time");
    let ran = setting.with_password("eve", "password");
    assert!(ran.code == Some(255) && ran.err.contains("Permission denied (publickey)"), "{ran:?}");
    let ran = setting.with_password("nobody-of-this-name", "password");
    assert!(ran.code == Some(255) && ran.err.contains("Permission denied"), "{ran:?}");
}

#[test]
fn a_terminal_has_its_size_and_follows_it() {
    let setting = Setting::new();
    let ssh = setting.ssh("ada", "ada", &["-tt", "127.0.0.1", "'stty size; tty; echo $TERM $SSH_TTY; exit 3'"]);
    let words: Vec<String> = ssh.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    // script(1) gives the client a terminal of its own.
    let line = format!("stty rows 33 cols 77; TERM=vt220 ssh {}; echo code $?", words.join(" "));
    let ran: Ran = Command::new("script").args(["-qec", &line, "/dev/null"]).stdin(Stdio::null()).output().unwrap().into();
    // script(1) types the end of its input.
    let clean = ran.out.replace("^@", "").replace(['\0', '\u{8}'], "");
    let lines: Vec<&str> = clean.lines().map(str::trim_end).collect();
    let ["33 77", tty, last, "code 3"] = lines[..] else { panic!("{ran:?}") };
    assert!(tty.starts_with("/dev/pts/") && last == format!("vt220 {tty}"), "{ran:?}");
}

#[test]
fn a_shell_reads_its_input_from_a_terminal() {
    let setting = Setting::new();
    let mut child = setting.ssh("ada", "ada", &["-tt", "127.0.0.1"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo $0 $((40 + 2))\nexit 5\n").unwrap();
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert!(ran.code == Some(5) && ran.out.contains("-sh 42"), "{ran:?}");
}

#[test]
fn whoever_leaves_takes_his_terminal_with_him() {
    let setting = Setting::new();
    let (pid_file, hung_up) = (setting.root.join("pid"), setting.root.join("hung-up"));
    let line = format!("trap 'touch {}; exit' HUP; echo $$ > {}; while :; do sleep 0.05; done", hung_up.display(), pid_file.display());
    let mut child = setting.ssh("ada", "ada", &["-tt", "127.0.0.1", &line]).stdin(Stdio::piped()).spawn().unwrap();
    eventually("it runs", || fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n')));
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the terminal hangs up", || hung_up.exists());
}

#[test]
fn how_a_command_ends_is_told() {
    let setting = Setting::new();
    assert_eq!(setting.run("ada", "exit 200").code, Some(200));
    assert_eq!(setting.run("ada", "no-such-program").code, Some(127));
    // OpenSSH's client has no other code for a signal.
    let ran = setting.run("ada", "kill -TERM $$");
    assert_eq!((ran.code, ran.err.as_str()), (Some(255), ""));
    let began = Instant::now();
    let ran = setting.run("ada", "sleep 30 & echo started");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "started\n"));
    assert!(began.elapsed() < Duration::from_secs(20), "what it leaves behind is not waited for");
}

#[test]
fn as_much_as_one_likes_goes_through_and_back() {
    let setting = Setting::new();
    // More than everything on the way holds.
    let sent: Vec<u8> = (0..20_u32 << 20).map(|number| (number.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let mut child = setting.ssh("ada", "ada", &["-oBatchMode=yes", "127.0.0.1", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = thread::spawn(move || stdin.write_all(&copy));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success() && output.stdout == sent, "{} of {} bytes", output.stdout.len(), sent.len());
}

#[test]
fn two_sessions_at_once() {
    let setting = Setting::new();
    let meeting = setting.root.join("meeting");
    assert!(Command::new("mkfifo").arg(&meeting).status().unwrap().success());
    let start = |user: &str, line: String| -> Child { setting.ssh(user, user, &["-oBatchMode=yes", "127.0.0.1", &line]).spawn().unwrap() };
    // Each waits for the other.
    let reader = start("ada", format!("cat {}", meeting.display()));
    let writer = start("eve", format!("echo hello > {}", meeting.display()));
    let ran: Ran = reader.wait_with_output().unwrap().into();
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "hello\n"));
    assert!(writer.wait_with_output().unwrap().status.success());
}

#[test]
fn ports_are_forwarded_unless_the_key_says_no() {
    let setting = Setting::new();
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = echo.local_addr().unwrap();
    thread::spawn(move || {
        for stream in echo.incoming() {
            let mut stream = stream.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            stream.write_all(text.to_uppercase().as_bytes()).unwrap();
        }
    });
    let forward = |to: &str| -> Ran {
        let mut child = setting.ssh("ada", "ada", &["-oBatchMode=yes", "-W", to, "127.0.0.1"]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"through").unwrap();
        child.wait_with_output().unwrap().into()
    };
    assert_eq!(forward(&target.to_string()).out, "THROUGH");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ran = forward(&closed.to_string());
    assert_ne!(ran.code, Some(0), "{ran:?}");
    setting.restrict("ada", "no-port-forwarding");
    let ran = forward(&target.to_string());
    assert!(ran.code != Some(0) && ran.out.is_empty(), "{ran:?}");
}

#[test]
fn a_key_is_used_for_what_its_options_say() {
    let setting = Setting::new();
    setting.restrict("ada", r#"restrict,command="echo forced: $SSH_ORIGINAL_COMMAND""#);
    let ran = setting.run("ada", "rm -rf everything");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "forced: rm -rf everything\n"));
    setting.restrict("ada", r#"from="10.0.0.1""#);
    setting.refuses("ada", "ada");
}

#[test]
fn an_expired_password_has_to_be_changed_first() {
    let setting = Setting::new();
    let ran = setting.run("old", "echo in");
    assert!(ran.code == Some(1) && ran.out.is_empty() && ran.err.contains("Your password has expired"), "{ran:?}");
}

#[test]
fn a_session_is_its_users_with_all_his_groups() {
    if !geteuid().is_root() {
        return;
    }
    let setting = Setting::new();
    fs::set_permissions(&setting.root, fs::Permissions::from_mode(0o755)).unwrap();
    let ran = setting.run("bob", "id -u; id -g; id -G; cat /etc/shadow 2>/dev/null || echo no");
    assert_eq!(ran.out, "54321\n54322\n54322 54323 54324\nno\n", "{ran:?}");
    // The files are root's, which sshd allows; another user's are not.
    rustix::fs::chown(setting.authorized_keys("bob"), Some(rustix::fs::Uid::from_raw(54_325)), None).unwrap();
    setting.refuses("bob", "bob");
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let setting = Setting::new();
    let packets: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-x\r\n\xff\xff\xff\xff\xff\xff\xff\xff",
        b"SSH-2.0-x\r\n\x00\x00\x00\x0c\x0a\x14AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        &[0; 100_000],
    ];
    for packet in packets {
        let mut stream = TcpStream::connect(setting.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = stream.write_all(packet);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        // Reset or ended: not left open.
        let ended = stream.read_to_end(&mut answer);
        assert!(!matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock), "{:?}", &packet[..8]);
    }
    assert_eq!(setting.run("ada", "echo in").out, "in\n");
}

#[test]
fn those_who_never_say_who_they_are_keep_nobody_out() {
    let setting = Setting::new();
    let strangers: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(setting.address).unwrap()).collect();
    assert_eq!(setting.run("ada", "echo in").out, "in\n");
    let is_open = |mut stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        let mut buffer = [0; 256];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return false,
                // The server's first line.
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
            }
        }
    };
    eventually("most of them are gone", || strangers.iter().filter(|stream| is_open(stream)).count() <= 32);
}
