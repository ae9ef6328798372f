//! Whole builds. Those named `slow_…` bootstrap a real Debian base and need the network; the others make bases of their own.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command as Process,
};

use form_image::{BuildError, BuildEvent, BuildOptions, Builder, BuiltImage, CachePaths, Cancel};
use form_types::{
    Spec,
    spec::{Command, Copy, CopySource, Resources, Restart, RestartPolicy, Step, StepAction, User},
};

struct Project {
    directory: tempfile::TempDir,
    spec: Spec,
    options: BuildOptions,
}

/// What an observer saw, in short.
#[derive(Default)]
struct Seen {
    events: Vec<String>,
    output: Vec<String>,
}

impl Seen {
    fn cached(&self) -> usize {
        self.events.iter().filter(|event| *event == "cached").count()
    }

    fn done(&self) -> usize {
        self.events.iter().filter(|event| *event == "done").count()
    }
}

impl Project {
    fn new(from: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("context")).unwrap();
        let spec = Spec {
            name: "hello".parse().unwrap(),
            description: None,
            from: from.to_owned(),
            args: BTreeMap::new(),
            steps: vec![],
            resources: Resources { vcpus: 1, memory_mib: 512, disk_gib: 5, gpus: vec![] },
            users: vec![],
            run_as: None,
            env: vec![],
            workdir: None,
            entrypoint: vec![],
            cmd: vec![],
            ports: vec![],
            volumes: vec![],
            networks: vec![],
            replicas: 1,
            restart: Restart { policy: RestartPolicy::Always, max_retries: None },
            healthcheck: None,
            labels: BTreeMap::new(),
            model: None,
        };
        Self { directory, spec, options: BuildOptions::default() }
    }

    fn context(&self) -> PathBuf {
        self.directory.path().join("context")
    }

    fn cache(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.context().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn step(&mut self, action: StepAction) {
        let line = self.spec.steps.len() as u32 + 2;
        self.spec.steps.push(Step { action, line });
    }

    fn copy(&mut self, source: &str, to: &str) {
        self.step(StepAction::Copy(Copy {
            sources: vec![CopySource::Path(source.to_owned())],
            to: to.to_owned(),
            chown: None,
            chmod: None,
        }));
    }

    fn run(&mut self, text: &str) {
        self.step(StepAction::Run { command: Command::Shell(text.to_owned()), env: vec![], workdir: None });
    }

    fn try_build(&self) -> (Result<BuiltImage, BuildError>, Seen) {
        let mut seen = Seen::default();
        let builder = Builder::new(CachePaths::new(self.cache()));
        let mut observer = |event: BuildEvent<'_>| match event {
            BuildEvent::StepCached { .. } => seen.events.push("cached".to_owned()),
            BuildEvent::StepFinished { .. } => seen.events.push("done".to_owned()),
            BuildEvent::StepFailed { line, exit_code, .. } => seen.events.push(format!("failed {line:?} {exit_code:?}")),
            BuildEvent::Finished { unchanged, .. } => seen.events.push(format!("finished {unchanged}")),
            BuildEvent::Output { line } => seen.output.push(line.to_owned()),
            BuildEvent::StepStarted { .. } | BuildEvent::Waiting => {}
        };
        let result = builder.build(&self.spec, &self.context(), &self.options, &mut observer);
        (result, seen)
    }

    fn build(&self) -> (BuiltImage, Seen) {
        let (result, seen) = self.try_build();
        match result {
            Ok(image) => (image, seen),
            Err(error) => panic!("{error}\n{:?}\n{}", seen.events, seen.output.join("\n")),
        }
    }

    /// The newest image's file system as a file, checked by e2fsck.
    fn disk(&self) -> PathBuf {
        let path = self.directory.path().join("disk");
        let store = Builder::new(CachePaths::new(self.cache())).store();
        store.export(&"hello".parse().unwrap(), &path).unwrap();
        let output = Process::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        path
    }

    fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.cache().join("layers")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| name.starts_with("tmp-")).collect()
    }
}

