//! What a snapshot's memory can be built upon: an earlier snapshot since which the VM's process knows what has changed, and whose file is as it
//! was made. The new file begins as a copy of that one which shares its blocks, and the process writes what has changed; so each file is
//! whole by itself, and neither knows of the other. Anything else is a full snapshot. Compressed memory shares no blocks: nothing is built upon it.

use std::fs::File;

use form_api::ApiError;
use form_store::SnapshotDraft;
use form_types::{Name, VmId};
use form_vmm::{
    control::{Client, SaveHow},
    memory::image::{SaveId, save_of},
};

use super::find;
use crate::{agent::Agent, serve::store_error};

/// How memory is going to be saved.
pub struct Base {
    pub how: SaveHow,
    /// What its file is a copy of.
    pub name: Option<Name>,
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
    let mut base = Base { how: SaveHow { onto: false, track }, name: None };
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
