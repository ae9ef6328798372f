use std::{
    ffi::{OsStr, OsString},
    fs,
    io::ErrorKind,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::ExitStatus,
};

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    ErrorCode,
    client::Client,
    vm::{ForwardQuery, SshAccess, SshServer},
};
use form_types::Name;
use tokio::{
    net::{UnixListener, UnixStream},
    process::Command,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    args::vm_name,
    complete,
    failure::{Failure, Outcome},
    session::Session,
};

/// Log in to a VM over SSH, or run a command there; ssh's exit code becomes this command's
///
/// Runs this machine's own `ssh`, through the agent, so that the VM's address need not be reachable from here. The host key is the one that
/// the guest itself reported: nothing is trusted at first use.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM, and the user; without one the only user of the Formfile that can log in
    #[arg(value_name = "[USER@]VM", value_parser = target, add = ArgValueCompleter::new(complete::vms))]
    target: Target,
    /// Forward a local port, as ssh does: [ADDRESS:]PORT:HOST:PORT
    #[arg(short = 'L', long = "local-forward", value_name = "FORWARD")]
    forwards: Vec<String>,
    /// The file with your SSH key; without it ssh finds one itself
    #[arg(short, long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    identity: Option<PathBuf>,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run nothing, only forward ports
    #[arg(short = 'N', long)]
    no_command: bool,
    /// Carry standard input and output to this socket: what ssh runs to come here
    #[arg(long, hide = true, value_name = "SOCKET")]
    through: Option<PathBuf>,
    /// The command and its arguments, which the user's shell reads; without one a login shell
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const PORT: u16 = 22;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    user: Option<String>,
    vm: Name,
}

fn target(text: &str) -> Result<Target, String> {
    let (user, vm) = match text.rsplit_once('@') {
        Some((user, vm)) => (Some(user), vm),
        None => (None, text),
    };
    // As names of users are anywhere; nothing that ssh could take for an option.
    let good = |user: &str| !user.is_empty() && !user.starts_with('-') && user.bytes().all(|byte| byte.is_ascii_graphic());
    if user.is_some_and(|user| !good(user)) {
        return Err("write USER@VM".to_owned());
    }
    Ok(Target { user: user.map(str::to_owned), vm: vm_name(vm)? })
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    if let Some(socket) = &args.through {
        return through(socket).await;
    }
    let client = session.client()?;
    let access = client.ssh_access(&args.target.vm).await?;
    check_server(&args.target.vm, &access)?;
    let user = user(&args.target, &access)?;
    let directory = tempfile::Builder::new().prefix("form-ssh-").tempdir();
    let directory = directory.map_err(|error| Failure::io("create a directory in", &std::env::temp_dir(), &error))?;
    let known_hosts = directory.path().join("known_hosts");
    write_known_hosts(&known_hosts, &access)?;
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).map_err(|error| Failure::io("listen on", &socket, &error))?;
    // ssh takes its signals itself, and it has to be told of.
    let _interrupted = signal(SignalKind::interrupt());
    let _quit = signal(SignalKind::quit());
    let program = std::env::current_exe().map_err(|error| Failure::io("find", Path::new("/proc/self/exe"), &error))?;
    let words = ssh_words(&args, &user, &access, &known_hosts, &proxy_command(&program, &args.target.vm, &socket));
    let child = Command::new("ssh").args(words).kill_on_drop(true).spawn();
    let mut child = child.map_err(|error| no_client(&error))?;
    let (troubles, mut trouble) = mpsc::unbounded_channel();
    let carrier = tokio::spawn(carry_all(listener, client, args.target.vm.clone(), troubles));
    let status = child.wait().await.map_err(|error| Failure::failed(format!("ssh cannot be waited for: {error}")))?;
    carrier.abort();
    while let Ok(reason) = trouble.try_recv() {
        session.terminal.warn(reason);
    }
    Ok(exit_code(status))
}