/// Asks debugfs, which knows the file system without mounting it.
fn debugfs(disk: &Path, request: &str) -> String {
    let output = Process::new("/sbin/debugfs").args(["-R", request]).arg(disk).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn cat(disk: &Path, path: &str) -> String {
    String::from_utf8_lossy(&Process::new("/sbin/debugfs").args(["-R", &format!("cat \"{path}\"")]).arg(disk).output().unwrap().stdout)
        .into_owned()
}

fn user(name: &str, shell: &str, groups: &[&str]) -> User {
    User {
        name: name.to_owned(),
        sudo: false,
        shell: shell.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        ssh_authorized_keys: vec![],
        lock_passwd: false,
        ssh_pwauth: true,
        disable_root: true,
        chpasswd_expire: true,
        has_passwd: false,
        passwd: None,
    }
}

/// A root file system with a shell and some programs: one static busybox.
fn busybox_root(project: &Project) {
    for directory in ["root/bin", "root/etc", "root/sbin", "root/usr/lib"] {
        fs::create_dir_all(project.context().join(directory)).unwrap();
    }
    let busybox = project.context().join("root/bin/busybox");
    fs::copy("/bin/busybox", &busybox).expect("the package busybox-static is installed");
    for name in [
        "sh", "cat", "chmod", "chown", "echo", "find", "id", "ln", "ls", "mkdir", "mknod", "mv", "rm", "rmdir", "sleep", "touch", "pwd",
        "env", "test", "seq", "stat",
    ] {
        symlink("busybox", project.context().join("root/bin").join(name)).unwrap();
    }
    project.write("root/etc/passwd", "root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/:/bin/sh\n");
    project.write("root/etc/group", "root:x:0:\nweb:x:1002:\n");
    symlink("usr/lib", project.context().join("root/lib")).unwrap();
}

#[test]
fn an_unchanged_build_does_nothing_and_a_changed_copy_reruns_what_follows() {
    let mut project = Project::new("scratch");
    project.write("one", "1");
    project.write("two", "2");
    project.copy("one", "/one");
    project.copy("two", "/dir/two");
    let (first, seen) = project.build();
    assert_eq!(seen.events, ["done", "done", "done", "finished false"]);
    let (second, seen) = project.build();
    assert_eq!(seen.events, ["cached", "cached", "cached", "finished true"]);
    assert_eq!((first.digest, first.version), (second.digest, second.version));
    project.write("two", "changed");
    let (third, seen) = project.build();
    assert_eq!(seen.events, ["cached", "cached", "done", "finished false"]);
    assert_eq!(third.version, 2);
    let disk = project.disk();
    assert_eq!((cat(&disk, "/one"), cat(&disk, "/dir/two")), ("1".to_owned(), "changed".to_owned()));
    assert!(project.leftovers().is_empty());
}

#[test]
fn the_same_inputs_give_the_same_image_anywhere() {
    let images: Vec<_> = (0..2)
        .map(|round| {
            let mut project = Project::new("./root");
            busybox_root(&project);
            project.write("app/main", "x".repeat(200_000));
            project.write("app/deep/er", "y");
            project.copy("app", "/srv/app");
            project.run("mkdir -p /data && echo made > /data/file && touch /data/empty && ln /data/file /data/hard && ln -s file /data/soft && rm -r /srv/app/deep");
            if round == 1 {
                std::thread::sleep(std::time::Duration::from_millis(1100));
            }
            project.build().0.digest
        })
        .collect();
    assert_eq!(images[0], images[1]);
}

#[test]
fn a_run_step_can_do_everything_to_a_tree() {
    let mut project = Project::new("./root");
    busybox_root(&project);
    project.write("root/keep/file", "old");
    project.write("root/gone/deep/file", "old");
    project.write("root/was-file", "old");
    project.write("root/was-dir/x", "old");
    let script = r#"
        test $(id -u) = 0; test -c /dev/null; test -d /proc/self
        rm -r /gone; rm /was-file; mkdir /was-file; echo in > /was-file/in; rm -r /was-dir; echo now > /was-dir
        mkdir '/sp ace'; echo a > '/sp ace/qu"ote'; echo b > "/sp ace/it's"; echo c > '/sp ace/<12>'; echo d > '/sp ace/-dash'; echo e > '/sp ace/#hash'; echo f > '/sp ace/back\slash'
        echo owned > /owned; chown 1001:1002 /owned; chmod 4750 /owned
        ln /keep/file /keep/link; ln -s '/some where/"else' /symlink; ln -s /very/long/$(seq -s / 100) /longlink
        mknod /pipe p; : > /empty; rm -r /keep-not-there 2>/dev/null || true
        rm -r /usr/lib; mkdir /usr/lib; echo new > /usr/lib/new
        echo ephemeral > /run/nothing; mkdir /many; for i in $(seq 500); do : > /many/a-rather-long-file-name-to-fill-directories-$i; done
        ln /owned /many/another-name
        echo seen; echo also >&2
    "#;
    project.run(script);
    let (_, seen) = project.build();
    assert_eq!(seen.output, ["seen", "also"]);
    let disk = project.disk();
    assert!(debugfs(&disk, "stat /gone").contains("not found"));
    assert_eq!((cat(&disk, "/was-file/in"), cat(&disk, "/was-dir")), ("in\n".to_owned(), "now\n".to_owned()));
    for (name, text) in [("qu\"\"ote", "a"), ("it's", "b"), ("<12>", "c"), ("-dash", "d"), ("#hash", "e"), ("back\\slash", "f")] {
        assert_eq!(cat(&disk, &format!("/sp ace/{name}")), format!("{text}\n"), "{name}");
    }
    let owned = debugfs(&disk, "stat /owned");
    assert!(
        owned.contains("Mode:  04750") && owned.contains("User:  1001") && owned.contains("Group:  1002") && owned.contains("Links: 2"),
        "{owned}"
    );
    assert!(debugfs(&disk, "stat /keep/link").contains("Links: 2"));
    assert!(debugfs(&disk, "stat /symlink").contains(r#"Fast link dest: "/some where/"else""#));
    assert!(debugfs(&disk, "stat /longlink").contains("Type: symlink"));
    assert!(debugfs(&disk, "stat /pipe").contains("Type: FIFO"));
    assert!(debugfs(&disk, "stat /run/nothing").contains("not found"));
    assert_eq!(debugfs(&disk, "ls -p /many").lines().filter(|line| line.contains("a-rather")).count(), 500);
    assert_eq!(cat(&disk, "/usr/lib/new"), "new\n");
}

#[test]
fn later_steps_see_earlier_ones_and_copies_follow_links_of_the_image() {
    let mut project = Project::new("./root");
    busybox_root(&project);
    project.write("tool", "#!/bin/sh\necho tool runs as $(id -u) in $(pwd) with $GREETING\n");
    project.step(StepAction::Copy(Copy {
        sources: vec![CopySource::Path("tool".to_owned()), CopySource::Inline { name: "conf".to_owned(), text: "inline\n".to_owned() }],
        to: "/lib/".to_owned(),
        chown: Some("web".to_owned()),
        chmod: Some("750".to_owned()),
    }));
    let env = vec![("GREETING".to_owned(), "a b".to_owned())];
    project.step(StepAction::Run { command: Command::Exec(vec!["/usr/lib/tool".to_owned()]), env, workdir: Some("/opt/here".to_owned()) });
    project.spec.workdir = Some("/srv/www".to_owned());
    let (_, seen) = project.build();
    assert_eq!(seen.output, ["tool runs as 0 in /opt/here with a b"]);
    let disk = project.disk();
    assert_eq!(cat(&disk, "/usr/lib/conf"), "inline\n");
    let stat = debugfs(&disk, "stat /usr/lib/tool");
    assert!(stat.contains("Mode:  0750") && stat.contains("User:  1001") && stat.contains("Group:  1002"), "{stat}");
    assert!(debugfs(&disk, "stat /lib").contains("symlink"));
    assert!(debugfs(&disk, "stat /srv/www").contains("directory") && debugfs(&disk, "stat /opt/here").contains("directory"));
}

#[test]
fn an_image_without_account_tools_gets_its_users_all_the_same() {
    let mut project = Project::new("scratch");
    project.spec.users = vec![user("ada", "/server", &["operators"]), user("bob", "/server", &["ada"])];
    project.write("server", "x");
    project.step(StepAction::Copy(Copy {
        sources: vec![CopySource::Path("server".to_owned())],
        to: "/home/ada/".to_owned(),
        chown: Some("ada:operators".to_owned()),
        chmod: None,
    }));
    let first = project.build().0;
    let disk = project.disk();
    assert_eq!(
        cat(&disk, "/etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home/ada:/server\nbob:x:1001:1001::/home/bob:/server\n"
    );
    assert_eq!(cat(&disk, "/etc/group"), "root:x:0:\nada:x:1000:bob\noperators:x:100:ada\nbob:x:1001:\n");
    for (path, mode, uid, gid) in [("/home/ada", "0700", 1000, 1000), ("/home", "0755", 0, 0), ("/home/ada/server", "0644", 1000, 100)] {
        let found = debugfs(&disk, &format!("stat {path}")).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(found.contains(&format!("Mode: {mode}")), "{path}: {found}");
        assert!(found.contains(&format!("User: {uid} Group: {gid} ")), "{path}: {found}");
    }
    assert_eq!(project.build().0.digest, first.digest);

    // A base that has accounts keeps them with their numbers; new ones get the next.
    let mut project = Project::new("./root");
    busybox_root(&project);
    project.spec.users = vec![user("web", "/bin/cat", &[]), user("ada", "/bin/sh", &["web"])];
    project.run("id -u ada; stat -c %u:%g /home/ada");
    assert_eq!(project.build().1.output, ["1002", "1002:1003"]);
    let disk = project.disk();
    assert!(cat(&disk, "/etc/passwd").contains("web:x:1001:1002::/:/bin/cat\n"));
    assert!(cat(&disk, "/etc/group").contains("web:x:1002:ada\n"));

    project.spec.users = vec![user("a:b", "/bin/sh", &[])];
    let error = project.try_build().0.unwrap_err().to_string();
    assert!(error.contains("`a:b` is no name of a user or group"), "{error}");
}

#[test]
fn a_failing_step_names_its_line_and_leaves_nothing() {
    let mut project = Project::new("./root");
    busybox_root(&project);
    project.run("for i in $(seq 30); do echo line $i; done; exit 3");
    let (result, seen) = project.try_build();
    let Err(BuildError::StepFailed { line, exit_code, tail, .. }) = result else { panic!("{result:?}") };
    assert_eq!((line, exit_code, tail.len(), tail[0].as_str()), (Some(2), 3, 20, "line 11"));
    assert_eq!(seen.events, ["done", "failed Some(2) Some(3)"]);
    assert!(project.leftovers().is_empty());
    project.spec.steps[0].action = StepAction::Run { command: Command::Shell("echo fixed".to_owned()), env: vec![], workdir: None };
    assert_eq!(project.build().1.events, ["cached", "done", "finished false"]);
}

#[test]
fn a_cancelled_build_stops_and_leaves_nothing() {
    let mut project = Project::new("./root");
    busybox_root(&project);
    project.run("echo up; sleep 1000");
    project.options.cancel = Cancel::new();
    let cancel = project.options.cancel.clone();
    let mut observer = |event: BuildEvent<'_>| {
        if matches!(event, BuildEvent::Output { .. }) {
            cancel.cancel();
        }
    };
    let result = Builder::new(CachePaths::new(project.cache())).build(&project.spec, &project.context(), &project.options, &mut observer);
    assert!(matches!(result, Err(BuildError::Cancelled)), "{result:?}");
    assert!(project.leftovers().is_empty());
}

#[test]
fn a_one_file_change_moves_few_blocks() {
    let mut project = Project::new("scratch");
    for number in 0..300u32 {
        let text: String =
            (0..2000).map(|line| format!("{number} {line} {}\n", number.wrapping_mul(2_654_435_761).wrapping_add(line))).collect();
        project.write(&format!("app/module{:02}/file{number}", number % 20), text);
    }
    project.copy("app", "/srv/app");
    let before = project.build().0;
    let total = before.manifest.rootfs.blocks.stored_bytes();
    let have = before.manifest.rootfs.blocks.digests();
    // Early in the tree, and long enough to need new blocks: all that lies behind it shifts.
    let grown = "grown\n".repeat(10_000);
    project.write("app/module01/file1", &grown);
    let after = project.build().0;
    let moved: usize = after.manifest.rootfs.blocks.digests().difference(&have).map(|digest| after.read_block(digest).unwrap().len()).sum();
    eprintln!("{moved} of {total} bytes moved for {} changed", grown.len());
    assert!(moved <= 2 * grown.len() + (1 << 20), "{moved} bytes moved for {} changed, of {total}", grown.len());
}

#[test]
fn copies_that_cannot_be_are_refused_with_their_line() {
    let mut project = Project::new("./root");
    busybox_root(&project);
    project.write("file", "x");
    for (source, to, word) in
        [("missing", "/x", "does not exist"), ("../x", "/x", "leaves"), ("file", "/etc/passwd/x", "is a file in the image")]
    {
        project.spec.steps.clear();
        project.copy(source, to);
        let error = project.try_build().0.unwrap_err().to_string();
        assert!(error.starts_with("line 2: `COPY`") && error.contains(word), "{error}");
    }
    assert!(project.leftovers().is_empty());
}

#[test]
fn an_image_can_be_a_base_and_the_store_keeps_versions() {
    let mut project = Project::new("scratch");
    project.write("a", "a");
    project.copy("a", "/a");
    let base = project.build().0;
    let mut other = Project::new("image:hello");
    other.directory = project.directory;
    other.spec.name = "second".parse().unwrap();
    other.write("b", "b");
    other.copy("b", "/b");
    let second = other.build().0;
    assert_eq!(second.manifest.history.len(), 3);
    let builder = Builder::new(CachePaths::new(other.cache()));
    let store = builder.store();
    assert_eq!(store.list().unwrap().len(), 2);
    let report = store.verify(&"second".parse().unwrap()).unwrap();
    assert!(report.blocks > 0 && report.bad.is_empty());
    store.remove(&"hello".parse().unwrap()).unwrap();
    assert!(store.get(&"hello".parse().unwrap()).is_err());
    assert!(builder.prune(&mut |_: BuildEvent<'_>| {}).unwrap() < u64::MAX);
    assert!(store.verify(&"second".parse().unwrap()).unwrap().bad.is_empty());
    assert_eq!((base.version, second.version), (1, 1));
    let error = other.try_build().0.unwrap_err().to_string();
    assert!(error.contains("no image `hello`"), "{error}");
}

#[test]
fn attributes_survive_from_a_tarball() {
    let mut project = Project::new("./root.tar.gz");
    busybox_root(&project);
    let context = project.context();
    fs::set_permissions(context.join("root/bin/busybox"), fs::Permissions::from_mode(0o4755)).unwrap();
    let script = "mknod root/etc/null c 1 3 2>/dev/null; setcap cap_net_raw+ep root/bin/busybox 2>/dev/null; setfattr -n user.note -v yes root/etc/group 2>/dev/null; \
        tar --xattrs --xattrs-include='*' --numeric-owner --owner=5 --group=60000 -czf root.tar.gz -C root . && rm -r root";
    assert!(Process::new("sh").args(["-c", script]).current_dir(&context).status().unwrap().success());
    project.run("test -e /etc/group && echo more >> /etc/motd");
    project.build();
    let disk = project.disk();
    let stat = debugfs(&disk, "stat /bin/busybox");
    assert!(stat.contains("Mode:  04755") && stat.contains("User:     5") && stat.contains("Group: 60000"), "{stat}");
    let have = |program: &str| Process::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success();
    if have("setcap") {
        assert!(debugfs(&disk, "ea_list /bin/busybox").contains("security.capability"));
    }
    if have("setfattr") {
        assert!(debugfs(&disk, "ea_get /etc/group user.note").contains("yes"));
    }
}

fn hello() -> Project {
    let mut project = Project::new("debian:12");
    project.step(StepAction::Install { packages: vec!["python3-minimal".to_owned()] });
    project.write("app.py", "print('hello from the image')\n");
    project.copy("app.py", "/srv/app.py");
    project.run("python3 /srv/app.py && id web && stat -c %U /home/web");
    project.spec.users.push(User { sudo: true, ..user("web", "/bin/bash", &["sudo", "operators"]) });
    project
}

#[test]
fn slow_a_debian_image_with_packages_and_accounts() {
    let mut project = hello();
    project.options.lock_file = Some(project.directory.path().join("Formfile.lock"));
    let (image, seen) = project.build();
    assert_eq!(seen.done(), 5);
    assert!(seen.output.iter().any(|line| line == "hello from the image"));
    assert!(image.manifest.packages.contains_key("python3-minimal"));
    let disk = project.disk();
    assert!(cat(&disk, "/etc/passwd").contains("web:x:1000:1000::/home/web:/bin/bash"));
    assert!(cat(&disk, "/etc/group").contains("operators:x:"));
    project.options.locked = true;
    assert_eq!(project.build().1.cached(), 5);
    let path = project.directory.path().join("Formfile.lock");
    let other = fs::read_to_string(&path).unwrap().replacen(image.manifest.packages["bash"].as_str(), "0.1", 1);
    fs::write(&path, other).unwrap();
    assert!(matches!(project.try_build().0, Err(BuildError::Locked { .. })));
    // Everything once more, from the mirror: the same versions give the same image.
    project.options.locked = false;
    project.options.no_cache = true;
    assert_eq!(project.build().0.digest, image.digest);
}
