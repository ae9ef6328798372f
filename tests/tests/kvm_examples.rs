//! Every example, as a reader meets it: checked, laid out, built, deployed to a host and looked at.
//!
//! Building needs the mirrors and no KVM, running needs KVM and no mirrors: the first test fills the build cache that the second uses.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use form_tests::{
    host::{Host, get, wait},
    programs::Programs,
};
use serde_json::Value;

/// Those that are deployed; the host of the sandbox is built and run by `form sandbox up`.
const DEPLOYED: [&str; 5] = ["hello", "scratch", "static-site", "systemd", "worker"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").canonicalize().unwrap()
}

fn formfile(example: &str) -> String {
    folder().join(example).join("Formfile").to_str().unwrap().to_owned()
}

/// As the example's own first lines say.
fn compile_scratch() {
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-static", "-o", "server", "server.c"]).current_dir(folder().join("scratch"));
    assert!(compile.status().unwrap().success());
}

#[test]
fn system_every_example_is_checked_formatted_and_built() {
    let home = tempfile::tempdir().unwrap();
    let form = Programs::new(home.path());
    compile_scratch();
    let mut found: Vec<String> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.retain(|name| folder().join(name).join("Formfile").exists());
    found.sort();
    let mut known = DEPLOYED.to_vec();
    known.push("sandbox-host");
    known.sort_unstable();
    assert_eq!(found, known, "an example that no test deploys");
    for example in &found {
        let _ = form.form(["check", &formfile(example)]).ok();
        let _ = form.form(["fmt", "--check", &formfile(example)]).ok();
    }
    for example in DEPLOYED {
        let built = form.form(["build", &formfile(example), "-o", "json"]).ok().json();
        let again = form.form(["build", &formfile(example), "-o", "json"]).ok();
        assert!(!again.stderr.contains("changed ("), "nothing is built twice: {}", again.stderr);
        assert_eq!((&again.json()["digest"], &again.json()["unchanged"]), (&built["digest"], &Value::Bool(true)));
        let verified = form.form(["image", "verify", "--local", example, "-o", "json"]).ok().json();
        assert_eq!(verified["bad"], Value::Array(vec![]), "{verified}");
    }
}

/// A disk of Debian as a cloud image is: its partitions, its kernel, and addresses asked for by DHCP. Made with Debian's own tools.
/// The kernel is Debian's ordinary one, which knows the identifier of a VM's generation as its cloud kernel does not, without the
/// drivers that are its largest.
const CLOUD: &str = r#"
export PATH="$PATH:/usr/sbin:/sbin"
LEFT_OUT="sound drivers/gpu drivers/media drivers/iio drivers/infiniband drivers/staging drivers/net/ethernet drivers/net/wireless"
set -f # For dpkg, and not for the shell.
mmdebstrap --quiet --variant=minbase --include=systemd-sysv,udev,linux-image-amd64,iproute2 \
    $(printf -- '--dpkgopt=path-exclude=/lib/modules/*/kernel/%s/* ' $LEFT_OUT) \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' bookworm tree.tar
mkdir tree && tar -C tree -xf tree.tar --exclude='./dev/*'
printf '[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n' >tree/etc/systemd/network/10-all.network
ln -s /lib/systemd/system/systemd-networkd.service tree/etc/systemd/system/multi-user.target.wants/
printf 'PARTUUID=1-1 / ext4 rw,discard 0 1\nPARTUUID=1-15 /boot/efi vfat defaults 0 0\n' >tree/etc/fstab
truncate -s 2G root && mke2fs -q -F -t ext4 -d tree root
truncate -s 2100M disk && printf 'label: gpt\nstart=32768, size=4194304\n' | sfdisk -q disk
dd if=root of=disk bs=1M seek=16 conv=notrunc,sparse status=none
qemu-img convert -c -O qcow2 disk disk.qcow2
"#;