fn no_client(error: &std::io::Error) -> Failure {
    if error.kind() == ErrorKind::NotFound {
        Failure::not_found("there is no program `ssh` on this machine")
            .hint("install one (`apt install openssh-client`), or use `form exec -it VM -- sh`, which needs none")
    } else {
        Failure::failed(format!("ssh cannot be started: {error}"))
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

/// Why there is nobody to talk to, if there is not.
fn check_server(vm: &Name, access: &SshAccess) -> Result<(), Failure> {
    if !access.listening {
        let refused =
            |hint: String| Err(Failure::new(ErrorCode::Unavailable, format!("nothing listens on port {PORT} of vm/{vm}")).hint(hint));
        return match (access.server, &access.program) {
            (SshServer::None, _) => refused(format!(
                "no user of its Formfile can log in: give one `ssh_authorized_keys:\"…\"` and deploy again; `form exec -it {vm} -- sh` needs none"
            )),
            (SshServer::Image, Some(program)) => {
                refused(format!("the image's own {program} does not run: start it in the VM, or leave it out of the image"))
            }
            _ => refused(format!("see `form logs --console {vm}` for what keeps the SSH server from running")),
        };
    }
    if access.host_keys.is_empty() {
        return Err(Failure::new(ErrorCode::Unavailable, format!("vm/{vm} has no host key that its guest knows of"))
            .hint("its server keeps its keys elsewhere than in /etc/ssh: connect with plain `ssh` and look at the key yourself"));
    }
    Ok(())
}

/// Who logs in: whom the caller names, else the only one who can.
fn user(target: &Target, access: &SshAccess) -> Result<String, Failure> {
    let vm = &target.vm;
    let with = |can: fn(&&form_api::vm::SshUser) -> bool| -> Vec<&str> {
        access.users.iter().filter(can).map(|user| user.name.as_str()).collect()
    };
    let (keys, passwords) = (with(|user| user.key), with(|user| user.password));
    let able = if keys.is_empty() { passwords } else { keys };
    let Some(name) = &target.user else {
        return match able[..] {
            [only] => Ok(only.to_owned()),
            [] => Err(Failure::usage(format!("no user of the Formfile of vm/{vm} has a key or a password to log in with"))
                .hint(format!("name a user of the image, `form ssh USER@{vm}`, or give one `ssh_authorized_keys:\"…\"` and deploy again"))),
            _ => Err(Failure::usage(format!("vm/{vm} has several users to log in as: {}", able.join(", ")))
                .hint(format!("name one: `form ssh {}@{vm}`", able.first().unwrap_or(&"USER")))),
        };
    };
    if name == "root" && !access.root_login {
        return Err(Failure::new(ErrorCode::NotAllowed, format!("root may not log in to vm/{vm}"))
            .hint(format!("its Formfile says `disable_root`; `form exec -it {vm} -- sh` is root's as well")));
    }
    if access.accounts.contains(name) {
        return Ok(name.clone());
    }
    let others = if able.is_empty() { access.accounts.iter().map(String::as_str).collect() } else { able };
    Err(Failure::not_found(format!("vm/{vm} has no user `{name}` that can log in")).hint(format!("there is {}", others.join(", "))))
}

/// One line for each host key, under the VM's id, which no other machine has.
fn write_known_hosts(path: &Path, access: &SshAccess) -> Result<(), Failure> {
    let good = |key: &&String| key.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    let text: String = access.host_keys.iter().filter(good).map(|key| format!("{} {key}\n", access.vm)).collect();
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes())).map_err(|error| Failure::io("write", path, &error))
}

/// What ssh gives to a shell to come to the VM. `%` begins ssh's own variables.
fn proxy_command(program: &Path, vm: &Name, socket: &Path) -> OsString {
    let mut line = Vec::new();
    for word in [program.as_os_str(), "vm".as_ref(), "ssh".as_ref(), "--through".as_ref(), socket.as_os_str(), vm.as_str().as_ref()] {
        line.extend_from_slice(b"'");
        for byte in word.as_bytes() {
            match byte {
                b'\'' => line.extend_from_slice(br"'\''"),
                b'%' => line.extend_from_slice(b"%%"),
                other => line.push(*other),
            }
        }
        line.extend_from_slice(b"' ");
    }
    OsStr::from_bytes(line.trim_ascii_end()).to_owned()
}

