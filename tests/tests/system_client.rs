//! Bad days of those who use `form`, with the real agent on a network of its own. No guest has to run for any of them.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use form_tests::{
    disk::SmallDisk,
    host::{Host, SERVE, enter_own_network, wait},
    programs::Ran,
};
use rustix::process::{Pid, Signal, kill_process};

/// A service that never listens: its deploy waits for its health until somebody ends it.
const SLEEP: &str = r#"["/bin/busybox", "sleep", "1000000"]"#;

/// Puts a file of so many MiB, which nothing compresses, into the image of an app.
fn add_ballast(host: &Host, name: &str, mebibytes: usize) {
    let mut bytes = vec![0; mebibytes << 20];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    fs::write(host.path(name).join("ballast"), bytes).unwrap();
    let formfile = host.path(name).join("Formfile");
    let text = fs::read_to_string(&formfile).unwrap().replace("COPY index.html", "COPY ballast /ballast\nCOPY index.html");
    fs::write(formfile, text).unwrap();
}

/// How many blocks a deploy says that it has sent of the image.
fn blocks_sent(ran: &Ran, name: &str) -> usize {
    let mut lines = ran.stderr.lines().skip_while(|line| *line != format!("sending image {name}")).skip(1);
    let line = lines.find(|line| line.contains("block")).unwrap_or_else(|| panic!("no blocks of {name} were sent: {ran:?}"));
    if line.contains("all blocks are there") { 0 } else { line.split_whitespace().next().unwrap().parse().unwrap() }
}

/// Blocks that have arrived and wait.
fn blocks_kept(host: &Host) -> usize {
    let incoming = host.root().join("var/lib/formation/vm-images/incoming");
    let directories = fs::read_dir(incoming).into_iter().flatten().flatten().filter(|entry| entry.file_name() != ".tmp");
    directories.map(|directory| fs::read_dir(directory.path()).into_iter().flatten().count()).sum()
}

/// A build cache of the test's own, with this user's kernel bundles in it: what `form` is told by `XDG_CACHE_HOME`.
fn own_cache(place: PathBuf) -> PathBuf {
    let users = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache"));
    let cache = place.join("form");
    fs::create_dir_all(&cache).unwrap();
    symlink(users.join("form/kernel"), cache.join("kernel")).unwrap();
    place
}

fn leftovers_of_builds(cache: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in ["form/layers", "form/images", "form/blocks", "form/bases"] {
        let entries = fs::read_dir(cache.join(directory)).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| entry.path()).filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("tmp-")));
    }
    found
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_build_that_fails_says_where_and_leaves_nothing() {
    let host = Host::new();
    let cache = own_cache(host.path("cache"));
    let root = host.path("app/root/bin");
    fs::create_dir_all(&root).unwrap();
    fs::copy("/bin/busybox", root.join("sh")).unwrap();
    let write =
        |lines: &str| fs::write(host.path("app/Formfile"), format!("NAME app\nFROM ./root\n{lines}ENTRYPOINT [\"/bin/sh\"]\n")).unwrap();
    let build = || {
        let mut command = host.remote_command(&["build", host.path("app").to_str().unwrap()]);
        command.env("XDG_CACHE_HOME", &cache);
        host.programs.run(command)
    };
    write("COPY nothing /nothing\n");
    let missing = build().exits(1);
    assert!(missing.stderr.contains("line 3") && missing.stderr.contains("nothing"), "{missing:?}");

    write("RUN echo one && echo two >&2 && exit 3\n");
    let failed = build().exits(1);
    for word in ["line 3", "exit code 3", "one", "two"] {
        assert!(failed.stderr.contains(word), "{word}: {failed:?}");
    }
    assert_eq!(leftovers_of_builds(&cache), Vec::<PathBuf>::new());
    write("RUN echo one\n");
    let _ = build().ok();
}

