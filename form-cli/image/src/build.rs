//! The build itself: one layer after the other, each from the cache when what goes into it is unchanged.

mod adopt;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use form_bundle::{
    Manifest,
    manifest::{HistoryEntry, OwnKernel, Rootfs},
};
use form_types::{Digest, ImageReference, Spec, spec::StepAction};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::{
    BuildError, BuildEvent, BuildObserver, CachePaths, Cancel, ImageStore, accounts,
    base::{self, Base},
    block_store::BlockStore,
    context::Context,
    copy,
    diff::{Diff, Kind},
    error::IoContext,
    ext4::{BASE_SIZE, Ext4},
    index::{Change, Index},
    layer::{Layer, LayerStore, RECIPE, TREE, read_json, write_json},
    lockfile::{Lock, installed_packages},
    oci::{self, BlobStore, Defaults, OciDigest, OciError, OciReference, Registries, UnpackError, artifact::Found},
    sandbox::{Finished, Input, Job, Sandbox, args},
    steps::{self, Program},
    tarball::{self, Origin, Spool},
    tree_path::TreePath,
};

/// How a build is asked for.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// Do every step again.
    pub no_cache: bool,
    /// Look for newer packages in the base: do the base and all that follows again.
    pub refresh: bool,
    /// Take the base that is in the lock file, and refuse package versions other than those in it.
    pub locked: bool,
    /// Where the lock file is (`Formfile.lock` beside the Formfile); `None` writes none.
    pub lock_file: Option<PathBuf>,
    pub cancel: Cancel,
    /// How images of registries are reached.
    pub registries: Registries,
    /// Which digest the tag of the base was found to have just now: it is not asked for again.
    pub base: Option<OciDigest>,
}

/// An image in the store.
#[derive(Clone, Debug)]
pub struct BuiltImage {
    pub name: form_types::Name,
    pub version: u32,
    pub digest: Digest,
    pub manifest: Manifest,
    /// What the Formfile means on this base, passwords included: an image of a registry has defaults of its own.
    pub spec: Spec,
    /// The store had it already, as its newest version.
    pub unchanged: bool,
    store: ImageStore,
}

impl BuiltImage {
    /// Keeps a manifest whose blocks are all there.
    pub(crate) fn keep(store: &ImageStore, manifest: Manifest) -> Result<Self, BuildError> {
        let (version, unchanged) = store.add(&manifest)?;
        Ok(Self {
            name: manifest.name.clone(),
            version,
            digest: manifest.digest()?,
            spec: manifest.config.clone(),
            manifest,
            unchanged,
            store: store.clone(),
        })
    }

    /// The plain bytes of a block, checked.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn read_block(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        self.store.read_block(digest)
    }

    /// The zstd frame of a block, as it travels.
    ///
    /// # Errors
    /// When it is missing.
    pub fn read_frame(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        self.store.read_frame(digest)
    }
}

/// Builds images in one cache.
#[derive(Clone, Debug)]
pub struct Builder {
    pub(crate) paths: CachePaths,
}

/// What one step of a build does.
enum Action<'a> {
    Base,
    Accounts,
    Step(&'a StepAction),
    Workdir(&'a str),
}

struct Planned<'a> {
    action: Action<'a>,
    line: Option<u32>,
    text: String,
}

/// What a base resolved to when it was last made.
#[derive(Serialize, Deserialize)]
struct Alias {
    layer: Digest,
}

/// What an image of a registry became, by its digest.
#[derive(Serialize, Deserialize)]
struct OciAlias {
    layer: Digest,
    defaults: Defaults,
    #[serde(default)]
    kernel: Option<OwnKernel>,
}

impl Builder {
    pub fn new(paths: CachePaths) -> Self {
        Self { paths }
    }

    pub fn store(&self) -> ImageStore {
        ImageStore::new(&self.paths)
    }

