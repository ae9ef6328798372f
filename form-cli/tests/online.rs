//! The commands that talk to a host, against an agent that answers as the test says.

#[path = "support/agent.rs"]
mod agent;
mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    process::Stdio,
    time::{Duration, Instant},
};

use agent::{Agent, ID, OTHER_ID, vm};
use snapbox::{assert_data_eq, str};
use support::{Place, Ran, ran};

struct Setting {
    place: Place,
    agent: Agent,
}

impl Setting {
    fn new() -> Self {
        let vms = vec![vm("web", "running"), vm("slow", "pending"), vm("old", "stopped"), vm("bad", "failed")];
        Self { place: Place::new(), agent: Agent::start(vms) }
    }

    fn run(&self, args: &[&str]) -> Ran {
        ran(self.command(args).output().unwrap())
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.place.command(args);
        command.env("FORM_HOST", self.agent.host());
        command
    }
}

#[test]
fn vms_in_every_format() {
    let setting = Setting::new();
    assert_data_eq!(
        setting.run(&["ps"]).out,
        str![[r#"
NAME  STATUS   IMAGE   ADDRESS   PORTS         AGE
web   running  web:1   10.0.0.7  8080->80/tcp  [..]d
slow  pending  slow:1  10.0.0.7  8080->80/tcp  [..]d
old   stopped  old:1   10.0.0.7  8080->80/tcp  [..]d
bad   failed   bad:1   10.0.0.7  8080->80/tcp  [..]d

"#]]
    );
    let wide = setting.run(&["vm", "ls", "-o", "wide"]).out;
    assert!(wide.contains("MEMORY") && wide.contains("512 MiB") && wide.contains("it broke"), "{wide}");
    for args in [&["ps", "-o", "name"][..], &["ps", "-q"]] {
        assert_eq!(setting.run(args).out, "web\nslow\nold\nbad\n");
    }
    let json: serde_json::Value = serde_json::from_str(&setting.run(&["ps", "-o", "json"]).out).unwrap();
    assert_eq!(json[0]["name"], "web");
    assert!(setting.run(&["ps", "-o", "yaml"]).out.starts_with("- id: "));
    let mut narrow = setting.command(&["ps"]);
    let narrow = ran(narrow.env("COLUMNS", "40").output().unwrap());
    assert!(narrow.out.starts_with("web\n  status   running\n"), "{}", narrow.out);
    assert!(narrow.out.lines().all(|line| line.chars().count() <= 40));
}

#[test]
fn a_bench_fails_when_something_is_over_its_budget() {
    let setting = Setting::new();
    let run = setting.run(&["bench", "--runs", "3"]);
    assert_eq!(run.code, 1, "{run:?}");
    assert_data_eq!(
        run.out,
        str![[r#"
NAME          MIN   MEDIAN  MAX  UNIT  BUDGET  PEER  STATUS
vmm-memory    1.50  3.20    123  MB    4.00    4.00  ok
agent-memory  1.50  12.0    123  MB    4.00    4.00  over budget
ps                               MB    4.00    4.00  not measured: no form

"#]]
    );
    assert!(run.err.contains("2 values over budget or not measured: agent-memory, ps"), "{}", run.err);
    let run = setting.run(&["bench", "--only", "vmm-memory", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((run.code, rows.as_array().map(Vec::len), &rows[0]["median"]), (0, Some(1), &serde_json::json!(3.2)));
    assert_eq!(setting.run(&["bench", "--only", "weather"]).code, 2);
    assert_eq!(setting.run(&["bench", "--runs", "0"]).code, 2);
}

#[test]
fn one_vm() {
    let setting = Setting::new();
    let run = setting.run(&["vm", "show", "vm/web"]);
    assert!(run.code == 0 && run.out.contains("memory    512 MiB"), "{run:?}");
    let run = setting.run(&["vm", "show", "nope"]);
    assert_eq!(run.code, 3);
    assert_data_eq!(
        run.err,
        str![[r#"
error: there is no vm/nope
hint: list them with `form ps`

"#]]
    );
}

#[test]
fn logs_carry_no_escapes_and_end_with_their_reader() {
    let setting = Setting::new();
    assert_eq!(setting.run(&["logs", "web", "--tail", "1"]).out, "line 2\u{fffd}[31m\n");
    assert_eq!(setting.run(&["logs", "web", "-o", "json"]).out.lines().count(), 3);
    let mut child = setting.command(&["logs", "-f", "web"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    drop(reader);
    let status = child.wait().unwrap();
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((status.code(), err.as_str()), (Some(0), ""));
}

#[test]
fn exec_gives_the_commands_own_code() {
    let setting = Setting::new();
    let run = setting.run(&["exec", "web", "-u", "ada", "--", "ls", "-l"]);
    assert_eq!((run.code, run.out.as_str(), run.err.as_str()), (42, "", "[\"ls\", \"-l\"] as Some(\"ada\")\n"));
    let mut child =
        setting.command(&["exec", "-i", "web", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through and back").unwrap();
    let run = ran(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.out.as_str()), (42, "through and back"));
    let run = setting.run(&["exec", "web", "broken"]);
    assert_eq!((run.code, run.err.as_str()), (125, "error: the guest does not answer\n"));
    assert_eq!(setting.run(&["exec", "nope", "ls"]).code, 125);
    let run = setting.run(&["exec", "-t", "web", "sh"]);
    assert!(run.code == 2 && run.err.contains("no terminal"), "{run:?}");
}

/// An `ssh` that says what it was told, and sends something to where it was told to connect.
const FAKE_SSH: &str = r#"#!/bin/sh
for word; do
    case $word in
    -oProxyCommand=*) proxy=${word#*=} ;;
    -oUserKnownHostsFile=*) eval "known=${word#*=}" ;;
    *) echo "[$word]" ;;
    esac
done
cat "$known"; stat -c %a "$known"
echo through and back | sh -c "$proxy"
exit 9
"#;

#[test]
fn ssh_comes_to_the_vm_that_is_meant_as_the_user_who_can() {
    let setting = Setting::new();
    setting.place.write("ssh", FAKE_SSH);
    fs::set_permissions(setting.place.path("ssh"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", setting.place.path("").display(), std::env::var("PATH").unwrap());
    let ssh = |args: &[&str]| ran(setting.command(args).env("PATH", &path).output().unwrap());
    let run = ssh(&["ssh", "web", "-L", "1:localhost:2", "-t", "--", "ls", "-l"]);
    assert_eq!((run.code, run.err.as_str()), (9, ""));
    assert_data_eq!(
        run.out,
        str![[r#"
[-oProxyUseFdpass=no]
[-oHostKeyAlias=00112233445566778899aabbccddeeff]
[-oGlobalKnownHostsFile=/dev/null]
[-oStrictHostKeyChecking=yes]
[-oUpdateHostKeys=no]
[-oCheckHostIP=no]
[-oControlMaster=no]
[-oControlPath=none]
[-l]
[ada]
[-L]
[1:localhost:2]
[-t]
[--]
[web.default.form.internal]
[ls]
[-l]
00112233445566778899aabbccddeeff ssh-ed25519 AAAA
600
through and back

"#]]
    );
    assert!(ssh(&["vm", "ssh", "bob@web"]).out.contains("\n[bob]\n"));
    let cases = [
        ("old", 5, "vm/old is stopped"),
        ("bad", 7, "nothing listens on port 22 of vm/bad"),
        ("eve@web", 3, "vm/web has no user `eve` that can log in"),
        ("root@web", 4, "root may not log in to vm/web"),
        ("nope", 3, "there is no vm/nope"),
    ];
    for (target, code, message) in cases {
        let run = ssh(&["ssh", target]);
        assert_eq!((run.code, run.out.as_str()), (code, ""), "{target}: {run:?}");
        assert!(run.err.starts_with(&format!("error: {message}")) && run.err.contains("\nhint: "), "{target}: {run:?}");
    }
    let run = ran(setting.command(&["ssh", "web"]).env("PATH", setting.place.path("empty")).output().unwrap());
    assert!(run.code == 3 && run.err.contains("there is no program `ssh`"), "{run:?}");
}

#[test]
fn a_port_comes_to_standard_input_and_output() {
    let setting = Setting::new();
    let mut child = setting.command(&["vm", "port-forward", "--stdio", "web", "22"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through and back").unwrap();
    let run = ran(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.out.as_str(), run.err.as_str()), (0, "through and back", ""));
    assert_eq!(setting.run(&["vm", "port-forward", "--stdio", "web", "22", "80"]).code, 2);
}

#[test]
fn exec_on_a_terminal_passes_every_key() {
    let setting = Setting::new();
    let form = env!("CARGO_BIN_EXE_form");
    // script(1) gives the program a terminal of its own.
    let line = format!("stty rows 33 cols 77; TERM=vt220 {form} exec -it web -- sh; echo code $?; stty -a");
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("FORM_HOST", setting.agent.host()).env("HOME", setting.place.path("home"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    out.read_line(&mut said).unwrap();
    assert!(said.contains("[\"sh\"] as None on vt220 of 77x33"), "{said}");
    let mut keys = child.stdin.take().unwrap();
    // Ctrl-C and Ctrl-Z go through as keys, Ctrl-D ends the other side.
    keys.write_all(b"a\x03\x1ab").unwrap();
    keys.flush().unwrap();
    let mut seen = [0; 4];
    out.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"a\x03\x1ab");
    keys.write_all(b"\x04").unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    // The terminal is as it was before.
    assert!(rest.contains("code 42") && rest.contains(" icanon") && rest.contains(" echo "), "{rest}");
    drop(keys);
    child.wait().unwrap();
}

#[test]
fn waiting_ends_when_it_never_will_be() {
    let setting = Setting::new();
    let run = setting.run(&["wait", "vm/web", "--for=ready"]);
    assert_eq!((run.code, run.out.as_str()), (0, "web: ready\n"));
    let run = setting.run(&["wait", "vm/bad"]);
    assert_eq!(run.code, 1);
    assert_data_eq!(
        run.err,
        str![[r#"
--- last lines of bad's log
  line 0�[31m
  line 1�[31m
  line 2�[31m
---
error: bad will not be ready: it broke
hint: `form logs bad --console` shows its boot, `form vm show bad` its state

"#]]
    );
    let run = setting.run(&["vm", "wait", "slow", "--for", "running", "--timeout", "1"]);
    assert_eq!(run.code, 6, "{run:?}");
    assert_eq!(setting.run(&["wait", "vm/web", "--for=healthy"]).code, 1);
    assert_eq!(setting.run(&["wait", "vm/nope"]).code, 3);
}

#[test]
fn operations_end_in_one_of_four_ways() {
    let setting = Setting::new();
    assert_eq!(setting.run(&["vm", "start", "web"]).out, "web: started\n");
    let run = setting.run(&["vm", "start", "old"]);
    assert_eq!(run.code, 1);
    assert!(run.err.contains("error: no memory is left\nhint: stop another VM\noperation: 0011"), "{}", run.err);
    let run = setting.run(&["vm", "start", "slow", "--no-wait"]);
    assert_eq!(run.code, 0);
    assert!(run.err.contains(&format!("form op wait {ID}")), "{run:?}");
    // Enough for a slow machine to begin it.
    let run = setting.run(&["vm", "start", "slow", "--timeout", "5"]);
    assert_eq!(run.code, 6, "{run:?}");
    assert!(run.err.contains("making the root disk\n") && run.err.contains("the operation goes on"), "{run:?}");
    assert_eq!(setting.run(&["vm", "start", "bad"]).code, 4);
    assert_eq!(setting.run(&["vm", "start", "web", "old"]).code, 7);
}

#[test]
fn ctrl_c_leaves_the_operation_going() {
    let setting = Setting::new();
    let mut child = setting.command(&["vm", "start", "slow"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut err = String::new();
    while !err.contains("making the root disk") {
        assert!(said.read_line(&mut err).unwrap() > 0, "it has ended: {err}");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    said.read_to_string(&mut err).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{err}");
    assert!(err.contains(&format!("form op wait {ID}")), "{err}");
}

#[test]
fn ctrl_c_names_all_operations_that_go_on() {
    let setting = Setting::new();
    let all = ["destroy", "slow", "web", "bad", "-y"];
    let mut child = setting.command(&all).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It waits for the first, all are asked for.
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("making the root disk") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it has ended");
    }
    kill(&child, "-INT");
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.contains("\n2 operations go on."), "{rest}");
    for (vm, id) in [("slow", ID), ("bad", OTHER_ID)] {
        assert!(rest.contains(&format!("  vm-destroy of vm/{vm}: `form op wait {id}`\n")), "{rest}");
    }
    assert!(!rest.contains("vm/web"), "{rest}");
}

#[test]
fn volumes_go_back_and_are_brought_in_line() {
    let setting = Setting::new();
    assert_data_eq!(
        setting.run(&["volume", "snapshot", "ls"]).out,
        str![[r#"
NAME    VOLUME  SIZE   USED   STATE     AGE
before  data    5 GiB  2 MiB  quiesced  [..]d

"#]]
    );
    let (listed, shown) =
        (setting.run(&["vm", "snapshot", "ls", "-o", "wide"]).out, setting.run(&["vm", "snapshot", "show", "web", "before"]).out);
    assert!(listed.contains("KIND") && listed.contains("incremental") && listed.contains("earlier"), "{listed}");
    assert!(shown.contains("incremental, based on earlier") && shown.contains("3 MiB"), "{shown}");
    assert!(listed.contains("incremental, compressed") && listed.contains("93 MiB"), "{listed}");
    assert!(shown.contains("compressed: a restore unfolds 93 MiB first"), "{shown}");
    let run = setting.run(&["vm", "snapshot", "create", "web", "-n", "one", "--compress"]);
    assert_eq!((run.code, run.out.as_str(), run.err.as_str()), (0, "web: snapshot one made\n", ""));
    let run = setting.run(&["vm", "snapshot", "create", "web", "-n", "full-disk", "--compress"]);
    assert_eq!((run.code, run.out.as_str()), (0, "web: snapshot full-disk made\n"));
    assert_eq!(run.err, "warning: web: snapshot full-disk: its memory is kept uncompressed: there is no room left\n");
    let shown = setting.run(&["volume", "snapshot", "show", "data", "before"]).out;
    assert!(shown.contains("5 GiB (5368709120 bytes)") && shown.contains("12 ms") && shown.contains("quiesced"), "{shown}");
    let run = setting.run(&["volume", "snapshot", "show", "data", "missing"]);
    assert!(run.code == 3 && run.err.contains("form volume snapshot ls"), "{run:?}");
    assert_eq!(setting.run(&["volume", "snapshot", "create", "nope"]).code, 3);
    assert_eq!(setting.run(&["volume", "snapshot", "create", "spare", "-n", "before"]).out, "spare: snapshot before made\n");
    let run = setting.run(&["volume", "snapshot", "create", "data"]);
    assert!(run.code == 5 && run.err.contains("stand still") && run.err.contains("form vm stop web"), "{run:?}");

    let run = setting.run(&["volume", "snapshot", "restore", "spare", "before"]);
    assert!(run.code == 2 && run.err.contains("lost, and it has 5 GiB again"), "{run:?}");
    assert_eq!(setting.run(&["volume", "snapshot", "restore", "spare", "missing", "-y"]).code, 3);
    assert_eq!(setting.run(&["volume", "snapshot", "restore", "spare", "before", "-y"]).out, "spare: restored from before\n");
    assert_eq!(setting.run(&["volume", "clone", "spare", "copy", "--snapshot", "before"]).out, "copy: holds what spare held at before\n");
    assert_eq!(setting.run(&["volume", "clone", "spare", "copy"]).out, "copy: holds what spare holds\n");

    // What was done is what the events of the operation say.
    assert_eq!(setting.run(&["volume", "sync", "spare"]).out, "spare: making the root disk\n");
    let run = setting.run(&["volume", "sync", "data"]);
    assert!(run.code == 6 && run.err.contains("does not answer"), "{run:?}");

    let run = setting.run(&["volume", "snapshot", "rm", "spare", "before"]);
    assert!(run.code == 2 && run.err.contains("Remove the snapshots before of spare?"), "{run:?}");
    assert_eq!(setting.run(&["volume", "snapshot", "rm", "spare", "before", "-y"]).out, "spare: snapshot before removed\n");
    let run = setting.run(&["volume", "rm", "spare", "-y"]);
    assert!(run.code == 5 && run.err.contains("has snapshots: before") && run.err.contains("--snapshots"), "{run:?}");
    assert_eq!(setting.run(&["volume", "rm", "spare", "--snapshots", "-y"]).out, "spare: removed\n");
}

#[test]
fn interfaces() {
    let setting = Setting::new();
    assert_data_eq!(
        setting.run(&["net", "ls", "web", "-o", "wide"]).out,
        str![[r#"
NAME  VM   NETWORK  IPV4        DEVICE  STATE     IPV6      MAC
eth0  web  default  10.83.7.10  eth0    attached  fd00::10  52:00:00:00:00:00

"#]]
    );
    assert_eq!(setting.run(&["net", "attach", "web"]).out, "web: eth1 attached: 10.83.7.11, fd00::11, 52:00:00:00:00:01\n");
    assert_eq!(setting.run(&["net", "ls", "web", "-o", "name"]).out, "eth0\neth1\n");
    let shown = setting.run(&["vm", "show", "web"]).out;
    assert!(shown.contains("interfaces") && shown.contains("eth1 10.83.7.11 fd00::11"), "{shown}");
    let run = setting.run(&["net", "detach", "web", "eth1"]);
    assert!(run.code == 5 && run.err.contains("sh (process 7) at tcp 10.83.7.11:80"), "{run:?}");
    assert_eq!(setting.run(&["net", "detach", "web", "eth1", "--force"]).out, "web: eth1 detached\n");
    for bad in ["", "../x", "eth 1", "a/b"] {
        assert_eq!(setting.run(&["net", "detach", "web", bad]).code, 2, "{bad}");
    }
    assert_eq!(setting.run(&["net", "attach", "nobody"]).code, 3);
}

#[test]
fn volumes_and_pools() {
    let setting = Setting::new();
    assert_data_eq!(
        setting.run(&["volume", "ls"]).out,
        str![[r#"
NAME   SIZE    USED   VM   STATE     PATH       AGE
data   10 GiB  1 MiB  web  attached  /var/data  [..]d
spare  10 GiB  1 MiB       free                 [..]d

"#]]
    );
    let shown = setting.run(&["volume", "show", "volume/data"]).out;
    assert!(
        shown.contains("  /dev/vdb\n") && shown.contains("  2026-01-02T00:00:00Z\n") && shown.contains("(10737418240 bytes)"),
        "{shown}"
    );
    assert!(shown.contains("  50 MiB/s\n"), "{shown}");
    let run = setting.run(&["volume", "set", "data", "--iops", "none", "--bandwidth", "50MiB"]);
    assert_eq!((run.out.as_str(), run.code), ("data: at most 50 MiB/s\n", 0), "{run:?}");
    for nothing in [&[][..], &["--iops", "0"], &["--bandwidth", "100Mbit"]] {
        assert_eq!(setting.run(&[&["volume", "set", "data"], nothing].concat()).code, 2, "{nothing:?}");
    }
    assert_eq!(setting.run(&["volume", "ls", "-o", "name"]).out, "data\nspare\n");
    assert_data_eq!(
        setting.run(&["pool", "ls"]).out,
        str![[r#"
NAME   KIND   STATE      VOLUMES  PROMISED  USED   FREE    TOTAL
local  local  available  2        20 GiB    2 MiB  60 GiB  100 GiB

"#]]
    );
    let shown = setting.run(&["pool", "show", "pool/local"]).out;
    assert!(shown.contains("reserve   10 GiB") && shown.contains("disk=nvme"), "{shown}");
    assert_eq!(setting.run(&["pool", "create", "fast", "--path", "/mnt/fast", "--reserve", "10GiB"]).out, "fast: made, in /mnt/fast\n");
    let nfs = ["pool", "create", "shared", "--kind", "nfs", "--source", "storage:/volumes", "--options", "vers=4.1"];
    assert_eq!(setting.run(&nfs).out, "shared: made, on storage:/volumes\n");
    for (half, lacks) in [(&nfs[..3], "--path"), (&nfs[..5], "--source")] {
        let refused = setting.run(half);
        assert!(refused.code == 2 && refused.err.contains(lacks), "{refused:?}");
    }
    assert_eq!(setting.run(&["pool", "set", "local", "--reserve", "0"]).out, "local: set\n");
    let nothing = setting.run(&["pool", "set", "local"]);
    assert!(nothing.code == 2 && nothing.err.contains("--reserve"), "{nothing:?}");
    assert_eq!(setting.run(&["pool", "rm", "local", "-y"]).out, "local: removed, its directory is kept\n");
    let asks = setting.run(&["pool", "rm", "local"]);
    assert!(asks.code == 2 && asks.err.contains("Remove the pool local"), "{asks:?}");
    assert_eq!(setting.run(&["volume", "rm", "nope", "-y"]).code, 3);
    let run = setting.run(&["volume", "rm", "spare"]);
    assert!(run.code == 2 && run.err.contains("Remove spare"), "{run:?}");
    for size in ["1M", "1.5G", "16777217B"] {
        assert_eq!(setting.run(&["volume", "create", "new", "--size", size]).code, 2, "{size}");
    }
}

#[test]
fn destroying_asks() {
    let setting = Setting::new();
    let run = setting.run(&["destroy", "web"]);
    assert!(run.code == 2 && run.err.contains("Destroy web") && run.err.contains("FORM_YES"), "{run:?}");
    assert!(run.err.contains("What is on the volumes data is kept"), "{run:?}");
    let run = setting.run(&["destroy", "web", "-y"]);
    assert_eq!((run.out.as_str(), run.err.as_str()), ("web: destroyed\n", "kept: volumes data (remove them with `form volume rm`)\n"));
    let run = setting.run(&["destroy", "web", "--volumes"]);
    assert!(run.code == 2 && run.err.contains("and on the volumes data?"), "{run:?}");
    assert_eq!(setting.run(&["destroy", "web", "--volumes", "-y"]).out, "web: destroyed\ndata: removed\n");
    assert_eq!(setting.run(&["destroy", "web", "--volumes", "-y", "--no-wait"]).code, 2);
    assert_eq!(setting.run(&["vm", "rm", "web", "nope", "-y"]).code, 3);
}

#[test]
fn going_back_shows_the_plan_and_asks() {
    let setting = Setting::new();
    assert_data_eq!(
        setting.run(&["rollback", "web", "--list"]).out,
        str![[r#"
IMAGE  DIGEST        HEALTHY SINCE  STATE
web:2  abababababab  [..] ago       kept
web:1  abababababab  [..] ago       gone

"#]]
    );
    assert_eq!(setting.run(&["vm", "rollback", "web", "--list", "-o", "name"]).out, "web:2\nweb:1\n");
    let asked = setting.run(&["rollback", "web"]);
    assert_eq!((asked.code, asked.out.as_str()), (2, ""), "{asked:?}");
    for word in ["memory  512 MiB -> 256 MiB", "lost: everything written to its root disk", "Go back?", "FORM_YES"] {
        assert!(asked.err.contains(word), "{word}: {asked:?}");
    }
    for args in [&["rollback", "web", "-y"][..], &["vm", "rollback", "vm/web", "2", "-y"], &["rollback", "web", "web:2", "-y"]] {
        let run = setting.run(args);
        assert!(run.code == 0 && run.out.contains("web"), "{run:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&setting.run(&["rollback", "web", "-y", "-o", "json"]).out).unwrap();
    assert_eq!(json["name"], "web");

    let gone = setting.run(&["rollback", "web", "1", "-y"]);
    assert!(gone.code == 3 && gone.err.contains("does not have web:1 any more") && gone.err.contains("--list"), "{gone:?}");
    let never = setting.run(&["rollback", "web", "other:2", "-y"]);
    assert!(never.code == 3 && never.err.contains("no other:2 to go back to"), "{never:?}");
    let first = setting.run(&["rollback", "old", "-y", "-o", "json"]);
    assert!(first.code == 5 && first.err.contains("nothing that vm/old could go back to"), "{first:?}");
    let none = setting.run(&["rollback", "old", "--list"]);
    assert!(none.code == 0 && none.err.contains("nothing that old could go back to"), "{none:?}");
    for wrong in [&["rollback", "web", "two"][..], &["rollback", "web", "2", "--list"], &["rollback"]] {
        assert_eq!(setting.run(wrong).code, 2, "{wrong:?}");
    }
}

#[test]
fn live_names_are_completed() {
    let setting = Setting::new();
    let mut command = setting.command(&["--", "form", "logs", ""]);
    let output = command.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", "2").env("_CLAP_IFS", "\n").output().unwrap();
    let run = ran(output);
    for name in ["web", "slow", "old", "bad"] {
        assert!(run.out.lines().any(|line| line == name), "{run:?}");
    }
}

#[test]
fn every_command_takes_every_format() {
    let setting = Setting::new();
    let help = setting.run(&["generate", setting.place.path("out").to_str().unwrap()]);
    assert_eq!(help.code, 0);
    let reference = setting.place.read("out/docs/cli.md");
    let commands: Vec<Vec<&str>> =
        reference.lines().filter_map(|line| line.strip_prefix("## form ")).map(|words| words.split(' ').collect()).collect();
    assert!(commands.len() > 35, "{}", commands.len());
    for command in commands {
        for format in ["table", "wide", "json", "yaml", "name"] {
            let run = setting.run(&[command.as_slice(), &["-o", format, "--help"]].concat());
            assert_eq!(run.code, 0, "{command:?} -o {format}");
        }
        let refused = setting.run(&[command.as_slice(), &["-o", "xml"]].concat());
        assert_eq!(refused.code, 2, "{command:?}");
    }
}

#[test]
fn what_vms_use() {
    let setting = Setting::new();
    assert_data_eq!(
        setting.run(&["vm", "stats"]).out,
        str![[r#"
NAME  CPU    MEMORY             MEM%   DISK READ  WRITTEN  NET IN     OUT     UPTIME
web   12.5%  64 MiB of 512 MiB  12.5%  8 KiB/s    4 KiB/s  1.5 KiB/s  70 B/s  90 s
slow  -      - of 512 MiB       -      -          -        -          -       pending
old   -      - of 512 MiB       -      -          -        -          -       stopped
bad   -      - of 512 MiB       -      -          -        -          -       failed

"#]]
    );
    let one = setting.run(&["vm", "stats", "old", "-o", "wide"]);
    assert!(one.code == 0 && one.out.contains("EXITS/S") && one.out.lines().count() == 2, "{one:?}");
    assert_eq!(setting.run(&["vm", "stats", "old", "web", "-q"]).out, "web\nold\n");
    let missing = setting.run(&["vm", "stats", "web", "nope"]);
    assert!(missing.code == 3 && missing.err.contains("vm/nope"), "{missing:?}");
    let json: serde_json::Value = serde_json::from_str(&setting.run(&["vm", "stats", "-o", "json"]).out).unwrap();
    assert_eq!((&json[0]["cpu_percent"], &json[2]["cpu_percent"]), (&12.5.into(), &serde_json::Value::Null));
}

#[test]
fn pruning_takes_what_nobody_uses_and_says_so() {
    let setting = Setting::new();
    assert_eq!(setting.run(&["vm", "prune", "--dry-run", "-q"]).out, "old\n");
    let asked = setting.run(&["vm", "prune"]);
    assert!(asked.code == 2 && asked.out.is_empty() && asked.err.contains("FORM_YES"), "{asked:?}");
    let none = setting.run(&["vm", "prune", "--label", "tier=test", "-y"]);
    assert!(none.code == 0 && none.out.is_empty() && none.err.contains("nothing to destroy"), "{none:?}");
    let destroyed = setting.run(&["vm", "prune", "-y"]);
    assert_eq!((destroyed.code, destroyed.out.as_str()), (0, "old: destroyed\n"), "{destroyed:?}");
}

#[test]
fn a_label_has_a_length() {
    let setting = Setting::new();
    let (name, value) = (format!("{}=v", "a".repeat(129)), format!("a={}", "v".repeat(1025)));
    let create = ["vm", "create", "new", "--image", "web"];
    for set in [["vm", "set", "web"].as_slice(), &["image", "set", "web"], &["pool", "set", "local"], &create] {
        for (label, why) in [(&name, "its name has 1 to 128 bytes"), (&value, "has 1025 bytes: 1024 are possible")] {
            let refused = setting.run(&[set, &["--label", label]].concat());
            assert!(refused.code == 2 && refused.err.contains(why), "{refused:?}");
        }
    }
}

#[test]
fn images_and_kernels_that_nothing_needs_are_removed_from_the_host() {
    let setting = Setting::new();
    let (free, of_tool, of_all) = ("kernel/020202020202\n", "kernel/030303030303\n", "kernel/040404040404\n");
    let listed = setting.run(&["image", "prune", "--dry-run", "-q"]);
    assert_eq!(listed.out, format!("tool:1\n{free}{of_tool}"), "{listed:?}");
    let listed = setting.run(&["image", "prune", "--dry-run"]);
    assert!(listed.err.contains("1 kernel (5 MiB) sent or asked for within a day"), "{listed:?}");
    assert_eq!(setting.run(&["image", "prune", "--dry-run", "--all", "-q"]).out, format!("tool:1\ntool:2\n{free}{of_tool}{of_all}"));
    assert_eq!(setting.run(&["image", "prune", "--dry-run", "--image", "tool", "-q"]).out, "tool:1\n");
    let listed: serde_json::Value = serde_json::from_str(&setting.run(&["image", "prune", "--dry-run", "-o", "json"]).out).unwrap();
    assert_eq!((listed[0]["version"].as_u64(), listed[1]["size_bytes"].as_u64()), (Some(1), Some(2 << 20)), "{listed}");
    let asked = setting.run(&["image", "prune"]);
    assert!(asked.code == 2 && asked.out.is_empty() && asked.err.contains("FORM_YES"), "{asked:?}");

    let removed = setting.run(&["image", "prune", "--all", "-y"]);
    let lines = "tool:1: removed\nkernel/020202020202: removed (6.1.0-cloud, 2 MiB)\n";
    assert_eq!((removed.code, removed.out.as_str()), (0, lines), "{removed:?}");
    assert!(removed.err.contains("tool:2: kept") && removed.err.contains("more than before"), "{removed:?}");
    assert!(removed.err.contains("kernel/030303030303: kept, the kernel is needed by vm/new"), "{removed:?}");
    assert!(removed.err.contains("and 1 kernel (2 MiB) removed;"), "{removed:?}");
    let removed = setting.run(&["image", "prune", "-y", "-o", "json"]);
    let kernel = serde_json::Deserializer::from_str(&removed.out).into_iter::<serde_json::Value>().last().unwrap().unwrap();
    assert_eq!((kernel["kind"].as_str(), kernel["kernel"]["size_bytes"].as_u64()), (Some("kernel-remove"), Some(2 << 20)), "{removed:?}");
    let none = setting.run(&["image", "prune", "--image", "web", "--all", "-y"]);
    assert!(none.code == 0 && none.err.contains("nothing to remove"), "{none:?}");
}

#[test]
fn watching_goes_on_until_it_is_interrupted() {
    let setting = Setting::new();
    for (format, line) in [("table", "web "), ("json", "{\"id\":")] {
        let mut child = setting.command(&["vm", "stats", "web", "-w", "-o", format]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..2 {
            assert!(lines.by_ref().any(|found| found.unwrap().starts_with(line)), "{format}");
        }
        kill(&child, "-INT");
        drop(lines);
        assert_eq!(child.wait().unwrap().code(), Some(0), "{format}");
    }
}

#[test]
fn top_draws_on_a_narrow_terminal_and_gives_it_back() {
    let setting = Setting::new();
    let refused = setting.run(&["top"]);
    assert!(refused.code == 2 && refused.err.contains("form vm stats"), "{refused:?}");
    let form = env!("CARGO_BIN_EXE_form");
    let line = format!("stty rows 20 cols 60; TERM=xterm {form} top --sort name; echo code $?; stty -a");
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("FORM_HOST", setting.agent.host()).env("HOME", setting.place.path("home"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut keys = child.stdin.take().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut screen = String::new();
    let mut until = |wanted: &str| {
        let mut buffer = [0; 4096];
        while !screen.contains(wanted) {
            let length = out.read(&mut buffer).unwrap();
            assert!(length > 0, "no {wanted:?} in {screen:?}");
            screen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        std::mem::take(&mut screen)
    };
    assert!(until("12.5%").contains("MEMORY"));
    // The first q is a letter of the filter.
    keys.write_all(b"/q\rq").unwrap();
    keys.flush().unwrap();
    // The former screen is back, and the terminal as it was.
    let rest = until("extproc");
    assert!(rest.contains("\x1b[?1049l") && rest.contains("code 0") && rest.contains(" icanon"), "{rest:?}");
    drop(keys);
    child.wait().unwrap();
}

fn kill(child: &std::process::Child, signal: &str) {
    assert!(std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// What a directory holds, by name.
fn inside(setting: &Setting, directory: &str) -> Vec<String> {
    let entries = fs::read_dir(setting.place.path(directory)).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_copy_goes_both_ways_as_cp_would_have_it() {
    let setting = Setting::new();
    setting.place.write("file", "hello");
    fs::create_dir(setting.place.path("there")).unwrap();
    let copy = |from: &str, to: &str| setting.run(&["cp", from, to]);
    for (from, to, code) in [
        ("file", "web:/srv", 0),
        ("file", "vm/web:/srv", 0),
        ("web:/file", "there", 0),
        ("web:/file", "there/other", 0),
        ("web:/tree", "there", 0),
        ("web:/tree", "there/new/", 0),
        // A file onto a directory, a directory onto a file, into what is not there.
        ("web:/file", "there/new/", 0),
        ("web:/tree", "file", 1),
        ("web:/file", "no/such", 3),
        ("web:/file", "no/", 3),
        ("file", "nope:/srv", 3),
        ("web:/no/such", "there", 3),
        ("no/such", "web:/srv", 3),
        ("/dev/null", "web:/srv", 1),
        ("file", "there", 2),
        ("web:/a", "web:/b", 2),
        ("web:file", "there", 2),
    ] {
        let run = copy(from, to);
        assert_eq!((run.code, run.out.as_str()), (code, ""), "{from} {to}: {run:?}");
    }
    assert_eq!(inside(&setting, "there"), ["file", "new", "other", "tree"]);
    assert_eq!(
        (inside(&setting, "there/tree"), inside(&setting, "there/new")),
        (vec!["a".to_owned()], vec!["a".to_owned(), "file".to_owned()])
    );
    let blocked = copy("web:/file", "there/tree/a/b");
    assert!(blocked.code == 1 && blocked.err.contains("is no directory"), "{blocked:?}");
    let full = copy("file", "web:/full");
    assert!(full.code == 1 && full.err.contains("there is no room left for /full in the guest"), "{full:?}");
    let tar = setting.command(&["cp", "web:/tree", "-"]).output().unwrap();
    assert!(tar.status.success() && tar.stdout.len().is_multiple_of(512) && tar.stdout.starts_with(b"tree/"));
    let mut into = setting.command(&["cp", "-", "web:/srv"]);
    setting.place.write("stream.tar", "");
    fs::write(setting.place.path("stream.tar"), &tar.stdout).unwrap();
    assert!(into.stdin(fs::File::open(setting.place.path("stream.tar")).unwrap()).status().unwrap().success());
}

#[test]
fn a_guest_that_lies_writes_nothing_where_it_should_not() {
    let setting = Setting::new();
    fs::create_dir(setting.place.path("there")).unwrap();
    // It calls what it sends `.bashrc`.
    assert_eq!(setting.run(&["cp", "web:/named", "there"]).code, 0);
    assert_eq!(inside(&setting, "there"), ["named"]);
    for (from, words) in [
        ("web:/escape", "leads outside"),
        ("web:/through", "is no directory"),
        ("web:/link", "neither a file nor a directory"),
        ("web:/nonsense", "makes no sense"),
        ("web:/failing", "the disk is on fire\u{fffd}[31m"),
        ("web:/short", "the end of the tar stream is missing"),
        ("web:/frames", "does not belong here"),
    ] {
        let run = setting.run(&["cp", from, "there/x"]);
        assert!(run.code == 1 && run.err.contains(words), "{from}: {run:?}");
        assert_eq!(inside(&setting, "there"), ["named"], "{from}");
    }
    let run = setting.run(&["cp", "web:/dying", "there/x"]);
    assert!(run.code == 7 && run.err.contains("the connection broke"), "{run:?}");
    assert_eq!(inside(&setting, "there"), ["named"]);
    assert!(!setting.place.path("escaped").exists() && !setting.place.path("there/escaped").exists());
}

#[test]
fn a_copy_that_is_interrupted_leaves_nothing_half() {
    let setting = Setting::new();
    fs::create_dir(setting.place.path("there")).unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let mut child = setting.command(&["cp", "web:/endless", "there"]).stderr(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        while inside(&setting, "there").is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the copy does not begin");
            std::thread::sleep(Duration::from_millis(5));
        }
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal}");
        assert!(inside(&setting, "there").is_empty(), "{signal}: {:?}", inside(&setting, "there"));
    }
}

#[test]
fn a_full_disk_ends_a_copy_and_gets_its_room_back() {
    let setting = Setting::new();
    fs::create_dir(setting.place.path("small")).unwrap();
    let script = "mount -t tmpfs -o size=512k none small || exit 99; \"$0\" cp web:/endless small/x; echo $?; ls -A small; df --output=used small | tail -1";
    let mut shell = std::process::Command::new("unshare");
    shell.args(["-Urm", "sh", "-c", script, env!("CARGO_BIN_EXE_form")]).env("FORM_HOST", setting.agent.host());
    let run = ran(shell.env("HOME", setting.place.path("home")).current_dir(setting.place.path("")).output().unwrap());
    assert_eq!(run.out.split_whitespace().collect::<Vec<_>>(), ["1", "0"], "{run:?}");
    assert!(run.err.contains("there is no room left for small/x"), "{run:?}");
}
