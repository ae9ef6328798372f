//! Volumes that leave a host and enter it: exports over NBD, used by the NBD clients of others, and transfers from files and to them. None of it
//! needs a running guest. Each test ends with nothing left over and nothing wrong.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use form_tests::host::{Host, enter_own_network, wait};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn volume(host: &Host, name: &str) -> Value {
    host.form(&["volume", "show", name, "-o", "json"]).ok().json()
}

fn names(host: &Host) -> Vec<String> {
    host.form(&["volume", "ls", "-o", "name"]).ok().stdout.lines().map(str::to_owned).collect()
}

fn create(host: &Host, name: &str, more: &[&str]) {
    let _ = host.form(&[&["volume", "create", name, "-s", "64M"], more].concat()).ok();
}

/// Exports a volume, and gives what NBD clients are to be told.
fn export(host: &Host, name: &str, more: &[&str]) -> String {
    let export = host.form(&[&["volume", "export", name, "--nbd", "-o", "json"], more].concat()).ok().json();
    export["uri"].as_str().unwrap().to_owned()
}

fn socket(uri: &str) -> PathBuf {
    uri.split_once("socket=").expect("a Unix socket").1.into()
}

/// What a program prints, and whether it ended well.
fn tried(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    (output.status.success(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

fn run(program: &str, arguments: &[&str]) -> String {
    let (well, text) = tried(program, arguments);
    assert!(well, "{program} {arguments:?}: {text}");
    text
}

fn qemu_io(uri: &str, commands: &[&str]) {
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    let text = run("qemu-io", &[&["-f", "raw"], &commands[..], &[uri]].concat());
    assert!(!text.contains("failed"), "{commands:?}: {text}");
}

/// A client that has been greeted and says nothing.
fn silent(uri: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket(uri)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream
}

/// Whether a client was hung up on.
fn is_over(mut stream: UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// A volume that is exported becomes 64 MiB larger: clients that come then see it so.
fn grows(host: &Host, name: &str, uri: &str) {
    let size = volume(host, name)["size_bytes"].as_u64().unwrap() + (64 << 20);
    let _ = host.form(&["volume", "resize", name, &format!("{size}B")]).ok();
    assert_eq!(run("nbdinfo", &["--size", uri]).trim(), size.to_string());
    let shown = volume(host, name);
    assert!(shown["size_bytes"] == size && shown["fault"].is_null() && shown["export"]["uri"] == uri, "{shown}");
}

fn is_clean(host: &Host) {
    let sockets = fs::read_dir(host.root().join("run/formation/nbd")).unwrap().count();
    assert_eq!((names(host), sockets), (Vec::new(), 0));
    host.is_clean();
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_an_export_is_read_and_written_by_the_clients_of_others() {
    enter_own_network();
    let host = Host::start();
    for format in ["raw", "qcow2"] {
        create(&host, "data", &["--format", format]);
        let uri = export(&host, "data", &["--writable"]);
        qemu_io(&uri, &["write -P 7 1M 3M", "write -f -P 9 60M 4k", "read -P 0 0 1M", "read -P 7 1M 3M", "flush"]);
        let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
        let export = &info["exports"][0];
        assert_eq!((&export["export-name"], export["export-size"].as_u64()), (&"data".into(), Some(64 << 20)));
        let can = |what: &str| export[what].as_bool().unwrap_or_else(|| panic!("{what} in {export}"));
        assert!(can("can_trim") && can("can_zero") && can("can_fua") && can("can_multi_conn") && can("can_df") && !can("is_read_only"));
        // What is where, as (offset, length, state): data is 0, and 3 is a hole that reads as zeros.
        let map = |uri: &str| -> Vec<(u64, u64, u64)> {
            let map: Vec<Value> = serde_json::from_str(&run("nbdinfo", &["--map", "--json", uri])).unwrap();
            let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
            map.iter().map(|extent| (number(extent, "offset"), number(extent, "length"), number(extent, "type"))).collect()
        };
        let mib = |number: u64| number << 20;
        let found = map(&uri);
        assert_eq!(found[..2], [(0, mib(1), 3), (mib(1), mib(3), 0)], "{format}: {found:?}");
        let data: u64 = found.iter().filter(|extent| extent.2 == 0).map(|extent| extent.1).sum();
        assert!((mib(3) + 4096..=mib(3) + 65_536).contains(&data), "{format}: {found:?}");
        // Discarded and zeroed, in the middle and with odd ends; room is given back.
        let before = volume(&host, "data")["allocated_bytes"].as_u64().unwrap();
        qemu_io(&uri, &["discard 2M 1M", "write -z -u 60M 4k", "write -z 1M 512", "flush"]);
        qemu_io(&uri, &["read -P 0 1M 512", "read -P 7 1049088 1023k", "read -P 0 2M 1M", "read -P 7 3M 1M", "read -P 0 60M 64k"]);
        assert_eq!(map(&uri)[..4].iter().map(|extent| extent.2).collect::<Vec<_>>(), [3, 0, 3, 0], "{format}");
        let after = volume(&host, "data")["allocated_bytes"].as_u64().unwrap();
        assert!(before - after >= mib(1), "{format}: {before}, then {after}");
        // A whole copy out, by several connections at once, and one in.
        let copy = host.path(&format!("{format}.copy"));
        run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
        let bytes = fs::read(&copy).unwrap();
        assert!(bytes.len() == 64 * MIB && bytes[3 * MIB..4 * MIB].iter().all(|byte| *byte == 7) && bytes[2 * MIB] == 0, "{format}");
        fio(&uri);
        fs::write(&copy, [vec![5; MIB], vec![0; 63 * MIB]].concat()).unwrap();
        run("nbdcopy", &["--flush", copy.to_str().unwrap(), &uri]);
        assert!(run("qemu-img", &["compare", "-f", "raw", "-F", "raw", copy.to_str().unwrap(), &uri]).contains("identical"));
        let _ = host.form(&["volume", "unexport", "data"]).ok();
        assert!(!socket(&uri).exists() && volume(&host, "data")["export"].is_null());
        let file = host.root().join("var/lib/formation/volumes").join(volume(&host, "data")["id"].as_str().unwrap());
        let file = file.join(format!("volume.{format}"));
        assert!(
            run("qemu-img", &["compare", "-f", "raw", "-F", format, copy.to_str().unwrap(), file.to_str().unwrap()]).contains("identical")
        );
        if format == "qcow2" {
            run("qemu-img", &["check", "-f", format, file.to_str().unwrap()]);
        }
        let _ = host.form(&["volume", "rm", "data", "-y"]).ok();
    }
    is_clean(&host);
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_an_export_that_may_not_be_written_is_not_and_tcp_stays_at_home() {
    enter_own_network();
    let host = Host::start();
    create(&host, "data", &[]);
    let uri = export(&host, "data", &["--listen", "127.0.0.1:0"]);
    assert!(uri.starts_with("nbd://127.0.0.1:") && !uri.contains(":0/"), "{uri}");
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), (64 << 20).to_string());
    let (well, text) = tried("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    assert!(!well || text.contains("failed") || text.contains("read only") || text.contains("read-only"), "{text}");
    run("nbdinfo", &["--is", "read-only", &uri]);
    assert_eq!(volume(&host, "data")["allocated_bytes"], 0, "nothing was written");
    // Who reads may be many.
    let _ = host.form(&["volume", "clone", "data", "copy"]).ok();
    for (arguments, code) in [
        (&["volume", "export", "data", "--nbd"][..], 5),
        (&["volume", "resize", "data", "32M"], 2),
        (&["volume", "export", "copy", "--nbd", "--listen", "0.0.0.0:10809"], 2),
        (&["volume", "export", "copy", "--nbd", "--listen", &uri["nbd://".len()..uri.len() - "/data".len()]], 5),
        (&["volume", "export", "copy"], 2),
        (&["volume", "export", "nope", "--nbd"], 3),
        (&["volume", "unexport", "copy"], 5),
        (&["volume", "unexport", "nope"], 3),
    ] {
        let _ = host.form(arguments).exits(code);
    }
    grows(&host, "data", &uri);
    create(&host, "image", &["--format", "qcow2"]);
    for options in [&["--writable"][..], &[]] {
        let uri = export(&host, "image", options);
        if !options.is_empty() {
            qemu_io(&uri, &["write -P 7 0 1M"]);
        }
        grows(&host, "image", &uri);
        if !options.is_empty() {
            // Where there was nothing before.
            qemu_io(&uri, &["write -P 9 100M 1M"]);
        }
        let _ = host.form(&["volume", "unexport", "image"]).ok();
    }
    let uri = export(&host, "image", &[]);
    let read = run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 7 0 1M", "-c", "read -P 9 100M 1M", "-c", "read -P 0 190M 1M", &uri]);
    assert!(!read.contains("failed"), "{read}");
    let _ = host.form(&["volume", "unexport", "image"]).ok();
    let image = host.root().join("var/lib/formation/volumes").join(volume(&host, "image")["id"].as_str().unwrap()).join("volume.qcow2");
    assert!(run("qemu-img", &["check", image.to_str().unwrap()]).contains("No errors"));
    let _ = host.form(&["volume", "rm", "image", "-y"]).ok();
    // An export that only reads ends with its volume.
    let _ = host.form(&["volume", "rm", "data", "copy", "-y"]).ok();
    assert!(!tried("nbdinfo", &[&uri]).0);
    is_clean(&host);
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_who_may_write_has_a_volume_alone() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);
    create(&host, "data", &[]);
    let uri = export(&host, "data", &["--writable"]);
    let client = silent(&uri);
    for arguments in [
        &["volume", "attach", "data", "web", "/data"][..],
        &["volume", "clone", "data", "copy"],
        &["volume", "rm", "data", "-y"],
        &["volume", "export", "data", "--nbd"],
        &["volume", "export", "data", "--to", host.path("file").to_str().unwrap()],
    ] {
        let refused = host.form(arguments).exits(5);
        assert!(refused.stderr.contains(&uri) && refused.stderr.contains("form volume unexport data"), "{refused:?}");
    }
    grows(&host, "data", &uri);
    let _ = host.form(&["volume", "unexport", "data"]).ok();
    assert!(is_over(client));

    // The other way round, and a VM that wants to start with what is exported.
    let _ = host.form(&["volume", "attach", "data", "web", "/data"]).ok();
    let uri = export(&host, "data", &[]);
    let started = host.form(&["vm", "start", "web"]).exits(1);
    assert!(started.stderr.contains("form volume unexport data"), "{started:?}");
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let client = silent(&uri);
    let _ = host.form(&["volume", "detach", "data"]).ok();
    assert!(is_over(client) && volume(&host, "data")["export"].is_null(), "an export ends when its volume is detached");

    // Of an agent that is killed no export is left, and what was exported is as it was.
    let uri = export(&host, "data", &["--writable"]);
    qemu_io(&uri, &["write -f -P 7 0 1M"]);
    let client = silent(&uri);
    host.kill_agent();
    assert!(is_over(client) && socket(&uri).exists(), "it had no time to remove its socket");
    host.start_agent();
    assert!(!socket(&uri).exists() && volume(&host, "data")["export"].is_null());
    let uri = export(&host, "data", &[]);
    let read = run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 7 0 1M", &uri]);
    assert!(!read.contains("failed"), "{read}");
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = host.form(&["volume", "rm", "data", "-y"]).ok();
    is_clean(&host);
}

/// Memory that a process has of its own, in kilobytes.
fn anonymous(pid: u32) -> i64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    text.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap().split_whitespace().next().unwrap().parse().unwrap()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_clients_come_and_go_and_get_stuck_and_cost_nothing() {
    enter_own_network();
    let host = Host::start();
    create(&host, "data", &[]);
    let uri = export(&host, "data", &["--writable"]);
    qemu_io(&uri, &["write -P 7 0 16M"]);
    let pid = host.agent_pid().unwrap();
    let go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04data\0\0";
    // A plain read of 512 bytes, whose simple reply has 16 more.
    let read = |length: u32| [&[0x25, 0x60, 0x95, 0x13][..], &[0; 20], &length.to_be_bytes()].concat();
    let cycle = || {
        let mut client = silent(&uri);
        client.write_all(go).unwrap();
        // What the export is, in 12 bytes, and that it may begin.
        client.read_exact(&mut [0; 20 + 12 + 20]).unwrap();
        client.write_all(&read(512)).unwrap();
        let mut answer = [0; 16 + 512];
        client.read_exact(&mut answer).unwrap();
        assert!(answer[16..] == [7; 512]);
        client
    };
    // Who does not read what it asked for holds up nobody.
    let mut stuck = cycle();
    for _ in 0..8 {
        stuck.write_all(&read(16 << 20)).unwrap();
    }
    (0..100).for_each(|_| drop(cycle()));
    let is_quiet = || volume(&host, "data")["export"]["clients"] == 1;
    wait("only the stuck client is left", is_quiet);
    let (memory, open) = (anonymous(pid), descriptors(pid));
    for _ in 0..1000 {
        drop(cycle());
    }
    wait("only the stuck client is left", is_quiet);
    let grown = anonymous(pid) - memory;
    println!("1000 clients: the agent has {grown} kB more");
    assert!(grown < 2048, "{grown} kB of 1000 clients");
    // Of the agent's own work some are open now and then.
    wait("the descriptors of 1000 clients are closed", || descriptors(pid) <= open + 2);
    // Exports too, and what a client gets that comes while one ends.
    let _ = host.form(&["volume", "unexport", "data"]).ok();
    drop(stuck);
    let memory = anonymous(pid);
    for _ in 0..20 {
        let uri = export(&host, "data", &["--writable"]);
        let client = silent(&uri);
        let _ = host.form(&["volume", "unexport", "data"]).ok();
        assert!(is_over(client));
    }
    let grown = anonymous(pid) - memory;
    assert!(grown < 2048, "{grown} kB of 20 exports");
    let _ = host.form(&["volume", "rm", "data", "-y"]).ok();
    is_clean(&host);
}

fn drafts(pool: &Path) -> usize {
    fs::read_dir(pool.join(".tmp")).map_or(0, |entries| entries.count())
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_volumes_come_from_files_and_go_to_files() {
    enter_own_network();
    let mut host = Host::start();
    let pool = host.root().join("var/lib/formation/volumes");
    let raw = host.path("disk.raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(200 << 20).unwrap();
    let noise: Vec<u8> = (0..3_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    file.write_all_at(&noise, 1_000_001).unwrap();
    file.write_all_at(b"end", (200 << 20) - 3).unwrap();
    let qcow2 = host.path("disk.qcow2");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&qcow2)]);
    // Each way in and each way out holds the same.
    for (name, source, kept, out) in [("a", &raw, "raw", "qcow2"), ("b", &qcow2, "raw", "raw"), ("c", &raw, "qcow2", "raw")] {
        let _ = host.form(&["volume", "import", name, &text(source), "--format", kept]).ok();
        let shown = volume(&host, name);
        assert_eq!(shown["size_bytes"], 200 << 20, "{shown}");
        assert!(shown["allocated_bytes"].as_u64().unwrap() < 8 << 20, "holes take no room: {shown}");
        let written = host.path(&format!("{name}.{out}"));
        let _ = host.form(&["volume", "export", name, "--to", &text(&written), "--format", out]).ok();
        assert!(run("qemu-img", &["compare", "-f", "raw", "-F", out, &text(&raw), &text(&written)]).contains("identical"), "{name}");
        let _ = host.form(&["volume", "export", name, "--to", &text(&written)]).exits(5);
    }
    let _ = host.form(&["volume", "import", "a", &text(&raw)]).exits(5);
    let _ = host.form(&["volume", "import", "d", &text(&raw), "--size", "100M"]).exits(2);
    let _ = host.form(&["volume", "import", "d", &text(&raw), "--pool", "nope"]).exits(3);
    // Small and odd files become volumes of a size that volumes have.
    fs::write(host.path("small"), "x").unwrap();
    let _ = host.form(&["volume", "import", "d", &text(&host.path("small"))]).ok();
    assert_eq!(volume(&host, "d")["size_bytes"], 16 << 20);

    // A client that breaks off, an agent that is killed: nothing is left.
    let request =
        "GET /v1/volumes/e/import?size_bytes=67108864 HTTP/1.1\r\nhost: agent\r\nconnection: upgrade\r\nupgrade: form-import\r\n\r\n";
    let begin = |host: &Host| {
        let mut client = UnixStream::connect(host.socket()).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        client.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 101");
        // One frame with eight bytes of offset and some of data.
        client.write_all(&[&[1, 12, 0, 0, 0][..], &[0; 8], b"data"].concat()).unwrap();
        wait("the agent is at it", || drafts(&pool) == 1);
        client
    };
    let client = begin(&host);
    let second = host.form(&["volume", "import", "e", &text(&raw)]).exits(5);
    assert!(second.stderr.contains("under way"), "{second:?}");
    drop(client);
    wait("what broke off is gone", || drafts(&pool) == 0 && host.no_operation_is_under_way());
    assert_eq!(host.operations()[0]["status"], "failed");
    let client = begin(&host);
    host.kill_agent();
    drop(client);
    host.start_agent();
    wait("what was under way has ended", || host.no_operation_is_under_way());
    assert_eq!((drafts(&pool), host.operations()[0]["status"].clone()), (0, "failed".into()));
    // Bytes that are not in the volume.
    let mut client = begin(&host);
    client.write_all(&[&[1, 12, 0, 0, 0][..], &(64_u64 << 20).to_le_bytes(), b"data"].concat()).unwrap();
    wait("it is refused", || drafts(&pool) == 0 && host.no_operation_is_under_way());
    assert_eq!(names(&host), ["a", "b", "c", "d"]);
    let _ = host.form(&["volume", "rm", "a", "b", "c", "d", "-y"]).ok();
    is_clean(&host);
}

/// Writes at random places with `fio`, and reads it all back.
fn fio(uri: &str) {
    let uri = format!("--uri={uri}");
    let options = [
        "--rw=randwrite",
        "--bs=4k",
        "--size=8M",
        "--iodepth=16",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_state_save=0",
        "--output-format=terse",
    ];
    let text = run("fio", &[&["--name=nbd", "--ioengine=nbd", &uri], &options[..]].concat());
    assert!(!text.contains("verify:") && !text.contains("error"), "{text}");
}

/// The options with which QEMU reaches an export with TLS.
fn qemu_options(uri: &str, directory: &Path) -> [String; 2] {
    let port = uri.split_once("192.0.2.1:").unwrap().1.split('/').next().unwrap();
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", directory.display());
    [object, format!("driver=nbd,host=192.0.2.1,port={port},export=data,tls-creds=tls0")]
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_with_tls_an_export_leaves_its_host_and_one_client_reaches_it() {
    enter_own_network();
    run("ip", &["address", "add", "192.0.2.1/32", "dev", "lo"]);
    let host = Host::start();
    create(&host, "data", &[]);
    create(&host, "other", &[]);
    let (own, strange) = (host.path("own"), host.path("strange"));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let _ = host.form(&["volume", "export", "data", "--nbd", "--tls", &text(&own)]).exits(2);
    let _ = host.form(&["volume", "export", "data", "--nbd", "--listen", "0.0.0.0:0", "--tls", &text(&own)]).exits(2);
    let _ = host.form(&["volume", "export", "nope", "--nbd", "--listen", "192.0.2.1:0", "--tls", &text(&own)]).exits(3);
    assert!(!own.exists(), "nothing is left of what was not exported");
    let uri = export(&host, "data", &["--writable", "--listen", "192.0.2.1:0", "--tls", &text(&own)]);
    assert!(uri.starts_with("nbds://192.0.2.1:") && uri.ends_with(&format!("/data?tls-certificates={}", own.display())), "{uri}");
    // QEMU is stricter with certificates than libnbd.
    let [object, image] = qemu_options(&uri, &own);
    let qemu = |command: &str| tried("qemu-io", &["--object", &object, "-c", command, "--image-opts", &image]);
    let (well, said) = qemu("write -P 7 32M 4M");
    assert!(well && !said.contains("failed"), "{said}");
    let copy = host.path("copy");
    run("nbdcopy", &[&uri, &text(&copy)]);
    let bytes = fs::read(&copy).unwrap();
    assert!(bytes.len() == 64 * MIB && bytes[32 * MIB..36 * MIB].iter().all(|byte| *byte == 7));

    // Nobody else: not without TLS, not without a certificate, not with that of another export.
    let _ = export(&host, "other", &["--listen", "192.0.2.1:0", "--tls", &text(&strange)]);
    let plain = uri.split('?').next().unwrap().replace("nbds:", "nbd:");
    assert!(!tried("nbdinfo", &[&plain]).0);
    fs::copy(own.join("ca-cert.pem"), strange.join("ca-cert.pem")).unwrap();
    assert!(!tried("nbdinfo", &["--size", &uri.replace("/own", "/strange")]).0);
    let _ = host.form(&["volume", "import", "new", "--from", &uri.replace("/own", "/strange")]).exits(1);
    let _ = host.form(&["volume", "import", "new", "--from", &plain]).exits(1);
    fs::remove_file(strange.join("client-cert.pem")).unwrap();
    assert!(!tried("nbdinfo", &["--size", &uri.replace("/own", "/strange")]).0);

    // What is served with TLS becomes a volume, of this host or of another.
    let _ = host.form(&["volume", "import", "new", "--from", &uri]).ok();
    let out = host.path("out");
    let _ = host.form(&["volume", "export", "new", "--to", &text(&out)]).ok();
    assert!(fs::read(&out).unwrap() == bytes);
    assert!(volume(&host, "new")["allocated_bytes"].as_u64().unwrap() < 16 << 20, "holes take no room");
    let _ = host.form(&["volume", "unexport", "data"]).ok();
    assert!(!tried("nbdinfo", &["--size", &uri]).0);
    let _ = host.form(&["volume", "rm", "data", "other", "new", "-y"]).ok();
    is_clean(&host);
}

/// A server of others, until this is dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(file: &Path, socket: &Path) -> Self {
        let child = Command::new("qemu-nbd").args(["-f", "qcow2", "-r", "-t", "-x", "disk", "-k"]).args([socket, file]).spawn().unwrap();
        wait("the other server serves", || socket.exists());
        Self(child)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs root: tests/run-system"]
fn system_volumes_come_from_the_servers_of_others() {
    enter_own_network();
    let host = Host::start();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (raw, qcow2, out, socket) = (host.path("raw"), host.path("qcow2"), host.path("out"), host.path("a socket"));
    let file = fs::File::create(&raw).unwrap();
    file.set_len(80 << 20).unwrap();
    file.write_all_at(&vec![5; 3 * MIB], 7 << 20).unwrap();
    file.write_all_at(b"end", (80 << 20) - 3).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&qcow2)]);
    let server = QemuNbd::start(&qcow2, &socket);
    let uri = format!("nbd+unix:///disk?socket={}", text(&socket).replace(' ', "%20"));
    let _ = host.form(&["volume", "import", "a", "--from", &uri]).ok();
    let _ = host.form(&["volume", "import", "b", "--from", &uri, "--format", "qcow2", "--size", "100M"]).ok();
    assert_eq!((volume(&host, "a")["size_bytes"].as_u64(), volume(&host, "b")["size_bytes"].as_u64()), (Some(80 << 20), Some(100 << 20)));
    assert!(volume(&host, "a")["allocated_bytes"].as_u64().unwrap() < 8 << 20, "holes take no room");
    for name in ["a", "b"] {
        let _ = host.form(&["volume", "export", name, "--to", &text(&out)]).ok();
        assert!(fs::read(&out).unwrap()[..80 * MIB] == fs::read(&raw).unwrap(), "{name}");
        fs::remove_file(&out).unwrap();
    }
    let _ = host.form(&["volume", "import", "c", "--from", &uri.replace("disk", "nope")]).exits(3);
    let _ = host.form(&["volume", "import", "c", "--from", &uri, "--size", "40M"]).exits(2);
    let _ = host.form(&["volume", "import", "c", "--from", "disk.raw"]).exits(2);
    let _ = host.form(&["volume", "import", "c", &text(&raw), "--from", &uri]).exits(2);
    let _ = host.form(&["volume", "import", "c"]).exits(2);
    drop(server);
    let gone = host.form(&["volume", "import", "c", "--from", &uri]).exits(7);
    assert!(gone.stderr.contains("cannot be reached"), "{gone:?}");
    let _ = host.form(&["volume", "rm", "a", "b", "-y"]).ok();
    is_clean(&host);
}