    /// Builds `spec` from the files of `context` and keeps the image. One build at a time uses a cache: another one waits.
    ///
    /// # Errors
    /// When a step fails, a tool is missing, or the build is cancelled. Nothing of the failed step is left.
    pub fn build(
        &self,
        spec: &Spec,
        context: &Path,
        options: &BuildOptions,
        observer: &mut dyn BuildObserver,
    ) -> Result<BuiltImage, BuildError> {
        let sandbox = Sandbox::detect()?;
        self.paths.create().during("create", self.paths.root())?;
        let _lock = lock(&self.paths.lock(), &options.cancel, observer)?;
        let layers = LayerStore::new(self.paths.layers());
        layers.remove_leftovers(&sandbox)?;
        oci::BlobStore::new(self.paths.oci()).remove_leftovers();
        let locked = match (&options.lock_file, options.locked) {
            (Some(path), true) => Some(Lock::read(path)?.ok_or_else(|| BuildError::Locked {
                differences: vec![format!("there is no {}; build once without --locked", path.display())],
            })?),
            (None, true) => return Err(BuildError::Locked { differences: vec!["no lock file is named".to_owned()] }),
            _ => None,
        };
        let mut work = Work::new(self, (spec, context), options, sandbox, locked);
        let result = work.run(observer);
        let cleaned = work.clean();
        let (digest, manifest) = result?;
        cleaned?;
        let (version, unchanged) = self.store().add(&manifest)?;
        let base = work.base_digest;
        let locks = !manifest.packages.is_empty() || base.is_some();
        if let Some(path) = options.lock_file.as_ref().filter(|_| !options.locked && locks) {
            let lock = Lock::new(&spec.from, base, manifest.packages.clone());
            if Lock::read(path).ok().flatten().as_ref() != Some(&lock) {
                lock.write(path)?;
            }
        }
        observer.event(BuildEvent::Finished { digest, version, unchanged });
        let spec = work.defaults.apply(spec);
        Ok(BuiltImage { name: spec.name.clone(), version, digest, manifest, spec, unchanged, store: self.store() })
    }

    /// Removes layers and blocks that no image needs, and what was fetched from registries. Gives back the bytes of blocks and blobs that
    /// went.
    ///
    /// # Errors
    /// Those of the disk; and when an image's manifest is damaged.
    pub fn prune(&self, observer: &mut dyn BuildObserver) -> Result<u64, BuildError> {
        let sandbox = Sandbox::detect()?;
        self.paths.create().during("create", self.paths.root())?;
        let _lock = lock(&self.paths.lock(), &Cancel::new(), observer)?;
        let layers = LayerStore::new(self.paths.layers());
        let store = self.store();
        let mut wanted_layers = std::collections::BTreeSet::new();
        let mut wanted_blocks = std::collections::BTreeSet::new();
        let mut wanted_kernels = std::collections::BTreeSet::new();
        for record in store.list()? {
            let (_, manifest) = store.get(&ImageReference { name: record.name, version: Some(record.version) })?;
            wanted_blocks.extend(manifest.rootfs.blocks.digests());
            wanted_kernels.extend(manifest.kernel.as_ref().map(|kernel| kernel.bundle));
            for entry in &manifest.history {
                wanted_layers.insert(OsString::from(LayerStore::name(&entry.layer)));
                if let Some(layer) = layers.load(&entry.layer) {
                    wanted_blocks.extend(layer.blocks.digests());
                }
            }
        }
        self.discard_kernels(&wanted_kernels)?;
        let unwanted: Vec<OsString> = layers.names()?.into_iter().filter(|name| !wanted_layers.contains(name)).collect();
        layers.discard(&unwanted, &sandbox)?;
        crate::original::discard_passing(&self.paths)?;
        let blobs = BlobStore::new(self.paths.oci()).clear().during("empty", self.paths.oci())?;
        Ok(blobs + BlockStore::new(self.paths.blocks()).sweep(|digest| wanted_blocks.contains(digest))?)
    }
}

