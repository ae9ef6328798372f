//! The memory of a snapshot that is there, compressed while its VM runs on. A snapshot that was asked for and exists is better than none: whatever
//! comes between leaves it as it is, and is said.

use std::{
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use form_api::{ApiError, ErrorCode};
use form_types::{Name, OperationId, VmId};
use form_vmm::memory::image::ImageError;

use super::{find, operate::on_disk};
use crate::{
    agent::{Agent, internal},
    headroom,
    serve::store_error,
};

/// How often it is said how far it is.
const SAID: Duration = Duration::from_secs(5);
/// Bytes of memory after which it is looked how much room is left.
const LOOK: u64 = 32 << 20;

/// Compresses the memory of the snapshot `name`, if it has any that is not. The last step of the operation says why that was not done.
pub async fn compress(agent: &Arc<Agent>, id: OperationId, vm: VmId, name: &Name) {
    agent.operations.step(id, "compressing memory");
    let of = name.clone();
    let done = on_disk(agent, move |agent| Ok(compress_now(agent, id, &vm, &of))).await;
    if let Err(error) = done.and_then(|done| done) {
        tracing::warn!(vm = %vm, snapshot = %name, "its memory stays uncompressed: {}", error.message);
        agent.operations.step(id, format!("its memory is kept uncompressed: {}", error.message));
    }
}

fn compress_now(agent: &Agent, id: OperationId, vm: &VmId, name: &Name) -> Result<(), ApiError> {
    let saved = match find(agent, vm, name)?.0.saved {
        Some(saved) if saved.compressed.is_none() => saved,
        // By an agent that was stopped after that.
        Some(_) => return Ok(()),
        None => return Err(ApiError::new(ErrorCode::Conflict, "the VM was stopped just before, and there is none")),
    };
    let file = File::open(&saved.memory).map_err(|error| internal(&format!("{}: {error}", saved.memory.display())))?;
    // What it has lost of an earlier one that it builds upon would be lost with a good checksum.
    match form_vmm::machine::verify_memory(&file) {
        Ok(()) | Err(ImageError::NoChecksums) => {}
        Err(error) => return Err(internal(&error)),
    }
    let length = file.metadata().map_err(|error| internal(&error))?.len();
    let mut said = Instant::now();
    let go_on = |done: u64| -> io::Result<()> {
        if said.elapsed() >= SAID {
            said = Instant::now();
            agent.operations.step(id, format!("compressing memory: {} %", done.saturating_mul(100) / length.max(1)));
        }
        // It writes beside what is there; other VMs need the rest.
        let is_low = || agent.store.space().is_ok_and(|space| space.free < headroom::LOW);
        if done.is_multiple_of(LOOK) && is_low() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    };
    agent.store.compress_snapshot(vm, name, go_on).map(drop).map_err(|error| store_error(&error))
}
