//! Bases from a registry: Debian's `docker-registry` on a port of this machine, filled by these tests.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use form_image::{
    BuildError, BuildEvent, BuildOptions, Builder, BuiltImage, CachePaths, Cancel, OciError, OciReference, Pulled, Registries,
};
use form_types::{
    Spec,
    spec::{Command, Step, StepAction},
};
use serde_json::json;
use sha2::{Digest, Sha256};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// User `ada`, password `correct horse`.
const HTPASSWD: &str = "ada:$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n";

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A registry that ends with the test.
struct Registry {
    child: Child,
    directory: tempfile::TempDir,
    address: String,
    login: Option<&'static str>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Registry {
    fn start(login: Option<&'static str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("htpasswd"), HTPASSWD).unwrap();
        // A port that is free now may be taken when the registry comes.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let address = format!("127.0.0.1:{port}");
            if let Some(child) = Self::run(directory.path(), &address, login.is_some()) {
                return Self { child, directory, address, login };
            }
        }
        panic!("docker-registry does not start: {}", fs::read_to_string(directory.path().join("log")).unwrap_or_default());
    }

    fn run(directory: &Path, address: &str, login: bool) -> Option<Child> {
        let auth =
            if login { format!("auth: {{htpasswd: {{realm: test, path: {}/htpasswd}}}}\n", directory.display()) } else { String::new() };
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {}/store}}}}\nhttp: {{addr: '{address}'}}\n{auth}",
            directory.display()
        );
        let path = directory.join("config.yml");
        fs::write(&path, config).unwrap();
        let log = fs::File::create(directory.join("log")).unwrap();
        let mut command = Process::new("docker-registry");
        command
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .env("OTEL_TRACES_EXPORTER", "none");
        let mut child = command.spawn().expect("the package docker-registry is installed");
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(20) {
            if !matches!(child.try_wait(), Ok(None)) {
                return None;
            }
            if agent().get(format!("http://{address}/v2/")).call().is_ok() {
                return Some(child);
            }
            thread::sleep(Duration::from_millis(50));
        }
        let _ = child.kill();
        let _ = child.wait();
        None
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    fn send(&self, method: &str, url: &str, content_type: &str, body: &[u8]) -> ureq::http::Response<ureq::Body> {
        let mut request = ureq::http::Request::builder().method(method).uri(url).header("content-type", content_type);
        if let Some(login) = self.login {
            request = request.header("authorization", format!("Basic {}", STANDARD.encode(login)));
        }
        let answer = agent().run(request.body(body).unwrap()).unwrap();
        assert!(answer.status().is_success(), "{method} {url}: {}", answer.status());
        answer
    }

    /// Gives the descriptor.
    fn push_blob(&self, repository: &str, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = digest(bytes);
        let answer = self.send("POST", &format!("http://{}/v2/{repository}/blobs/uploads/", self.address), "", &[]);
        let location = answer.headers()["location"].to_str().unwrap().to_owned();
        let joint = if location.contains('?') { '&' } else { '?' };
        self.send("PUT", &format!("{location}{joint}digest={digest}"), "application/octet-stream", bytes);
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    fn push_manifest(&self, repository: &str, tag: &str, media_type: &str, manifest: &serde_json::Value) -> serde_json::Value {
        let bytes = serde_json::to_vec(manifest).unwrap();
        self.send("PUT", &format!("http://{}/v2/{repository}/manifests/{tag}", self.address), media_type, &bytes);
        json!({"mediaType": media_type, "digest": digest(&bytes), "size": bytes.len()})
    }

    /// Pushes an image of these layers and gives the descriptor of its manifest.
    fn push_image(&self, repository: &str, tag: &str, layers: &[Layer], config: &serde_json::Value) -> serde_json::Value {
        let ids: Vec<String> = layers.iter().map(|layer| digest(&layer.plain)).collect();
        let config = json!({"architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = self.push_blob(repository, OCI_CONFIG, &serde_json::to_vec(&config).unwrap());
        let layers: Vec<_> = layers.iter().map(|layer| self.push_blob(repository, layer.media_type, &layer.packed)).collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
        self.push_manifest(repository, tag, OCI_MANIFEST, &manifest)
    }

    /// Where the registry keeps a blob.
    fn stored(&self, descriptor: &serde_json::Value) -> PathBuf {
        let digits = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let blobs = self.directory.path().join("store/docker/registry/v2/blobs/sha256");
        blobs.join(&digits[..2]).join(digits).join("data")
    }

    /// Where it keeps the only layer of an image.
    fn stored_layer(&self, layer: &Layer) -> PathBuf {
        self.stored(&json!({"digest": digest(&layer.packed)}))
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).timeout_global(Some(Duration::from_secs(30)));
    ureq::Agent::new_with_config(config.build())
}

struct Layer {
    media_type: &'static str,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

impl Layer {
    /// Files by path; a target that begins with `->` makes a link, a path that ends in `/` a directory.
    fn new(media_type: &'static str, files: &[(&str, &[u8])]) -> Self {
        let mut plain = Vec::new();
        let mut archive = tar::Builder::new(&mut plain);
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(0);
            if let Some(target) = content.strip_prefix(b"->") {
                header.set_entry_type(tar::EntryType::Symlink);
                archive.append_link(&mut header, path, std::str::from_utf8(target).unwrap()).unwrap();
            } else if path.ends_with('/') {
                header.set_entry_type(tar::EntryType::Directory);
                archive.append_data(&mut header, path, std::io::empty()).unwrap();
            } else {
                header.set_size(content.len() as u64);
                archive.append_data(&mut header, path, *content).unwrap();
            }
        }
        archive.finish().unwrap();
        drop(archive);
        let packed = match media_type {
            GZIP => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&plain).unwrap();
                encoder.finish().unwrap()
            }
            _ => zstd::encode_all(plain.as_slice(), 1).unwrap(),
        };
        Self { media_type, plain, packed }
    }

    fn busybox() -> Self {
        let busybox = fs::read("/bin/busybox").expect("the package busybox-static is installed");
        let links: &[(&str, &[u8])] =
            &[("bin/sh", b"->busybox"), ("bin/env", b"->busybox"), ("bin/pwd", b"->busybox"), ("bin/cat", b"->busybox")];
        Self::new(GZIP, &[&[("bin/busybox", busybox.as_slice()), ("etc/", b"")], links].concat())
    }
}

