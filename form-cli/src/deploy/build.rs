//! Builds on a thread of their own, with what they say shown as it comes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use form_api::{ErrorCode, client::ClientError};
use form_bundle::Manifest;
use form_image::{
    BuildError, BuildEvent, BuildObserver, BuildOptions, Builder, BuiltImage, CachePaths, Cancel, KernelBundle, OciError, kernel as bundles,
};
use form_types::Spec;
use tokio::sync::mpsc;

use crate::{
    context::registries,
    failure::Failure,
    formfile_source::Source,
    session::Session,
    signals,
    ui::{Step, bytes, printable},
};

/// What to build, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct BuildArgs {
    /// The Formfile, its directory, or - for standard input
    #[arg(value_name = "FILE", default_value = ".")]
    pub file: PathBuf,
    /// A value for an ARG of the Formfile
    #[arg(long = "build-arg", value_name = "KEY=VALUE", value_parser = build_arg)]
    pub build_args: Vec<(String, String)>,
    /// Take the base of Formfile.lock, and refuse package versions other than those in it
    #[arg(long)]
    pub locked: bool,
    /// Do every step again
    #[arg(long)]
    pub no_cache: bool,
    /// Look for newer packages: do the base and all that follows again
    #[arg(long)]
    pub refresh: bool,
}

