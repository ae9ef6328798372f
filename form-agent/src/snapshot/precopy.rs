//! Copying a VM's memory to the snapshot's file while the VM runs, in rounds: each writes what has changed since the one before. What the VM
//! stands for is then the little that has changed last, however much memory it has.

use std::os::fd::{AsFd, BorrowedFd};

use form_api::ApiError;
use form_store::SnapshotDraft;
use form_types::{Failpoint, VmId, failpoint::reach};
use form_vmm::control::{Client, ClientError};

use super::{base::Base, take::process_error};
use crate::agent::internal;

/// A VM that changes its memory faster than it is written is not waited for.
const ROUNDS: u32 = 6;
/// What a round may have written, in bytes, for no other to be worth while: it takes the VM process no time to copy as much.
const LITTLE: u64 = 4 << 20;

/// Copies the memory of a VM that runs, and says in `base` what is left for the save. Blocks.
///
/// # Errors
/// The VM ended meanwhile, or the file cannot be written.
pub(super) fn precopy(vm: &VmId, client: &Client, draft: &mut SnapshotDraft, base: &mut Base) -> Result<(), ApiError> {
    let (_, memory) = draft.saved().ok_or_else(|| internal(&"the snapshot has no files"))?;
    let told = rounds(client, memory.as_fd(), base.how.onto, |incremental, written| base.copied(incremental, written));
    if let Some(why) = told.map_err(|error| process_error(&error))? {
        tracing::info!(%vm, why, "not all of its memory is copied before it stands");
    }
    Ok(())
}

/// Copies the memory of a VM that runs to `memory`, which with `onto` holds a copy of an earlier save's; `each` is told of every round whether it
/// wrote only what had changed, and the bytes of pages. Gives why there are no more rounds, when the VM process refused one: it is not
/// running, of a release that does not know how, or cannot. Then the VM stands for longer.
///
/// # Errors
/// The VM process is gone, or the file cannot be written.
pub fn rounds(
    client: &Client,
    memory: BorrowedFd<'_>,
    mut onto: bool,
    mut each: impl FnMut(bool, u64),
) -> Result<Option<String>, ClientError> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS {
        let (aside, saved) = match client.precopy(memory, onto) {
            Ok(begun) => begun,
            Err(ClientError::Refused { message, .. }) => return Ok(Some(message)),
            Err(error) => return Err(error),
        };
        reach(Failpoint::SnapshotCopied);
        let written = aside.wait()?.unwrap_or_default();
        each(saved.incremental, written);
        onto = true;
        if written <= LITTLE || written > before / 4 * 3 {
            break;
        }
        before = written;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::OwnedFd,
        time::{Duration, Instant},
    };

    use form_vmm::control::{ControlReply, ControlRequest, ErrorKind, channel::Channel};

    use super::*;

    /// Asks a VM process whose rounds write so many bytes and which then does not go on. Gives what each round was asked.
    fn asked(rounds_write: &'static [u64], told: &mut Vec<(bool, u64)>) -> (Vec<bool>, Result<Option<String>, ClientError>) {
        let (mine, its) = Channel::pair().unwrap();
        let process = std::thread::spawn(move || {
            let mut asked = Vec::new();
            let until = Instant::now() + Duration::from_secs(10);
            while let Ok(Some((request, fds))) = its.receive::<ControlRequest>(until) {
                let ControlRequest::Precopy { onto, .. } = request else { panic!("{request:?}") };
                asked.push(onto);
                let Some(written) = rounds_write.get(asked.len() - 1) else {
                    let message = "the VM is paused".to_owned();
                    its.send(&ControlReply::Error { kind: ErrorKind::WrongState, message }, &[], until).unwrap();
                    continue;
                };
                let [_, whole] = <[OwnedFd; 2]>::try_from(fds).unwrap();
                its.send(&ControlReply::Saved { incremental: onto, written_bytes: None }, &[], until).unwrap();
                rustix::io::write(whole, &[&[0; 4][..], &written.to_le_bytes()].concat()).unwrap();
            }
            asked
        });
        let file = tempfile::tempfile().unwrap();
        let client = Client::new(mine);
        let result = rounds(&client, file.as_fd(), false, |incremental, written| told.push((incremental, written)));
        drop(client);
        (process.join().unwrap(), result)
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_end_when_little_is_left_or_they_gain_nothing() {
        for (write, count) in [
            (&[3 * MIB, 0][..], 1),
            (&[900 * MIB, 90 * MIB, 4 * MIB, 0], 3),
            // It changes as much as can be written.
            (&[900 * MIB, 800 * MIB, 0], 2),
            (&[900 * MIB, 600 * MIB, 400 * MIB, 250 * MIB, 150 * MIB, 100 * MIB, 60 * MIB], 6),
        ] {
            let mut told = Vec::new();
            let (asked, result) = asked(write, &mut told);
            assert!(matches!(result, Ok(None)), "{result:?}");
            assert_eq!(asked, (0..count).map(|round| round > 0).collect::<Vec<_>>(), "{write:?}");
            assert_eq!(told.len(), count);
        }
    }

    #[test]
    fn a_vm_process_that_does_not_go_on_with_it_is_no_fault() {
        let mut told = Vec::new();
        let (asked, result) = asked(&[100 * MIB], &mut told);
        assert_eq!((asked, told, result.unwrap().as_deref()), (vec![false, true], vec![(false, 100 * MIB)], Some("the VM is paused")));
    }
}
