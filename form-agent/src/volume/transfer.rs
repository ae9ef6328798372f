//! What volumes hold, on its way into the host and out of it.

use std::{io, sync::Arc};

use form_api::{
    ApiError, ErrorCode,
    volume::{CreateRequest, Piece},
};
use form_store::Contents;
use form_types::{Failpoint, Name, OperationId, failpoint::reach};
use tokio::sync::mpsc::{Receiver, Sender};

use super::{
    describe, export,
    operate::{self, Change, Exported, Opened, Progress},
    rules,
};
use crate::{agent::Agent, authorise::Caller, serve::store_error};

/// A volume that is about to be made of what is sent. Dropped before [`Import::receive`] its operation fails.
pub struct Import {
    agent: Arc<Agent>,
    name: Name,
    id: OperationId,
    progress: Box<Progress>,
    finished: bool,
}

impl Import {
    /// Records the operation.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn begin(agent: &Arc<Agent>, caller: &Caller, request: CreateRequest) -> Result<Self, ApiError> {
        let name = request.name.clone();
        match operate::open(agent, caller, &name, Change::Import(request))? {
            Opened::New(id, progress) => Ok(Self { agent: Arc::clone(agent), name, id, progress, finished: false }),
            // What was sent then is not sent again.
            Opened::Repeated(operation) => {
                let text = format!("this import was asked for before, and is {}", operation.status.as_str());
                Err(ApiError::new(ErrorCode::Conflict, text).hint(format!("look at it with `form op show {}`", operation.id)))
            }
        }
    }

    /// Makes the volume of the pieces that come until `None`. Without that nothing is left of it. Blocks.
    ///
    /// # Errors
    /// When the pieces break off or make no sense, or there is no room.
    pub fn receive(mut self, pieces: Receiver<Option<Piece>>) -> Result<(), ApiError> {
        let result = self.fill(pieces);
        self.finished = true;
        self.agent.operations.finish(self.id, result.clone());
        result
    }

    fn fill(&self, mut pieces: Receiver<Option<Piece>>) -> Result<(), ApiError> {
        let Change::Import(request) = &self.progress.change else {
            return Err(ApiError::new(ErrorCode::Internal, "an import of something else"));
        };
        let pool = self.agent.store.pool(&self.progress.pool).map_err(|error| store_error(&error))?;
        let pool = &*pool;
        let _in_use = pool.enter().map_err(|error| store_error(&error))?;
        super::pool::has_room(pool)?;
        pool.can_hold(request.format, request.size_bytes).map_err(|error| store_error(&error))?;
        let mut fault = None;
        let filled = pool.create_filled(&self.progress.id, request.format, request.size_bytes, |contents| {
            let taken = take_pieces(contents, &mut pieces);
            taken.map_err(|(error, why)| {
                fault = why.map(|(code, message)| ApiError::new(code, message));
                error
            })
        });
        if let Err(error) = filled {
            return Err(fault.unwrap_or_else(|| store_error(&error)));
        }
        reach(Failpoint::VolumeMade);
        operate::complete(&self.agent, pool, &self.name, &self.progress)
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        if !self.finished {
            let error = ApiError::new(ErrorCode::Failed, "the client was gone before it sent anything").hint("run the same command again");
            self.agent.operations.finish(self.id, Err(error));
        }
    }
}

type Fault = (io::Error, Option<(ErrorCode, String)>);

fn take_pieces(contents: &Contents, pieces: &mut Receiver<Option<Piece>>) -> Result<(), Fault> {
    loop {
        match pieces.blocking_recv() {
            Some(Some(Piece { offset, bytes })) => contents.write_at(&bytes, offset).map_err(|error| {
                let outside = error.kind() == io::ErrorKind::InvalidInput;
                let text = || format!("{} bytes at {offset} are not in a volume of {} bytes", bytes.len(), contents.size_bytes());
                (error, outside.then(|| (ErrorCode::Invalid, text())))
            })?,
            Some(None) => return Ok(()),
            None => {
                let text = "what was sent broke off: nothing is left of it".to_owned();
                return Err((io::ErrorKind::UnexpectedEof.into(), Some((ErrorCode::Failed, text))));
            }
        }
    }
}

/// A volume of this host, open for reading: nobody can write to it as long as it is.
///
/// # Errors
/// When there is none, or somebody may write to it.
pub fn open(agent: &Agent, name: &Name) -> Result<Contents, ApiError> {
    let _turn = agent.volume_turn();
    let volume = describe::volume_named(agent, name)?;
    if volume.host != agent.host_id() {
        return Err(rules::VolumeFault::NotYours(volume.name).into_api());
    }
    operate::not_exported(agent, &volume, "be read", Exported::Writable)?;
    operate::not_held(agent, &volume, "be read")?;
    let pool = agent.store.pool(&volume.pool).map_err(|error| store_error(&error))?;
    export::open(&pool, &volume, false)
}

/// Sends what a volume holds, without its holes, until all is sent or nobody takes it any more. Blocks.
///
/// # Errors
/// When the volume cannot be read.
pub fn send(contents: &Contents, to: &Sender<Piece>) -> io::Result<()> {
    let (mut at, size) = (0, contents.size_bytes());
    while at < size {
        let extent = contents.extent(at, size - at)?;
        let end = at + extent.length;
        while !extent.is_hole && at < end {
            let count = usize::try_from(end - at).unwrap_or(Piece::MAX_BYTES).min(Piece::MAX_BYTES);
            let mut bytes = vec![0; count];
            contents.read_at(&mut bytes, at)?;
            if to.blocking_send(Piece { offset: at, bytes }).is_err() {
                return Ok(());
            }
            at += count as u64;
        }
        at = end;
    }
    Ok(())
}
