//! The replica as a whole: what it keeps, what it refuses, what it remembers.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use form_types::ClusterId;

use crate::{
    Applied, Blame, Document, RecordId, Refused, Replica, Scalar, SignedChange, SignedRequest, StateError, Table, Write,
    testing::{CLUSTER, Host, TestRules, id, key, request},
};

fn field(replica: &Replica, vm: u8, field: &str) -> Option<Scalar> {
    replica.view().cluster().field(Table::Vms, id(vm), field).cloned()
}

fn signed(host: &Host, hash: crate::ChangeHash) -> Vec<u8> {
    host.replica.signed_change(&hash).unwrap().unwrap()
}

/// Takes a change apart, lets `forge` alter it, and signs it again with the author's key.
fn forge(author: u8, bytes: &[u8], forge: impl FnOnce(&mut SignedChange)) -> Vec<u8> {
    let mut change = SignedChange::decode(bytes).unwrap();
    forge(&mut change);
    change.sign(&key(author)).unwrap()
}

#[test]
fn a_change_is_seen_kept_and_told() {
    let host = Host::new(1);
    let told = Arc::new(Mutex::new(Vec::new()));
    let listener = told.clone();
    host.replica.on_change(Box::new(move |summary| listener.lock().unwrap().push(summary.clone())));
    let hash = host.put(1, "name", "web");
    host.put(1, "epoch", 1_u64);
    assert_eq!(field(&host.replica, 1, "name"), Some("web".into()));
    assert_eq!(host.replica.generation(), 2);
    let told = told.lock().unwrap();
    assert_eq!((told[0].hash, told[0].generation, told[0].records.as_slice()), (hash, 1, [(Table::Vms, id(1))].as_slice()));
    assert_eq!(told.len(), 2);

    let same = request(1, "ann", &[Write::put(Table::Vms, id(1), "name", "web")]);
    assert_eq!(host.replica.submit(same).unwrap(), None, "what is there already makes no change");
    assert_eq!(host.replica.commit(None, Vec::new()).unwrap(), None);

    let before = (host.replica.view(), host.replica.clock(), host.replica.heads(Document::Cluster));
    let host = host.reopen();
    assert_eq!(before, (host.replica.view(), host.replica.clock(), host.replica.heads(Document::Cluster)));
    assert_eq!(host.replica.generation(), 2);
    let removed = request(1, "ann", &[Write::remove(Table::Vms, id(1))]);
    assert!(host.replica.submit(removed.clone()).unwrap().is_some());
    assert_eq!(host.replica.view().cluster().count(Table::Vms), 0);
    assert_eq!(host.replica.submit(removed).unwrap(), None);
    host.put(1, "name", "again");
    assert_eq!(host.replica.view().cluster().record(Table::Vms, id(1)).map(|record| record.len()), Some(1));
    assert_eq!(host.reopen().replica.view().cluster().field(Table::Vms, id(1), "name"), Some(&"again".into()));
}

#[test]
fn every_kind_of_scalar_survives() {
    let (one, two) = (Host::new(1), Host::new(2));
    let values: [Scalar; 7] = [
        true.into(),
        i64::MIN.into(),
        u64::MAX.into(),
        "".into(),
        "grüße \0 𝄞".into(),
        Scalar::Bytes(vec![0, 255]),
        Scalar::Bytes(Vec::new()),
    ];
    let writes: Vec<_> =
        values.iter().enumerate().map(|(n, value)| Write::put(Table::Vms, id(1), format!("f{n}"), value.clone())).collect();
    let hash = one.replica.submit(request(1, "ann", &writes)).unwrap().unwrap();
    assert_eq!(two.replica.receive(&signed(&one, hash)).unwrap(), Applied::New(hash));
    let two = two.reopen();
    for (n, value) in values.iter().enumerate() {
        assert_eq!(field(&two.replica, 1, &format!("f{n}")).as_ref(), Some(value));
    }
}

