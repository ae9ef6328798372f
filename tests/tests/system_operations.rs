//! Operations as an audit: many at once, each of them recorded with who asked for what, when, and how it ended.

use std::process::{Child, Stdio};

use form_tests::host::{Host, enter_own_network};
use serde_json::{Value, json};

/// Begins all of these before it waits for any, and gives their exit codes.
fn at_once(host: &Host, commands: &[Vec<String>]) -> Vec<i32> {
    let begin = |command: &Vec<String>| {
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        host.form_command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let children: Vec<Child> = commands.iter().map(begin).collect();
    children.into_iter().map(|mut child| child.wait().unwrap().code().unwrap()).collect()
}

fn words(command: &str) -> Vec<String> {
    command.split(' ').map(str::to_owned).collect()
}

/// The newest so many operations, the oldest of them first.
fn newest(host: &Host, count: usize) -> Vec<Value> {
    let mut operations = host.form(&["op", "ls", "--limit", &count.to_string(), "-o", "json"]).ok().json().as_array().unwrap().clone();
    operations.reverse();
    operations
}

fn is_whole(operation: &Value) -> bool {
    let time =
        |field: &str| operation[field].as_str().unwrap_or_else(|| panic!("no {field}: {operation}")).parse::<jiff::Timestamp>().unwrap();
    operation["actor"] == "local:0"
        && operation["request"]["path"].as_str().is_some_and(|path| path.starts_with("/v1/"))
        && time("created_at") <= time("started_at")
        && time("started_at") <= time("finished_at")
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_ten_operations_on_a_vm_and_a_hundred_on_a_host_are_each_on_record() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);

    // A hundred on a host: ten things are each wanted by ten. One of them gets it, the others are told why not.
    let before = newest(&host, 1000).len();
    let hundred: Vec<_> = (0..100).map(|number| words(&format!("volume create data{} -s 16M", number / 10))).collect();
    let codes = at_once(&host, &hundred);
    for ten in codes.chunks(10) {
        assert!(ten.iter().filter(|code| **code == 0).count() == 1 && ten.iter().all(|code| [0, 5].contains(code)), "{codes:?}");
    }
    let volumes = host.form(&["volume", "ls", "-o", "json"]).ok().json();
    assert_eq!(volumes.as_array().unwrap().len(), 10);
    // What was refused before anything was begun is no operation.
    let created = newest(&host, 1000).split_off(before);
    let completed = created.iter().filter(|operation| operation["status"] == "completed").count();
    assert!(completed == 10 && created.iter().all(is_whole), "{created:?}");
    assert_eq!(created[0]["request"]["method"], "POST");
    assert_eq!(created[0]["request"]["body"]["size_bytes"], 16 << 20);

    // Ten on one VM: each volume is another subject, so all of them are done.
    let before = newest(&host, 1000).len();
    let ten: Vec<_> = (0..10).map(|number| words(&format!("volume attach data{number} web /mnt/data{number}"))).collect();
    assert_eq!(at_once(&host, &ten), [0; 10]);
    let mut paths: Vec<Value> = (0..10)
        .map(|number| host.form(&["volume", "show", &format!("data{number}"), "-o", "json"]).ok().json()["attachment"]["path"].clone())
        .collect();
    paths.sort_by_key(ToString::to_string);
    assert_eq!(paths, (0..10).map(|number| json!(format!("/mnt/data{number}"))).collect::<Vec<_>>());
    let attached = newest(&host, 1000).split_off(before);
    assert!(attached.len() == 10 && attached.iter().all(|operation| operation["status"] == "completed" && is_whole(operation)));
    // What is asked of the VM itself is done one after the other or refused, never mixed.
    let labels: Vec<_> = (0..10).map(|number| words(&format!("vm set web --label turn={number}"))).collect();
    let codes = at_once(&host, &labels);
    assert!(codes.contains(&0) && codes.iter().all(|code| [0, 5].contains(code)), "{codes:?}");
    let last = newest(&host, 1).remove(0);
    assert_eq!(last["request"]["path"], "/v1/vms/web");
    assert_eq!(host.vm("web")["labels"], last["request"]["body"]["labels"], "{last}");

    // Who shows an operation sees what was asked, and none of what is secret.
    let _ = host.form(&["vm", "create", "db", "--image", "web", "--no-start", "--no-volumes", "-e", "PASSWORD=hunter2"]).ok();
    let create = newest(&host, 1).remove(0);
    assert!(
        create["kind"] == "vm-create" && create.to_string().contains("PASSWORD") && !create.to_string().contains("hunter2"),
        "{create}"
    );
    let shown = host.form(&["op", "show", last["id"].as_str().unwrap()]).ok().stdout;
    assert!(shown.contains("/v1/vms/web") && shown.contains("turn"), "{shown}");

    let checks = host.form(&["doctor", "-o", "json"]).json();
    let wrong: Vec<&Value> =
        checks.as_array().unwrap().iter().filter(|check| check["name"].as_str().unwrap().starts_with("volume/")).collect();
    assert_eq!(wrong, Vec::<&Value>::new());
    for name in ["db", "web"] {
        let _ = host.form(&["destroy", name, "-y"]).ok();
    }
    host.is_clean();
}
