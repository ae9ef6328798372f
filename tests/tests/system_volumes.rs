//! Bad days of volumes that need no running guest: full and absent pools, foreign programs, two who want one thing, requests that make no
//! sense. Each ends with nothing left over and nothing wrong.

use std::{
    fs,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use form_tests::host::{Host, enter_own_network};
use serde_json::{Value, json};

/// A file system of its own, in memory.
struct Mount(PathBuf);

impl Mount {
    fn new(path: PathBuf, mib: u32) -> Self {
        fs::create_dir_all(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", path.to_str().unwrap()]);
        Self(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy".as_ref(), self.0.as_os_str()]).status();
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// A host with a pool `small` on a file system of its own.
fn host_with_pool(mib: u32) -> (Host, Mount) {
    let mut host = Host::new();
    let mount = Mount::new(host.path("small"), mib);
    host.configure(&format!("pools: {{ small: {} }}\n", mount.0.display()));
    host.start_agent();
    (host, mount)
}

fn names(host: &Host) -> Vec<String> {
    host.form(&["volume", "ls", "-o", "name"]).ok().stdout.lines().map(str::to_owned).collect()
}

fn volume(host: &Host, name: &str) -> Value {
    host.form(&["volume", "show", name, "-o", "json"]).ok().json()
}

fn file(pool: &Path, volume: &Value) -> PathBuf {
    pool.join(volume["id"].as_str().unwrap()).join("volume.raw")
}

/// What is in a directory of volumes, but for the place for half-made ones.
fn kept(pool: &Path) -> usize {
    fs::read_dir(pool).unwrap().flatten().filter(|entry| entry.file_name() != ".tmp").count()
}

/// What doctor has to say of volumes and pools.
fn wrong(host: &Host) -> Vec<Value> {
    let checks = host.form(&["doctor", "-o", "json"]).json().as_array().unwrap().clone();
    let concerns = |check: &Value| ["volume/", "pool/"].iter().any(|kind| check["name"].as_str().unwrap().starts_with(kind));
    checks.into_iter().filter(concerns).collect()
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_pool_that_is_full_or_away_loses_nothing() {
    enter_own_network();
    let (mut host, mount) = host_with_pool(140);
    let pool = mount.0.clone();
    let create = |host: &Host, name: &str, size: &str| host.form(&["volume", "create", name, "-s", size, "--pool", "small"]);
    // More than the pool has is promised, more than a file can have is not.
    let _ = create(&host, "data", "1G").ok();
    fs::File::options().write(true).open(file(&pool, &volume(&host, "data"))).unwrap().write_all_at(&vec![7; 72 << 20], 0).unwrap();
    let no_room = host.form(&["volume", "clone", "data", "copy", "-o", "json"]).exits(1);
    let error: Value = serde_json::from_str(no_room.stderr.lines().last().unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "no-room", "{no_room:?}");
    assert_eq!((names(&host), kept(&pool)), (vec!["data".to_owned()], 1), "nothing is left of the copy");

    // Full: nothing new is begun there, elsewhere it is, and what frees room works.
    fs::write(pool.join("filler"), vec![1; 60 << 20]).unwrap();
    let full = create(&host, "other", "16M").exits(1);
    assert!(full.stderr.contains("pool/small is full"), "{full:?}");
    assert!(wrong(&host).iter().any(|check| check["name"] == "pool/small"), "doctor warns");
    let _ = host.form(&["volume", "create", "other", "-s", "16M"]).ok();
    let _ = host.form(&["volume", "rm", "other", "-y"]).ok();
    fs::remove_file(pool.join("filler")).unwrap();
    let _ = host.form(&["volume", "clone", "data", "copy"]).exits(1);
    assert_eq!(wrong(&host), Vec::<Value>::new());

    // Not mounted: the volume is there, with its fault, and is neither made anew nor taken for removed.
    host.kill_agent();
    let aside = host.path("aside");
    fs::create_dir(&aside).unwrap();
    run("mount", &["--move", pool.to_str().unwrap(), aside.to_str().unwrap()]);
    host.start_agent();
    assert!(volume(&host, "data")["fault"].as_str().unwrap().contains("mounted"), "{}", volume(&host, "data"));
    assert_eq!(wrong(&host).len(), 1);
    let _ = host.form(&["volume", "clone", "data", "copy"]).exits(1);
    fs::remove_dir(&pool).unwrap();
    let away = host.form(&["volume", "rm", "data", "-y"]).exits(1);
    assert!(away.stderr.contains("mounted"), "{away:?}");
    assert_eq!(names(&host), ["data"]);
    fs::create_dir(&pool).unwrap();
    run("mount", &["--move", aside.to_str().unwrap(), pool.to_str().unwrap()]);
    assert_eq!(volume(&host, "data")["fault"], Value::Null);
    assert_eq!(fs::read(file(&pool, &volume(&host, "data"))).unwrap()[..72 << 20], vec![7; 72 << 20]);
    let _ = host.form(&["volume", "rm", "data", "-y"]).ok();
    assert_eq!((kept(&pool), wrong(&host)), (0, Vec::new()));
    host.is_clean();
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_pool_is_made_used_and_removed_and_its_empty_mount_point_is_left_alone() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    let mount = Mount::new(host.path("fast"), 200);
    let path = mount.0.to_str().unwrap().to_owned();
    let create = |more: &[&str]| host.form(&[&["pool", "create", "fast"], more].concat());
    for (place, reason) in [
        ("relative", "not absolute"),
        ("/nowhere", "no such directory"),
        ("/dev/null", "no directory"),
        ("/proc", "cannot be made there"),
        (host.root().to_str().unwrap(), "neither may lie in the other"),
        (host.root().join("var/log/formation").to_str().unwrap(), "to itself"),
    ] {
        let refused = create(&["--path", place]).exits(2);
        assert!(refused.stderr.contains(reason), "{place}: {refused:?}");
    }
    let made = create(&["--path", &path, "--reserve", "100M", "--limit", "1G", "--label", "disk=nvme"]).ok();
    assert!(made.stdout.contains("fast: made"), "{made:?}");
    let _ = create(&["--path", "/nowhere"]).exits(5);
    let show = |host: &Host| host.form(&["pool", "show", "fast", "-o", "json"]).ok().json();
    let shown = show(&host);
    assert_eq!(
        (&shown["reserve_bytes"], &shown["limit_bytes"], &shown["labels"]["disk"]),
        (&json!(100 << 20), &json!(1 << 30), &json!("nvme"))
    );

    // Another agent does not get it.
    let mut other = Host::new();
    other.configure("listen: 127.0.0.1:7946\n");
    other.start_agent();
    let taken = other.form(&["pool", "create", "mine", "--path", &path]).exits(5);
    assert!(taken.stderr.contains("another agent") && taken.stderr.contains(shown["host"].as_str().unwrap()), "{taken:?}");
    other.is_clean();

    // The limit is of what is promised, the reserve of what is free.
    let volume_in = |host: &Host, name: &str, size: &str| host.form(&["volume", "create", name, "-s", size, "--pool", "fast"]);
    let _ = volume_in(&host, "data", "768M").ok();
    let no_room = volume_in(&host, "more", "512M").exits(1);
    assert!(no_room.stderr.contains("promise 768 MiB of the 1 GiB"), "{no_room:?}");
    let no_room = host.form(&["volume", "resize", "data", "2G"]).exits(1);
    assert!(no_room.stderr.contains("form pool set fast --limit"), "{no_room:?}");
    let _ = host.form(&["volume", "clone", "data", "more"]).exits(1);
    fs::write(mount.0.join("filler"), vec![1; 110 << 20]).unwrap();
    let no_room = volume_in(&host, "more", "16M").exits(1);
    assert!(no_room.stderr.contains("100 MiB are kept in reserve"), "{no_room:?}");
    assert!(wrong(&host).iter().any(|check| check["name"] == "pool/fast"), "doctor warns");
    let _ = host.form(&["pool", "set", "fast", "--reserve", "0", "--limit", "0", "--remove-label", "disk"]).ok();
    let _ = volume_in(&host, "more", "512M").ok();
    fs::remove_file(mount.0.join("filler")).unwrap();

    // To another pool and back: with what it holds, and nothing is left behind.
    let local = host.root().join("var/lib/formation/volumes");
    fs::File::options().write(true).open(file(&mount.0, &volume(&host, "data"))).unwrap().write_all_at(&vec![7; 8 << 20], 9 << 20).unwrap();
    let _ = host.form(&["volume", "export", "data", "--nbd"]).ok();
    let exported = host.form(&["volume", "move", "data", "--to", "local"]).exits(5);
    assert!(exported.stderr.contains("form volume unexport data"), "{exported:?}");
    let _ = host.form(&["volume", "unexport", "data"]).ok();
    let _ = host.form(&["volume", "move", "data", "--to", "local"]).ok();
    let there = fs::read(file(&local, &volume(&host, "data"))).unwrap();
    assert!(
        there.len() == 768 << 20
            && there[9 << 20..17 << 20].iter().all(|byte| *byte == 7)
            && there[17 << 20..].iter().all(|byte| *byte == 0)
    );
    assert!(volume(&host, "data")["allocated_bytes"].as_u64().unwrap() < 16 << 20, "holes stay holes");
    assert_eq!((kept(&local), kept(&mount.0)), (1, 2), "the marker and the other volume");
    for (to, code) in [("local", 5), ("nope", 3)] {
        let _ = host.form(&["volume", "move", "data", "--to", to]).exits(code);
    }
    let _ = host.form(&["pool", "set", "fast", "--limit", "600M"]).ok();
    let no_room = host.form(&["volume", "move", "data", "--to", "fast"]).exits(1);
    assert!(no_room.stderr.contains("of the 600 MiB"), "{no_room:?}");
    let _ = host.form(&["pool", "set", "fast", "--limit", "0"]).ok();
    fs::write(mount.0.join("filler"), vec![1; 194 << 20]).unwrap();
    let _ = host.form(&["volume", "move", "data", "--to", "fast"]).exits(1);
    fs::remove_file(mount.0.join("filler")).unwrap();
    assert_eq!((kept(&local), kept(&mount.0), volume(&host, "data")["pool"].as_str()), (1, 2, Some("local")));
    let _ = host.form(&["volume", "move", "data", "--to", "pool/fast"]).ok();
    assert_eq!((kept(&local), kept(&mount.0), wrong(&host)), (0, 3, Vec::new()));

    // In use, or not made by that command: it stays.
    let in_use = host.form(&["pool", "rm", "fast", "-y"]).exits(5);
    assert!(in_use.stderr.contains("data, more"), "{in_use:?}");
    let _ = host.form(&["pool", "rm", "local", "-y"]).exits(5);
    let _ = host.form(&["pool", "rm", "nope", "-y"]).exits(3);

    let data = volume(&host, "data");

    // Not mounted: nothing is made in the directory below, whatever is asked.
    host.kill_agent();
    let aside = host.path("aside");
    fs::create_dir(&aside).unwrap();
    run("mount", &["--move", &path, aside.to_str().unwrap()]);
    host.start_agent();
    let unavailable = show(&host);
    assert!(unavailable["fault"].as_str().unwrap().contains("mounted"), "{unavailable}");
    assert!(host.form(&["pool", "ls"]).ok().stdout.contains("unavailable"));
    assert!(volume(&host, "data")["fault"].as_str().unwrap().contains("pool/fast is not there"), "{}", volume(&host, "data"));
    for command in [
        &["volume", "create", "third", "-s", "16M", "--pool", "fast"][..],
        &["volume", "rm", "data", "-y"],
        &["volume", "export", "data", "--nbd"],
    ] {
        let away = host.form(command).exits(1);
        assert!(away.stderr.contains("mounted"), "{command:?}: {away:?}");
    }
    assert_eq!(wrong(&host).len(), 3, "doctor names the pool and its two volumes");
    assert_eq!(fs::read_dir(&mount.0).unwrap().count(), 0);
    run("mount", &["--move", aside.to_str().unwrap(), &path]);
    assert_eq!((show(&host)["fault"].clone(), volume(&host, "data")["fault"].clone()), (Value::Null, Value::Null));

    // One is lost with its pool, and is nobody's when the pool comes back.
    let there = host.form(&["volume", "rm", "data", "--lost", "-y"]).exits(5);
    assert!(there.stderr.contains("form volume rm data`"), "{there:?}");
    run("mount", &["--move", &path, aside.to_str().unwrap()]);
    let lost = host.form(&["volume", "rm", "data", "-y"]).exits(1);
    assert!(lost.stderr.contains("form volume rm data --lost`"), "{lost:?}");
    let _ = host.form(&["volume", "rm", "data", "--lost", "-y"]).ok();
    let _ = host.form(&["volume", "show", "data"]).exits(3);
    assert_eq!(wrong(&host).len(), 2, "doctor names the pool and the volume that is left");
    host.kill_agent();
    host.start_agent();
    let _ = host.form(&["volume", "show", "data"]).exits(3);
    run("mount", &["--move", aside.to_str().unwrap(), &path]);
    let (nobodys, id) = (wrong(&host), data["id"].as_str().unwrap());
    assert!(nobodys.len() == 1 && nobodys[0]["message"].as_str().unwrap().contains(id), "{nobodys:?}");
    let refused = host.form(&["pool", "rm", "fast", "-y"]).exits(5);
    assert!(refused.stderr.contains("more"), "{refused:?}");
    let _ = host.form(&["volume", "rm", "more", "-y"]).ok();
    assert!(host.form(&["pool", "rm", "fast", "-y"]).exits(5).stderr.contains(id));
    fs::remove_dir_all(mount.0.join(id)).unwrap();
    let _ = host.form(&["pool", "rm", "fast", "-y"]).ok();
    assert_eq!(fs::read_dir(&mount.0).unwrap().count(), 0);
    let kinds: Vec<String> = host.operations().iter().map(|operation| operation["kind"].as_str().unwrap().to_owned()).collect();
    assert!(["pool-create", "pool-set", "pool-remove"].iter().all(|kind| kinds.iter().any(|found| found == kind)), "{kinds:?}");
    let events = host.form(&["events", "-o", "json"]).ok().stdout;
    assert!(events.contains("pool-remove pool/fast completed"), "{events}");
    assert_eq!(wrong(&host), Vec::<Value>::new());
    host.is_clean();
}

fn snapshots(host: &Host, volume: &str) -> Vec<Value> {
    host.form(&["volume", "snapshot", "ls", volume, "-o", "json"]).ok().json().as_array().unwrap().clone()
}

/// All that a volume holds, as a client reads it.
fn held(host: &Host, name: &str) -> Vec<u8> {
    let to = host.path("held.raw");
    let _ = fs::remove_file(&to);
    let _ = host.form(&["volume", "export", name, "--to", to.to_str().unwrap()]).ok();
    fs::read(to).unwrap()
}

/// The file that holds a volume now, in its directory.
fn its_file(directory: &Path) -> PathBuf {
    let files = fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "raw" || extension == "qcow2")).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Writes to a volume as a foreign program does that heeds locks.
fn write(volume: &Path, command: &str) {
    let format = volume.extension().unwrap().to_str().unwrap();
    let ran = Command::new("qemu-io").args(["-f", format, "-c", command, volume.to_str().unwrap()]).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
}

/// A foreign program that has a volume open and locked, until it is killed.
fn opened(volume: &Path, format: &str) -> Child {
    let mut program =
        Command::new("qemu-io").args(["-f", format]).arg(volume).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // It asks for commands once it has it.
    let mut prompt = [0; 9];
    program.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"qemu-io> ");
    program
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_a_volume_goes_back_to_its_snapshots_and_they_go_with_it() {
    enter_own_network();
    let (host, mount) = host_with_pool(200);
    for format in ["raw", "qcow2"] {
        snapshots_for_life(&host, &mount.0, format);
    }
    damaged_and_full(&host, &mount.0);
    host.is_clean();
}

fn snapshots_for_life(host: &Host, pool: &Path, format: &str) {
    let _ = host.form(&["volume", "create", "data", "-s", "16M", "--format", format, "--pool", "small"]).ok();
    let directory = pool.join(volume(host, "data")["id"].as_str().unwrap());
    write(&its_file(&directory), "write -P 7 4M 2M");
    let then = held(host, "data");
    assert!(then.len() == 16 << 20 && then[4 << 20] == 7);
    let create = ["volume", "snapshot", "create", "data", "-n", "one"];
    assert_eq!(host.form(&create).ok().stdout, "data: snapshot one made\n");
    let twice = host.form(&create).exits(5);
    assert!(twice.stderr.contains("there is a snapshot `one`"), "{twice:?}");
    let of_time = host.form(&["volume", "snapshot", "create", "data", "-o", "name"]).ok().stdout;
    let all = snapshots(host, "data");
    assert_eq!((all.len(), volume(host, "data")["snapshots"].as_u64()), (2, Some(2)), "{of_time}");
    let told = (&all[0]["name"], &all[0]["consistency"], all[0]["size_bytes"].as_u64());
    assert_eq!(told, (&json!("one"), &json!("stopped"), Some(16 << 20)));
    let _ = host.form(&["volume", "snapshot", "rm", "data", of_time.trim(), "-y"]).ok();
    let _ = host.form(&["volume", "snapshot", "show", "data", of_time.trim()]).exits(3);

    // Made larger and written to, and back, with what it held and its size; twice.
    for round in 0..2 {
        let _ = host.form(&["volume", "resize", "data", "32M"]).ok();
        write(&its_file(&directory), "write -P 9 5M 20M");
        let _ = host.form(&["volume", "snapshot", "restore", "data", "one", "-y"]).ok();
        assert_eq!(volume(host, "data")["size_bytes"], 16 << 20, "round {round}");
        assert_eq!(held(host, "data"), then);
    }
    // The size is in what is signed, and has to be true.
    let _ = host.form(&["volume", "resize", "data", "32M"]).ok();
    let socket = host.socket();
    let post = |path: &str, body: &Value| {
        let arguments = ["-s", "--unix-socket", socket.to_str().unwrap(), "-d", &body.to_string()];
        let ran = Command::new("curl").args(arguments).arg(format!("http://agent{path}")).output().unwrap();
        serde_json::from_slice::<Value>(&ran.stdout).unwrap()
    };
    let answer = post("/v1/volumes/data/restore", &json!({"snapshot": "one"}));
    assert!(answer["error"]["code"] == "conflict" && answer["error"]["hint"].as_str().unwrap().contains("16777216"), "{answer}");
    assert_eq!(post("/v1/volumes/data/clone", &json!({"name": "copy", "size_bytes": 64 << 20}))["error"]["code"], "invalid");

    // Made from it, whatever the volume is now.
    let _ = host.form(&["volume", "clone", "data", "copy", "--snapshot", "one"]).ok();
    assert_eq!((held(host, "copy"), volume(host, "copy")["size_bytes"].as_u64()), (then.clone(), Some(16 << 20)));
    let _ = host.form(&["volume", "clone", "data", "nothing", "--snapshot", "two"]).exits(3);
    not_meanwhile(host, &directory);

    // It moves with its snapshots, and is not removed by mistake.
    let _ = host.form(&["volume", "move", "data", "--to", "local"]).ok();
    let there = snapshots(host, "data");
    assert!(there.len() == 2 && there.iter().all(|snapshot| snapshot["pool"] == "local"), "{there:?}");
    let _ = host.form(&["volume", "snapshot", "restore", "data", "one", "-y"]).ok();
    assert_eq!(held(host, "data"), then);
    let kept_back = host.form(&["volume", "rm", "data", "-y"]).exits(5);
    assert!(kept_back.stderr.contains("has snapshots: one, two") && kept_back.stderr.contains("--snapshots"), "{kept_back:?}");
    let _ = host.form(&["volume", "rm", "data", "--snapshots", "-y"]).ok();
    let _ = host.form(&["volume", "rm", "copy", "-y"]).ok();
    assert_eq!((kept(pool), names(host), wrong(host)), (0, Vec::<String>::new(), Vec::new()));
}

/// While somebody has it open, or it is exported.
fn not_meanwhile(host: &Host, directory: &Path) {
    let file = its_file(directory);
    let format = file.extension().unwrap().to_str().unwrap();
    let mut other = opened(&file, format);
    let two = ["volume", "snapshot", "create", "data", "-n", "two"];
    let _ = host.form(&two).exits(5);
    let foreign = host.form(&["volume", "snapshot", "restore", "data", "one", "-y"]).exits(5);
    assert!(foreign.stderr.contains("qemu-io"), "{foreign:?}");
    let _ = (other.kill(), other.wait());
    assert_eq!(fs::read_dir(directory).unwrap().count(), 3, "nothing is left of what was refused");

    let _ = host.form(&["volume", "export", "data", "--nbd"]).ok();
    let exported = host.form(&["volume", "snapshot", "restore", "data", "one", "-y"]).exits(5);
    assert!(exported.stderr.contains("form volume unexport data"), "{exported:?}");
    let _ = host.form(&two).ok();
    let _ = host.form(&["volume", "unexport", "data"]).ok();
    let _ = host.form(&["volume", "export", "data", "--nbd", "--writable"]).ok();
    let _ = host.form(&["volume", "snapshot", "create", "data", "-n", "three"]).exits(5);
    let _ = host.form(&["volume", "unexport", "data"]).ok();
    assert_eq!(snapshots(host, "data").len(), 2);
}

/// A pool that gets full in the middle, one with a limit, and files that somebody took away.
fn damaged_and_full(host: &Host, pool: &Path) {
    let _ = host.form(&["volume", "create", "data", "-s", "128M", "--pool", "small"]).ok();
    let directory = pool.join(volume(host, "data")["id"].as_str().unwrap());
    write(&its_file(&directory), "write -P 7 0 65M");
    let _ = host.form(&["volume", "snapshot", "create", "data", "-n", "one"]).ok();
    write(&its_file(&directory), "write -P 8 0 65M");
    // There is room to begin with, and not for all of it.
    let no_room = |command: &[&str]| {
        let full = host.form(command).exits(1);
        let error: Value = serde_json::from_str(full.stderr.lines().last().unwrap()).unwrap();
        assert_eq!(error["error"]["code"], "no-room", "{full:?}");
        assert_eq!((snapshots(host, "data").len(), fs::read_dir(&directory).unwrap().count()), (1, 3));
        assert_eq!(fs::read_dir(pool.join(".tmp")).map_or(0, |entries| entries.count()), 0);
    };
    write(&its_file(&directory), "write -P 8 0 70M");
    no_room(&["volume", "snapshot", "create", "data", "-n", "two", "-o", "json"]);
    fs::write(pool.join("filler"), vec![1; 10 << 20]).unwrap();
    no_room(&["volume", "snapshot", "restore", "data", "one", "-y", "-o", "json"]);
    fs::remove_file(pool.join("filler")).unwrap();
    assert_eq!(held(host, "data")[0], 8, "it is what it was");

    // What snapshots take counts.
    let _ = host.form(&["pool", "set", "small", "--limit", "180M"]).ok();
    let shown = host.form(&["pool", "show", "small", "-o", "json"]).ok().json();
    assert!(shown["snapshots"] == 1 && shown["provisioned_bytes"].as_u64().unwrap() >= 193 << 20, "{shown}");
    let over = host.form(&["volume", "create", "more", "-s", "16M", "--pool", "small"]).exits(1);
    assert!(over.stderr.contains("snapshots promise"), "{over:?}");
    let _ = host.form(&["pool", "set", "small", "--limit", "0"]).ok();

    // Left over by hand: a restore that nobody is at work on, a record without a file, a file without a record.
    let left = directory.join(format!("restore-{}", "0".repeat(32)));
    fs::create_dir(&left).unwrap();
    let fixable =
        || host.form(&["doctor", "-o", "json"]).json().as_array().unwrap().iter().any(|check| check["name"] == "leftover/volume/data");
    assert!(fixable());
    let _ = host.form(&["doctor", "--fix"]);
    assert!(!left.exists() && !fixable());
    let sync = || host.form(&["volume", "sync", "data"]).ok().stdout;
    assert_eq!(sync(), "data: in line already\n");
    let _ = host.form(&["volume", "export", "data", "--nbd"]).ok();
    fs::create_dir(&left).unwrap();
    fs::remove_file(host.root().join("run/formation/nbd/data.sock")).unwrap();
    let said = sync();
    assert!(
        said.contains("data: what was left of a restore") && said.contains("data: its export, whose socket was gone, is ended"),
        "{said}"
    );
    assert!(!left.exists() && volume(host, "data")["export"].is_null());
    assert_eq!(sync(), "data: in line already\n");
    let one = directory.join("snapshots/one");
    let unusable = || {
        let checks = wrong(host);
        assert!(checks.len() == 1 && checks[0]["name"] == "volume/data/one", "{checks:?}");
        assert!(snapshots(host, "data")[0]["fault"].is_string());
        let refused = host.form(&["volume", "snapshot", "restore", "data", "one", "-y"]).exits(1);
        assert!(refused.stderr.contains("form volume snapshot rm"), "{refused:?}");
    };
    fs::rename(one.join("volume.raw"), pool.join("aside")).unwrap();
    unusable();
    fs::rename(pool.join("aside"), one.join("volume.raw")).unwrap();
    assert_eq!(wrong(host), Vec::<Value>::new());
    fs::remove_file(one.join("snapshot.json")).unwrap();
    unusable();
    let _ = host.form(&["volume", "snapshot", "rm", "data", "one", "-y"]).ok();
    assert_eq!(wrong(host), Vec::<Value>::new());
    // What cannot be read is not taken for nothing.
    let unreadable = directory.join("snapshots");
    fs::write(&unreadable, "no directory").unwrap();
    let _ = host.form(&["volume", "rm", "data", "-y"]).exits(1);
    assert_eq!(volume(host, "data")["name"], "data");
    fs::remove_file(&unreadable).unwrap();
    let _ = host.form(&["volume", "rm", "data", "-y"]).ok();
}

fn spawn(host: &Host, arguments: &[&str]) -> Child {
    host.form_command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// How each of these ends, when all begin at once.
fn at_once(host: &Host, commands: &[&[&str]]) -> Vec<i32> {
    let children: Vec<Child> = commands.iter().map(|command| spawn(host, command)).collect();
    children.into_iter().map(|mut child| child.wait().unwrap().code().unwrap()).collect()
}

/// How many of these end well, when all begin at once; the others end with a conflict.
fn winners(host: &Host, commands: &[&[&str]]) -> usize {
    let codes = at_once(host, commands);
    assert!(codes.iter().all(|code| [0, 5].contains(code)), "{codes:?}");
    codes.iter().filter(|code| **code == 0).count()
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_of_all_who_want_one_volume_one_gets_it() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web", "db"]);
    let pool = host.root().join("var/lib/formation/volumes");
    let create: &[&str] = &["volume", "create", "data", "-s", "16M"];
    assert_eq!(winners(&host, &[create; 6]), 1);
    assert_eq!((names(&host), kept(&pool)), (vec!["data".to_owned()], 1));
    let _ = host.form(&["volume", "create", "spare", "-s", "16M"]).ok();
    let clones: [&[&str]; 2] = [&["volume", "clone", "data", "copy"], &["volume", "clone", "spare", "copy"]];
    assert_eq!(winners(&host, &clones), 1);
    let web: &[&str] = &["volume", "attach", "data", "web", "/data"];
    let db: &[&str] = &["volume", "attach", "data", "db", "/data"];
    assert_eq!(winners(&host, &[web, db, web, db]), 1);
    assert!(["web", "db"].contains(&volume(&host, "data")["attachment"]["vm"].as_str().unwrap()));
    // Detached and removed at once: what is attached is not removed, so removing comes too early or after it.
    let detach: &[&str] = &["volume", "detach", "data"];
    let remove: &[&str] = &["volume", "rm", "data", "-y"];
    let codes = at_once(&host, &[detach, remove]);
    assert!(codes == [0, 0] || codes == [0, 5], "{codes:?}");
    assert_eq!(names(&host).contains(&"data".to_owned()), codes[1] == 5, "{codes:?}");
    if codes[1] == 0 {
        let _ = host.form(create).ok();
    }
    // Removed and attached at once: whoever comes first, nothing is attached that is gone.
    let codes = at_once(&host, &[remove, web]);
    match names(&host).contains(&"data".to_owned()) {
        true => assert_eq!((codes[0], &volume(&host, "data")["attachment"]["vm"]), (5, &json!("web")), "{codes:?}"),
        false => assert!(codes[0] == 0 && [3, 5].contains(&codes[1]), "{codes:?}"),
    }

    // A program that is none of ours, and one that heeds no state but locks.
    let spare = file(&pool, &volume(&host, "spare"));
    let mut foreign = opened(&spare, "raw");
    let _ = host.form(&["volume", "clone", "spare", "late"]).exits(5);
    let refused = host.form(&["volume", "rm", "spare", "-y"]).exits(5);
    assert!(refused.stderr.contains("qemu-io") && refused.stderr.contains("volume/spare"), "{refused:?}");
    assert!(names(&host).contains(&"spare".to_owned()) && spare.exists(), "what could not be removed is still known");
    foreign.kill().unwrap();
    foreign.wait().unwrap();

    let refused = host.form(&["volume", "attach", "spare", "web", "/spare", "--read-only"]).exits(5);
    assert!(refused.stderr.contains("never held anything"), "{refused:?}");
    // ext4 has no files of that size, others do. What is promised could never be taken back: it is tried before.
    let trial = host.path("trial");
    let can = fs::File::create(&trial).unwrap().set_len(64 << 40).is_ok();
    fs::remove_file(trial).unwrap();
    let grown = host.form(&["volume", "resize", "spare", "64T"]);
    assert_eq!((grown.code == Some(0), volume(&host, "spare")["size_bytes"] == 64_u64 << 40), (can, can), "{grown:?}");
    limits(&mut host);
    senseless(&host);
    // A volume with snapshots of its own is not removed by the way, and that is known before the VM is gone.
    for command in ["volume create keep -s 16M", "volume attach keep web /keep", "volume snapshot create keep --name one"] {
        let _ = host.form(&command.split(' ').collect::<Vec<_>>()).ok();
    }
    let refused = host.form(&["destroy", "web", "db", "--volumes", "-y"]).exits(5);
    assert!(refused.stderr.contains("volume/keep") && refused.stderr.contains("--snapshots"), "{refused:?}");
    assert!(host.vm("web").is_object() && host.vm("db").is_object());
    let _ = host.form(&["destroy", "web", "db", "--volumes", "--snapshots", "-y"]).ok();
    assert!(!names(&host).contains(&"keep".to_owned()));
    let rest = names(&host);
    let remove: Vec<&str> = ["volume", "rm", "-y"].into_iter().chain(rest.iter().map(String::as_str)).collect();
    let _ = host.form(&remove).ok();
    assert_eq!((kept(&pool), wrong(&host)), (0, Vec::new()));
    host.is_clean();
}

/// What a VM may do with a volume in a second: asked for, changed, taken back, and known to the next agent.
fn limits(host: &mut Host) {
    let limits = |host: &Host, name: &str| volume(host, name)["limits"].clone();
    let _ = host.form(&["volume", "create", "slow", "-s", "16M", "--iops", "500", "--bandwidth", "50MiB"]).ok();
    assert_eq!(limits(host, "slow"), json!({"iops": 500, "bytes_per_second": 50 << 20}));
    assert_eq!(limits(host, "spare"), json!({"iops": null, "bytes_per_second": null}));
    let said = host.form(&["volume", "set", "slow", "--iops", "none", "--bandwidth", "1MiB"]).ok().stdout;
    assert_eq!(said, "slow: at most 1 MiB/s\n");
    let _ = host.form(&["volume", "clone", "slow", "slow-too"]).ok();
    host.kill_agent();
    host.start_agent();
    for name in ["slow", "slow-too"] {
        assert_eq!(limits(host, name), json!({"iops": null, "bytes_per_second": 1 << 20}), "{name}");
    }
    assert!(host.form(&["volume", "show", "slow"]).ok().stdout.contains("1 MiB/s"));
    let _ = host.form(&["volume", "set", "slow", "--bandwidth", "none"]).ok();
    assert_eq!(limits(host, "slow"), limits(host, "spare"));
    let _ = host.form(&["volume", "set", "slow"]).exits(2);
    let _ = host.form(&["volume", "set", "nothing", "--iops", "1"]).exits(3);
    let _ = host.form(&["volume", "rm", "slow", "slow-too", "-y"]).ok();

    let of_vm = |host: &Host| host.form(&["vm", "show", "web", "-o", "json"]).ok().json()["limits"].clone();
    let _ = host.form(&["vm", "set", "web", "--net-bandwidth", "100Mbit", "--iops", "300"]).ok();
    let _ = host.form(&["vm", "set", "web", "--bandwidth", "10MiB", "--iops", "none"]).ok();
    host.kill_agent();
    host.start_agent();
    let disk = json!({"iops": null, "bytes_per_second": 10 << 20});
    assert_eq!(of_vm(host), json!({"disk": disk, "net_bytes_per_second": 12_500_000}));
    assert!(host.form(&["vm", "show", "web"]).ok().stdout.contains("100 Mbit/s each way"));
    let _ = host.form(&["vm", "set", "web", "--net-bandwidth", "none"]).ok();
    assert_eq!(of_vm(host)["net_bytes_per_second"], Value::Null);
}

/// Requests of a client that is not ours: the status says what is wrong, and nothing changes.
fn senseless(host: &Host) {
    let before = volume(host, "spare");
    for (method, path, body, status) in [
        ("POST", "/v1/volumes", r#"{"name": "x", "size_bytes": 16777217}"#, "400"),
        ("POST", "/v1/volumes", r#"{"name": "x", "size_bytes": 0}"#, "400"),
        ("POST", "/v1/volumes", r#"{"name": "x", "size_bytes": 18446744073709551615}"#, "400"),
        ("POST", "/v1/volumes", r#"{"name": "../x", "size_bytes": 16777216}"#, "400"),
        ("POST", "/v1/volumes", r#"{"name": "x", "size_bytes": 16777216, "pool": "nope"}"#, "404"),
        ("POST", "/v1/volumes", r#"{"name": "x", "size_bytes": 16777216, "live": true}"#, "400"),
        ("POST", "/v1/volumes", r#"{"name": "spare", "size_bytes": 16777216}"#, "409"),
        ("POST", "/v1/volumes/spare/resize", r#"{"size_bytes": 16777215}"#, "400"),
        ("POST", "/v1/volumes/spare/resize", r#"{"size_bytes": 17000000000001}"#, "400"),
        ("POST", "/v1/volumes", r#"{"name": "x", "size_bytes": 16777216, "limits": {"iops": 0}}"#, "400"),
        ("PATCH", "/v1/volumes/spare", r#"{"iops": 0}"#, "400"),
        ("PATCH", "/v1/volumes/spare", r#"{"bytes_per_second": 1}"#, "400"),
        ("PATCH", "/v1/volumes/spare", r#"{"speed": 1}"#, "400"),
        ("PATCH", "/v1/volumes/spare", "{}", "400"),
        ("PATCH", "/v1/volumes/nope", r#"{"iops": 1}"#, "404"),
        ("POST", "/v1/volumes/spare/attach", r#"{"vm": "web", "path": "/proc/x"}"#, "400"),
        ("POST", "/v1/volumes/spare/attach", r#"{"vm": "nope"}"#, "404"),
        ("POST", "/v1/volumes/spare/detach", "", "409"),
        ("POST", "/v1/volumes/spare/detach", r#"{"force": true}"#, "409"),
        ("POST", "/v1/volumes/spare/detach", r#"{"force": "yes"}"#, "400"),
        ("POST", "/v1/volumes/spare/clone", r#"{"name": "spare"}"#, "409"),
        ("POST", "/v1/volumes/spare/move", r#"{"pool": "local"}"#, "409"),
        ("POST", "/v1/volumes/spare/move", r#"{"pool": "nope"}"#, "404"),
        ("POST", "/v1/volumes/spare/move", r#"{"to": "local"}"#, "400"),
        ("POST", "/v1/volumes/spare/export", r#"{"nbd": true}"#, "400"),
        ("POST", "/v1/volumes/spare/export", r#"{"listen": "nowhere"}"#, "400"),
        ("POST", "/v1/volumes/spare/export", r#"{"listen": "0.0.0.0:10809"}"#, "400"),
        ("DELETE", "/v1/volumes/spare/export", "", "409"),
        ("GET", "/v1/volumes/x/import?size_bytes=1", "", "400"),
        ("GET", "/v1/volumes/x/import", "", "400"),
        ("GET", "/v1/volumes/nope/contents", "", "400"),
        ("DELETE", "/v1/volumes", "", "405"),
        ("DELETE", "/v1/volumes/nope", "", "404"),
        ("DELETE", "/v1/pools", "", "405"),
        ("DELETE", "/v1/pools/local", "", "409"),
        ("DELETE", "/v1/pools/nope", "", "404"),
        ("PATCH", "/v1/pools/local", r#"{"reserve": 1}"#, "400"),
        ("PATCH", "/v1/pools/local", r#"{"labels": {"a b": "c"}}"#, "400"),
        ("POST", "/v1/pools", r#"{"name": "x", "path": "relative"}"#, "400"),
        ("POST", "/v1/pools", r#"{"name": "local", "path": "/tmp"}"#, "409"),
    ] {
        let socket = host.socket();
        let output = Command::new("curl")
            .args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--unix-socket", socket.to_str().unwrap()])
            .args(["--request", method, "--header", "content-type: application/json", "--data-binary", body])
            .arg(format!("http://agent{path}"))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), status, "{method} {path} {body}");
    }
    assert_eq!(volume(host, "spare"), before);
    assert!(!names(host).contains(&"x".to_owned()));
}