fn build_arg(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        // As docker does: the value of the environment.
        None => std::env::var(text)
            .map(|value| (text.to_owned(), value))
            .map_err(|_| format!("write {text}=VALUE, or set {text} in the environment")),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

impl BuildArgs {
    /// The Formfile and what it means.
    ///
    /// # Errors
    /// When it cannot be read or has faults.
    pub fn load(&self, session: &Session) -> Result<(Source, Spec), Failure> {
        let source = Source::read(&self.file)?;
        let spec = source.spec(self.build_args.iter().cloned().collect::<BTreeMap<_, _>>(), session)?;
        Ok((source, spec))
    }
}

/// A build's event that may cross threads.
enum Event {
    Waiting,
    Started { index: usize, total: usize, text: String },
    Output(String),
    Cached,
    Finished { changed_bytes: u64 },
    Failed,
}

/// Sends events on; a listener that is gone does not stop a build, its [`Cancel`] does.
struct Forward(mpsc::UnboundedSender<Event>);

impl BuildObserver for Forward {
    fn event(&mut self, event: BuildEvent<'_>) {
        let event = match event {
            BuildEvent::Waiting => Event::Waiting,
            BuildEvent::StepStarted { index, total, text, .. } => Event::Started { index, total, text: text.to_owned() },
            BuildEvent::Output { line } => Event::Output(line.to_owned()),
            BuildEvent::StepCached { .. } => Event::Cached,
            BuildEvent::StepFinished { changed_bytes, .. } => Event::Finished { changed_bytes },
            BuildEvent::StepFailed { .. } => Event::Failed,
            BuildEvent::Finished { .. } => return,
        };
        let _ = self.0.send(event);
    }
}

/// # Errors
/// When there is no home directory.
pub fn cache() -> Result<CachePaths, Failure> {
    CachePaths::from_environment()
        .ok_or_else(|| Failure::failed("there is no place for the build cache").hint("set HOME or XDG_CACHE_HOME in the environment"))
}

/// Builds the image of `spec`.
///
/// # Errors
/// When a step fails, with its last lines.
pub async fn image(session: &Session, args: &BuildArgs, source: &Source, spec: &Spec) -> Result<BuiltImage, Failure> {
    let options = BuildOptions {
        no_cache: args.no_cache,
        refresh: args.refresh,
        locked: args.locked,
        lock_file: lock_file(source),
        cancel: Cancel::new(),
        registries: registries()?,
        base: None,
    };
    image_of(session, spec, source.context(), options).await
}

/// As [`image`], for a spec that need not come from a file.
///
/// # Errors
/// When a step fails, with its last lines.
pub async fn image_of(session: &Session, spec: &Spec, context: PathBuf, options: BuildOptions) -> Result<BuiltImage, Failure> {
    let (builder, spec, cancel) = (Builder::new(cache()?), spec.clone(), options.cancel.clone());
    observed(session, &cancel, move |observer| builder.build(&spec, &context, &options, observer)).await
}

fn lock_file(source: &Source) -> Option<PathBuf> {
    if source.path == Path::new("-") {
        return None;
    }
    let mut name = source.path.file_name()?.to_owned();
    name.push(".lock");
    Some(source.path.with_file_name(name))
}

/// The kernel bundle that an image boots with: that of the kernel which it brings along, else the machine's ([`kernel`]).
///
/// # Errors
/// When it cannot be made, or the kernel package cannot be had.
pub async fn kernel_of(session: &Session, image: &Manifest) -> Result<KernelBundle, Failure> {
    let Some(own) = image.kernel.clone() else { return kernel(session).await };
    let (builder, cancel, image) = (Builder::new(cache()?), Cancel::new(), image.clone());
    let stop = cancel.clone();
    observed(session, &cancel, move |observer| builder.own_kernel(&image, &own, &stop, observer)).await
}

/// The kernel bundle, made at its first use.
///
/// # Errors
/// When the kernel package cannot be had.
pub async fn kernel(session: &Session) -> Result<KernelBundle, Failure> {
    let (paths, cancel) = (cache()?, Cancel::new());
    if let Some(bundle) = bundles::cached(&paths) {
        return Ok(bundle);
    }
    let step = session.terminal.step("making the kernel bundle, once");
    let stop = cancel.clone();
    let bundle = observed(session, &stop, move |observer| bundles::ensure(&paths, false, &cancel, observer)).await?;
    step.done(&bundle.manifest.release);
    Ok(bundle)
}

/// Runs `work` on a thread for blocking work and shows its events. Ctrl-C cancels it and waits until it has cleaned up.
///
/// # Errors
/// Those of the work.
pub async fn observed<T: Send + 'static>(
    session: &Session,
    cancel: &Cancel,
    work: impl FnOnce(&mut dyn BuildObserver) -> Result<T, BuildError> + Send + 'static,
) -> Result<T, Failure> {
    let mut interrupts = signals::interrupts()?;
    let (sender, mut events) = mpsc::unbounded_channel();
    let task = tokio::task::spawn_blocking(move || work(&mut Forward(sender)));
    let mut view = View { session, coming: None, step: None };
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => view.show(event),
                None => break,
            },
            () = tokio::time::sleep(LET_CACHE_ANSWER), if view.coming.is_some() => view.begin(),
            _ = interrupts.recv() => cancel.cancel(),
        }
    }
    drop(view);
    match task.await {
        Ok(result) => result.map_err(|error| failure(&error)),
        Err(error) => Err(Failure::failed(format!("the builder stopped: {error}"))),
    }
}

/// How long a step may keep silent before it is shown as begun: one that the cache answers is one line, not two.
const LET_CACHE_ANSWER: Duration = Duration::from_millis(150);

struct View<'a> {
    session: &'a Session,
    /// Begun and not yet shown.
    coming: Option<String>,
    step: Option<Step<'a>>,
}

impl View<'_> {
    fn show(&mut self, event: Event) {
        if matches!(event, Event::Cached)
            && let Some(text) = self.coming.take()
        {
            return self.session.terminal.note(format!("{text}: cached"));
        }
        self.begin();
        match event {
            Event::Waiting => self.session.terminal.note("waiting for another build to end"),
            Event::Started { index, total, text } => self.coming = Some(format!("[{index}/{total}] {}", first_line(&text))),
            Event::Output(line) => match &self.step {
                Some(step) => step.line(&line),
                None => self.session.terminal.note(format!("  {}", printable(&line))),
            },
            Event::Cached => self.end("cached"),
            Event::Finished { changed_bytes: 0 } => self.end("nothing changed"),
            Event::Finished { changed_bytes } => self.end(&format!("{} changed", bytes(changed_bytes))),
            Event::Failed => self.step = None,
        }
    }

    fn begin(&mut self) {
        if let Some(text) = self.coming.take() {
            self.step = Some(self.session.terminal.step(text));
        }
    }

    fn end(&mut self, result: &str) {
        if let Some(step) = self.step.take() {
            step.done(result);
        }
    }
}

