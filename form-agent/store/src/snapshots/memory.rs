//! The memory of a snapshot, compressed and unfolded again.

use std::{fs::File, io};

use form_types::{Failpoint, Name, VmId, failpoint::reach};
use rustix::fs::{CWD, MemfdFlags, RenameFlags, memfd_create, renameat_with};

use super::{COMPRESSED_MEMORY, MEMORY, Record, SavedMemory, link, read_record};
use crate::{
    Store,
    compressed::{self, Compressed, CompressedError, Unfolded},
    disks::create,
    durable::{Draft, Seal, sync_dir},
    error::{Result, StoreError},
};

impl Store {
    /// Puts a snapshot with compressed memory in the place of one with memory that is not, in one step; before it the snapshot is what it was, and so
    /// it stays when this fails. `go_on` is told, every MiB, how many bytes of the file of memory are done, and may end it. False when there is
    /// nothing to compress.
    ///
    /// # Errors
    /// Those of [`Store::snapshot`], [`StoreError::NoRoom`], what `go_on` says.
    pub fn compress_snapshot(&self, vm: &VmId, name: &Name, go_on: impl FnMut(u64) -> io::Result<()>) -> Result<bool> {
        let entry = self.snapshot(vm, name)?;
        let directory = self.snapshots_of(vm).join(name.as_str());
        let record = read_record(&directory, name)?;
        let (Some(saved), Some((state_length, _)), None) = (entry.saved, record.saved, record.compressed) else { return Ok(false) };
        let draft = self.draft(vm, name, directory.clone())?;
        for file in record.others() {
            link(&directory, &draft.path, file)?;
        }
        let path = draft.path.join(COMPRESSED_MEMORY);
        let source = File::open(&saved.memory).map_err(StoreError::io("read", &saved.memory))?;
        let target = create(&path).map_err(StoreError::io("write", &path))?;
        let unfolded = compressed::write(&source, &target, go_on).map_err(StoreError::io("write", &path))?;
        let length = target.metadata().map_err(StoreError::io("look at", &path))?.len();
        let memory_seal = Some(Seal::of(&path)?);
        let record = Record { saved: Some((state_length, length)), memory_seal, compressed: Some(unfolded), ..record };
        draft.write_record(&record)?;
        reach(Failpoint::SnapshotCompressed);
        renameat_with(CWD, &draft.path, CWD, &directory, RenameFlags::EXCHANGE)
            .map_err(|error| StoreError::io("put in its place", &directory)(error.into()))?;
        directory.parent().map_or(Ok(()), sync_dir)?;
        reach(Failpoint::SnapshotExchanged);
        // What it was goes with the draft, in whose place it lies.
        drop(draft);
        Ok(true)
    }

    /// The saved memory, to be mapped. What is compressed is unfolded into a file without a name, which is there as long as somebody has it open or
    /// mapped, and has been compared with its checksums.
    ///
    /// # Errors
    /// [`StoreError::SnapshotMemory`], [`StoreError::NoRoom`].
    pub fn open_memory(&self, saved: &SavedMemory, name: &Name) -> Result<File> {
        let (file, compressed) = saved.open(name)?;
        let Some(unfolded) = compressed else { return Ok(file) };
        let target = self.nameless()?;
        let opened = Compressed::open(&file, unfolded.length);
        opened.and_then(|compressed| compressed.unfold(&target)).map_err(|error| fault(saved, name, error))?;
        Ok(target)
    }

    /// As [`Store::open_memory`], but of what is compressed only its last MiB is there, which says what it is; the rest are zeros.
    ///
    /// # Errors
    /// As [`Store::open_memory`].
    pub fn open_end_of_memory(&self, saved: &SavedMemory, name: &Name) -> Result<File> {
        let (file, compressed) = saved.open(name)?;
        let Some(unfolded) = compressed else { return Ok(file) };
        let target = memfd_create("memory", MemfdFlags::CLOEXEC).map_err(|error| StoreError::io("unfold", &saved.memory)(error.into()))?;
        let target = File::from(target);
        let opened = Compressed::open(&file, unfolded.length);
        opened.and_then(|compressed| compressed.unfold_end(&target)).map_err(|error| fault(saved, name, error))?;
        Ok(target)
    }

    /// A file that is gone when nobody has it open any more.
    fn nameless(&self) -> Result<File> {
        // An agent that is killed here leaves it where the next start removes everything.
        let draft = Draft::new(&self.vms)?;
        let path = draft.path().join(MEMORY);
        create(&path).map_err(StoreError::io("write", &path))
    }
}

impl SavedMemory {
    /// The file of memory, and how it is unfolded when it is compressed: both as they are now. It may have been compressed since somebody looked,
    /// which puts another directory with another file in this one's place; that is done once.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(&self, name: &Name) -> Result<(File, Option<Unfolded>)> {
        let failed = |error| Err(StoreError::io("read", &self.memory)(error));
        let gone = match File::open(&self.memory) {
            Ok(file) => return Ok((file, self.compressed)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.compressed.is_none() => error,
            Err(error) => return failed(error),
        };
        let Some(directory) = self.memory.parent() else { return failed(gone) };
        match read_record(directory, name) {
            Ok(Record { compressed: Some(unfolded), .. }) => match File::open(directory.join(COMPRESSED_MEMORY)) {
                Ok(file) => Ok((file, Some(unfolded))),
                Err(error) => failed(error),
            },
            _ => failed(gone),
        }
    }

    /// Reads compressed memory, and compares it with its checksums. Memory that is not compressed has its own.
    ///
    /// # Errors
    /// [`StoreError::SnapshotMemory`].
    pub fn verify_compressed(&self, name: &Name) -> Result<()> {
        let (file, compressed) = self.open(name)?;
        let Some(unfolded) = compressed else { return Ok(()) };
        let verified = Compressed::open(&file, unfolded.length).and_then(|compressed| compressed.verify());
        verified.map_err(|error| fault(self, name, error))
    }
}

fn fault(saved: &SavedMemory, name: &Name, error: CompressedError) -> StoreError {
    match error {
        CompressedError::Read(error) => StoreError::io("read", &saved.memory)(error),
        CompressedError::Write(error) => StoreError::io("unfold", &saved.memory)(error),
        source => StoreError::SnapshotMemory { name: name.clone(), source },
    }
}
