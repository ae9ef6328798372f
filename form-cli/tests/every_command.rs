//! A walk over every command there is: how it fails is the same everywhere (exit codes, JSON errors, nothing on standard output).

#[path = "support/agent.rs"]
mod agent;
mod support;

use std::{
    collections::BTreeSet,
    io::Read,
    os::unix::net::UnixListener,
    process::{Child, Stdio},
};

use agent::{Agent, vm};
use support::{Place, Ran, ran};

/// What a command needs of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// A host: it has to answer.
    Host,
    /// A host, and an answer of yes.
    HostAndYes,
    /// An answer of yes.
    Yes,
    Nothing,
}

/// Every command with arguments that are well formed and name nothing that exists.
const COMMANDS: &[(&str, &[&str], Needs)] = &[
    ("init", &["there"], Needs::Yes),
    ("check", &["nope"], Needs::Nothing),
    ("fmt", &["nope"], Needs::Nothing),
    ("build", &["nope"], Needs::Nothing),
    ("plan", &["nope"], Needs::Nothing),
    ("deploy", &["nope"], Needs::Nothing),
    ("ps", &[], Needs::Host),
    ("logs", &["nope"], Needs::Host),
    ("exec", &["nope", "ls"], Needs::Host),
    ("ssh", &["nope"], Needs::Host),
    ("cp", &["nope:/etc", "there"], Needs::Host),
    ("wait", &["vm/nope", "--for", "running"], Needs::Host),
    ("rollback", &["nope"], Needs::HostAndYes),
    ("destroy", &["nope"], Needs::HostAndYes),
    // It looks at its terminal first, and has none here.
    ("top", &[], Needs::Nothing),
    ("events", &[], Needs::Host),
    ("doctor", &[], Needs::Host),
    ("bench", &[], Needs::Host),
    ("vm ls", &[], Needs::Host),
    ("vm show", &["nope"], Needs::Host),
    ("vm create", &["new", "--image", "nope"], Needs::Host),
    ("vm clone", &["nope", "new"], Needs::Host),
    ("vm fork", &["nope", "new"], Needs::Host),
    ("vm start", &["nope"], Needs::Host),
    ("vm stop", &["nope"], Needs::Host),
    ("vm restart", &["nope"], Needs::Host),
    ("vm pause", &["nope"], Needs::Host),
    ("vm resume", &["nope"], Needs::Host),
    ("vm reset", &["nope"], Needs::Host),
    ("vm rename", &["nope", "other"], Needs::Host),
    ("vm set", &["nope", "--label", "a=b"], Needs::Host),
    ("vm rollback", &["nope", "2"], Needs::HostAndYes),
    ("vm snapshot create", &["nope"], Needs::Host),
    ("vm snapshot ls", &["nope"], Needs::Host),
    ("vm snapshot show", &["nope", "nope"], Needs::Host),
    ("vm snapshot restore", &["nope", "nope"], Needs::HostAndYes),
    ("vm snapshot rm", &["nope", "nope"], Needs::HostAndYes),
    ("vm rm", &["nope"], Needs::HostAndYes),
    ("vm prune", &[], Needs::Host),
    ("vm logs", &["nope"], Needs::Host),
    ("vm exec", &["nope", "ls"], Needs::Host),
    ("vm ssh", &["nope"], Needs::Host),
    ("vm console", &["nope"], Needs::Host),
    ("vm cp", &["nope:/etc", "there"], Needs::Host),
    ("vm stats", &["nope"], Needs::Host),
    ("vm port-forward", &["nope", "0:80"], Needs::Host),
    ("vm wait", &["nope", "--for", "running"], Needs::Host),
    ("image ls", &[], Needs::Host),
    ("image show", &["nope"], Needs::Host),
    ("image set", &["nope", "--keep"], Needs::Host),
    ("image rm", &["nope"], Needs::HostAndYes),
    ("image pull", &["nonsense"], Needs::Nothing),
    ("image push", &["nope", "registry.example/nope:1"], Needs::Nothing),
    ("image export", &["nope", "there.tar"], Needs::Nothing),
    ("image import", &["nope"], Needs::Nothing),
    ("image prune", &["--all"], Needs::Host),
    ("image history", &["nope"], Needs::Host),
    ("image verify", &["nope"], Needs::Host),
    ("volume create", &["new", "--size", "1G"], Needs::Host),
    ("volume ls", &[], Needs::Host),
    ("volume show", &["nope"], Needs::Host),
    ("volume attach", &["nope", "web"], Needs::Host),
    ("volume detach", &["nope"], Needs::Host),
    ("volume resize", &["nope", "1G"], Needs::Host),
    ("volume set", &["nope", "--iops", "100"], Needs::Host),
    ("volume clone", &["nope", "copy"], Needs::Host),
    ("volume snapshot create", &["nope"], Needs::Host),
    ("volume snapshot ls", &["nope"], Needs::Host),
    ("volume snapshot show", &["nope", "nope"], Needs::Host),
    ("volume snapshot restore", &["nope", "nope"], Needs::HostAndYes),
    ("volume snapshot rm", &["nope", "nope"], Needs::HostAndYes),
    ("volume sync", &["nope"], Needs::Host),
    ("volume move", &["nope", "--to", "local"], Needs::Host),
    ("volume import", &["new", "nope"], Needs::Nothing),
    ("volume export", &["nope", "--nbd"], Needs::Host),
    ("volume unexport", &["nope"], Needs::Host),
    ("volume rm", &["nope"], Needs::HostAndYes),
    ("pool create", &["new", "--path", "/nowhere"], Needs::Host),
    ("pool ls", &[], Needs::Host),
    ("pool show", &["nope"], Needs::Host),
    ("pool set", &["nope", "--reserve", "1G"], Needs::Host),
    ("pool rm", &["nope"], Needs::HostAndYes),
    ("net attach", &["nope"], Needs::Host),
    ("net detach", &["nope", "eth1"], Needs::Host),
    ("net ls", &["nope"], Needs::Host),
    ("host add", &["127.0.0.1:1", "--token", "nonsense"], Needs::Nothing),
    ("host ls", &[], Needs::Nothing),
    ("host show", &[], Needs::Host),
    // It asks about a host that is there only.
    ("host rm", &["nope"], Needs::Nothing),
    ("op ls", &[], Needs::Host),
    ("op show", &["00112233445566778899aabbccddeeff"], Needs::Host),
    ("op wait", &["00112233445566778899aabbccddeeff"], Needs::Host),
    ("key show", &[], Needs::Nothing),
    ("key new", &["--force"], Needs::Yes),
    ("key passphrase", &[], Needs::Nothing),
    ("context ls", &[], Needs::Nothing),
    ("context use", &["nope"], Needs::Nothing),
    ("context show", &["nope"], Needs::Nothing),
    ("sandbox up", &["--hosts", "nonsense"], Needs::Nothing),
    ("sandbox down", &["nope"], Needs::Nothing),
    ("sandbox status", &["nope"], Needs::Nothing),
    ("completion", &["bash"], Needs::Nothing),
    ("version", &[], Needs::Nothing),
];

