//! What a snapshot's memory can be built upon: an earlier snapshot since which the VM's process knows what has changed, and whose file is as it
//! was made. The new file begins as a copy of that one which shares its blocks, and the process writes what has changed; so each file is
//! whole by itself, and neither knows of the other. Anything else is a full snapshot. Compressed memory shares no blocks: nothing is built upon it.

use std::fs::File;

use form_api::ApiError;
use form_store::SnapshotDraft;
use form_types::{Name, VmId};
use form_vmm::{
    control::{Client, SaveHow},
    machine::Saved,
    memory::image::{SaveId, save_of},
};

use super::{KeptMemory, find};
use crate::{agent::Agent, serve::store_error};

/// How memory is going to be saved.
pub struct Base {
    pub how: SaveHow,
    /// What its file is a copy of.
    name: Option<Name>,
    /// What was written before the VM stands.
    copied: Option<Copied>,
}

struct Copied {
    /// Only what had changed since the earlier snapshot.
    incremental: bool,
    /// Of all rounds, in bytes.
    written: u64,
}

impl Base {
    /// A round of a copy was written: what builds upon the file builds upon that.
    pub fn copied(&mut self, incremental: bool, written: u64) {
        match &mut self.copied {
            // A round that could not build upon the one before began anew.
            Some(copied) if incremental => copied.written += written,
            Some(copied) => *copied = Copied { incremental: false, written },
            none => *none = Some(Copied { incremental, written }),
        }
        self.how.onto = true;
    }

    /// What is kept of it, when the VM process has `saved` the rest or goes on to write that, and the bytes that were written before.
    pub fn kept(self, saved: Saved) -> (KeptMemory, u64) {
        // All of it is written again when memory has come or gone meanwhile.
        let copied = self.copied.filter(|_| saved.incremental);
        let is_upon = saved.incremental && copied.as_ref().is_none_or(|copied| copied.incremental);
        let before = copied.map_or(0, |copied| copied.written);
        (KeptMemory { base: self.name.filter(|_| is_upon), written_bytes: saved.written.map(|written| before + written) }, before)
    }
}

/// Makes the files of `draft`; those for memory a copy of what it can be built upon, where that is possible. With `compress` nothing will be built
/// upon it in turn.
///
/// # Errors
/// No room.
pub fn prepare(agent: &Agent, vm: &VmId, client: &Client, draft: &mut SnapshotDraft, compress: bool) -> Result<Base, ApiError> {
    draft.create_saved().map_err(|error| store_error(&error))?;
    // Where files cannot share blocks nothing is built upon another: the VM need not note what changes.
    let track = draft.can_share().map_err(|error| store_error(&error))?;
    let mut base = Base { how: SaveHow { onto: false, track }, name: None, copied: None };
    if !track {
        return Ok(base);
    }
    // A process of an earlier release does not know the question.
    let known = client.saves().unwrap_or_default();
    if let Some((name, file)) = latest(agent, vm, &known)
        && draft.share_memory(&file).map_err(|error| store_error(&error))?
    {
        base.how.onto = true;
        base.name = Some(name);
    }
    // With nothing to build upon neither now nor later, the VM keeps its large pages.
    base.how.track = base.how.onto || !compress;
    Ok(base)
}

/// The snapshot of the latest of these saves that is there and was not written to since it was made.
fn latest(agent: &Agent, vm: &VmId, known: &[SaveId]) -> Option<(Name, File)> {
    let mut best: Option<(usize, Name, File)> = None;
    for name in agent.store.snapshots(vm).ok()? {
        let Ok((entry, _)) = find(agent, vm, &name) else { continue };
        let Some(saved) = entry.saved.filter(|saved| !saved.is_touched && saved.compressed.is_none()) else { continue };
        let Ok(file) = File::open(&saved.memory) else { continue };
        let Some(at) = save_of(&file).ok().and_then(|save| known.iter().position(|known| *known == save)) else { continue };
        if best.as_ref().is_none_or(|(than, ..)| at > *than) {
            best = Some((at, name, file));
        }
    }
    best.map(|(_, name, file)| (name, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_copied_before_the_vm_stood_counts_with_what_was_left() {
        let base = || Base { how: SaveHow { onto: true, track: true }, name: Some("first".parse().unwrap()), copied: None };
        let saved = |incremental, written| Saved { incremental, written };
        let kept = |base: Base, saved| {
            let (memory, before) = base.kept(saved);
            (memory.base.map(|name| name.to_string()), memory.written_bytes, before)
        };
        let first = Some("first".to_owned());
        assert_eq!(kept(base(), saved(true, Some(5))), (first.clone(), Some(5), 0));
        assert_eq!(kept(base(), saved(false, Some(5))), (None, Some(5), 0));
        let mut copied = base();
        copied.copied(true, 100);
        copied.copied(true, 20);
        assert_eq!(kept(copied, saved(true, None)), (first, None, 120));
        // The VM process did not know the earlier one: the later rounds build upon the first.
        let mut all = base();
        all.copied(false, 100);
        all.copied(true, 20);
        assert!(all.how.onto);
        assert_eq!(kept(all, saved(true, Some(3))), (None, Some(123), 120));
        // Memory came between two rounds, or before the save.
        let mut anew = base();
        anew.copied(true, 20);
        anew.copied(false, 100);
        assert_eq!(kept(anew, saved(true, Some(3))), (None, Some(103), 100));
        let mut anew = base();
        anew.copied(true, 20);
        assert_eq!(kept(anew, saved(false, Some(200))), (None, Some(200), 0));
    }
}