#[test]
#[ignore = "needs root and loop devices: tests/run-system"]
fn system_a_full_disk_ends_a_build_and_nothing_of_it_is_kept() {
    let host = Host::new();
    let disk = SmallDisk::mount(&host.path("disk"), &host.path("cache"), 160);
    let cache = own_cache(host.path("cache"));
    let app = host.app("app", SERVE, 18100);
    add_ballast(&host, "app", 24);
    let build = || {
        let mut command = host.remote_command(&["build", &app]);
        fs::create_dir_all(host.path("cache/tmp")).unwrap();
        command.env("XDG_CACHE_HOME", &cache).env("TMPDIR", host.path("cache/tmp"));
        host.programs.run(command)
    };
    // Full at the first step, and in the middle.
    for free in [2 << 10, 20 << 10] {
        disk.fill_but(free);
        let full = build().exits(1);
        assert!(full.stderr.contains("No space left"), "{full:?}");
        assert!(full.stderr.contains("hint: free some space") && full.stderr.contains(cache.to_str().unwrap()), "{full:?}");
        assert_eq!(leftovers_of_builds(&cache), Vec::<PathBuf>::new());
        assert_eq!(fs::read_dir(host.path("cache/tmp")).unwrap().count(), 0, "something is left in TMPDIR");
        disk.free();
    }
    let _ = build().ok();

    // An image on its way out or in finds no room either.
    let image = |arguments: &[&str]| {
        let mut command = host.remote_command(&[&["image"], arguments].concat());
        command.env("XDG_CACHE_HOME", &cache).env("TMPDIR", host.path("cache/tmp"));
        host.programs.run(command)
    };
    let (small, large) = (host.path("cache/app.tar"), host.path("app.tar"));
    disk.fill_but(2 << 10);
    let full = image(&["export", "app", small.to_str().unwrap()]).exits(1);
    assert!(full.stderr.contains("No space left") && full.stderr.contains("nothing was left there"), "{full:?}");
    let drafts = fs::read_dir(host.path("cache")).unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().contains("export"));
    assert!(drafts.count() == 0 && !small.exists());
    let _ = image(&["export", "app", large.to_str().unwrap()]).ok();
    disk.free();
    let _ = image(&["rm", "app", "--local", "-y"]).ok();
    disk.fill_but(8 << 10);
    let full = image(&["import", large.to_str().unwrap()]).exits(1);
    assert!(full.stderr.contains("No space left") && full.stderr.contains("hint: free some space"), "{full:?}");
    let blocks = fs::read_dir(cache.join("form/blocks")).unwrap().flatten().map(|group| fs::read_dir(group.path()).unwrap().count());
    assert_eq!((blocks.sum::<usize>(), image(&["ls", "--local", "-q"]).ok().stdout.as_str()), (0, ""));
    disk.free();
    let _ = image(&["import", large.to_str().unwrap()]).ok();
    assert!(image(&["verify", "app", "--local"]).code == Some(0));
}