#[test]
fn what_the_rules_do_not_allow_is_not_made() {
    let host = Host::new(1);
    host.put(1, "owner", "ann");
    let write = || vec![Write::put(Table::Vms, id(1), "run", "stopped")];
    let generation = host.replica.generation();
    let to_another = host.replica.submit(request(2, "ann", &write()));
    assert!(matches!(to_another, Err(StateError::Refused(_))), "{to_another:?}");
    assert!(matches!(host.replica.submit(request(1, "bob", &write())), Err(StateError::Refused(_))));
    assert!(matches!(host.replica.commit(None, write()), Err(StateError::Refused(_))));
    assert!(matches!(host.replica.commit(Some(request(1, "ann", &[])), write()), Err(StateError::NotDerived)));
    let mixed = vec![Write::put(Table::Hosts, id(1), "a", 1_u64), Write::put(Table::ObservedHosts, id(1), "a", 1_u64)];
    for bad in [
        mixed,
        vec![Write::put(Table::Hosts, id(1), "Bad Name", 1_u64)],
        vec![Write::put(Table::Hosts, id(1), "a", 1_u64), Write::put(Table::Hosts, id(1), "a", 2_u64)],
        vec![Write::put(Table::Hosts, id(1), "a", 1_u64), Write::remove(Table::Hosts, id(1))],
        vec![Write::put(Table::Hosts, id(1), "a", "x".repeat(crate::MAX_VALUE + 1))],
    ] {
        assert!(matches!(host.replica.commit(None, bad), Err(StateError::Writes(_))));
    }
    let much: Vec<_> = (0..3).map(|n| Write::put(Table::Hosts, id(n), "a", "x".repeat(crate::MAX_VALUE))).collect();
    assert!(matches!(host.replica.commit(None, much), Err(StateError::TooLarge { .. })));
    assert_eq!(host.replica.generation(), generation);
}

#[test]
fn a_host_writes_its_own_observations_and_nobody_elses() {
    let (one, two) = (Host::new(1), Host::new(2));
    let seen = vec![Write::put(Table::ObservedVms, id(1), "state", "running")];
    let hash = one.replica.commit(None, seen).unwrap().unwrap();
    let change = signed(&one, hash);
    assert_eq!(two.replica.receive(&change).unwrap(), Applied::New(hash));
    assert_eq!(two.replica.receive(&change).unwrap(), Applied::Held);
    let view = two.replica.view();
    let host = view.host(&key(1).public()).unwrap();
    assert_eq!(host.field(Table::ObservedVms, id(1), "state"), Some(&"running".into()));
    assert!(view.host(&key(2).public()).is_none());
    let foreign = forge(1, &change, |change| change.document = Document::Host(key(2).public()));
    assert!(matches!(two.replica.receive(&foreign), Err(Refused::ForeignDocument { .. })));
}

#[test]
fn forged_changes_are_refused_and_leave_no_trace() {
    let (one, two) = (Host::new(1), Host::new(2));
    let first = signed(&one, one.put(1, "owner", "ann"));
    let second = signed(&one, one.put(1, "run", "running"));
    assert!(matches!(two.replica.receive(&second), Err(Refused::Missing(missing)) if missing.len() == 1));
    two.replica.receive(&first).unwrap();
    let before = two.replica.view();
    type Forgery = Box<dyn FnOnce(&mut SignedChange)>;
    let forgeries: Vec<(&str, Forgery)> = vec![
        ("seq gap", Box::new(|change| change.seq = 7)),
        ("seq zero", Box::new(|change| change.seq = 0)),
        ("no deps", Box::new(|change| change.deps.clear())),
        ("other time", Box::new(|change| change.time += 1)),
        ("other hash", Box::new(|change| change.hash.0[0] ^= 1)),
        ("other cluster", Box::new(|change| change.cluster = ClusterId::from_bytes([0; 16]))),
        ("empty chunk", Box::new(|change| change.change.clear())),
        ("altered chunk", Box::new(|change| *change.change.last_mut().unwrap() ^= 1)),
        ("compressed chunk", Box::new(|change| change.change[8] = 2)),
        ("trailing bytes", Box::new(|change| change.change.push(0))),
        ("no request", Box::new(|change| change.request = None)),
        ("request to another", Box::new(|change| change.request = Some(request(2, "ann", &[])))),
        ("other request", Box::new(|change| change.request = Some(request(1, "ann", &[Write::put(Table::Vms, id(9), "a", 1_u64)])))),
        ("same writes, other request", Box::new(|change| change.request.as_mut().unwrap().envelope = "01 ann".to_owned())),
        ("other's VM", Box::new(|change| change.request = Some(request(1, "bob", &[Write::remove(Table::Vms, id(1))])))),
    ];
    for (what, alter) in forgeries {
        let refused = two.replica.receive(&forge(1, &second, alter));
        assert!(refused.is_err(), "{what}");
        assert_ne!(refused.unwrap_err().blame(), Blame::Nobody, "{what}");
        assert_eq!(two.replica.view(), before, "{what}");
    }
    let stolen = forge(2, &second, |_| {});
    assert!(matches!(two.replica.receive(&stolen), Err(Refused::Undecodable(_))));
    let reattributed = forge(2, &second, |change| change.author = key(2).public());
    assert!(two.replica.receive(&reattributed).is_err());
    assert!(two.replica.receive(&second).is_ok(), "the honest one is still welcome");
}

