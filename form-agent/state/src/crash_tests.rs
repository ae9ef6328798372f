//! A host that is killed at any moment: what it said was done is there, and it never signs a second history.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread::sleep,
    time::Duration,
};

use crate::{
    Document, Replica, Table, Write,
    testing::{CLUSTER, Host, TestRules, id, key},
};

const CHILD: &str = "FORM_STATE_CRASH_CHILD";

/// The child's part: writes for ever and says after each change that it is done.
#[test]
fn child_writes_until_it_is_killed() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let replica = Replica::open(Path::new(&path), &key(1), CLUSTER, Arc::new(TestRules)).unwrap();
    let start = replica.generation();
    for n in start.. {
        let table = if n % 2 == 0 { Table::Hosts } else { Table::ObservedHosts };
        let hash = replica.commit(None, vec![Write::put(table, id((n % 5) as u8), "n", n)]).unwrap().unwrap();
        println!("done {} {hash}", n + 1);
    }
}

#[test]
fn kill_9_loses_nothing_that_was_done() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let twin = Host::new(2);
    let mut total = 0;
    for round in 0..6_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_tests::child_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = child.stdout.take().unwrap();
        let (told, writes) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let done = |line: String| line.split_once("done ").and_then(|(_, rest)| rest.split_once(' ')?.0.parse::<u64>().ok());
            // Nobody listens any more later on.
            let tell = |_: &u64| told.send(()).unwrap_or_default();
            BufReader::new(output).lines().map_while(Result::ok).filter_map(done).inspect(tell).last()
        });
        // In the middle of its writing, however long it took to begin.
        for _ in 0..2 {
            writes.recv().expect("the child writes");
        }
        sleep(Duration::from_millis(97 * (round + 1)));
        child.kill().unwrap();
        child.wait().unwrap();
        let done = reader.join().unwrap().unwrap_or(total);

        let replica = Replica::open(&path, &key(1), CLUSTER, Arc::new(TestRules)).unwrap();
        assert!(replica.generation() >= done, "{} of {done} changes are there", replica.generation());
        total = replica.generation();
        assert_eq!(replica.verify().unwrap(), total);
        // What another replica took before the crash still fits what comes after it.
        let (changes, _) = replica.changes_after(&twin.replica.clock(), usize::MAX).unwrap();
        for result in twin.replica.receive_all(&changes) {
            result.unwrap();
        }
        assert_eq!(twin.replica.view(), replica.view());
    }
    assert!(total > 6, "the child wrote {total} changes");
    assert!(!twin.replica.is_equivocator(&key(1).public()));
    assert_eq!(twin.replica.heads(Document::Cluster).len(), 1);
}
