//! Progress of a build, as data: who shows it decides how.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use form_types::Digest;

/// Gets the events of a build in order, on the thread that builds.
pub trait BuildObserver {
    fn event(&mut self, event: BuildEvent<'_>);
}

impl<F: FnMut(BuildEvent<'_>)> BuildObserver for F {
    fn event(&mut self, event: BuildEvent<'_>) {
        self(event);
    }
}

#[derive(Clone, Debug)]
pub enum BuildEvent<'a> {
    /// Another build holds the cache; this one goes on when it is done.
    Waiting,
    /// `index` counts from 1. `line` is the line of the Formfile; `None` where the step was not written (accounts, work directory).
    StepStarted { index: usize, total: usize, line: Option<u32>, text: &'a str },
    /// A line that the step wrote, without its end of line.
    Output { line: &'a str },
    /// Nothing to do: the layer is in the cache.
    StepCached { index: usize, total: usize },
    /// `changed_bytes`: plain size of the blocks that this layer changed.
    StepFinished { index: usize, total: usize, duration: Duration, changed_bytes: u64 },
    /// A [`crate::BuildError`] with the same content follows.
    StepFailed { index: usize, total: usize, line: Option<u32>, exit_code: Option<i32>, tail: &'a [String] },
    /// The image is in the store. `unchanged`: it was there already, under the same version.
    Finished { digest: Digest, version: u32, unchanged: bool },
}

/// A flag that another thread raises to stop a build. The running step is killed whole and leaves nothing.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
