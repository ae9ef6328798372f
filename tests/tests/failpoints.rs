//! The agent killed at every named step, and started again: what was under way goes on or fails cleanly, nothing is left behind, and the
//! same command then succeeds.
//!
//! `system_…` walks the steps that need no running guest, each by itself, on a machine whose `/dev/kvm` may not be able to run one.
//! `kvm_…` walks those of a VM's whole life with a guest that answers, each agent dying at the next step.

use std::{
    fs,
    process::{Child, Stdio},
};

use form_tests::host::{Host, SERVE, answers, enter_own_network, wait};
use form_types::Failpoint::{self, *};

/// What has to be asked for so that the agent comes to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A deploy to a host that has no kernel yet.
    FirstUpload,
    /// A deploy of an image that the host does not have.
    Upload,
    /// A deploy.
    Deploy,
    /// A destroy.
    Destroy,
    /// A command about volumes.
    Volume,
    /// A command about pools.
    Pool,
    /// A copy of a stopped VM.
    Clone,
    /// Only with a guest that runs.
    Guest,
    /// A volume or network interface that comes to a guest that runs, or leaves it, or a volume that has a snapshot made meanwhile:
    /// `kvm_volumes` and `kvm_interfaces` walk these.
    Hotplug,
    /// A command about snapshots, also only with such a guest: `kvm_snapshots` walks these.
    Snapshot,
    /// vCPUs that come to such a guest, or leave it: `kvm_one_host` walks these.
    Vcpus,
}

/// No point is forgotten: one without a way does not compile.
const fn way(point: Failpoint) -> Way {
    match point {
        KernelAssembled | KernelPublished => Way::FirstUpload,
        BlockKept | ImageAssembled | ImageVersionTaken | ImagePublished => Way::Upload,
        OperationRecorded | OperationEnded | StateSigned | StateStored | DeployRemembered | DeploySubmitted | DeployRecorded => Way::Deploy,
        DiskRecorded | DiskDrafted | DiskMade => Way::Deploy,
        LaunchOpened | LaunchDirectoryMade | LaunchRulesSet | LaunchTapMade | LaunchCgroupMade => Way::Deploy,
        LaunchProcessSpawned | LaunchProcessRecorded | LaunchBooted | LaunchBootRecorded => Way::Deploy,
        LifecycleSubmitted | StopAsked | StopProcessGone => Way::Destroy,
        CleanTapRemoved | CleanDirectoryRemoved | CleanCgroupRemoved => Way::Destroy,
        RemoveDiskRemoved | RemoveDirectoryRemoved | RemoveLogRemoved => Way::Destroy,
        VolumeDrafted | VolumeNamed | VolumeMade | VolumeSubmitted | VolumeGrown | VolumeForgotten => Way::Volume,
        VolumeSnapshotDrafted | VolumeSnapshotNamed | VolumeSnapshotRetired => Way::Volume,
        VolumeRestoreDrafted | VolumeRestoreMoved | VolumeRestoreSwitched => Way::Volume,
        PoolMarked | PoolRecorded | PoolForgotten => Way::Pool,
        VolumePlugged | VolumeUnplugged | VolumeSnapshotPaused => Way::Hotplug,
        InterfaceSubmitted | InterfaceTapMade | InterfacePlugged | InterfaceUnplugged => Way::Hotplug,
        VcpusChanged | VcpusNoted => Way::Vcpus,
        SnapshotCopied | SnapshotPaused | SnapshotSaved | SnapshotDrafted | SnapshotNamed | SnapshotRetired => Way::Snapshot,
        SnapshotCompressed | SnapshotExchanged => Way::Snapshot,
        ForkShared | ForkTold => Way::Snapshot,
        RestoreDrafted | RestoreEnded | RestoreHeld | RestoreSwapped | RestoreRecorded => Way::Snapshot,
        DiskCopied | CloneMade => Way::Clone,
        DiskRetired | GuestReady | DeployHealthy | DeployKept | RollbackSubmitted => Way::Guest,
    }
}

/// Of a point that a flow passes more than once, the time that counts.
fn fuse(point: Failpoint) -> String {
    let time = match point {
        // In the middle of the upload.
        BlockKept => 5,
        // The image's import is an operation too; the deploy's comes after it.
        OperationRecorded => 2,
        _ => 1,
    };
    format!("{}:{time}", point.as_str())
}