#[test]
fn system_a_cloud_image_is_taken_in() {
    let home = tempfile::tempdir().unwrap();
    let form = Programs::new(home.path());
    let place = tempfile::tempdir().unwrap();
    let mut make = Command::new("bash");
    make.args(["-euc", CLOUD]).current_dir(place.path());
    assert!(make.status().unwrap().success());
    let disk = place.path().join("disk.qcow2");
    let disk = disk.to_str().unwrap();
    let _ = form.form(["image", "rm", "--local", "cloud-disk", "-y"]);
    let image = form.form(["image", "import", disk, "cloud-disk", "-o", "json"]).ok();
    assert!(image.stderr.contains("boots with its own kernel") && !image.stderr.contains("-cloud-amd64"), "{}", image.stderr);
    let again = form.form(["image", "import", disk, "cloud-disk", "-o", "json"]).ok().json();
    assert_eq!(again["digest"], image.json()["digest"]);
    // Half of it: a download that broke off.
    let file = std::fs::File::options().write(true).open(disk).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let _ = form.form(["image", "import", disk, "half"]).exits(1);
    let _ = form.form(["image", "show", "--local", "half"]).exits(3);
}

/// The image that the test above has made.
#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_cloud_image_boots_with_its_own_kernel() {
    let host = Host::start();
    let _ = host.form(&["vm", "create", "cloud", "--image", "cloud-disk", "--disk", "6G", "--timeout", "300s"]).ok();
    let run = |command: &str| inside(&host, "cloud", None, command);
    assert_eq!(run("cat /proc/1/comm"), "systemd");
    // The kernel is the one that its own package has put there, with all its modules beside it.
    assert_eq!(run("test -e /boot/vmlinuz-$(uname -r) && modprobe nbd && echo there"), "there");
    assert_eq!(run("systemctl is-active systemd-networkd"), "active");
    let address = host.vm("cloud")["ipv4"].as_str().unwrap().to_owned();
    assert!(run("networkctl --no-pager status eth0; ip -4 -o address show eth0").contains(&format!("inet {address}/32")));
    assert!(run("ip route").contains("default via 169.254.77.1"));
    assert_eq!(run("test $(stat -f -c %b /) -gt 1400000 && echo grown"), "grown");
    // The second time it is on the host, with its kernel.
    let kernel = |name: &str| host.form(&["vm", "show", name, "-o", "json"]).ok().json()["desired"]["kernel"].clone();
    let _ = host.form(&["vm", "create", "second", "--image", "cloud-disk", "--disk", "6G", "--no-start"]).ok();
    assert!(kernel("second").is_string());
    assert_eq!(kernel("second"), kernel("cloud"));
    let _ = host.form(&["destroy", "second", "-y"]).ok();
    becomes_other_machines(&host);
    let _ = host.form(&["destroy", "cloud", "-y"]).ok();
    let _ = host.form(&["image", "rm", "cloud-disk:1", "-y"]).ok();
    host.is_clean();
}

/// A copy of it, and itself as it was a while ago: its kernel is told, and draws its random numbers anew.
fn becomes_other_machines(host: &Host) {
    let run = |vm: &str, command: &str| inside(host, vm, None, command);
    let told = |vm: &str| run(vm, "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true");
    assert_eq!(told("cloud"), "0");
    let _ = host.form(&["vm", "fork", "cloud", "copy", "--timeout", "300s"]).ok();
    wait("the kernel of the copy is told", || told("copy") == "1");
    assert_eq!((run("copy", "cat /proc/sys/kernel/hostname").as_str(), told("cloud").as_str()), ("copy", "0"));
    assert_ne!(run("copy", "cat /etc/machine-id"), run("cloud", "cat /etc/machine-id"));
    let address = host.vm("copy")["ipv4"].as_str().unwrap().to_owned();
    assert!(run("copy", "ip -4 -o address show eth0").contains(&format!("inet {address}/32")));
    let _ = host.form(&["destroy", "copy", "-y"]).ok();

    let _ = host.form(&["vm", "snapshot", "create", "cloud", "--name", "before", "--timeout", "300s"]).ok();
    assert_eq!(run("cloud", "touch /after && echo made"), "made");
    let _ = host.form(&["vm", "snapshot", "restore", "cloud", "before", "-y", "--timeout", "300s"]).ok();
    wait("the kernel is told that it went back", || told("cloud") == "1");
    assert_eq!(run("cloud", "test ! -e /after && cat /proc/sys/kernel/hostname && systemctl is-active systemd-networkd"), "cloud\nactive");
    let _ = host.form(&["vm", "snapshot", "rm", "cloud", "before", "-y"]).ok();
}