/// Takes the cache's lock; it is free again when the file is dropped, however the process ends.
pub(crate) fn lock(path: &Path, cancel: &Cancel, observer: &mut dyn BuildObserver) -> Result<File, BuildError> {
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).during("open", path)?;
    let mut told = false;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error).during("lock", path),
        }
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        if !told {
            observer.event(BuildEvent::Waiting);
            told = true;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// One build under way.
pub(crate) struct Work<'a> {
    pub(crate) spec: &'a Spec,
    context: &'a Path,
    pub(crate) options: &'a BuildOptions,
    layers: LayerStore,
    blocks: BlockStore,
    bases: PathBuf,
    oci: BlobStore,
    /// What the base says about how it runs.
    defaults: Defaults,
    /// The kernel that the base brings along.
    kernel: Option<OwnKernel>,
    /// What the base is called in its registry.
    base_digest: Option<OciDigest>,
    store: ImageStore,
    sandbox: Sandbox,
    locked: Option<Lock>,
    /// The layers so far, the base first.
    chain: Vec<Layer>,
    /// What is in them; made when it is first needed.
    index: Option<Index>,
    /// A file system with all of them; likewise.
    disk: Option<Ext4>,
    /// Where the layer under way is made.
    workspace: Option<PathBuf>,
}

impl<'a> Work<'a> {
    /// In the cache of `builder`, which is locked and has its directories.
    pub(crate) fn new(
        builder: &Builder,
        (spec, context): (&'a Spec, &'a Path),
        options: &'a BuildOptions,
        sandbox: Sandbox,
        locked: Option<Lock>,
    ) -> Self {
        let paths = &builder.paths;
        Self {
            spec,
            context,
            options,
            layers: LayerStore::new(paths.layers()),
            blocks: BlockStore::new(paths.blocks()),
            bases: paths.bases(),
            oci: BlobStore::new(paths.oci()),
            defaults: Defaults::default(),
            kernel: None,
            base_digest: None,
            store: builder.store(),
            sandbox,
            locked,
            chain: Vec::new(),
            index: None,
            disk: None,
            workspace: None,
        }
    }

    fn run(&mut self, observer: &mut dyn BuildObserver) -> Result<(Digest, Manifest), BuildError> {
        let plan = self.plan();
        let total = plan.len();
        for (number, step) in plan.iter().enumerate() {
            let index = number + 1;
            if self.options.cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            observer.event(BuildEvent::StepStarted { index, total, line: step.line, text: &step.text });
            let begin = Instant::now();
            let before = self.chain.len();
            match self.step(step, observer) {
                Ok(true) => observer.event(BuildEvent::StepCached { index, total }),
                Ok(false) => {
                    let made = self.chain.get(before..).unwrap_or_default();
                    let changed_bytes = made.iter().map(|layer| layer.changed_blocks * form_bundle::BLOCK_SIZE as u64).sum();
                    observer.event(BuildEvent::StepFinished { index, total, duration: begin.elapsed(), changed_bytes });
                }
                Err(error) => {
                    if let BuildError::StepFailed { exit_code, tail, .. } = &error {
                        observer.event(BuildEvent::StepFailed { index, total, line: step.line, exit_code: Some(*exit_code), tail });
                    } else if !matches!(error, BuildError::Cancelled) {
                        observer.event(BuildEvent::StepFailed { index, total, line: step.line, exit_code: None, tail: &[] });
                    }
                    return Err(error);
                }
            }
            self.check_lock(index == total)?;
        }
        let manifest = self.manifest()?;
        Ok((manifest.digest()?, manifest))
    }