#[test]
fn a_history_with_two_branches_is_found_and_proved() {
    let (one, two) = (Host::new(1), Host::new(2));
    let root = signed(&one, one.put(1, "name", "web"));
    two.replica.receive(&root).unwrap();
    let (left, right) = one.double();
    let left_change = signed(&left, left.put(1, "run", "running"));
    let right_change = signed(&right, right.put(1, "run", "stopped"));
    two.replica.receive(&left_change).unwrap();
    let refused = two.replica.receive(&right_change);
    assert!(matches!(refused, Err(Refused::Equivocation { seq: 2, .. })), "{refused:?}");
    assert!(two.replica.is_equivocator(&key(1).public()));
    assert_eq!(field(&two.replica, 1, "run"), Some("running".into()));
    // What the first branch goes on to say is still taken: replicas that hold it stay together.
    two.replica.receive(&signed(&left, left.put(1, "epoch", 2_u64))).unwrap();

    let two = two.reopen();
    let proofs = two.replica.equivocations();
    let proof = &proofs[&(Document::Cluster, key(1).public())];
    assert_eq!((proof.held.as_slice(), proof.other.as_slice(), proof.seq), (left_change.as_slice(), right_change.as_slice(), 2));
    let three = Host::new(3);
    assert!(three.replica.receive_proof(proof).unwrap());
    assert!(!three.replica.receive_proof(proof).unwrap());
    let mut hollow = proof.clone();
    hollow.other = hollow.held.clone();
    assert!(Host::new(4).replica.receive_proof(&hollow).is_err());

    // The host that signed both learns of it, and stops.
    assert!(left.replica.receive(&right_change).is_err());
    let stopped = left.replica.submit(request(1, "ann", &[Write::put(Table::Vms, id(1), "x", 1_u64)]));
    assert!(matches!(stopped, Err(StateError::SelfEquivocation { seq: 2, .. })), "{stopped:?}");
}

#[test]
fn a_restored_backup_takes_its_own_lost_changes_back() {
    let (one, two) = (Host::new(1), Host::new(2));
    two.replica.receive(&signed(&one, one.put(1, "name", "web"))).unwrap();
    let (lost, restored) = one.double();
    let change = signed(&lost, lost.put(1, "run", "running"));
    two.replica.receive(&change).unwrap();
    restored.replica.receive(&change).unwrap();
    two.replica.receive(&signed(&restored, restored.put(1, "run", "stopped"))).unwrap();
    assert!(!two.replica.is_equivocator(&key(1).public()));
}

#[test]
fn concurrent_changes_are_judged_by_what_their_author_saw() {
    let (one, two, three) = (Host::new(1), Host::new(2), Host::new(3));
    let base = signed(&one, one.put(1, "name", "web"));
    two.replica.receive(&base).unwrap();
    three.replica.receive(&base).unwrap();
    // At the same time ann makes the VM hers at host 1, and bob renames it at host 2, which he may: there it is nobody's yet.
    let owned = signed(&one, one.put(1, "owner", "ann"));
    let renamed = two.replica.submit(request(2, "bob", &[Write::put(Table::Vms, id(1), "name", "bobs")])).unwrap().unwrap();
    let renamed = signed(&two, renamed);
    three.replica.receive(&owned).unwrap();
    three.replica.receive(&renamed).unwrap();
    one.replica.receive(&renamed).unwrap();
    two.replica.receive(&owned).unwrap();
    assert_eq!(one.replica.view(), two.replica.view());
    assert_eq!(one.replica.view(), three.replica.view());
    assert_eq!(one.replica.heads(Document::Cluster).len(), 2);
    // Two heads become one again.
    let merged = signed(&three, three.put(1, "epoch", 1_u64));
    one.replica.receive(&merged).unwrap();
    assert_eq!(one.replica.heads(Document::Cluster).len(), 1);
    let late = two.replica.submit(request(2, "bob", &[Write::put(Table::Vms, id(1), "name", "x")]));
    assert!(matches!(late, Err(StateError::Refused(_))));
}