/// What a command in the VM prints.
fn inside(host: &Host, vm: &str, user: Option<&str>, command: &str) -> String {
    let mut words = vec!["exec", vm];
    words.extend(user.iter().flat_map(|user| ["--user", user]));
    words.extend(["--", "sh", "-c", command]);
    host.form(&words).ok().stdout.trim_end().to_owned()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_every_example_does_what_it_is_for() {
    let host = Host::start();
    // One after the other: two guests at once are what software emulation stumbles over.
    for example in DEPLOYED {
        let _ = host.form(&["deploy", &formfile(example), "-y", "--timeout", "300s"]).ok();
        assert!(host.form(&["deploy", &formfile(example), "-y"]).ok().stderr.contains("unchanged"));
        let vm = host.vm(example);
        assert_eq!((&vm["state"], &vm["ready"]), (&"running".into(), &true.into()), "{vm}");
        match example {
            "hello" => assert!(get(8080, "/").unwrap().ends_with("Hello from a microVM, hello!\n")),
            "static-site" => static_site(),
            "scratch" => assert!(get(8082, "/").unwrap().ends_with("Hello from scratch!\n")),
            "worker" => worker(&host),
            "systemd" => systemd(&host),
            other => panic!("nothing looks at {other}"),
        }
        let _ = host.form(&["destroy", example, "-y"]).ok();
        let _ = host.form(&["image", "rm", &format!("{example}:1"), "-y"]).ok();
    }
    let _ = host.form(&["volume", "rm", "worker-reports", "-y"]).ok();
    host.is_clean();
    assert_eq!(host.form(&["image", "ls", "-o", "json"]).ok().json(), Value::Array(vec![]));
}

fn static_site() {
    let page = std::fs::read_to_string(folder().join("static-site/site/index.html")).unwrap();
    assert!(get(8081, "/").unwrap().ends_with(&page));
    assert!(get(8081, "/style.css").unwrap().contains("text/css"));
    assert!(get(8081, "/nothing").unwrap().starts_with("HTTP/1.1 404"));
}

/// An image of one program, without any account of its own.
#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_an_image_from_scratch_has_its_users() {
    let host = Host::start();
    let file = host.app("lonely", r#"["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]"#, 18086);
    let text = std::fs::read_to_string(&file).unwrap();
    let keys = tempfile::tempdir().unwrap();
    let key = ssh_key(keys.path());
    let public = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    let users = format!(
        "USER username:ada passwd:secret shell:/bin/sh groups:operators chpasswd_expire:no ssh_authorized_keys:\"{}\"\n\
         COPY --chown=ada:operators index.html /home/ada/\nENTRYPOINT",
        public.trim()
    );
    std::fs::write(&file, text.replacen("ENTRYPOINT", &users, 1)).unwrap();
    let _ = host.form(&["deploy", &file, "-y", "--timeout", "300s"]).ok();
    let run = |user: Option<&str>, command: &str| inside(&host, "lonely", user, command);
    assert_eq!(run(Some("ada"), "busybox id"), "uid=1000(ada) gid=1000(ada) groups=100(operators),1000(ada)");
    assert_eq!(run(None, "busybox stat -c '%U %G %a' /home/ada /home/ada/index.html"), "ada ada 700\nada operators 644");
    let shadow = run(None, "busybox cat /etc/shadow");
    assert!(shadow.starts_with("ada:$6$"), "{shadow}");
    let hash = shadow.split(':').nth(1).unwrap();
    let salt = hash.split('$').nth(2).unwrap();
    assert_eq!(run(None, &format!("busybox mkpasswd -m sha512 -S '{salt}' secret")), hash);
    logs_in(&host, &key);
    let _ = host.form(&["destroy", "lonely", "-y"]).ok();
    host.is_clean();
}

/// A key of its own, without a passphrase.
fn ssh_key(directory: &Path) -> PathBuf {
    let key = directory.join("key");
    let mut make = Command::new("ssh-keygen");
    make.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key);
    assert!(make.status().unwrap().success());
    key
}

