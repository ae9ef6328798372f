//! The file of a saved state: magic, version, checksum and length, then JSON.
//!
//! The version covers everything behind it. A state of a version that this program does not know is refused: a VM that goes on with half
//! of its state is worse than one that has to be started.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::state::MachineState;

/// Raised with every change of what is saved.
pub const VERSION: u32 = 3;
/// What was saved since then can be read.
const OLDEST: u32 = 1;
const MAGIC: [u8; 8] = *b"FORMVMST";
/// Magic, version, checksum, length.
const HEADER: usize = 24;
/// A VM with 128 vCPUs and all devices has under 16 MiB.
const LENGTH_MAX: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum SavedStateError {
    #[error("cannot write the saved state")]
    Write(#[source] io::Error),
    #[error("cannot read the saved state")]
    Read(#[source] io::Error),
    #[error("this is not the saved state of a VM")]
    Foreign,
    #[error("the saved state has version {found}, this program reads {VERSION}: restore it with the release that saved it")]
    Version { found: u32 },
    #[error("the saved state is torn: {found} bytes of {expected}")]
    Torn { expected: u64, found: u64 },
    #[error("the saved state is damaged: its checksum is wrong")]
    Checksum,
    #[error("the saved state cannot be understood")]
    Malformed(#[source] serde_json::Error),
}

/// Writes `state` to `file`, whose former content is dropped. When it returns the file is on stable storage.
///
/// # Errors
/// When the file cannot be written.
pub fn write(file: &File, state: &MachineState) -> Result<(), SavedStateError> {
    let payload = serde_json::to_vec(state).map_err(SavedStateError::Malformed)?;
    let write = SavedStateError::Write;
    file.set_len(0).map_err(write)?;
    file.write_all_at(&payload, HEADER as u64).map_err(write)?;
    file.write_all_at(&header(&payload), 0).map_err(write)?;
    file.sync_data().map_err(write)
}

fn header(payload: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    header[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    header
}

/// # Errors
/// When the file is not what [`write`] wrote, or another version's.
pub fn read(file: &File) -> Result<MachineState, SavedStateError> {
    let found = file.metadata().map_err(SavedStateError::Read)?.len();
    let mut header = [0; HEADER];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(SavedStateError::Foreign),
        Err(error) => return Err(SavedStateError::Read(error)),
    }
    if header[..8] != MAGIC {
        return Err(SavedStateError::Foreign);
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if !(OLDEST..=VERSION).contains(&word(8)) {
        return Err(SavedStateError::Version { found: word(8) });
    }
    let length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if length > LENGTH_MAX || found != length + HEADER as u64 {
        return Err(SavedStateError::Torn { expected: length.saturating_add(HEADER as u64), found });
    }
    let mut payload = vec![0; length as usize];
    file.read_exact_at(&mut payload, HEADER as u64).map_err(SavedStateError::Read)?;
    if crc32fast::hash(&payload) != word(12) {
        return Err(SavedStateError::Checksum);
    }
    serde_json::from_slice(&payload).map_err(SavedStateError::Malformed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::machine::state::ClockState;
    use crate::platform::power::PowerState;
    use crate::platform::processors::ProcessorsState;
    use crate::platform::serial::SerialPortState;

    fn state() -> MachineState {
        MachineState {
            save: [3; 16],
            memory_mib: 256,
            vcpus: Vec::new(),
            processors: Some(ProcessorsState::new(2, 4)),
            chips: vec![kvm_bindings::kvm_irqchip { chip_id: 2, ..Default::default() }],
            clock: ClockState { guest_ns: 1, world_ns: u64::MAX },
            serial: SerialPortState::default(),
            power: PowerState { events: 1, timer_ns: 5 },
            pci_address: 0x8000_0000,
            devices: Vec::new(),
        }
    }

    fn saved() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xFF; 100_000], 0).unwrap();
        write(&file, &state()).unwrap();
        file
    }

    #[test]
    fn a_state_comes_back() {
        let again = read(&saved()).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&state()).unwrap());
    }

    #[test]
    fn a_state_of_the_first_version_has_the_vcpus_that_it_started_with() {
        let file = saved();
        let mut json: serde_json::Value = serde_json::to_value(state()).unwrap();
        json.as_object_mut().unwrap().remove("processors");
        let payload = serde_json::to_vec(&json).unwrap();
        file.set_len(0).unwrap();
        file.write_all_at(&payload, HEADER as u64).unwrap();
        file.write_all_at(&header(&payload), 0).unwrap();
        file.write_all_at(&1_u32.to_le_bytes(), 8).unwrap();
        assert_eq!(read(&file).unwrap().processors, None);
        file.write_all_at(&0_u32.to_le_bytes(), 8).unwrap();
        assert!(matches!(read(&file), Err(SavedStateError::Version { found: 0 })));
    }

    #[test]
    fn a_foreign_a_newer_a_torn_and_a_damaged_file_are_told_apart() {
        assert!(matches!(read(&tempfile::tempfile().unwrap()), Err(SavedStateError::Foreign)));
        let file = saved();
        file.write_all_at(b"Q", 0).unwrap();
        assert!(matches!(read(&file), Err(SavedStateError::Foreign)));
        let file = saved();
        file.write_all_at(&(VERSION + 1).to_le_bytes(), 8).unwrap();
        let error = read(&file).unwrap_err();
        assert!(error.to_string().contains(&format!("version {}", VERSION + 1)), "{error}");
        let file = saved();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        assert!(matches!(read(&file), Err(SavedStateError::Torn { .. })));
        let file = saved();
        file.write_all_at(b"\0", 30).unwrap();
        assert!(matches!(read(&file), Err(SavedStateError::Checksum)));
        // Whole, but of a program that wrote something else.
        let file = saved();
        file.set_len(0).unwrap();
        file.write_all_at(b"{}", HEADER as u64).unwrap();
        file.write_all_at(&header(b"{}"), 0).unwrap();
        assert!(matches!(read(&file), Err(SavedStateError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(at in 0_u64..600, bytes in prop::collection::vec(any::<u8>(), 1..16), cut in 0_u64..700) {
            let file = saved();
            file.write_all_at(&bytes, at).unwrap();
            file.set_len(cut).unwrap();
            prop_assert!(read(&file).is_err());
        }
    }
}