/// A client that is not waited for.
fn spawn(host: &Host, arguments: &[&str]) -> Child {
    host.form_command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// The agent, armed, dies of the command; its client with it.
fn dies_of(host: &mut Host, point: Failpoint, arguments: &[&str]) {
    host.start_agent_with(Some(&fuse(point)));
    let mut client = spawn(host, arguments);
    let died = host.dies_at(point.as_str(), |_| false);
    let _ = client.kill();
    let _ = client.wait();
    assert!(died, "{arguments:?} does not come to {}", point.as_str());
}

/// Whether the VM's process is on record as started. On a machine that runs no guests a VM comes no further.
fn has_started(host: &Host, name: &str) -> bool {
    host.vm(name)["started_at"].is_string()
}

/// After a crash: the command that was broken off is done, or is being done, or has failed cleanly and now succeeds.
fn deploys(host: &Host, file: &str, name: &str) {
    let ran = host.form(&["deploy", file, "-y", "--no-wait"]);
    match ran.code {
        Some(0) => {}
        Some(5) => assert!(ran.stderr.contains("form op wait"), "a conflict that does not say what is under way: {ran:?}"),
        _ => panic!("{ran:?}"),
    }
    wait("the VM is started", || has_started(host, name));
}

fn change_page(host: &Host, name: &str, page: &str) {
    fs::write(host.path(name).join("index.html"), format!("it works\n{page}\n")).unwrap();
}

fn survives(host: &mut Host, point: Failpoint) {
    println!("=== {}", point.as_str());
    // A name of its own, and with it an image that the host does not have.
    let name = format!("p-{}", point.as_str().replace('.', "-"));
    let file = host.app(&name, SERVE, 18090);
    change_page(host, &name, &name);
    let deploy = ["deploy", file.as_str(), "-y", "--no-wait"];
    match way(point) {
        Way::FirstUpload | Way::Upload | Way::Deploy => dies_of(host, point, &deploy),
        Way::Destroy => {
            host.start_agent();
            deploys(host, &file, &name);
            host.kill_agent();
        }
        Way::Volume | Way::Pool | Way::Clone | Way::Guest | Way::Snapshot | Way::Hotplug | Way::Vcpus => unreachable!("not walked here"),
    }
    if way(point) == Way::Destroy {
        dies_of(host, point, &["destroy", &name, "-y"]);
        host.start_agent();
        wait("the destroy ends", || {
            host.operations().iter().all(|operation| operation["kind"] != "vm-destroy" || operation["status"] != "executing")
        });
        let again = host.form(&["destroy", &name, "-y"]);
        assert!(matches!(again.code, Some(0 | 3)), "{again:?}");
    } else {
        host.start_agent();
        deploys(host, &file, &name);
        // A deploy that still waits for its guest does not keep anybody from giving it up.
        let _ = host.form(&["destroy", &name, "-y"]).ok();
    }
    wait("every operation ends", || host.no_operation_is_under_way());
    host.is_clean();
    host.kill_agent();
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_the_agent_is_killed_at_every_step_and_nothing_is_left() {
    enter_own_network();
    let points = |wanted: fn(Way) -> bool| Failpoint::ALL.iter().copied().filter(move |point| wanted(way(*point)));
    for point in points(|way| way == Way::FirstUpload) {
        survives(&mut Host::new(), point);
    }
    let mut host = Host::new();
    for point in points(|way| matches!(way, Way::Upload | Way::Deploy | Way::Destroy)) {
        survives(&mut host, point);
    }
}

/// A command about volumes, the steps on its way, and the commands that take it back. Each goes on where the one before it has ended.
struct Walk {
    command: &'static [&'static str],
    points: &'static [Failpoint],
    undo: &'static [&'static [&'static str]],
}

const OF_VOLUMES: &[Walk] = &[
    Walk {
        command: &["volume", "create", "new", "-s", "16M"],
        points: &[OperationRecorded, VolumeDrafted, VolumeNamed, VolumeMade, StateStored, VolumeSubmitted, OperationEnded],
        undo: &[&["volume", "rm", "new", "-y"]],
    },
    Walk {
        command: &["volume", "clone", "data", "copy"],
        points: &[VolumeDrafted, VolumeMade, VolumeSubmitted],
        undo: &[&["volume", "rm", "copy", "-y"]],
    },
    Walk {
        command: &["volume", "resize", "data", "32M"],
        points: &[VolumeSubmitted, VolumeGrown],
        undo: &[&["volume", "rm", "data", "-y"], &["volume", "create", "data", "-s", "16M"]],
    },
    Walk {
        command: &["volume", "attach", "data", "web", "/data"],
        points: &[OperationRecorded, VolumeSubmitted],
        undo: &[&["volume", "detach", "data"]],
    },
    Walk {
        command: &["volume", "detach", "data"],
        points: &[StateStored, VolumeSubmitted],
        undo: &[&["volume", "attach", "data", "web", "/data"]],
    },
    Walk {
        command: &["volume", "rm", "new", "-y"],
        points: &[OperationRecorded, VolumeSubmitted, VolumeForgotten],
        undo: &[&["volume", "create", "new", "-s", "16M"]],
    },
];

const OF_SNAPSHOTS: &[Walk] = &[
    Walk {
        command: &["volume", "snapshot", "create", "data", "-n", "one"],
        points: &[OperationRecorded, VolumeSnapshotDrafted, VolumeSnapshotNamed, OperationEnded],
        undo: &[&["volume", "snapshot", "rm", "data", "one", "-y"]],
    },
    // To another size, so that the volume tells which of the two it is.
    Walk {
        command: &["volume", "snapshot", "restore", "data", "one", "-y"],
        points: &[
            OperationRecorded,
            VolumeRestoreDrafted,
            StateStored,
            VolumeSubmitted,
            VolumeRestoreMoved,
            VolumeRestoreSwitched,
            OperationEnded,
        ],
        undo: &[&["volume", "resize", "data", "32M"]],
    },
    Walk {
        command: &["volume", "clone", "data", "copy", "--snapshot", "one"],
        points: &[VolumeDrafted, VolumeMade, VolumeSubmitted],
        undo: &[&["volume", "rm", "copy", "-y"]],
    },
    Walk {
        command: &["volume", "snapshot", "rm", "data", "one", "-y"],
        points: &[OperationRecorded, VolumeSnapshotRetired],
        undo: &[&["volume", "snapshot", "create", "data", "-n", "one"]],
    },
];

/// Name, size and VM of every volume. Each has its file, no file is nobody's, and nothing is wrong with any.
fn volumes(host: &Host) -> Vec<(String, u64, String, u64)> {
    let all = host.form(&["volume", "ls", "-o", "json"]).ok().json();
    let told = all.as_array().unwrap().iter().map(|volume| {
        assert!(volume["fault"].is_null() && volume["allocated_bytes"].is_u64(), "{volume}");
        let vm = volume["attachment"]["vm"].as_str().unwrap_or_default().to_owned();
        let directory = host.root().join("var/lib/formation/volumes").join(volume["id"].as_str().unwrap());
        let expected = if volume["snapshots"] == 0 { 2 } else { 3 };
        assert_eq!(fs::read_dir(directory).unwrap().count(), expected, "its record, its file, its snapshots: {volume}");
        (volume["name"].as_str().unwrap().to_owned(), volume["size_bytes"].as_u64().unwrap(), vm, volume["snapshots"].as_u64().unwrap())
    });
    let told: Vec<_> = told.collect();
    let kept = |directory: &str| {
        let entries = fs::read_dir(host.root().join("var/lib/formation").join(directory)).unwrap().flatten();
        entries.filter(|entry| entry.file_name() != ".tmp").count()
    };
    assert_eq!((kept("volumes"), kept("volumes-made/local")), (told.len(), told.len()), "{told:?}");
    for check in host.form(&["doctor", "-o", "json"]).json().as_array().unwrap() {
        let name = check["name"].as_str().unwrap();
        assert!(!name.starts_with("volume/") && !name.starts_with("pool/"), "{check}");
    }
    told
}

fn all_ok(host: &Host, commands: &[&[&str]]) {
    for command in commands {
        let _ = host.form(command).ok();
    }
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_a_volume_is_what_was_asked_for_or_what_it_was_wherever_the_agent_dies() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);
    let _ = host.form(&["volume", "create", "data", "-s", "16M"]).ok();
    walk(&mut host, OF_VOLUMES);
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = host.form(&["volume", "rm", "copy", "data", "-y"]).ok();
    assert_eq!(volumes(&host), []);
    host.is_clean();
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_volume_goes_back_to_a_snapshot_or_stays_what_it_is_wherever_the_agent_dies() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    let _ = host.form(&["volume", "create", "data", "-s", "16M"]).ok();
    let data = host.form(&["volume", "show", "data", "-o", "json"]).ok().json();
    let file = host.root().join("var/lib/formation/volumes").join(data["id"].as_str().unwrap()).join("volume.raw");
    fs::write(&file, [vec![7; 1 << 20], vec![0; 15 << 20]].concat()).unwrap();
    walk(&mut host, &OF_SNAPSHOTS[..1]);
    let _ = host.form(&["volume", "resize", "data", "32M"]).ok();
    walk(&mut host, &OF_SNAPSHOTS[1..]);
    // What it holds now is what the snapshot held.
    let out = host.path("out.raw");
    let _ = host.form(&["volume", "export", "copy", "--to", out.to_str().unwrap()]).ok();
    assert_eq!(fs::read(&out).unwrap(), [vec![7; 1 << 20], vec![0; 15 << 20]].concat());
    let _ = host.form(&["volume", "rm", "copy", "data", "-y"]).ok();
    assert_eq!(volumes(&host), []);
    for point in Failpoint::ALL.iter().filter(|point| way(**point) == Way::Volume) {
        let walked = |walks: &[Walk]| walks.iter().any(|walk| walk.points.contains(point));
        assert!(walked(OF_VOLUMES) || walked(OF_SNAPSHOTS), "{} is walked nowhere", point.as_str());
    }
    host.is_clean();
}

/// The agent dies at each step of each command, which then is done, or is not and succeeds.
fn walk(host: &mut Host, walks: &[Walk]) {
    for Walk { command, points, undo } in walks {
        let (old, _) = (volumes(host), host.form(command).ok());
        let new = volumes(host);
        assert_ne!(old, new);
        for point in *points {
            println!("=== {} at {}", command.join(" "), point.as_str());
            all_ok(host, undo);
            assert_eq!(volumes(host), old);
            host.kill_agent();
            host.start_agent_with(Some(point.as_str()));
            let mut client = spawn(host, command);
            let died = host.dies_at(point.as_str(), |_| false);
            let _ = (client.kill(), client.wait());
            assert!(died, "{command:?} does not come to {}", point.as_str());
            host.start_agent();
            wait("the operation ends", || host.no_operation_is_under_way());
            let operation = newest(host, kind(command));
            if operation["status"] == "failed" {
                assert!(operation["error"]["hint"].as_str().unwrap().contains("run the same command again"), "{operation}");
                assert_eq!(volumes(host), old);
                let _ = host.form(command).ok();
            }
            assert_eq!(volumes(host), new);
        }
    }
}

/// That of the operation.
fn kind(command: &[&str]) -> &'static str {
    match command[1..] {
        ["create", ..] => "volume-create",
        ["clone", ..] => "volume-clone",
        ["resize", ..] => "volume-resize",
        ["attach", ..] => "volume-attach",
        ["detach", ..] => "volume-detach",
        ["rm", ..] => "volume-remove",
        ["snapshot", "create", ..] => "volume-snapshot-create",
        ["snapshot", "restore", ..] => "volume-restore",
        ["snapshot", "rm", ..] => "volume-snapshot-remove",
        _ => panic!("{command:?} is no command about volumes"),
    }
}