/// Through the agent, and straight to the address: the image has no server, so it is ours.
fn logs_in(host: &Host, key: &Path) {
    let key = key.to_str().unwrap();
    let ssh = |words: &[&str]| host.form(&[&["ssh", "lonely", "-i", key][..], words].concat());
    let session = ssh(&["--", "busybox id; echo $HOME; exit 7"]).exits(7);
    assert_eq!(session.stdout, "uid=1000(ada) gid=1000(ada) groups=100(operators),1000(ada)\n/home/ada\n");
    let _ = host.form(&["ssh", "root@lonely", "-i", key, "--", "true"]).exits(4);
    let _ = host.form(&["ssh", "eve@lonely", "-i", key, "--", "true"]).exits(3);
    // The key that the guest has is the one that the address shows.
    let address = host.vm("lonely")["ipv4"].as_str().unwrap().to_owned();
    let public = inside(host, "lonely", None, "busybox cat /etc/ssh/ssh_host_ed25519_key.pub");
    let known_hosts = Path::new(key).with_file_name("known_hosts");
    std::fs::write(&known_hosts, format!("{address} {public}\n")).unwrap();
    let mut plain = Command::new("ssh");
    plain.args(["-F", "none", "-i", key, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o"]);
    plain.arg(format!("UserKnownHostsFile={}", known_hosts.display())).args(["-l", "ada", &address, "echo straight"]);
    let plain = plain.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&plain.stdout), "straight\n", "{}", String::from_utf8_lossy(&plain.stderr));
    let _ = host.form(&["vm", "stop", "lonely"]).ok();
    let stopped = ssh(&["--", "true"]).exits(5);
    assert!(stopped.stderr.contains("vm/lonely is stopped"), "{}", stopped.stderr);
}

/// It runs as its own user, reports once a minute and is healthy for that reason.
fn worker(host: &Host) {
    let ticks = || host.form(&["logs", "worker"]).ok().stdout.matches("report written: load").count();
    let before = ticks();
    assert!(before >= 1);
    assert_eq!(host.vm("worker")["health"], "healthy");
    assert_eq!(inside(host, "worker", None, "stat -c %U /var/lib/worker/latest"), "worker");
    let volume = host.form(&["volume", "show", "worker-reports", "-o", "json"]).ok().json();
    let device = inside(host, "worker", None, "findmnt -no SOURCE /var/lib/worker");
    assert_eq!((volume["attachment"]["device"].as_str(), volume["attachment"]["vm"].as_str()), (Some(device.as_str()), Some("worker")));
    // The pid of its shell is not known; whose the process is, is.
    assert_eq!(inside(host, "worker", None, "ps -o user= -C worker | sort -u"), "worker");
    wait("the worker reports again", || ticks() > before);
}