struct Project {
    directory: tempfile::TempDir,
    spec: Spec,
    options: BuildOptions,
}

impl Project {
    fn new(from: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = format!("NAME app\nFROM {from}\n");
        let spec = formfile::check("Formfile", &text, &formfile::LowerOptions::default()).spec.unwrap();
        let credentials = Some(directory.path().join("docker.json"));
        let options = BuildOptions {
            lock_file: Some(directory.path().join("Formfile.lock")),
            registries: Registries { credentials, ..Registries::default() },
            ..BuildOptions::default()
        };
        Self { directory, spec, options }
    }

    fn builder(&self) -> Builder {
        Builder::new(CachePaths::new(self.directory.path().join("cache")))
    }

    /// The image, how many steps the cache answered, and what was said.
    fn try_build(&self) -> (Result<BuiltImage, BuildError>, usize, Vec<String>) {
        let (mut cached, mut output) = (0, Vec::new());
        let mut observer = |event: BuildEvent<'_>| match event {
            BuildEvent::StepCached { .. } => cached += 1,
            BuildEvent::Output { line } => output.push(line.to_owned()),
            _ => {}
        };
        let result = self.builder().build(&self.spec, self.directory.path(), &self.options, &mut observer);
        (result, cached, output)
    }

    fn build(&self) -> BuiltImage {
        let (result, _, output) = self.try_build();
        result.unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    /// Why a base cannot be had.
    fn fails(&self) -> OciError {
        match self.try_build().0 {
            Err(BuildError::Registry { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    }

    /// Files of the newest image, asked of debugfs.
    fn show(&self, path: &str) -> String {
        let disk = self.directory.path().join("disk");
        self.builder().store().export(&"app".parse().unwrap(), &disk).unwrap();
        let output = Process::new("/sbin/debugfs").args(["-R", &format!("cat {path}")]).arg(&disk).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + if output.stdout.is_empty() { "(nothing)" } else { "" }
    }

    fn blobs(&self) -> usize {
        fs::read_dir(self.directory.path().join("cache/oci")).unwrap().count()
    }
}

#[test]
fn system_a_base_from_a_registry_is_built_upon() {
    let registry = Registry::start(None);
    let top = Layer::new(ZSTD, &[("etc/.wh.gone", b""), ("etc/new", b"new\n"), ("etc/kept", b"second\n")]);
    let middle = Layer::new(GZIP, &[("etc/gone", b"old\n"), ("etc/kept", b"first\n")]);
    let config = json!({
        "Env": ["PATH=/bin", "COLOUR=green", "SIZE=1"], "WorkingDir": "/srv/app", "User": "7:8",
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["pwd"], "ExposedPorts": {"80/tcp": {}},
    });
    let amd64 = registry.push_image("team/app", "amd64", &[Layer::busybox(), middle, top], &config);
    let platform = |mut descriptor: serde_json::Value, os: &str, architecture: &str| {
        descriptor["platform"] = json!({"os": os, "architecture": architecture});
        descriptor
    };
    let manifests = [platform(amd64.clone(), "linux", "arm64"), platform(amd64, "linux", "amd64")];
    registry.push_manifest("team/app", "1.2", OCI_INDEX, &json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}));

    let mut project = Project::new(&registry.reference("team/app:1.2"));
    let env = vec![("SIZE".to_owned(), "2".to_owned())];
    let command = Command::Shell("(pwd; env) > /etc/seen".to_owned());
    project.spec.steps.push(Step { action: StepAction::Run { command, env, workdir: None }, line: 2 });
    let (result, _, output) = project.try_build();
    let image = result.unwrap();
    assert!(output.iter().any(|line| line.starts_with("layer 3 of 3: ")), "{output:?}");
    assert!(output.iter().any(|line| line.contains("listens on 80/tcp")), "{output:?}");
    assert_eq!(
        (project.show("/etc/kept"), project.show("/etc/new"), project.show("/etc/gone")),
        ("second\n".into(), "new\n".into(), "(nothing)".into())
    );
    let seen = project.show("/etc/seen");
    for line in ["/srv/app", "PATH=/bin", "COLOUR=green", "SIZE=2"] {
        assert!(seen.lines().any(|found| found == line), "{line}: {seen}");
    }
    let config = &image.manifest.config;
    assert_eq!((config.run_as.as_deref(), config.workdir.as_deref(), config.env.len()), (Some("7:8"), Some("/srv/app"), 3));
    assert_eq!((config.entrypoint.join(" "), config.cmd.join(" "), config.ports.len()), ("/bin/sh -c".into(), "pwd".into(), 0));
    let mut spec = image.spec.clone();
    spec.steps[0].line = 0;
    assert_eq!(spec, *config);

    // The second time the tag is asked for, and nothing is fetched: the registry has lost the layers.
    for entry in fs::read_dir(project.directory.path().join("cache/oci")).unwrap() {
        let stored = registry.stored(&json!({"digest": format!("sha256:{}", entry.unwrap().file_name().into_string().unwrap())}));
        if fs::metadata(&stored).unwrap().len() > 2000 {
            fs::remove_file(stored).unwrap();
        }
    }
    let (again, cached, _) = project.try_build();
    let again = again.unwrap();
    assert_eq!((again.digest, again.unchanged, cached), (image.digest, true, 2));
    assert_eq!(again.spec, image.spec);
    // What was fetched goes with a prune, and the base stays with the image.
    assert!(project.blobs() > 0);
    project.builder().prune(&mut |_: BuildEvent<'_>| {}).unwrap();
    assert_eq!((project.blobs(), project.try_build().1), (0, 2));
}

#[test]
fn system_a_tag_that_moves_moves_unlocked_builds_alone() {
    let mut registry = Registry::start(None);
    let push = |registry: &Registry, text: &str| {
        registry.push_image("app", "1", &[Layer::new(GZIP, &[("etc/release", text.as_bytes())])], &json!({}))
    };
    let first = push(&registry, "one");
    let mut project = Project::new(&registry.reference("app:1"));
    let old = project.build();
    let lock = fs::read_to_string(project.directory.path().join("Formfile.lock")).unwrap();
    assert!(lock.contains(first["digest"].as_str().unwrap()), "{lock}");

    push(&registry, "two");
    project.options.locked = true;
    assert_eq!(project.build().digest, old.digest);
    project.options.locked = false;
    let new = project.build();
    assert_eq!((new.digest == old.digest, project.show("/etc/release").as_str()), (false, "two"));
    // By its digest it is what it was.
    let pinned = Project::new(&format!("{}@{}", registry.reference("app:1"), first["digest"].as_str().unwrap()));
    pinned.build();
    assert_eq!(pinned.show("/etc/release"), "one");

    registry.stop();
    assert!(matches!(project.fails(), OciError::Unreachable { .. }));
    project.options.locked = true;
    assert_eq!(project.build().digest, new.digest);
    // Also when every step is done again: its blobs are here.
    project.options.no_cache = true;
    assert_eq!(project.build().digest, new.digest);
    assert!(pinned.try_build().0.is_ok());
    // A lock of another base, and one without any.
    project.spec.from = registry.reference("other:1");
    assert!(matches!(project.try_build().0, Err(BuildError::Locked { .. })));
    fs::write(project.directory.path().join("Formfile.lock"), r#"{"version":1,"from":"x","packages":{}}"#).unwrap();
    assert!(matches!(project.try_build().0, Err(BuildError::Locked { .. })));
}

#[test]
fn system_what_a_registry_has_damaged_is_refused_and_not_kept() {
    let registry = Registry::start(None);
    let layer = Layer::new(GZIP, &[("etc/release", b"sound")]);
    let manifest = registry.push_image("app", "1", std::slice::from_ref(&layer), &json!({}));
    let project = Project::new(&registry.reference("app:1"));
    let stored = registry.stored_layer(&layer);
    let sound = fs::read(&stored).unwrap();
    let mut bytes = sound.clone();
    bytes[20] ^= 1;
    fs::write(&stored, &bytes).unwrap();
    let error = project.fails();
    assert!(matches!(&error, OciError::Digest { what, .. } if what == "layer 1"), "{error}");
    // Longer, shorter, gone.
    fs::write(&stored, [sound.as_slice(), b"x"].concat()).unwrap();
    assert!(matches!(project.fails(), OciError::Size { .. }));
    fs::write(&stored, &sound[..sound.len() - 1]).unwrap();
    assert!(matches!(project.fails(), OciError::Size { .. }));
    fs::remove_file(&stored).unwrap();
    assert!(matches!(project.fails(), OciError::NotFound { .. }));
    let names = || fs::read_dir(project.directory.path().join("cache/oci")).unwrap().map(|entry| entry.unwrap().file_name());
    let digits = digest(&layer.packed)["sha256:".len()..].to_owned();
    assert!(names().all(|name| name != *digits && !name.to_string_lossy().starts_with("tmp-")));
    // Mended, it builds.
    fs::write(&stored, &sound).unwrap();
    project.build();

    // A blob that is damaged on this machine is fetched again.
    fs::write(project.directory.path().join("cache/oci").join(&digits), b"damaged").unwrap();
    let mut again = project;
    again.options.no_cache = true;
    again.build();

    // Another manifest under the digest.
    let stored = registry.stored(&manifest);
    let text = fs::read_to_string(&stored).unwrap().replace("\"schemaVersion\":2", "\"schemaVersion\":2 ");
    fs::write(&stored, text).unwrap();
    let fresh = Project::new(&registry.reference("app:1"));
    let error = fresh.fails();
    assert!(matches!(error, OciError::Digest { .. } | OciError::NotFound { .. } | OciError::Status { .. }), "{error}");
}

#[test]
fn system_what_does_not_fit_is_refused_by_name() {
    let registry = Registry::start(None);
    let layer = || Layer::new(GZIP, &[("etc/release", b"x")]);
    let mut manifest = registry.push_image("app", "1", &[layer()], &json!({}));
    manifest["platform"] = json!({"os": "linux", "architecture": "riscv64"});
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [manifest]});
    registry.push_manifest("app", "elsewhere", OCI_INDEX, &index);
    let error = Project::new(&registry.reference("app:elsewhere")).fails();
    assert!(matches!(&error, OciError::Platform { others } if *others == ["linux/riscv64"]), "{error}");
    assert!(matches!(Project::new(&registry.reference("app:none")).fails(), OciError::NotFound { .. }));
    assert!(matches!(Project::new(&registry.reference("none:1")).fails(), OciError::NotFound { .. }));
    // A layer that leaves the image leaves nothing in the cache but its blob.
    let mut hostile = layer();
    let at = hostile.plain.windows(11).position(|window| window == b"etc/release").unwrap();
    hostile.plain[at..at + 11].copy_from_slice(b"../../evil\0");
    let mut header = tar::Header::from_byte_slice(&hostile.plain[..512]).clone();
    header.set_cksum();
    hostile.plain[..512].copy_from_slice(header.as_bytes());
    hostile.packed = zstd::encode_all(hostile.plain.as_slice(), 1).unwrap();
    hostile.media_type = ZSTD;
    registry.push_image("app", "hostile", &[hostile], &json!({}));
    let project = Project::new(&registry.reference("app:hostile"));
    let error = project.fails();
    assert!(matches!(&error, OciError::Layer { number: 1, reason } if reason.contains("no path inside")), "{error}");
    assert_eq!(fs::read_dir(project.directory.path().join("cache/layers")).unwrap().count(), 0);
    assert!(!project.directory.path().join("evil").exists());
}

#[test]
fn system_a_login_comes_from_the_configuration_of_docker() {
    let registry = Registry::start(Some("ada:correct horse"));
    registry.push_image("app", "1", &[Layer::new(GZIP, &[("etc/release", b"secret")])], &json!({}));
    let project = Project::new(&registry.reference("app:1"));
    let docker = project.directory.path().join("docker.json");
    assert!(matches!(project.fails(), OciError::Denied { known: false, .. }));
    let auths =
        |login: &str| json!({"auths": BTreeMap::from([(registry.address.clone(), json!({"auth": STANDARD.encode(login)}))])}).to_string();
    fs::write(&docker, auths("ada:battery staple")).unwrap();
    let error = project.fails();
    assert!(matches!(error, OciError::Denied { known: true, .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("battery"));
    fs::write(&docker, auths("ada:correct horse")).unwrap();
    project.build();
    assert_eq!(project.show("/etc/release"), "secret");
}

/// Packs and other blobs that a registry has.
fn blobs_of(registry: &Registry) -> usize {
    let blobs = registry.directory.path().join("store/docker/registry/v2/blobs/sha256");
    let Ok(groups) = fs::read_dir(blobs) else { return 0 };
    groups.map(|group| fs::read_dir(group.unwrap().path()).unwrap().count()).sum()
}

/// An image of files, not of a registry.
fn local(project: &mut Project, text: &str) -> BuiltImage {
    project.spec.from = "./files".to_owned();
    let files = project.directory.path().join("files");
    fs::create_dir_all(files.join("etc")).unwrap();
    fs::write(files.join("etc/release"), text).unwrap();
    project.build()
}

fn push(project: &Project, image: &str, to: &str) -> Result<form_image::Pushed, BuildError> {
    let reference = OciReference::parse(to, None).unwrap();
    let original = Arc::new(project.builder().original(&image.parse().unwrap())?);
    project.builder().push(&original, &reference, &project.options.registries, &Cancel::new(), &mut |_: BuildEvent<'_>| {})
}

fn pull(project: &Project, from: &str, name: Option<&str>) -> Result<Pulled, BuildError> {
    let reference = OciReference::parse(from, None).unwrap();
    let name = name.map(|name| name.parse().unwrap());
    let registries = &project.options.registries;
    project.builder().pull(&reference, name.as_ref(), registries, &Cancel::new(), &mut |_: BuildEvent<'_>| {})
}

fn pulled(project: &Project, from: &str, name: Option<&str>) -> BuiltImage {
    match pull(project, from, name).unwrap() {
        Pulled::Image(image) => *image,
        Pulled::Another(digest) => panic!("{digest} is none of ours"),
    }
}

#[test]
fn system_an_image_of_ours_goes_by_a_registry_to_another_machine() {
    let registry = Registry::start(None);
    let to = registry.reference("team/app:1");
    let (mut here, there) = (Project::new("scratch"), Project::new("scratch"));
    let image = local(&mut here, "one");
    let first = push(&here, "app", &to).unwrap();
    assert!(first.digest == image.digest && first.version == 1 && first.kept_blobs == 0 && first.sent_blobs >= 2, "{first:?}");
    let all = blobs_of(&registry);
    assert_eq!(all, first.sent_blobs + 1, "and the manifest of the artifact");

    // The same again sends nothing; of the next version only what changed is sent.
    let again = push(&here, "app:1", &to).unwrap();
    assert_eq!((again.sent_blobs, again.sent_bytes, again.kept_blobs), (0, 0, first.sent_blobs));
    assert_eq!((again.artifact, blobs_of(&registry)), (first.artifact, all));
    let second = local(&mut here, "two");
    let next = push(&here, "app", &registry.reference("team/app:2")).unwrap();
    assert!(next.version == 2 && next.sent_blobs < first.sent_blobs && next.kept_blobs > 0, "{next:?}");

    let image_there = pulled(&there, &to, None);
    assert_eq!((image_there.digest, image_there.version, image_there.name.as_str()), (image.digest, 1, "app"));
    assert!(there.builder().store().verify(&"app".parse().unwrap()).unwrap().bad.is_empty());
    assert_eq!((there.show("/etc/release").as_str(), there.blobs()), ("one", 0));
    assert!(pulled(&there, &to, None).unchanged);
    // By its digest, under another name.
    let by_digest = format!("{}@{}", registry.reference("team/app"), next.artifact);
    assert_eq!(pulled(&there, &by_digest, None).digest, second.digest);
    assert_eq!(pulled(&there, &by_digest, Some("shop")).name.as_str(), "shop");

    // What others push is told apart.
    registry.push_image("team/app", "other", &[Layer::new(GZIP, &[("etc/release", b"x")])], &json!({}));
    assert!(matches!(pull(&there, &registry.reference("team/app:other"), None), Ok(Pulled::Another(_))));

    // A Formfile begins with its files; what is built upon it has the blocks that it has where the image is from.
    let on_top = |project: &mut Project| {
        let command = Command::Shell("echo three > /etc/more".to_owned());
        project.spec.steps = vec![Step { action: StepAction::Run { command, env: vec![], workdir: None }, line: 2 }];
        fs::remove_file(project.directory.path().join("Formfile.lock")).ok();
        project.build()
    };
    let mut elsewhere = Project::new(&registry.reference("team/base:1"));
    here.spec.from = "./files".to_owned();
    fs::create_dir_all(here.directory.path().join("files/bin")).unwrap();
    fs::copy("/bin/busybox", here.directory.path().join("files/bin/sh")).expect("the package busybox-static is installed");
    here.build();
    let base = push(&here, "app", &registry.reference("team/base:1")).unwrap();
    here.spec.from = "image:app".to_owned();
    let (ours, theirs) = (on_top(&mut here), on_top(&mut elsewhere));
    assert_eq!((elsewhere.show("/etc/release"), elsewhere.show("/etc/more")), ("two".into(), "three\n".into()));
    assert!(ours.manifest.rootfs == theirs.manifest.rootfs);
    let lock = fs::read_to_string(elsewhere.directory.path().join("Formfile.lock")).unwrap();
    assert!(lock.contains(&base.artifact.to_string()), "{lock}");
    // Once it is here, the registry is asked for the tag alone.
    assert_eq!((elsewhere.try_build().1, elsewhere.blobs()), (2, 0));
}

#[test]
fn system_an_image_of_ours_that_a_registry_has_damaged_leaves_nothing() {
    let mut registry = Registry::start(None);
    let to = registry.reference("app:1");
    let (mut here, there) = (Project::new("scratch"), Project::new("scratch"));
    let image = local(&mut here, "one");
    push(&here, "app", &to).unwrap();
    let groups = fs::read_dir(registry.directory.path().join("store/docker/registry/v2/blobs/sha256")).unwrap();
    let blobs = groups.flat_map(|group| fs::read_dir(group.unwrap().path()).unwrap()).map(|blob| blob.unwrap().path().join("data"));
    let largest = blobs.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let sound = fs::read(&largest).unwrap();
    let leaves_nothing = || {
        let blocks = there.directory.path().join("cache/blocks");
        let groups = fs::read_dir(blocks).into_iter().flatten();
        groups.map(|group| fs::read_dir(group.unwrap().path()).unwrap().count()).sum::<usize>() == 0
            && there.builder().store().list().unwrap().is_empty()
    };
    let mut bytes = sound.clone();
    bytes[sound.len() / 2] ^= 1;
    for wrong in [bytes, sound[..sound.len() - 1].to_vec(), [sound.as_slice(), b"x"].concat()] {
        fs::write(&largest, wrong).unwrap();
        let error = pull(&there, &to, None).unwrap_err();
        assert!(matches!(&error, BuildError::Registry { source: OciError::Digest { .. } | OciError::Size { .. }, .. }), "{error:?}");
        assert!(leaves_nothing());
    }
    fs::write(&largest, &sound).unwrap();
    assert_eq!(pulled(&there, &to, None).digest, image.digest);
    registry.stop();
    let away = push(&here, "app", &to).unwrap_err();
    assert!(matches!(&away, BuildError::Push { source: OciError::Unreachable { .. }, .. }), "{away:?}");
    assert!(matches!(pull(&there, &to, None), Err(BuildError::Registry { source: OciError::Unreachable { .. }, .. })));
}

#[test]
fn system_a_push_needs_the_login_that_a_pull_needs() {
    let registry = Registry::start(Some("ada:correct horse"));
    let to = registry.reference("app:1");
    let mut project = Project::new("scratch");
    let image = local(&mut project, "one");
    let denied = |project: &Project, expected: bool| match push(project, "app", &to) {
        Err(BuildError::Push { source: OciError::Denied { known, .. }, .. }) => assert_eq!(known, expected),
        other => panic!("{other:?}"),
    };
    denied(&project, false);
    let docker = project.directory.path().join("docker.json");
    let auths =
        |login: &str| json!({"auths": BTreeMap::from([(registry.address.clone(), json!({"auth": STANDARD.encode(login)}))])}).to_string();
    fs::write(&docker, auths("ada:battery staple")).unwrap();
    denied(&project, true);
    assert_eq!(blobs_of(&registry), 0);
    fs::write(&docker, auths("ada:correct horse")).unwrap();
    push(&project, "app", &to).unwrap();
    assert_eq!(pulled(&project, &to, Some("copy")).manifest.rootfs, image.manifest.rootfs);
}