    fn plan(&self) -> Vec<Planned<'a>> {
        let spec = self.spec;
        let mut plan = vec![Planned { action: Action::Base, line: None, text: format!("FROM {}", spec.from) }];
        if !spec.users.is_empty() {
            let names: Vec<&str> = spec.users.iter().map(|user| user.name.as_str()).collect();
            plan.push(Planned { action: Action::Accounts, line: None, text: format!("USER {}", names.join(", ")) });
        }
        for step in &spec.steps {
            plan.push(Planned { action: Action::Step(&step.action), line: Some(step.line), text: describe(&step.action) });
        }
        if let Some(workdir) = spec.workdir.as_deref().filter(|workdir| *workdir != "/") {
            plan.push(Planned { action: Action::Workdir(workdir), line: None, text: format!("WORKDIR {workdir}") });
        }
        plan
    }

    fn manifest(&self) -> Result<Manifest, BuildError> {
        let top = self.top()?;
        let history = self.chain.iter().map(|layer| HistoryEntry {
            text: layer.text.clone(),
            layer: layer.key,
            changed_blocks: layer.changed_blocks,
        });
        let spec = self.defaults.apply(self.spec);
        let manifest = Manifest::new(&spec, Rootfs::new(top.blocks.clone()), top.packages.clone(), history.collect())?;
        Ok(Manifest { kernel: self.kernel.clone(), ..manifest })
    }

    pub(crate) fn top(&self) -> Result<&Layer, BuildError> {
        self.chain.last().ok_or_else(|| BuildError::FileSystem { reason: "the image has no base".to_owned() })
    }

    fn check_lock(&self, complete: bool) -> Result<(), BuildError> {
        let Some(lock) = &self.locked else { return Ok(()) };
        let differences = lock.differences(&self.spec.from, &self.top()?.packages, complete);
        if differences.is_empty() { Ok(()) } else { Err(BuildError::Locked { differences }) }
    }

    /// Does one step; `true` when the cache had it.
    fn step(&mut self, step: &Planned<'_>, observer: &mut dyn BuildObserver) -> Result<bool, BuildError> {
        match &step.action {
            Action::Base => self.base(&step.text, observer),
            Action::Accounts => {
                let key = self.key("accounts", &accounts::essence(&self.spec.users))?;
                self.layer(key, step, observer, |work, observer| {
                    accounts::check(&work.spec.users)?;
                    if accounts::has_tools(work.index()?) {
                        return work.program(&accounts::words(&work.spec.users), &[], None, step, observer);
                    }
                    let spool = work.spool()?;
                    let parent = work.top()?.clone();
                    let diff = accounts::written(&work.spec.users, work.index()?, &parent, &spool)?;
                    Ok((diff, spool))
                })
            }
            Action::Step(StepAction::Install { packages }) => {
                let line = step.line.unwrap_or(0);
                let words = steps::install_words(packages, line)?;
                let mut sorted = packages.clone();
                sorted.sort();
                sorted.dedup();
                let key = self.key("install", &sorted)?;
                self.layer(key, step, observer, |work, observer| {
                    if !accounts::has_program(work.index()?, "apt-get") {
                        let reason = "the base has no `apt-get`: packages need a base such as `debian:12`".to_owned();
                        return Err(BuildError::Install { line, reason });
                    }
                    let env = [("DEBIAN_FRONTEND".to_owned(), "noninteractive".to_owned())];
                    work.program(&words, &env, None, step, observer)
                })
            }
            Action::Step(StepAction::Run { command, env, workdir }) => {
                let env = self.defaults.step_env(env);
                let workdir = workdir.clone().or_else(|| self.defaults.workdir.clone());
                let key = self.key("run", &(command, &env, &workdir))?;
                self.layer(key, step, observer, |work, observer| {
                    work.program(&steps::words(command), &env, workdir.as_deref(), step, observer)
                })
            }
            Action::Step(StepAction::Copy(copy)) => {
                let line = step.line.unwrap_or(0);
                let context = Context::open(self.context).map_err(|reason| BuildError::Copy { line, reason })?;
                let plan = copy::Plan::new(copy, line, &context)?;
                let key = self.key("copy", &plan.identity())?;
                self.layer(key, step, observer, |work, _| {
                    let spool = work.spool()?;
                    let parent = work.top()?.clone();
                    let diff = plan.diff(work.index()?, &parent, &spool)?;
                    Ok((diff, spool))
                })
            }
            Action::Workdir(workdir) => {
                let key = self.key("workdir", workdir)?;
                self.layer(key, step, observer, |work, _| {
                    let spool = work.spool()?;
                    let path = work.resolve(workdir)?;
                    let diff = copy::directory_diff(work.index()?, &path).map_err(|reason| BuildError::FileSystem { reason })?;
                    Ok((diff, spool))
                })
            }
        }
    }

    /// The key of a layer on top of those so far.
    pub(crate) fn key(&self, kind: &str, inputs: &(impl Serialize + ?Sized)) -> Result<Digest, BuildError> {
        let parent = self.chain.last().map(|layer| layer.key);
        Ok(Digest::of(&serde_json::to_vec(&(RECIPE, parent, kind, inputs))?))
    }

    /// Takes a layer from the cache or makes it.
    fn layer<'o>(
        &mut self,
        key: Digest,
        step: &Planned<'_>,
        observer: &mut (dyn BuildObserver + 'o),
        make: impl FnOnce(&mut Self, &mut (dyn BuildObserver + 'o)) -> Result<(Diff, Spool), BuildError>,
    ) -> Result<bool, BuildError> {
        if !self.options.no_cache && self.cached(&key) {
            return Ok(true);
        }
        let (diff, spool) = make(self, observer)?;
        self.finish(key, &step.text, &diff, &spool)?;
        Ok(false)
    }

    /// Puts a layer of the cache on top.
    pub(crate) fn cached(&mut self, key: &Digest) -> bool {
        let parent = self.chain.last().map(|layer| layer.key);
        let Some(layer) = self.layers.load(key).filter(|layer| layer.parent == parent) else { return false };
        // The last look at blocks is cheap next to a build that fails for want of one.
        if !self.blocks.has_all(&layer.blocks) {
            return false;
        }
        self.chain.push(layer);
        self.index = None;
        self.disk = None;
        true
    }

    fn base(&mut self, text: &str, observer: &mut dyn BuildObserver) -> Result<bool, BuildError> {
        let again = self.options.no_cache || self.options.refresh;
        let from = self.spec.from.clone();
        let base = Base::parse(&from, self.context, self.options.registries.default.as_deref())?;
        match base {
            Base::Image(reference) => self.image_base(&from, &reference, text),
            Base::Registry(reference) => self.registry_base(&from, &reference, text, observer),
            Base::Release { distribution, codename } => {
                let sources = base::release_sources(&from, codename)?;
                let lines: Vec<String> = sources.iter().map(crate::apt::Source::line).collect();
                let request = Digest::of(&serde_json::to_vec(&(RECIPE, distribution, codename, &lines))?);
                let alias_path = self.bases.join(format!("{request}.json"));
                let alias: Option<Alias> = read_json(&alias_path);
                if !again && alias.is_some_and(|alias| self.cached(&alias.layer)) {
                    return Ok(true);
                }
                let spool = self.spool()?;
                let diff =
                    base::bootstrap(codename, &sources, &spool, &self.options.cancel, |line| observer.event(BuildEvent::Output { line }))?;
                // Named by what came out: when the mirror has nothing new, all layers on top stay.
                let packages = packages_of(&diff, &spool)?.unwrap_or_default();
                let key = self.key("release", &(distribution, codename, lines, packages))?;
                let same = !self.options.no_cache && self.cached(&key);
                if !same {
                    self.finish(key, text, &diff, &spool)?;
                }
                write_json(&alias_path, &Alias { layer: key })?;
                Ok(same)
            }
            Base::Scratch | Base::Directory(_) | Base::Tarball(_) => {
                let spool = self.spool()?;
                let cancel = &self.options.cancel;
                let (kind, identity) = match &base {
                    Base::Tarball(path) => ("tarball", base::file_digest(path)?),
                    _ => ("tree", Digest::of(&[])),
                };
                if kind == "tarball" && !again {
                    let key = self.key(kind, &identity)?;
                    if self.cached(&key) {
                        return Ok(true);
                    }
                }
                let diff = match &base {
                    Base::Directory(path) => base::from_directory(path, &spool, cancel)?,
                    Base::Tarball(path) => base::from_tarball(path, &spool, cancel)?,
                    _ => {
                        let mut diff = Diff::default();
                        base::clean_any(&mut diff, &spool)?;
                        diff
                    }
                };
                let key = if kind == "tarball" { self.key(kind, &identity)? } else { self.key(kind, &diff)? };
                if !self.options.no_cache && self.cached(&key) {
                    return Ok(true);
                }
                self.finish(key, text, &diff, &spool)?;
                Ok(false)
            }
        }
    }

    /// Starts from the layers of an image that is here; without them from its file system.
    fn image_base(&mut self, from: &str, reference: &ImageReference, text: &str) -> Result<bool, BuildError> {
        let (_, manifest) = self.store.get(reference)?;
        self.kernel = manifest.kernel.clone();
        let chain = manifest.history.last().and_then(|top| self.layers.chain(&top.layer));
        if let Some(chain) = chain.filter(|chain| chain.iter().all(|layer| self.blocks.has_all(&layer.blocks))) {
            self.chain = chain;
            return Ok(true);
        }
        if !self.blocks.has_all(&manifest.rootfs.blocks) {
            let reason = "blocks of it are no longer in the cache: build, pull or import it again".to_owned();
            return Err(BuildError::Base { from: from.to_owned(), reason });
        }
        self.adopt(text, &manifest)
    }

    /// Starts from an image of a registry. A tag is asked for at each build; what its digest names is fetched and unpacked once.
    fn registry_base(
        &mut self,
        from: &str,
        reference: &OciReference,
        text: &str,
        observer: &mut dyn BuildObserver,
    ) -> Result<bool, BuildError> {
        let (options, oci, limit) = (self.options, self.oci.clone(), self.spec.resources.disk_gib);
        let (registries, cancel) = (&options.registries, &options.cancel);
        let fail = |source: OciError| match source {
            OciError::Cancelled => BuildError::Cancelled,
            source => BuildError::Registry { from: from.to_owned(), source },
        };
        let pinned = match &self.locked {
            Some(lock) => Some(lock.base_of(from)?),
            None => options.base.or(reference.digest),
        };
        let digest = match pinned {
            Some(digest) => digest,
            None => oci::resolve(reference, registries, &oci, cancel).map_err(fail)?,
        };
        self.base_digest = Some(digest);
        let alias_path = self.bases.join(format!("{}.json", Digest::of(&serde_json::to_vec(&(RECIPE, "oci", digest))?)));
        if !options.no_cache
            && let Some(alias) = read_json::<OciAlias>(&alias_path)
            && self.cached(&alias.layer)
        {
            self.defaults = alias.defaults;
            self.kernel = alias.kernel;
            return Ok(true);
        }
        let mut line = |line: &str| observer.event(BuildEvent::Output { line });
        line(&digest.to_string());
        let exactly = OciReference { digest: Some(digest), ..reference.clone() };
        if let Found::Ours(artifact) = oci::artifact::fetch(&exactly, registries, &oci, cancel, &mut line).map_err(fail)? {
            return self.artifact_base((from, text), &artifact, &alias_path, observer);
        }
        let fetched = oci::fetch(reference, digest, registries, &oci, limit, cancel, &mut line).map_err(fail)?;
        if !fetched.defaults.ports.is_empty() {
            line(&format!("the base listens on {}: publish what you want with EXPOSE", fetched.defaults.ports.join(", ")));
        }
        let key = self.key("oci", &fetched.manifest)?;
        let same = !options.no_cache && self.cached(&key);
        if !same {
            line("unpacking");
            let spool = self.spool()?;
            let unpacked = oci::unpack(&fetched, &spool, limit, cancel).map_err(|error| match error {
                UnpackError::Image(source) => fail(source),
                UnpackError::Build(error) => error,
            });
            let mut diff = unpacked?;
            base::clean_any(&mut diff, &spool)?;
            if let Some(workdir) = &fetched.defaults.workdir {
                base::make_directory(&mut diff, workdir)?;
            }
            self.finish(key, text, &diff, &spool)?;
        }
        write_json(&alias_path, &OciAlias { layer: key, defaults: fetched.defaults.clone(), kernel: None })?;
        self.defaults = fetched.defaults;
        Ok(same)
    }

    /// Runs a program of the image and captures what it changed.
    fn program(
        &mut self,
        words: &[String],
        env: &[(String, String)],
        workdir: Option<&str>,
        step: &Planned<'_>,
        observer: &mut dyn BuildObserver,
    ) -> Result<(Diff, Spool), BuildError> {
        let workdir = workdir.unwrap_or("/");
        let real = self.resolve(workdir)?.to_path().into_os_string();
        let workspace = self.workspace()?;
        let lower: Vec<String> = self.chain.iter().rev().map(|layer| format!("{}/{TREE}", LayerStore::name(&layer.key))).collect();
        let name = workspace.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let program = Program {
            sandbox: &self.sandbox,
            layers: self.layers.directory(),
            lower: &lower.join(":"),
            workspace: &name,
            cancel: &self.options.cancel,
        };
        let finished: Finished =
            program.run(words, &steps::environment(env), (workdir, &real), |line| observer.event(BuildEvent::Output { line }))?;
        if !finished.status.success() {
            return Err(BuildError::StepFailed {
                line: step.line,
                text: step.text.clone(),
                exit_code: finished.exit_code(),
                tail: finished.tail,
            });
        }
        let spool = self.spool()?;
        let script =
            "exec tar --create --format=pax --xattrs --xattrs-include='*' --numeric-owner --warning=no-file-ignored --directory=tree .";
        let job = Job { directory: &workspace, script, args: &[], env: &[], input: Input::Null };
        let diff = self.sandbox.read(job, &self.options.cancel, |stream| tarball::read(stream, Origin::Overlay, &spool))?;
        Ok((diff, spool))
    }

    /// Writes a layer into the file system, keeps its blocks, and publishes it.
    pub(crate) fn finish(&mut self, key: Digest, text: &str, diff: &Diff, spool: &Spool) -> Result<(), BuildError> {
        let workspace = self.workspace()?;
        self.plant(&workspace, diff, spool)?;
        self.index()?;
        let disk = self.take_disk(&workspace)?;
        let changes: Vec<Change> = self.index.as_mut().map(|index| index.apply(diff)).unwrap_or_default();
        disk.apply(&changes, spool, &self.options.cancel)?;
        let parent = self.chain.last();
        let snapshot = self.blocks.snapshot(disk.path(), parent.map(|layer| &layer.blocks), &self.options.cancel)?;
        let layer = Layer {
            key,
            parent: parent.map(|layer| layer.key),
            text: text.to_owned(),
            blocks: snapshot.map,
            changed_blocks: snapshot.changed_blocks,
            packages: match packages_of(diff, spool)? {
                Some(packages) => packages,
                None => parent.map(|layer| layer.packages.clone()).unwrap_or_default(),
            },
            passwd: text_of(diff, spool, b"etc/passwd")?.unwrap_or_else(|| parent.map(|layer| layer.passwd.clone()).unwrap_or_default()),
            group: text_of(diff, spool, b"etc/group")?.unwrap_or_else(|| parent.map(|layer| layer.group.clone()).unwrap_or_default()),
        };
        self.publish(&workspace, &disk, layer, diff, spool)
    }

    /// The overlay's work directory holds one of root's own.
    fn remove_scaffold(&self, workspace: &Path) -> Result<(), BuildError> {
        if workspace.join("work").exists() {
            self.sandbox.remove(workspace, &args(["work"]))?;
            let mount_point = workspace.join("mnt");
            fs::remove_dir(&mount_point).during("remove", &mount_point)?;
        }
        Ok(())
    }

    fn workspace(&mut self) -> Result<PathBuf, BuildError> {
        if let Some(workspace) = &self.workspace {
            return Ok(workspace.clone());
        }
        let workspace = self.layers.workspace()?;
        self.workspace = Some(workspace.clone());
        Ok(workspace)
    }

    pub(crate) fn spool(&mut self) -> Result<Spool, BuildError> {
        Spool::create(self.workspace()?.join("spool"))
    }

    fn index(&mut self) -> Result<&Index, BuildError> {
        let index = match self.index.take() {
            Some(index) => index,
            None => self.layers.index(&self.chain)?,
        };
        Ok(self.index.insert(index))
    }

    /// A path of the image with its symbolic links followed.
    fn resolve(&mut self, text: &str) -> Result<TreePath, BuildError> {
        let path = TreePath::parse(text.as_bytes()).map_err(|error| BuildError::FileSystem { reason: error.to_string() })?;
        let reason = || format!("`{text}` leads through a circle of symbolic links in the image");
        self.index()?.resolve(&path).ok_or_else(|| BuildError::FileSystem { reason: reason() })
    }

    /// The file system of the layers so far, in a file that may be changed.
    fn take_disk(&mut self, workspace: &Path) -> Result<Ext4, BuildError> {
        if let Some(disk) = self.disk.take() {
            return Ok(disk);
        }
        let path = workspace.join("disk");
        match self.chain.last() {
            None => Ext4::create(path, BASE_SIZE),
            Some(layer) => {
                self.blocks.restore(&layer.blocks, &path, &self.options.cancel)?;
                Ok(Ext4::open(path))
            }
        }
    }

    /// Leaves nothing of the layer under way.
    pub(crate) fn clean(&mut self) -> Result<(), BuildError> {
        self.disk = None;
        self.workspace = None;
        self.layers.remove_leftovers(&self.sandbox)
    }
}

/// A step in the words of the Formfile, on one line.
fn describe(action: &StepAction) -> String {
    use form_types::spec::{Command, CopySource};
    let text = match action {
        StepAction::Install { packages } => format!("INSTALL {}", packages.join(" ")),
        StepAction::Run { command: Command::Shell(text), .. } => {
            format!("RUN {}", text.lines().map(str::trim).collect::<Vec<_>>().join(" "))
        }
        StepAction::Run { command: Command::Exec(words), .. } => format!("RUN {}", words.join(" ")),
        StepAction::Copy(copy) => {
            let sources = copy.sources.iter().map(|source| match source {
                CopySource::Path(path) => path.as_str(),
                CopySource::Inline { name, .. } => name.as_str(),
            });
            format!("COPY {} {}", sources.collect::<Vec<_>>().join(" "), copy.to)
        }
    };
    if text.chars().count() > 120 { text.chars().take(119).chain(['…']).collect() } else { text }
}

/// The content of a file that a layer has, as text.
fn text_of(diff: &Diff, spool: &Spool, path: &[u8]) -> Result<Option<String>, BuildError> {
    let entry = diff.entries.iter().find(|entry| entry.path.as_bytes() == path);
    match entry.map(|entry| &entry.kind) {
        // Larger than any account or package list: not one.
        Some(Kind::File { size, digest }) if *size < 256 << 20 => Ok(Some(String::from_utf8_lossy(&spool.read(digest)?).into_owned())),
        _ => Ok(None),
    }
}

pub(crate) fn packages_of(diff: &Diff, spool: &Spool) -> Result<Option<BTreeMap<String, String>>, BuildError> {
    Ok(text_of(diff, spool, b"var/lib/dpkg/status")?.map(|status| installed_packages(&status)))
}
