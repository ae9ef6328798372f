//! What VMs were before and the images that this needs, on a machine whose `/dev/kvm` may not be able to run a guest.

use std::{
    fs,
    process::{Command, Stdio},
};

use form_tests::{
    disk::SmallDisk,
    host::{Host, SERVE, enter_own_network, wait},
};
use form_types::Failpoint;
use serde_json::{Value, json};

/// What `web` should be.
fn desired(host: &Host) -> Value {
    host.form(&["vm", "show", "web", "-o", "json"]).ok().json()["desired"].clone()
}

fn offered(host: &Host) -> Vec<(String, bool)> {
    let versions = host.form(&["rollback", "web", "--list", "-o", "json"]).ok().json();
    let one = |version: &Value| (version["image"].as_str().unwrap().to_owned(), version["is_there"].as_bool().unwrap());
    versions.as_array().unwrap().iter().map(one).collect()
}

/// Status and body of a request to the agent's socket.
fn post(host: &Host, path: &str, body: &Value) -> (String, Value) {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--unix-socket"])
        .arg(host.socket())
        .args(["--write-out", "\n%{http_code}", "--header", "content-type: application/json", "--data", &body.to_string()])
        .arg(format!("http://agent{path}"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.to_owned(), serde_json::from_str(body).unwrap())
}

/// A host with `web`, which should be its second image. That it was healthy as both is what its host's record says; no guest has run.
fn host_with_two_versions() -> (Host, Value, Value) {
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);
    let first = desired(&host);
    let nothing = host.form(&["rollback", "web", "-y"]).exits(5);
    assert!(nothing.stderr.contains("nothing that vm/web could go back to"), "{nothing:?}");
    let _ = host.form(&["rollback", "nope", "-y"]).exits(3);

    let file = host.app("web", SERVE, 18090);
    fs::write(host.path("web").join("index.html"), "it works\nsecond\n").unwrap();
    let _ = host.form(&["deploy", &file, "-y"]);
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let second = desired(&host);
    assert_ne!(first["image"], second["image"]);
    let signed = json!({"header": "", "body": second.to_string()});
    let kept = json!({"request": signed, "boot": "00".repeat(32), "earlier": [{"request": first, "image": "web:1"}]});
    let id = host.vm("web")["id"].as_str().unwrap().to_owned();
    fs::write(host.root().join("var/lib/formation/vms").join(id).join("deployed.json"), kept.to_string()).unwrap();
    (host, first, second)
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_a_vm_goes_back_to_what_its_host_keeps_and_to_nothing_else() {
    enter_own_network();
    let (mut host, first, second) = host_with_two_versions();
    assert_eq!(offered(&host), [("web:1".to_owned(), true)]);

    // The image is kept for it.
    let images = host.form(&["image", "ls", "-o", "json"]).ok().json();
    assert_eq!((&images[0]["kept_for"], &images[1]["kept_for"]), (&json!(["web"]), &json!([])), "{images}");
    let pruned = host.form(&["image", "prune", "-y"]).ok();
    assert!(pruned.stderr.contains("one to go back to: nothing to remove"), "{pruned:?}");

    // So is one that its owner wants kept, by whatever name it is asked to go.
    let _ = host.form(&["image", "set", "web:1", "--keep", "--label", "stage=production"]).ok();
    let named = host.form(&["image", "ls", "-l", "stage=production", "-o", "json"]).ok().json();
    assert_eq!((named.as_array().unwrap().len(), &named[0]["version"], &named[0]["keep"]), (1, &json!(1), &json!(true)), "{named}");
    let refused = host.form(&["image", "rm", "web:1", "-y"]).exits(5);
    assert!(refused.stderr.contains("form image set web:1 --no-keep"), "{refused:?}");
    assert!(host.form(&["image", "prune", "--all", "-y"]).ok().stderr.contains("nothing to remove"));
    let _ = host.form(&["image", "set", "web:1", "--no-keep", "--remove-label", "stage"]).ok();
    assert_eq!(host.form(&["image", "ls", "-l", "stage=production", "-o", "json"]).ok().json(), json!([]));
    let _ = host.form(&["image", "set", "web:9", "--keep"]).exits(3);

    // Images and VMs have so many labels and so long ones, whoever asks.
    let many: Vec<String> = (0..65).map(|number| format!("--label=tier-{number}=a")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let long = format!("--label=a={}", "v".repeat(1025));
    for set in [["image", "set", "web:1"], ["vm", "set", "web"]] {
        let refused = host.form(&[&set, many.as_slice()].concat()).exits(2);
        assert!(refused.stderr.contains("that would be 65 labels: 64 are possible"), "{refused:?}");
        let refused = host.form(&[&set, [long.as_str()].as_slice()].concat()).exits(2);
        assert!(refused.stderr.contains("1025 bytes: 1024 are possible"), "{refused:?}");
        let _ = host.form(&[&set, &many[..40]].concat()).ok();
        let refused = host.form(&[&set, &many[40..]].concat()).exits(2);
        assert!(refused.stderr.contains("65 labels"), "{refused:?}");
        let removed: Vec<String> = (0..40).map(|number| format!("--remove-label=tier-{number}")).collect();
        let removed: Vec<&str> = removed.iter().map(String::as_str).collect();
        let _ = host.form(&[&set, removed.as_slice()].concat()).ok();
    }
    let mut labelled = first.clone();
    labelled["spec"]["labels"] = json!({"a": "v".repeat(1025)});
    let (status, error) = post(&host, "/v1/plan", &labelled);
    assert_eq!((status.as_str(), &error["error"]["code"]), ("400", &json!("invalid")), "{error}");
    assert_eq!(post(&host, "/v1/deploy", &labelled).0, "400");

    // Nothing else is taken for a version of it.
    let mut forged = first.clone();
    forged["spec"]["resources"]["memory_mib"] = json!(256);
    let (status, error) = post(&host, "/v1/vms/web/rollback", &json!({"to": forged}));
    assert_eq!((status.as_str(), &error["error"]["code"]), ("409", &json!("conflict")), "{error}");
    let (status, error) = post(&host, "/v1/vms/web/rollback", &json!({"to": second}));
    assert!(status == "409" && error["error"]["message"].as_str().unwrap().contains("is that version already"), "{error}");
    let mut another = first.clone();
    another["spec"]["name"] = json!("other");
    assert_eq!(post(&host, "/v1/vms/web/rollback", &json!({"to": another})).0, "400");
    assert_eq!(post(&host, "/v1/vms/nope/rollback", &json!({"to": another})).0, "400");
    assert_eq!(post(&host, "/v1/vms/other/rollback", &json!({"to": another})).0, "404");
    assert_eq!(desired(&host), second);

    // The agent dies on the way: it is done, or is not, and says so.
    for point in [Failpoint::DeployRemembered, Failpoint::StateStored, Failpoint::DeploySubmitted, Failpoint::DeployRecorded] {
        println!("=== rollback at {}", point.as_str());
        let before = desired(&host);
        host.kill_agent();
        host.start_agent_with(Some(point.as_str()));
        let mut client = host.form_command(&["rollback", "web", "-y"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let died = host.dies_at(point.as_str(), |_| false);
        let _ = (client.kill(), client.wait());
        assert!(died, "a rollback does not come to {}", point.as_str());
        host.start_agent();
        wait("the operation ends", || host.no_operation_is_under_way());
        let newest = host.operations().remove(0);
        assert_eq!((&newest["kind"], &newest["status"]), (&json!("vm-rollback"), &json!("failed")), "no guest runs here: {newest}");
        let unchanged = newest["error"]["hint"].as_str().unwrap().contains("run the same command again");
        assert_eq!(unchanged, point == Failpoint::DeployRemembered, "{newest}");
        assert_eq!(desired(&host) == before, unchanged, "{newest}");
        // What it should be now is never among what it can go back to.
        let now = desired(&host)["image"] == first["image"];
        assert_eq!(offered(&host), [(if now { "web:2" } else { "web:1" }.to_owned(), true)]);
        let _ = host.form(&["vm", "stop", "web"]).ok();
    }

    // An image that is gone is no way back, and is said to be.
    if desired(&host)["image"] == first["image"] {
        let failed = host.form(&["rollback", "web", "-y"]).exits(1);
        assert!(failed.stderr.contains("vm/web"), "{failed:?}");
        let _ = host.form(&["vm", "stop", "web"]).ok();
    }
    assert_eq!(desired(&host), second);
    let _ = host.form(&["image", "rm", "web:1", "-y"]).ok();
    assert_eq!(offered(&host), [("web:1".to_owned(), false)]);
    let gone = host.form(&["rollback", "web", "-y"]).exits(3);
    assert!(gone.stderr.contains("does not have web:1 any more"), "{gone:?}");
    assert_eq!(post(&host, "/v1/vms/web/rollback", &json!({"to": first})).0, "404");
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_an_image_that_is_only_on_a_host_is_exported() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);
    // A machine that has never seen it.
    let elsewhere = tempfile::tempdir().unwrap();
    let form = |arguments: &[&str]| {
        let output = host.form_command(arguments).env("XDG_CACHE_HOME", elsewhere.path()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let path = |name: &str| host.path(name).to_str().unwrap().to_owned();
    let (code, _, said) = form(&["image", "export", "web", &path("none.tar")]);
    assert!(code == Some(3) && said.contains("--from-host"), "{said}");
    assert_eq!(form(&["image", "export", "nope", &path("none.tar"), "--from-host"]).0, Some(3));

    let (code, exported, said) = form(&["image", "export", "web", &path("there.tar"), "--from-host", "-o", "json"]);
    assert_eq!(code, Some(0), "{said}");
    let exported: Value = serde_json::from_str(&exported).unwrap();
    let image = host.form(&["image", "show", "web", "-o", "json"]).ok().json();
    assert_eq!((&exported["digest"], &exported["version"]), (&image["digest"], &image["version"]));
    assert_eq!(form(&["image", "ls", "--local", "-q"]).1, "", "it is no image of that machine");
    // It is the same file as of the machine that built it.
    let _ = host.form(&["image", "export", "web", &path("here.tar")]).ok();
    assert!(fs::read(path("there.tar")).unwrap() == fs::read(path("here.tar")).unwrap());
    assert_eq!(form(&["image", "export", "web", &path("there.tar"), "--from-host"]).0, Some(5));

    // A full disk: nothing is there, and what was fetched is used by the next try. Two at once take turns.
    let disk = SmallDisk::mount(&host.path("small"), &host.path("mounted"), 8);
    disk.fill_but(64);
    let (code, _, said) = form(&["image", "export", "web", &path("mounted/full.tar"), "--from-host"]);
    assert!(code == Some(1) && said.contains("free some space on the disk of"), "{said}");
    assert!(!host.path("mounted/full.tar").exists());
    drop(disk);
    std::thread::scope(|scope| {
        let both = ["one.tar", "two.tar"].map(|name| scope.spawn(move || form(&["image", "export", "web", &path(name), "--from-host"])));
        for one in both {
            let (code, _, said) = one.join().unwrap();
            assert_eq!(code, Some(0), "{said}");
        }
    });

    // A block that is damaged on the host is named, and there is no file.
    let rootfs = host.root().join("var/lib/formation/vm-images").join(image["digest"].as_str().unwrap()).join("root.ext4");
    // The superblock is there in every image.
    let write = |bytes: &[u8]| {
        let mut permissions = fs::metadata(&rootfs).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        fs::set_permissions(&rootfs, permissions).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&fs::File::options().write(true).open(&rootfs).unwrap(), bytes, 0).unwrap();
    };
    write(b"damaged");
    let (code, _, said) = form(&["image", "export", "web:1", &path("damaged.tar"), "--from-host"]);
    assert!(
        code == Some(1) && said.contains("block 0 of web:1 is damaged on the host") && said.contains("form image verify web:1"),
        "{said}"
    );
    assert!(!host.path("damaged.tar").exists());
    write(&[0; 7]);
    assert_eq!(form(&["image", "export", "web:1", &path("mended.tar"), "--from-host"]).0, Some(0));
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs root, and a kernel bundle in the build cache: tests/run-system"]
fn system_kernels_that_nothing_needs_go_and_others_stay() {
    enter_own_network();
    let mut host = Host::new();
    host.configure(Host::IMPATIENT);
    host.start_agent();
    host.stopped_vms(&["web"]);
    let get = |host: &Host, path: &str| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--unix-socket"]).arg(host.socket()).arg(format!("http://agent{path}"));
        serde_json::from_slice::<Value>(&command.output().unwrap().stdout).unwrap()
    };
    let kernels = get(&host, "/v1/kernels");
    let (kernel, all) = (&kernels[0], kernels.as_array().unwrap());
    assert_eq!((all.len(), &kernel["needed_by"]), (1, &json!(["vm/web"])), "{kernels}");
    let digest = kernel["digest"].as_str().unwrap().to_owned();
    let directory = host.root().join("var/lib/formation/kernel").join(&digest);
    let two_days_ago = || {
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * 86_400);
        fs::File::open(&directory).unwrap().set_modified(then).unwrap();
    };
    let prune = |host: &Host, arguments: &[&str]| host.form(&[&["image", "prune", "--all"], arguments].concat()).ok();

    // A stopped VM needs it, and so does its snapshot when the VM is another one by then.
    two_days_ago();
    assert!(prune(&host, &["-y"]).stderr.contains("nothing to remove"));
    let _ = host.form(&["vm", "snapshot", "create", "web", "--name", "before"]).ok();
    assert_eq!(get(&host, "/v1/kernels")[0]["needed_by"], json!(["snapshot/web/before", "vm/web"]));
    // It is on record, whoever asks for its removal.
    let refused = Command::new("curl")
        .args(["--silent", "--request", "DELETE", "--unix-socket"])
        .arg(host.socket())
        .arg(format!("http://agent/v1/kernels/{digest}"))
        .output()
        .unwrap();
    let refused: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!((&refused["kind"], &refused["error"]["code"]), (&json!("kernel-remove"), &json!("conflict")), "{refused}");

    // Nothing needs it any more, and somebody who is about to make a VM has asked for it.
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = get(&host, &format!("/v1/kernels/{digest}"));
    let kept = prune(&host, &["-y"]);
    assert!(kept.stderr.contains("sent or asked for within a day") && directory.exists(), "{kept:?}");
    two_days_ago();
    let name = format!("kernel/{}", &digest[..12]);
    assert!(prune(&host, &["--dry-run", "-q"]).stdout.contains(&name));
    host.kill_agent();
    host.start_agent();
    let pruned = prune(&host, &["-y"]);
    assert!(pruned.stdout.contains(&format!("{name}: removed (")) && pruned.stderr.contains("1 kernel ("), "{pruned:?}");
    assert!(!directory.exists());
    assert_eq!(get(&host, "/v1/kernels"), json!([]));

    // The next deploy sends it again.
    host.stopped_vms(&["web"]);
    assert!(directory.exists());
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}