/// Everything that ssh is told. What stands on its command line wins over its configuration files.
fn ssh_words(args: &Args, user: &str, access: &SshAccess, known_hosts: &Path, proxy: &OsStr) -> Vec<OsString> {
    let option = |name: &str, value: &OsStr| {
        let mut word = OsString::from(format!("-o{name}="));
        word.push(value);
        word
    };
    let quoted = |path: &Path| {
        let mut word = OsString::from("\"");
        word.push(path);
        word.push("\"");
        word
    };
    let mut words = vec![
        option("ProxyCommand", proxy),
        option("ProxyUseFdpass", "no".as_ref()),
        option("HostKeyAlias", access.vm.to_string().as_ref()),
        option("UserKnownHostsFile", &quoted(known_hosts)),
        option("GlobalKnownHostsFile", "/dev/null".as_ref()),
        option("StrictHostKeyChecking", "yes".as_ref()),
        option("UpdateHostKeys", "no".as_ref()),
        option("CheckHostIP", "no".as_ref()),
        // A connection of its own: this program has to be there for as long as it lives.
        option("ControlMaster", "no".as_ref()),
        option("ControlPath", "none".as_ref()),
        "-l".into(),
        user.into(),
    ];
    if let Some(identity) = &args.identity {
        words.extend(["-i".into(), identity.into(), "-oIdentitiesOnly=yes".into()]);
    }
    for forward in &args.forwards {
        words.extend(["-L".into(), forward.into()]);
    }
    words.extend([(args.tty, "-t"), (args.no_command, "-N")].into_iter().filter(|(wanted, _)| *wanted).map(|(_, word)| word.into()));
    words.extend(["--".into(), OsString::from(&access.dns_name)]);
    words.extend(args.command.iter().cloned());
    words
}

/// Carries each connection to the VM's port.
async fn carry_all(listener: UnixListener, client: Client, vm: Name, troubles: mpsc::UnboundedSender<String>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let (client, vm, troubles) = (client.clone(), vm.clone(), troubles.clone());
        tokio::spawn(async move {
            // ssh says that the connection was closed; why, it cannot know.
            match client.forward(&vm, &ForwardQuery { port: PORT }).await {
                Ok(mut tunnel) => drop(tokio::io::copy_bidirectional(&mut stream, &mut tunnel).await),
                Err(error) => drop(troubles.send(format!("vm/{vm}: {error}"))),
            }
        });
    }
}

/// ssh's end of it.
async fn through(socket: &Path) -> Outcome {
    let stream = UnixStream::connect(socket).await.map_err(|error| Failure::io("connect to", socket, &error))?;
    super::port_forward::carry_standard(stream).await;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use form_api::vm::SshUser;

    use super::*;

    fn access(users: &[(&str, bool, bool)]) -> SshAccess {
        let users = users.iter().map(|(name, key, password)| SshUser { name: (*name).to_owned(), key: *key, password: *password });
        SshAccess {
            vm: "00112233445566778899aabbccddeeff".parse().unwrap(),
            dns_name: "web.default.form.internal".to_owned(),
            server: SshServer::Formation,
            program: None,
            listening: true,
            host_keys: vec!["ssh-ed25519 AAAA".to_owned()],
            users: users.collect(),
            accounts: ["root", "ada", "bob"].map(str::to_owned).into(),
            root_login: false,
        }
    }

    #[test]
    fn targets() {
        let vm: Name = "web".parse().unwrap();
        assert_eq!(target("web"), Ok(Target { user: None, vm: vm.clone() }));
        assert_eq!(target("ada@vm/web"), Ok(Target { user: Some("ada".to_owned()), vm: vm.clone() }));
        assert_eq!(target("ada@home@web"), Ok(Target { user: Some("ada@home".to_owned()), vm }));
        for bad in ["@web", "-oProxyCommand=x@web", "a b@web", "ada@", "", "Web"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_only_one_who_can_log_in_does() {
        let who = |text: &str, access: &SshAccess| user(&target(text).unwrap(), access).map_err(|failure| failure.exit_code());
        let one = access(&[("ada", true, false), ("bob", false, true)]);
        assert_eq!(who("web", &one), Ok("ada".to_owned()), "keys come before passwords");
        assert_eq!(who("web", &access(&[("bob", false, true)])), Ok("bob".to_owned()));
        assert_eq!(who("web", &access(&[("ada", true, false), ("bob", true, true)])), Err(2));
        assert_eq!(who("web", &access(&[])), Err(2));
        assert_eq!(who("bob@web", &one), Ok("bob".to_owned()));
        assert_eq!(who("eve@web", &one), Err(3));
        assert_eq!(who("root@web", &one), Err(4));
        assert_eq!(who("root@web", &SshAccess { root_login: true, ..one }), Ok("root".to_owned()));
    }

    #[test]
    fn a_proxy_command_survives_a_shell_and_ssh() {
        let line = proxy_command(Path::new("/opt/it's 100%/form"), &"web".parse().unwrap(), Path::new("/tmp/s"));
        assert_eq!(line, r"'/opt/it'\''s 100%%/form' 'vm' 'ssh' '--through' '/tmp/s' 'web'");
    }
}