#[test]
fn snapshots_shorten_the_replay_and_change_nothing() {
    let (one, two) = (Host::new(1), Host::new(2));
    let changes: Vec<_> = (0..600_u64).map(|n| signed(&one, one.put((n % 7) as u8, "epoch", n))).collect();
    for part in changes.chunks(50) {
        assert!(two.replica.receive_all(part).iter().all(Result::is_ok));
    }
    let before = (one.replica.view(), one.replica.clock());
    assert_eq!(before, (two.replica.view(), two.replica.clock()));
    let (one, two) = (one.reopen(), two.reopen());
    assert_eq!(before, (one.replica.view(), one.replica.clock()));
    assert_eq!(before, (two.replica.view(), two.replica.clock()));
    assert!(one.replica.state().documents[&Document::Cluster].tail < 256);
    two.replica.receive(&signed(&one, one.put(1, "name", "after"))).unwrap();
}

#[test]
fn history_can_be_asked_for() {
    let host = Host::new(1);
    let hashes: Vec<_> = (0..5_u64).map(|n| host.put(1, "epoch", n)).collect();
    let changes: Vec<_> = hashes.iter().map(|hash| signed(&host, *hash)).collect();
    assert_eq!(host.replica.changes_since(Document::Cluster, &[hashes[2]]).unwrap(), changes[3..]);
    assert_eq!(host.replica.changes_since(Document::Cluster, &[]).unwrap(), changes);
    assert!(host.replica.changes_since(Document::Host(key(1).public()), &[]).unwrap().is_empty());
    assert_eq!(host.replica.missing(&[hashes[0], crate::ChangeHash([0; 32])]).unwrap(), [crate::ChangeHash([0; 32])]);
    let (some, clock) = host.replica.changes_after(&crate::Clock::new(), 1).unwrap();
    assert_eq!(some, changes[..1]);
    let (rest, clock) = host.replica.changes_after(&clock, usize::MAX).unwrap();
    assert_eq!(rest, changes[1..]);
    assert_eq!(clock, host.replica.clock());
}

#[test]
fn a_second_open_is_refused_and_so_is_anothers_file() {
    let host = Host::new(1);
    assert!(matches!(Host::open_in(&host.directory, 1), Err(StateError::InUse { .. })));
    let Host { directory, replica, .. } = host;
    drop(replica);
    assert!(matches!(Host::open_in(&directory, 2), Err(StateError::OtherHost { .. })));
    let path = directory.path().join("state.redb");
    let other = Replica::open(&path, &key(1), ClusterId::from_bytes([0; 16]), Arc::new(TestRules));
    assert!(matches!(other, Err(StateError::OtherCluster { .. })));
    assert!(Host::open_in(&directory, 1).is_ok());
}

#[test]
fn a_damaged_file_is_an_error_that_names_it() {
    let host = Host::new(1);
    for n in 0..40_u64 {
        host.put((n % 5) as u8, "request", format!("{n}{}", "x".repeat(300)));
        host.put((n % 5) as u8, "epoch", n);
    }
    let Host { directory, replica, .. } = host;
    drop(replica);
    let path = directory.path().join("state.redb");
    let sound = std::fs::read(&path).unwrap();
    let mut damages: Vec<Vec<u8>> =
        vec![b"no database at all".repeat(1000), sound[..sound.len() / 2].to_vec(), sound[..5000].to_vec(), sound[..1].to_vec()];
    for start in (0..sound.len()).step_by(sound.len() / 40) {
        let mut garbled = sound.clone();
        let end = (start + 600).min(garbled.len());
        garbled[start..end].fill(0xa5);
        damages.push(garbled);
    }
    let mut refused = 0;
    for damaged in damages {
        std::fs::write(&path, damaged).unwrap();
        if let Err(error) = Replica::open(&path, &key(1), CLUSTER, Arc::new(TestRules)) {
            refused += 1;
            assert!(error.to_string().contains("state.redb"), "{error}");
        }
    }
    assert!(refused >= 4, "{refused}");
}