fn words<'a>(command: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    command.split(' ').chain(more.iter().copied()).collect()
}

fn asking_a_host() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    COMMANDS.iter().filter(|(_, _, needs)| matches!(needs, Needs::Host | Needs::HostAndYes)).map(|(command, args, _)| (*command, *args))
}

/// Several at a time: each is little more than the start of a program.
fn all(children: Vec<(&'static str, Child)>) -> Vec<(&'static str, Ran)> {
    children.into_iter().map(|(command, child)| (command, ran(child.wait_with_output().unwrap()))).collect()
}

fn spawn(place: &Place, args: &[&str]) -> Child {
    place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn error(command: &str, run: &Ran) -> serde_json::Value {
    let body: serde_json::Value =
        serde_json::from_str(run.err.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{command}: {error} in {run:?}"));
    let keys: Vec<&String> = body["error"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["code", "hint", "message", "operation", "retryable"], "{command}");
    body["error"].clone()
}

#[test]
fn the_walk_leaves_out_no_command() {
    let place = Place::new();
    assert_eq!(place.run(&["generate", "out"]).code, 0);
    let reference = place.read("out/docs/cli.md");
    let there: BTreeSet<&str> = reference.lines().filter_map(|line| line.strip_prefix("## form ")).collect();
    let walked: BTreeSet<&str> = COMMANDS.iter().map(|(command, ..)| *command).collect();
    assert_eq!(walked, there);
}

#[test]
fn wrong_words_are_usage_everywhere_and_json_where_that_is_wished() {
    let place = Place::new();
    let children = COMMANDS.iter().map(|(command, ..)| (*command, spawn(&place, &words(command, &["--no-such-flag"]))));
    for (command, run) in all(children.collect()) {
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{command}: {run:?}");
        assert!(run.err.contains("--no-such-flag"), "{command}: {run:?}");
    }
    let children = COMMANDS.iter().map(|(command, ..)| (*command, spawn(&place, &words(command, &["-o", "json", "--no-such-flag"]))));
    for (command, run) in all(children.collect()) {
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{command}: {run:?}");
        assert_eq!(error(command, &run)["code"], "invalid", "{command}");
    }
}

#[test]
fn a_host_that_is_not_there_is_unreachable_everywhere() {
    let place = Place::new();
    // Those that wait give a host half a minute to come back.
    let children = asking_a_host().filter(|(command, _)| !command.ends_with("wait")).map(|(command, args)| {
        let more = [args, &["-y", "-o", "json", "--host", "unix:/nowhere/agent.sock"]].concat();
        // What follows a command to run belongs to it.
        let args = if command.ends_with("exec") { [&more[2..], args].concat() } else { more };
        (command, spawn(&place, &words(command, &args)))
    });
    for (command, run) in all(children.collect()) {
        assert_eq!((run.code, run.out.as_str()), (if command.ends_with("exec") { 125 } else { 7 }, ""), "{command}: {run:?}");
        let error = error(command, &run);
        assert_eq!((&error["code"], &error["retryable"]), (&"unavailable".into(), &true.into()), "{command}");
        assert!(error["hint"].is_string(), "{command}");
    }
}

#[test]
fn a_host_that_never_answers_is_given_up_everywhere() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("silent.sock")).unwrap();
    std::thread::spawn(move || {
        let held: Vec<_> = listener.incoming().map_while(Result::ok).collect();
        drop(held);
    });
    let host = format!("unix:{}", place.path("silent.sock").display());
    let children = asking_a_host().map(|(command, args)| {
        let more = ["-y", "-o", "json", "--timeout", "2", "--host", &host];
        (command, spawn(&place, &words(command, &[&more, args].concat())))
    });
    for (command, run) in all(children.collect()) {
        assert_eq!((run.code, run.out.as_str()), (if command.ends_with("exec") { 125 } else { 6 }, ""), "{command}: {run:?}");
        let error = error(command, &run);
        assert_eq!(error["code"], "timed-out", "{command}");
        // What it has waited, by itself: how long all of them take together is the machine's matter.
        let waited =
            error["message"].as_str().unwrap().split_once(" within ").and_then(|(_, rest)| rest.split_once(' ')?.0.parse::<u64>().ok());
        assert!(waited.is_some_and(|seconds| seconds <= 2), "{command}: {error}");
    }
}

#[test]
fn an_unknown_name_is_not_found_everywhere() {
    let (place, agent) = (Place::new(), Agent::start(vec![vm("web", "running")]));
    let host = agent.host();
    let named = COMMANDS.iter().filter(|(_, args, _)| args.iter().any(|word| word.contains("nope")));
    let children = named.filter(|(command, ..)| !command.starts_with("sandbox")).map(|(command, args, _)| {
        let more = ["-y", "-o", "json", "--host", &host];
        (*command, spawn(&place, &words(command, &[&more, *args].concat())))
    });
    for (command, run) in all(children.collect()) {
        let expected = if command.ends_with("exec") { 125 } else { 3 };
        assert_eq!((run.code, run.out.as_str()), (expected, ""), "{command}: {run:?}");
        assert_eq!(error(command, &run)["code"], "not-found", "{command}");
    }
}

#[test]
fn what_asks_names_the_flag_and_the_variable_when_nobody_can_be_asked() {
    let (place, agent) = (Place::new(), Agent::start(vec![vm("web", "running")]));
    place.run(&["key", "new"]);
    let host = agent.host();
    for (command, args, _) in COMMANDS.iter().filter(|(_, _, needs)| matches!(needs, Needs::Yes | Needs::HostAndYes)) {
        // Nobody is asked about what is not there.
        let there = match command.split(" ").next() {
            Some("volume") => "spare",
            Some("pool") => "local",
            _ => "web",
        };
        let args: Vec<&str> = args.iter().map(|word| if *word == "nope" { there } else { word }).collect();
        let run = place.run(&words(command, &[&args[..], &["--host", &host]].concat()));
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{command}: {run:?}");
        assert!(run.err.contains("-y") && run.err.contains("FORM_YES"), "{command}: {run:?}");
    }
}

/// Those that show something, with what the agent of this test has.
const SHOWING: &[&[&str]] = &[
    &["ps"],
    &["vm", "ls"],
    &["vm", "show", "web"],
    &["vm", "stats"],
    &["vm", "snapshot", "ls"],
    &["vm", "snapshot", "ls", "web"],
    &["vm", "snapshot", "show", "web", "before"],
    &["rollback", "web", "--list"],
    &["logs", "web"],
    &["vm", "logs", "web"],
    &["events"],
    &["doctor"],
    &["image", "ls"],
    &["volume", "ls"],
    &["volume", "show", "data"],
    &["volume", "snapshot", "ls"],
    &["volume", "snapshot", "ls", "data"],
    &["volume", "snapshot", "show", "data", "before"],
    &["pool", "ls"],
    &["pool", "show", "local"],
    &["op", "ls"],
    &["op", "show", "00112233445566778899aabbccddeeff"],
    &["host", "show"],
    &["key", "show"],
    &["context", "ls"],
    &["version"],
];

#[test]
fn what_shows_something_does_so_in_every_format() {
    let (place, agent) = (Place::new(), Agent::start(vec![vm("web", "running")]));
    place.run(&["key", "new"]);
    let host = agent.host();
    for command in SHOWING {
        let run = |more: &[&str]| {
            let run = place.run(&[*command, more, &["--host", &host]].concat());
            assert_eq!(run.code, 0, "{command:?} {more:?}: {run:?}");
            run.out
        };
        let json = run(&["-o", "json"]);
        for document in serde_json::Deserializer::from_str(&json).into_iter::<serde_json::Value>() {
            document.unwrap_or_else(|error| panic!("{command:?}: {error} in {json}"));
        }
        let yaml = run(&["-o", "yaml"]);
        assert!(!yaml.is_empty() && !yaml.starts_with('{'), "{command:?}: {yaml}");
        let (table, wide, bare) = (run(&[]), run(&["-o", "wide"]), run(&["--no-header"]));
        assert!(wide.len() >= table.len() && bare.len() <= table.len(), "{command:?}:\n{table}\n{wide}\n{bare}");
        let names = run(&["-o", "name"]);
        assert!(names.lines().all(|name| !name.contains(' ') || command.contains(&"logs")), "{command:?}: {names}");
        assert_eq!(run(&["-q", "-o", "json"]), json, "{command:?}: -q takes nothing from data");
    }
}

#[test]
fn help_is_there_for_all() {
    let place = Place::new();
    let children = COMMANDS.iter().map(|(command, ..)| (*command, spawn(&place, &words(command, &["--help"]))));
    for (command, mut child) in children.collect::<Vec<_>>() {
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success() && text.contains("Usage: form "), "{command}: {text}");
    }
}