/// systemd is process 1, its service runs, and the users are those of the Formfile.
fn systemd(host: &Host) {
    let run = |user: Option<&str>, command: &str| inside(host, "systemd", user, command);
    assert_eq!(run(None, "cat /proc/1/comm"), "systemd");
    wait("systemd has started everything", || {
        let state = host.form(&["exec", "systemd", "--", "systemctl", "is-system-running"]);
        state.stdout.trim() == "running"
    });
    assert_eq!(run(None, "systemctl list-units --failed --no-legend --plain"), "");
    assert_eq!(run(None, "systemctl is-active clock.service"), "active");
    assert!(run(None, "journalctl --unit clock --output cat --no-pager").contains("UTC 20"), "the service's output is in the journal");

    assert_eq!(run(Some("alice"), "id -un; id -gn; echo $HOME; pwd"), "alice\nalice\n/home/alice\n/home/alice");
    assert_eq!(run(Some("alice"), "id -Gn | tr ' ' '\\n' | sort"), "adm\nalice");
    assert_eq!(run(None, "getent passwd alice | cut -d: -f6-"), "/home/alice:/bin/bash");
    assert_eq!(run(Some("alice"), "sudo -n id -un"), "root", "alice has no password to ask for");
    assert!(run(None, "cat /home/alice/.ssh/authorized_keys").contains("alice@example.com"));
    assert_eq!(run(None, "stat -c '%a %U' /home/alice/.ssh /home/alice/.ssh/authorized_keys"), "700 alice\n600 alice");

    assert_eq!(run(Some("bob"), "id -Gn"), "bob");
    assert_eq!(run(None, "getent passwd bob | cut -d: -f7"), "/bin/sh");
    let _ = host.form(&["exec", "systemd", "--user", "bob", "--", "sudo", "-n", "true"]).exits(1);
    // The password is the Formfile's, as crypt(3) of the guest sees it; it must be changed at the first login.
    assert_eq!(run(None, "getent shadow bob | cut -d: -f3"), "0");
    let check = r#"field=$(getent shadow bob | cut -d: -f2); perl -e 'print crypt($ARGV[0], $ARGV[1]) eq $ARGV[1] ? "fits" : "differs"' change-me "$field""#;
    assert_eq!(run(None, check), "fits");
    assert!(run(None, "getent shadow root | cut -d: -f2").starts_with(['!', '*']), "nobody logs in as root");
    assert!(!run(None, "grep -rs change-me /etc /var/lib /run || true").contains("change-me"), "no clear text anywhere");
    twin(host);
}

/// A copy of it while it runs: systemd and its services go on there, in another machine.
fn twin(host: &Host) {
    let _ = host.form(&["vm", "fork", "systemd", "twin", "--timeout", "300s"]).ok();
    let both = |command: &str| (inside(host, "systemd", None, command), inside(host, "twin", None, command));
    assert_eq!(both("cat /proc/sys/kernel/hostname /etc/hostname"), ("systemd\nsystemd".to_owned(), "twin\ntwin".to_owned()));
    for own in ["cat /etc/machine-id", "ip -4 -o addr show eth0", "cat /sys/class/net/eth0/address"] {
        let (one, other) = both(own);
        assert!(!one.is_empty() && !other.is_empty() && one != other, "{own}: {one} {other}");
    }
    // The server for its users is ours, and comes back with a key of the copy's own.
    let host_key = "cat /etc/ssh/ssh_host_ed25519_key.pub 2>/dev/null || true";
    wait("the copy has a host key of its own", || {
        let (one, other) = both(host_key);
        one.starts_with("ssh-ed25519 ") && other.starts_with("ssh-ed25519 ") && one != other
    });
    let since = "systemctl show --property=ActiveState --property=MainPID --property=NRestarts clock.service";
    let (one, other) = both(since);
    assert!(one.contains("ActiveState=active") && one.contains("NRestarts=0"), "{one}");
    assert_eq!(one, other, "its service goes on as the process that it was");
    assert_eq!(both("systemctl is-system-running"), ("running".to_owned(), "running".to_owned()));
    let (_, groups) = both("ls /sys/fs/cgroup");
    assert!(!groups.contains("form-held"), "{groups}");
    let _ = host.form(&["destroy", "twin", "-y"]).ok();
}