/// The steps of a move between pools.
const OF_A_MOVE: [Failpoint; 8] =
    [OperationRecorded, VolumeDrafted, VolumeNamed, VolumeMade, StateStored, VolumeSubmitted, VolumeForgotten, OperationEnded];

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_moved_volume_is_whole_in_one_pool_wherever_the_agent_dies() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    let directory = host.path("fast");
    fs::create_dir(&directory).unwrap();
    let _ = host.form(&["pool", "create", "fast", "--path", directory.to_str().unwrap()]).ok();
    let _ = host.form(&["volume", "create", "data", "-s", "16M"]).ok();
    let id = host.form(&["volume", "show", "data", "-o", "json"]).ok().json()["id"].as_str().unwrap().to_owned();
    let places = [("local", host.root().join("var/lib/formation/volumes")), ("fast", directory.clone())];
    let file = |place: &std::path::Path| place.join(&id).join("volume.raw");
    let bytes: Vec<u8> = (0..3_u32 << 20).map(|byte| (byte % 251) as u8).collect();
    {
        use std::os::unix::fs::FileExt;
        fs::File::options().write(true).open(file(&places[0].1)).unwrap().write_all_at(&bytes, 5 << 20).unwrap();
    }
    // The pool that the volume is in: there with all its bytes, and in no other.
    let pool = |host: &Host| {
        let volume = host.form(&["volume", "show", "data", "-o", "json"]).ok().json();
        assert!(volume["fault"].is_null(), "{volume}");
        let pool = volume["pool"].as_str().unwrap().to_owned();
        for (name, place) in &places {
            assert_eq!(place.join(&id).exists(), *name == pool, "{name}: {volume}");
            assert_eq!(host.root().join("var/lib/formation/volumes-made").join(name).join(&id).exists(), *name == pool);
            assert_eq!(fs::read_dir(place.join(".tmp")).map_or(0, |entries| entries.count()), 0, "{name}");
            if *name == pool {
                let there = fs::read(file(place)).unwrap();
                assert!(there.len() == 16 << 20 && there[5 << 20..8 << 20] == bytes && there[8 << 20..].iter().all(|byte| *byte == 0));
            }
        }
        for check in host.form(&["doctor", "-o", "json"]).json().as_array().unwrap() {
            let name = check["name"].as_str().unwrap();
            assert!(!name.starts_with("volume/") && !name.starts_with("pool/"), "{check}");
        }
        pool
    };
    for (step, point) in OF_A_MOVE.into_iter().enumerate() {
        let (from, to) = if step % 2 == 0 { ("local", "fast") } else { ("fast", "local") };
        println!("=== move to {to} at {}", point.as_str());
        assert_eq!(pool(&host), from);
        let command = ["volume", "move", "data", "--to", to];
        host.kill_agent();
        host.start_agent_with(Some(point.as_str()));
        let mut client = spawn(&host, &command);
        let died = host.dies_at(point.as_str(), |_| false);
        let _ = (client.kill(), client.wait());
        assert!(died, "a move does not come to {}", point.as_str());
        host.start_agent();
        wait("the operation ends", || host.no_operation_is_under_way());
        let operation = newest(&host, "volume-move");
        if operation["status"] == "failed" {
            assert!(operation["error"]["hint"].as_str().unwrap().contains("run the same command again"), "{operation}");
            assert_eq!(pool(&host), from);
            let _ = host.form(&command).ok();
        }
        assert_eq!(pool(&host), to);
    }
    let _ = host.form(&["volume", "rm", "data", "-y"]).ok();
    let _ = host.form(&["pool", "rm", "fast", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_pool_is_there_or_not_wherever_the_agent_dies() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    let directory = host.path("fast");
    fs::create_dir(&directory).unwrap();
    let create = ["pool", "create", "fast", "--path", directory.to_str().unwrap(), "--reserve", "1M"];
    let remove = ["pool", "rm", "fast", "-y"];
    let pools = |host: &Host| {
        let names = host.form(&["pool", "ls", "-o", "name"]).ok().stdout;
        let marked = directory.join("formation-pool.json").exists();
        assert_eq!(marked, names.contains("fast"), "{names}");
        for check in host.form(&["doctor", "-o", "json"]).json().as_array().unwrap() {
            assert!(!check["name"].as_str().unwrap().starts_with("pool/"), "{check}");
        }
        names.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let mut walked = Vec::new();
    for (command, points, [old, new]) in [
        (&create[..], [OperationRecorded, PoolMarked, PoolRecorded], [vec!["local"], vec!["fast", "local"]]),
        (&remove[..], [OperationRecorded, PoolForgotten, OperationEnded], [vec!["fast", "local"], vec!["local"]]),
    ] {
        for point in points {
            println!("=== {} at {}", command.join(" "), point.as_str());
            if pools(&host) != old {
                let _ = host.form(if command == create { &remove } else { &create }).ok();
            }
            host.kill_agent();
            host.start_agent_with(Some(point.as_str()));
            let mut client = spawn(&host, command);
            let died = host.dies_at(point.as_str(), |_| false);
            let _ = (client.kill(), client.wait());
            assert!(died, "{command:?} does not come to {}", point.as_str());
            host.start_agent();
            wait("the operation ends", || host.no_operation_is_under_way());
            let operation = newest(&host, &format!("pool-{}", if command == create { "create" } else { "remove" }));
            if operation["status"] == "failed" {
                assert!(operation["error"]["hint"].as_str().unwrap().contains("run the same command again"), "{operation}");
                assert_eq!(pools(&host), old);
                let _ = host.form(command).ok();
            }
            assert_eq!(pools(&host), new);
            walked.push(point);
        }
    }
    for point in Failpoint::ALL.iter().filter(|point| way(**point) == Way::Pool) {
        assert!(walked.contains(point), "{} is walked nowhere", point.as_str());
    }
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    host.is_clean();
}

/// The steps of a clone. The last ones are those of what the state knows already.
const OF_A_CLONE: [Failpoint; 9] =
    [OperationRecorded, DiskCopied, DiskMade, CloneMade, DeployRemembered, StateStored, DeploySubmitted, DeployRecorded, OperationEnded];

/// The VMs that the host has, and whether each has its directory and none is nobody's.
fn vms(host: &Host) -> Vec<String> {
    let all = host.form(&["vm", "ls", "-o", "json"]).ok().json();
    let mut told: Vec<(String, String)> =
        all.as_array().unwrap().iter().map(|vm| (vm["id"].as_str().unwrap().to_owned(), vm["name"].as_str().unwrap().to_owned())).collect();
    told.sort();
    let ids: Vec<String> = told.iter().map(|(id, _)| id.clone()).collect();
    wait("there are the disks of these VMs and no others", || {
        let entries = fs::read_dir(host.root().join("var/lib/formation/vms")).unwrap().flatten();
        let mut found: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name != ".tmp").collect();
        found.sort();
        let whole = |id: &String| host.root().join("var/lib/formation/vms").join(id).join("root/disk.json").exists();
        found == ids && found.iter().all(whole)
    });
    let mut names: Vec<String> = told.into_iter().map(|(_, name)| name).collect();
    names.sort();
    names
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_a_clone_is_there_or_not_wherever_the_agent_dies() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);
    let command = ["vm", "clone", "web", "copy", "--no-start"];
    for point in Failpoint::ALL.iter().filter(|point| way(**point) == Way::Clone) {
        assert!(OF_A_CLONE.contains(point), "{} is walked nowhere", point.as_str());
    }
    for point in OF_A_CLONE {
        println!("=== clone at {}", point.as_str());
        assert_eq!(vms(&host), ["web"]);
        host.kill_agent();
        host.start_agent_with(Some(point.as_str()));
        let mut client = spawn(&host, &command);
        let died = host.dies_at(point.as_str(), |_| false);
        let _ = (client.kill(), client.wait());
        assert!(died, "a clone does not come to {}", point.as_str());
        host.start_agent();
        wait("the operation ends", || host.no_operation_is_under_way());
        if newest(&host, "vm-clone")["status"] == "failed" {
            assert_eq!(vms(&host), ["web"]);
            let _ = host.form(&command).ok();
        }
        assert_eq!(vms(&host), ["copy", "web"]);
        let copy = host.vm("copy");
        assert_eq!((copy["state"].as_str(), copy["ipv4"] == host.vm("web")["ipv4"]), (Some("stopped"), false), "{copy}");
        let taken = host.form(&command).exits(5);
        assert!(taken.stderr.contains("there is a vm/copy already") && taken.stderr.contains("form vm rm copy"), "{taken:?}");
        let _ = host.form(&["destroy", "copy", "-y"]).ok();
    }
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_lives_through_the_death_of_its_agent_at_every_step() {
    let mut host = Host::new();
    let web = host.app("web", SERVE, 18091);
    let deploy = ["deploy", web.as_str(), "-y"];
    let mut walked = vec![DiskRetired, RollbackSubmitted];

    // The agent dies at one step after the other of one deploy.
    let steps = [
        DeploySubmitted,
        DiskRecorded,
        DiskDrafted,
        DiskMade,
        LaunchOpened,
        LaunchDirectoryMade,
        LaunchRulesSet,
        LaunchTapMade,
        LaunchCgroupMade,
        LaunchProcessSpawned,
        LaunchProcessRecorded,
        LaunchBooted,
        LaunchBootRecorded,
        GuestReady,
        DeployHealthy,
        DeployKept,
        OperationEnded,
    ];
    walked.extend(steps);
    dies_of(&mut host, steps[0], &deploy);
    for step in &steps[1..] {
        println!("=== {}", step.as_str());
        host.start_agent_with(Some(step.as_str()));
        assert!(host.dies_at(step.as_str(), |_| false));
    }
    host.start_agent();
    assert_eq!(newest(&host, "deploy")["status"], "completed");
    wait("it answers", || answers(18091));
    let again = host.form(&deploy).ok();
    assert!(again.stderr.contains("unchanged"), "{again:?}");

    // Another image: the old disk is gone when the agent dies.
    host.kill_agent();
    change_page(&host, "web", "the second page");
    dies_of(&mut host, DiskRetired, &deploy);
    host.start_agent();
    wait("the deploy ends", || host.no_operation_is_under_way());
    assert_eq!(newest(&host, "deploy")["status"], "completed");
    wait("it answers", || answers(18091));
    let page = host.form(&["exec", "web", "--", "/bin/busybox", "cat", "/www/index.html"]).ok();
    assert!(page.stdout.contains("the second page"), "{page:?}");

    // A version that does not work is taken back; the agent dies in the middle of that.
    host.kill_agent();
    let _ = host.app("web", r#"["/bin/busybox", "sh", "-c", "echo broken on purpose; exit 9"]"#, 18091);
    change_page(&host, "web", "the second page");
    dies_of(&mut host, RollbackSubmitted, &deploy);
    host.start_agent();
    wait("the deploy ends", || host.no_operation_is_under_way());
    let failed = newest(&host, "deploy");
    assert_eq!(failed["status"], "failed");
    assert!(failed["error"]["message"].as_str().unwrap().contains("broken on purpose"), "{failed}");
    wait("the old version answers", || answers(18091));

    // Stopped, with the agent dying between the removal of the runtime directory and that of the cgroup.
    host.kill_agent();
    dies_of(&mut host, StopProcessGone, &["vm", "restart", "web"]);
    host.start_agent();
    wait("it answers again", || answers(18091));
    wait("the restart ends", || host.no_operation_is_under_way());
    assert_eq!(newest(&host, "vm-restart")["status"], "completed");
    host.kill_agent();
    dies_of(&mut host, CleanDirectoryRemoved, &["vm", "stop", "web"]);
    host.start_agent();
    wait("the stop ends", || host.no_operation_is_under_way());
    assert_eq!(host.vm("web")["state"], "stopped");
    let running: Vec<String> = host.leftovers().into_iter().filter(|left| !left.contains("formation")).collect();
    assert_eq!(running, Vec::<String>::new(), "a stopped VM has a disk and a log and nothing else");
    let _ = host.form(&["vm", "start", "web"]).ok();

    // And the end of it, step by step.
    host.kill_agent();
    dies_of(&mut host, LifecycleSubmitted, &["destroy", "web", "-y"]);
    for step in [StopAsked, CleanTapRemoved, CleanCgroupRemoved, RemoveDiskRemoved, RemoveDirectoryRemoved, RemoveLogRemoved] {
        println!("=== {}", step.as_str());
        host.start_agent_with(Some(step.as_str()));
        assert!(host.dies_at(step.as_str(), |_| false));
    }
    host.start_agent();
    wait("the destroy ends", || host.no_operation_is_under_way());
    assert_eq!(newest(&host, "vm-destroy")["status"], "completed");
    let _ = host.form(&["destroy", "web", "-y"]).exits(3);
    host.is_clean();
    let _ = host.form(&["doctor"]).ok();
    for point in Failpoint::ALL.iter().filter(|point| way(**point) == Way::Guest) {
        assert!(walked.contains(point), "{} is walked nowhere", point.as_str());
    }
}

/// The newest operation of a kind.
fn newest(host: &Host, kind: &str) -> serde_json::Value {
    host.operations().into_iter().find(|operation| operation["kind"] == kind).expect("an operation")
}