#[test]
fn a_file_whose_keys_lead_back_is_an_error_not_a_circle() {
    let host = Host::new(1);
    for n in 0..60_u64 {
        host.put((n % 5) as u8, "request", format!("{n}{}", "x".repeat(300)));
    }
    let Host { directory, replica, .. } = host;
    drop(replica);
    let path = directory.path().join("state.redb");
    let mut file = std::fs::read(&path).unwrap();
    // The pages that lead to others say now that all is to the left; redb's pages begin with their kind, of which 2 leads to others.
    let mut replaced = 0;
    for page in file.chunks_mut(4096).filter(|page| page[0] == 2) {
        for position in 0..60_u64 {
            let place = [&Document::Cluster.to_bytes()[..], &position.to_le_bytes()].concat();
            if let Some(at) = page.windows(place.len()).position(|window| window == place) {
                page[at + 33..at + place.len()].fill(0xff);
                replaced += 1;
            }
        }
    }
    assert!(replaced >= 2, "{replaced}");
    std::fs::write(&path, file).unwrap();
    let error = Replica::open(&path, &key(1), CLUSTER, Arc::new(TestRules)).unwrap_err();
    assert!(error.to_string().contains("state.redb"), "{error}");
}

#[test]
fn waiting_ends_with_a_change() {
    let host = Host::new(1);
    assert_eq!(host.replica.wait(0, Duration::from_millis(5)), 0);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| host.replica.wait(0, Duration::from_secs(60)));
        host.put(1, "name", "web");
        assert_eq!(waiter.join().unwrap(), 1);
    });
}

#[test]
fn reads_are_cheap_while_others_write() {
    let host = Host::new(1);
    for vm in 0..100 {
        host.put(vm, "name", "web");
    }
    let reading = AtomicBool::new(true);
    let (milliseconds, waits) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let before = (own_milliseconds(), own_waits());
            for _ in 0..3000 {
                assert_eq!(host.replica.view().cluster().count(Table::Vms), 100);
            }
            let taken = (own_milliseconds() - before.0, own_waits() - before.1);
            reading.store(false, Ordering::Relaxed);
            taken
        });
        let mut writes = 0_u64;
        while writes < 10 || reading.load(Ordering::Relaxed) {
            host.put(1, "epoch", writes);
            writes += 1;
        }
        reader.join().unwrap()
    });
    println!("3000 reads: {milliseconds} ms of a processor, {waits} waits");
    assert!(milliseconds <= 300, "3000 reads took {milliseconds} ms of a processor");
    // A write to the disk is nothing that a read waits for.
    assert!(waits <= 20, "3000 reads waited {waits} times");
}

/// What this thread has had of the processors (proc(5), `stat`: `utime` and `stime`, in hundredths of a second): however many others want one.
fn own_milliseconds() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum()
}

/// How often this thread gave up its processor by itself, to wait for something (proc(5), `status`): not when others want the processor.
fn own_waits() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let waits = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    waits.trim().parse().unwrap()
}

#[test]
fn two_threads_write_one_history() {
    let host = Host::new(1);
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let host = &host;
            scope.spawn(move || (0..20_u64).for_each(|n| _ = host.put(thread, "epoch", n)));
        }
    });
    assert_eq!(host.replica.generation(), 80);
    let twin = Host::new(2);
    let changes = host.replica.changes_since(Document::Cluster, &[]).unwrap();
    assert!(twin.replica.receive_all(&changes).iter().all(Result::is_ok));
    assert_eq!(twin.replica.view(), host.replica.view());
}

/// Not a test of behaviour: `RecordId` and requests print without their contents.
#[test]
fn debug_forms_are_short() {
    let request = SignedRequest { envelope: "secret".to_owned(), body: vec![1; 1000] };
    assert!(!format!("{request:?}").contains("secret"));
    assert_eq!(format!("{:?}", RecordId([0xab; 16])), "ab".repeat(16));
}