/// A heredoc is many lines; one says which step it is.
fn first_line(text: &str) -> String {
    const LONGEST: usize = 100;
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() > LONGEST { line.chars().take(LONGEST).chain(['…']).collect() } else { line.to_owned() }
}

/// Whether the build ended because a disk is full. Tools say so in the words of strerror(3).
fn is_full(error: &BuildError, message: &str) -> bool {
    const WORDS: &str = "No space left on device";
    let in_tail = matches!(error, BuildError::StepFailed { tail, .. } if tail.iter().any(|line| line.contains(WORDS)));
    let in_kind = matches!(error, BuildError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull);
    in_tail || in_kind || message.contains(WORDS)
}

fn no_room(failure: Failure, error: &BuildError) -> Failure {
    let cache = cache().map(|paths| paths.root().display().to_string()).unwrap_or_default();
    let temporary = std::env::temp_dir();
    let hint = format!(
        "free some space on the disk of the build cache {cache} or of {}, or set XDG_CACHE_HOME and TMPDIR to places that have some",
        temporary.display()
    );
    let tail = if let BuildError::StepFailed { tail, .. } = error { tail.clone() } else { Vec::new() };
    failure.tail("last lines of the step", tail).hint(hint)
}

/// What a registry's answer means for the program that asked us.
const fn code(error: &OciError) -> ErrorCode {
    match error {
        OciError::NotFound { .. } => ErrorCode::NotFound,
        OciError::Denied { .. } | OciError::Login { .. } => ErrorCode::NotAllowed,
        OciError::Unreachable { .. } => ErrorCode::Unavailable,
        _ => ErrorCode::Failed,
    }
}

pub fn failure(error: &BuildError) -> Failure {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        // A transparent error says the same as what it holds.
        if !message.ends_with(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    if is_full(error, &message) {
        return no_room(Failure::failed(message), error);
    }
    let failure = Failure::failed(message);
    match error {
        BuildError::StepFailed { tail, .. } => {
            failure.tail("last lines of the step", tail.clone()).hint("mend the step and build again: what came before it is cached")
        }
        BuildError::Cancelled => failure.hint("what was finished is cached: the next build goes on from there"),
        BuildError::Artifact { .. } => failure.hint("nothing of it was kept; write it again with `form image export`, or copy it again"),
        BuildError::OwnKernel { .. } => failure.hint("import the disk again, or build on another base"),
        BuildError::Host(source) => match source.downcast_ref::<ClientError>() {
            Some(error) => error.to_api().into(),
            None => failure,
        },
        BuildError::HostBlock { image, .. } => {
            failure.hint(format!("`form image verify {image}` lists what is damaged; whole blocks of it may be on a machine that built it"))
        }
        BuildError::HostManifest { image, .. } => {
            failure.hint(format!("repeat the command; `form image verify {image}` reads the image again"))
        }
        BuildError::Exists { .. } => Failure::new(ErrorCode::Conflict, failure.error.message).hint("remove it, or choose another name"),
        BuildError::Registry { source, .. } | BuildError::Push { source, .. } => {
            let failure = Failure::new(code(source), failure.error.message);
            if let Some(hint) = source.hint() { failure.hint(hint) } else { failure }
        }
        BuildError::Locked { .. } => failure.hint("build once without --locked to take the new versions"),
        _ => failure,
    }
}