#[test]
#[ignore = "needs root, loop devices, and a kernel bundle in the build cache: tests/run-system"]
fn system_a_full_disk_ends_an_upload_and_the_next_try_sends_the_rest() {
    enter_own_network();
    let mut host = Host::new();
    let disk = SmallDisk::mount(&host.path("disk"), &host.root().join("var/lib/formation"), 700);
    host.start_agent();
    // The kernel first, so that what follows is about the image.
    let first = host.app("first", SERVE, 18101);
    let _ = host.form(&["deploy", &first, "-y", "--no-wait"]).ok();
    let _ = host.form(&["destroy", "first", "-y"]).ok();

    // Enough to begin with, and not for all of it.
    let app = host.app("app", SERVE, 18102);
    add_ballast(&host, "app", 128);
    disk.fill_but(100 << 10);
    let full = host.form(&["deploy", &app, "-y", "--no-wait"]).exits(1);
    assert!(full.stderr.contains("there is no room left") && full.stderr.contains("form image rm"), "{full:?}");
    let kept = blocks_kept(&host);
    // The agent goes on, and says what is wrong.
    let doctor = host.form(&["doctor"]);
    assert!(doctor.stdout.contains("disk is full"), "{doctor:?}");
    let _ = host.form(&["ps"]).ok();

    disk.free();
    let sent = blocks_sent(&host.form(&["deploy", &app, "-y", "--no-wait"]).ok(), "app");
    let all = sent + kept;
    assert!(kept > 64 * 16 && (128 * 16..128 * 16 + 200).contains(&all), "{kept} blocks were there, and {sent} were sent");
    let _ = host.form(&["destroy", "app", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs root, loop devices, and a kernel bundle in the build cache: tests/run-system"]
fn system_a_host_whose_disk_is_full_to_the_last_byte_can_be_freed() {
    enter_own_network();
    let mut host = Host::new();
    let disk = SmallDisk::mount(&host.path("disk"), &host.root().join("var/lib/formation"), 300);
    host.start_agent();
    for (name, port) in [("one", 18103), ("two", 18104)] {
        let file = host.app(name, SLEEP, port);
        let _ = host.form(&["deploy", &file, "-y", "--no-wait"]).ok();
        // What a start writes (disk, kernel) is there: a VM that meets the full disk earlier has failed, and says so in other words.
        wait("its process runs", || host.vm(name)["started_at"].is_string());
    }
    disk.fill_but(0);
    // Nothing new is begun…
    let three = host.app("three", SLEEP, 18105);
    let full = host.form(&["deploy", &three, "-y", "--no-wait"]).exits(1);
    assert!(full.stderr.contains("disk is full") || full.stderr.contains("no room"), "{full:?}");
    // … the agent says what is the matter …
    let doctor = host.form(&["doctor"]).exits(1);
    assert!(doctor.stdout.contains("disk is full"), "{doctor:?}");
    assert!(host.vm("one")["fault"].as_str().unwrap_or_default().contains("disk is full"), "{}", host.vm("one"));
    // … what frees room still works …
    let _ = host.form(&["destroy", "one", "-y"]).ok();
    assert!(host.vm("one").is_null());
    // … and all is as before once there is room.
    disk.free();
    let _ = host.form(&["deploy", &three, "-y", "--no-wait"]).ok();
    for name in ["two", "three"] {
        let _ = host.form(&["destroy", name, "-y"]).ok();
    }
    wait("every operation ends", || host.no_operation_is_under_way());
    host.is_clean();
    host.kill_agent();
    host.start_agent();
    host.is_clean();
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_an_upload_that_breaks_off_is_taken_up_where_it_ended() {
    enter_own_network();
    let mut host = Host::new();
    host.claim();
    let first = host.app("first", SERVE, 18106);
    let _ = host.remote(&["deploy", &first, "-y", "--no-wait"]).ok();
    let _ = host.remote(&["destroy", "first", "-y"]).ok();
    host.kill_agent();

    // The agent is killed in the middle; its client tries for a while and says that nobody answers.
    let app = host.app("app", SERVE, 18107);
    add_ballast(&host, "app", 32);
    host.start_agent_with(Some("upload.block-kept:200"));
    let gone = host.remote(&["deploy", &app, "-y", "--no-wait"]).exits(7);
    assert!(gone.stderr.contains("going on with what is missing") && gone.stderr.contains("hint:"), "{gone:?}");
    assert!(host.dies_at("upload.block-kept", |_| false));
    let kept = blocks_kept(&host);
    assert!((200..=220).contains(&kept), "{kept}");
    host.start_agent();
    let again = host.remote(&["deploy", &app, "-y", "--no-wait"]).ok();
    let sent = blocks_sent(&again, "app");
    let all = sent + kept;
    assert!((32 * 16..32 * 16 + 200).contains(&all), "{kept} blocks were there, and {sent} were sent");
    let _ = host.remote(&["destroy", "app", "-y"]).ok();

    // The network is cut in the middle, for longer than a connection may be silent.
    let cut = host.app("cut", SERVE, 18108);
    add_ballast(&host, "cut", 96);
    // What is beyond this is lost: however quick the upload is, it is not done before the line is cut. A kernel that cannot count it has to
    // be slower than the test.
    let port = form_api::DEFAULT_PORT;
    let nft = |arguments: &str| Command::new("nft").arg(arguments).status().unwrap().success();
    let is_bounded = nft(&format!(
        "table inet cut {{ chain in {{ type filter hook input priority 0; udp dport {port} quota over 24 mbytes drop; }}; }}"
    ));
    let mut client = host.remote_command(&["deploy", &cut, "-y", "--no-wait"]).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while blocks_kept(&host) <= 50 {
        assert!(begun.elapsed() < Duration::from_secs(120), "the upload is not under way");
        thread::sleep(Duration::from_millis(5));
    }
    link("down");
    assert!(!is_bounded || nft("delete table inet cut"));
    let mut said = BufReader::new(client.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut lines: Vec<String> = said.by_ref().take_while(|line| !line.contains("going on with what is missing")).collect();
    link("up");
    let kept = blocks_kept(&host);
    lines.extend(said);
    assert_eq!(client.wait().unwrap().code(), Some(0), "{lines:#?}");
    let blocks: usize =
        lines.iter().find_map(|line| line.trim().strip_suffix("MB")?.split(' ').next()?.parse().ok()).unwrap_or_else(|| {
            let line = lines.iter().rfind(|line| line.contains(" blocks, ")).unwrap_or_else(|| panic!("{lines:#?}"));
            line.trim().split(' ').next().unwrap().parse().unwrap()
        });
    // What was on its way when the line was cut is sent twice, and no more.
    assert!(kept > 50 && blocks < 96 * 16 + 600, "{kept} blocks were there, and {blocks} were sent in all");
    let _ = host.remote(&["destroy", "cut", "-y"]).ok();
    host.is_clean();
}

fn link(direction: &str) {
    assert!(Command::new("ip").args(["link", "set", "lo", direction]).status().unwrap().success());
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_host_that_is_away_or_another_is_told_before_anything_is_built() {
    enter_own_network();
    let mut host = Host::new();
    host.claim();
    let app = host.app("app", SERVE, 18109);
    let build_steps = |ran: &Ran| ran.stderr.lines().filter(|line| line.starts_with('[')).count();

    host.kill_agent();
    let away = host.remote(&["deploy", &app, "-y"]).exits(7);
    assert!(away.stderr.contains("127.0.0.1 is unreachable") && away.stderr.contains("systemctl status form-agent"), "{away:?}");
    assert_eq!(build_steps(&away), 0, "{away:?}");

    // Set up anew, or somebody else at its address.
    let key = |ran: &Ran| ran.json()["public_key"].as_str().unwrap().to_owned();
    host.start_agent();
    let known = key(&host.form(&["host", "show", "-o", "json"]).ok());
    host.kill_agent();
    for file in ["etc/formation/host.key", "var/lib/formation/db/identity.json", "var/lib/formation/db/state.redb"] {
        fs::remove_file(host.root().join(file)).unwrap();
    }
    host.start_agent();
    let found = key(&host.form(&["host", "show", "-o", "json"]).ok());
    assert_ne!(known, found);
    let other = host.remote(&["deploy", &app, "-y"]).exits(4);
    for word in [known.as_str(), found.as_str(), "form host rm", "in between"] {
        assert!(other.stderr.contains(word), "{word}: {other:?}");
    }
    assert_eq!(build_steps(&other), 0, "{other:?}");
    let asked = host.operations().iter().filter(|operation| operation["kind"] != "claim").count();
    assert_eq!(asked, 0, "the other host was asked for something");
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_two_deploys_of_one_name_at_once_end_as_one_of_them() {
    enter_own_network();
    let mut host = Host::new();
    host.start_agent();
    let one = host.app("one", SLEEP, 18110);
    let two = host.app("two", SLEEP, 18111);
    fs::write(&two, fs::read_to_string(&two).unwrap().replace("NAME two", "NAME one").replace("MEM 128", "MEM 160")).unwrap();
    // Everything but the deploy itself is done before, so that both come to it together.
    for file in [&one, &two] {
        let _ = host.form(&["build", file]).ok();
    }
    let clients: Vec<_> = [&one, &two]
        .iter()
        .map(|file| {
            let mut command = host.form_command(&["deploy", file, "-y", "--no-wait"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let ended: Vec<_> = clients.into_iter().map(|client| client.wait_with_output().unwrap()).collect();
    let mut codes: Vec<_> = ended.iter().map(|output| output.status.code()).collect();
    let said: Vec<_> = ended.iter().map(|output| String::from_utf8_lossy(&output.stderr).into_owned()).collect();
    let winner = codes.iter().position(|code| *code == Some(0)).unwrap_or_else(|| panic!("{said:#?}"));
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(5)], "{said:#?}");
    let loser = &said[1 - winner];
    assert!(loser.contains("deploy of vm/one is under way") && loser.contains("form op wait"), "{loser}");
    let vm = host.vm("one");
    let (port, memory) = (vm["ports"][0]["host_port"].as_u64(), vm["memory_mib"].as_u64());
    let expected = if winner == 0 { (Some(18110), Some(128)) } else { (Some(18111), Some(160)) };
    assert_eq!((port, memory), expected, "{vm}");
    assert_eq!(host.form(&["ps", "-o", "name"]).ok().stdout, "one\n");
    let _ = host.form(&["destroy", "one", "-y"]).ok();
    host.is_clean();
}

/// A deploy that waits for its guest, with what it says.
fn waiting_deploy(host: &Host, name: &str, port: u16) -> (std::process::Child, Vec<String>) {
    let file = host.app(name, SLEEP, port);
    let mut client = host.form_command(&["deploy", &file, "-y"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = Vec::new();
    let mut said = BufReader::new(client.stderr.take().unwrap());
    loop {
        let mut line = String::new();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended: {lines:#?}");
        lines.push(line.clone());
        if line.contains("waiting for the guest") {
            break;
        }
    }
    client.stderr = Some(said.into_inner());
    (client, lines)
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_the_operation_outlives_its_client() {
    enter_own_network();
    let mut host = Host::new();
    host.start_agent();
    let (mut client, _) = waiting_deploy(&host, "app", 18112);
    kill_process(Pid::from_child(&client), Signal::INT).unwrap();
    let mut rest = String::new();
    client.stderr.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(130), "{rest}");
    let operation = host.operations().remove(0);
    assert_eq!((operation["kind"].as_str(), operation["status"].as_str()), (Some("deploy"), Some("executing")));
    assert!(rest.contains(&format!("form op wait {}", operation["id"].as_str().unwrap())), "{rest}");
    // Found again by its id, and given up by the one thing that need not wait for it.
    let mut follower = host.form_command(&["op", "wait", operation["id"].as_str().unwrap()]);
    let follower = follower.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = host.form(&["destroy", "app", "-y"]).ok();
    let followed = follower.wait_with_output().unwrap();
    assert_eq!(followed.status.code(), Some(5), "{followed:?}");
    assert!(String::from_utf8_lossy(&followed.stderr).contains("destroyed before its deploy was done"), "{followed:?}");
    host.is_clean();
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_odd_terminals_and_pipes_are_no_trouble() {
    enter_own_network();
    let mut host = Host::new();
    host.start_agent();
    let file = host.app("app", SLEEP, 18113);
    let form = host.programs.dist().join("bin/form");
    let shell = |line: &str| {
        let mut command = host.programs.shell(line);
        command.env("FORM", &form).env("FORM_HOST", format!("unix:{}", host.socket().display()));
        host.programs.run(command)
    };
    // Standard input closed: nobody can be asked, so nothing is done.
    let closed = shell(&format!("exec $FORM deploy {file} <&-")).exits(2);
    assert!(closed.stderr.contains("-y") && closed.stderr.contains("FORM_YES"), "{closed:?}");
    assert!(host.vm("app").is_null());
    let _ = shell(&format!("exec $FORM deploy {file} -y --no-wait <&-")).ok();
    // Standard output closed or full: it is said, or the reader has seen enough.
    for command in ["events --tail 5", "ps -o json", "op ls", "doctor -o json", "vm show app", "host show -o yaml"] {
        let head = shell(&format!("set -o pipefail; $FORM {command} | head -c 1 >/dev/null; echo \"${{PIPESTATUS[0]}}\""));
        assert!(["0\n", "1\n"].contains(&head.stdout.as_str()) && head.stderr.is_empty(), "{command}: {head:?}");
        let full = shell(&format!("$FORM {command} >/dev/full"));
        assert!(full.code == Some(1) && full.stderr.contains("No space left"), "{command}: {full:?}");
    }
    let _ = host.form(&["destroy", "app", "-y"]).ok();

    // Forty columns, with the progress drawn.
    add_ballast(&host, "app", 8);
    let line = format!("stty rows 24 cols 40; exec {} deploy {file} -y --no-wait", form.display());
    let mut command = host.programs.shell(&format!("exec script -qec '{line}' /dev/null"));
    command.env("FORM_HOST", format!("unix:{}", host.socket().display())).env("TERM", "xterm").env_remove("NO_COLOR");
    let drawn = host.programs.run(command).ok();
    assert!(drawn.stdout.contains("MiB/"), "no progress was drawn: {drawn:?}");
    // What was drawn over and over is gone, and what was said stands there once.
    let screen = screen(&drawn.stdout, 40);
    assert!(!screen.contains("MiB/") && !screen.contains(['⠁', '⠂', '⠄', '█', '░']), "{screen}");
    assert_eq!(screen.matches("sending image app").count(), 1, "{screen}");
    let _ = host.form(&["destroy", "app", "-y"]).ok();
    host.is_clean();
}

/// What a terminal of so many columns, and of any height, shows in the end of what was written to it.
fn screen(text: &str, columns: usize) -> String {
    let mut lines: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column) = (0_usize, 0_usize);
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        match character {
            '\r' => column = 0,
            '\n' => row += 1,
            '\u{1b}' => {
                let Some('[') = rest.next() else { continue };
                let mut parameter = String::new();
                let command = rest.by_ref().find(|character| {
                    parameter.extend(character.is_ascii_digit().then_some(*character));
                    character.is_ascii_alphabetic()
                });
                let count = parameter.parse().unwrap_or(1);
                match command {
                    Some('A') => row = row.saturating_sub(count),
                    Some('B') => row += count,
                    Some('C') => column += count,
                    Some('D') => column = column.saturating_sub(count),
                    Some('G') => column = count - 1,
                    Some('K') if parameter == "2" => lines[row].clear(),
                    Some('K') => lines[row].truncate(column),
                    Some('J') => {
                        lines.truncate(row + 1);
                        lines[row].truncate(column);
                    }
                    _ => {}
                }
            }
            character if character.is_control() => {}
            character => {
                if column == columns {
                    (row, column) = (row + 1, 0);
                }
                lines.resize(lines.len().max(row + 1), Vec::new());
                let line = &mut lines[row];
                line.resize(line.len().max(column + 1), ' ');
                line[column] = character;
                column += 1;
            }
        }
        lines.resize(lines.len().max(row + 1), Vec::new());
    }
    lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned() + "\n").collect()
}

#[test]
#[ignore = "needs root and libfaketime: tests/run-system"]
fn system_a_wrong_clock_is_told_with_the_hosts_time() {
    enter_own_network();
    let mut host = Host::new();
    host.claim();
    let library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
    assert!(Path::new(library).exists(), "the package libfaketime is not installed");
    for (shift, word) in [("-20m", "expired"), ("+20m", "valid for too long ahead")] {
        let mut command = host.remote_command(&["doctor", "--fix"]);
        // The time of day alone: what measures how long things take goes on as it is.
        command.env("LD_PRELOAD", library).env("FAKETIME", shift).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let wrong = host.programs.run(command).exits(4);
        assert!(
            wrong.stderr.contains(word) && wrong.stderr.contains("the host's clock says") && wrong.stderr.contains("date -u"),
            "{wrong:?}"
        );
    }
    for shift in ["-6m", "+6m"] {
        let mut command = host.remote_command(&["doctor", "--fix"]);
        command.env("LD_PRELOAD", library).env("FAKETIME", shift).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let ran = host.programs.run(command);
        assert!(matches!(ran.code, Some(0 | 1)) && !ran.stderr.contains("clock"), "{ran:?}");
    }
    thread::sleep(Duration::from_millis(10));
    assert_eq!(host.operations().iter().filter(|operation| operation["kind"] == "doctor-fix").count(), 2);
}
