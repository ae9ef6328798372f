//! Volumes that are served over NBD. An export is a thing of the running agent: the state does not know it, and it ends with the agent.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use form_api::{
    ApiError, ErrorCode,
    volume::{Export, ExportRequest},
};
use form_nbd::{Uri, tls};
use form_store::{
    Contents, Pool, StoreError,
    nbd::{Place, Server},
};
use form_types::{Name, VolumeId};

use super::DesiredVolume;
use crate::{agent::Agent, serve::store_error};

/// The exports of this run of the agent.
pub struct Exports {
    /// Of their sockets.
    directory: PathBuf,
    all: Mutex<BTreeMap<VolumeId, Exported>>,
}

struct Exported {
    name: Name,
    server: Server,
    /// With TLS, the authority of the server's certificate, in PEM.
    authority: Option<String>,
}

impl Exports {
    /// Nothing is exported, and no socket of an agent that was killed is left in `directory`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(directory: &Path) -> io::Result<Self> {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir_all(directory)?,
        }
        Ok(Self { directory: directory.to_owned(), all: Mutex::default() })
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Exported>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn of(&self, id: &VolumeId) -> Option<Export> {
        let all = self.all();
        let Exported { name, server, authority } = all.get(id)?;
        let clients = u32::try_from(server.clients()).unwrap_or(u32::MAX);
        let uri = uri(server.place(), name, authority.is_some());
        Some(Export { uri, writable: server.is_writable(), clients, authority: authority.clone() })
    }

    fn contents(&self, id: &VolumeId) -> Option<Arc<Contents>> {
        self.all().get(id).map(|exported| exported.server.contents())
    }

    /// Hangs up on the clients of a volume's export and closes the volume; that there is none is fine. Blocks until their threads have ended.
    pub fn end(&self, id: &VolumeId) {
        let ended = self.all().remove(id);
        // Not under the lock: others may ask meanwhile.
        drop(ended);
    }

    /// Ends an export that nobody can find any more, since somebody removed its socket; whether there was one.
    pub fn end_unreachable(&self, id: &VolumeId) -> bool {
        let is_gone = |exported: &Exported| matches!(exported.server.place(), Place::Unix(path) if !path.exists());
        let ended = {
            let mut all = self.all();
            if all.get(id).is_some_and(is_gone) { all.remove(id) } else { None }
        };
        ended.is_some()
    }

    pub fn end_all(&self) {
        let ended = std::mem::take(&mut *self.all());
        drop(ended);
    }
}

/// Whether an export may be where it is wanted.
///
/// # Errors
/// When others than this host's own programs could reach it.
pub fn check(request: &ExportRequest) -> Result<(), ApiError> {
    let Some(certificate) = &request.client_certificate else {
        return match request.listen {
            Some(address) if !address.ip().is_loopback() => {
                let text =
                    format!("{address} is no address of the loopback interface: an export there would be open to the network, without TLS");
                Err(ApiError::new(ErrorCode::Invalid, text)
                    .hint("add --tls DIRECTORY, or listen on 127.0.0.1 or [::1], or leave --listen out for a Unix socket"))
            }
            _ => Ok(()),
        };
    };
    tls::check_certificate(certificate).map_err(|error| ApiError::new(ErrorCode::Invalid, format!("client_certificate: {error}")))?;
    match request.listen {
        None => Err(ApiError::new(ErrorCode::Invalid, "an export with TLS has an address").hint("say which with --listen ADDRESS:PORT")),
        Some(address) if address.ip().is_unspecified() => {
            let text = format!("{address} is every address of the host: clients could not tell that the server is the right one");
            Err(ApiError::new(ErrorCode::Invalid, text).hint("listen on the one address at which clients reach the host"))
        }
        Some(_) => Ok(()),
    }
}

/// Opens the volume and serves it. Whoever calls holds [`Agent::volume_turn`] and has checked that nothing stands in the way.
///
/// # Errors
/// When the volume cannot be opened, or the address not be had.
pub fn start(agent: &Agent, pool: &Pool, volume: &DesiredVolume, request: &ExportRequest) -> Result<(), ApiError> {
    let contents = open(pool, volume, request.writable)?;
    let place = match request.listen {
        Some(address) => Place::Tcp(address),
        None => Place::Unix(agent.exports.directory.join(format!("{}.sock", volume.name))),
    };
    let failed = |error: io::Error| {
        let place = match &place {
            Place::Tcp(address) => address.to_string(),
            Place::Unix(path) => path.display().to_string(),
        };
        let code = if error.kind() == io::ErrorKind::AddrInUse { ErrorCode::Conflict } else { ErrorCode::Failed };
        ApiError::new(code, format!("volume/{} cannot be exported at {place}: {error}", volume.name))
            .hint("choose another address with --listen; port 0 is any that is free")
    };
    let name = volume.name.as_str();
    let started = match (&place, &request.client_certificate) {
        (Place::Tcp(address), Some(client)) => {
            Server::start_secure(contents, name, *address, client).map(|(server, authority)| (server, Some(authority)))
        }
        _ => Server::start(contents, name, &place).map(|server| (server, None)),
    };
    let (server, authority) = started.map_err(failed)?;
    if let Place::Unix(path) = &place {
        share(path, &agent.paths().socket());
    }
    agent.exports.all().insert(volume.id, Exported { name: volume.name.clone(), server, authority });
    Ok(())
}

/// Makes a volume larger that is exported: clients that come then see its new size. Whether it is exported. Whoever calls holds
/// [`Agent::volume_turn`].
///
/// # Errors
/// Those of the file system.
pub fn grow(agent: &Agent, pool: &Pool, id: &VolumeId, size_bytes: u64) -> Result<bool, ApiError> {
    let Some(contents) = agent.exports.contents(id) else { return Ok(false) };
    contents.grow(size_bytes).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            ApiError::new(ErrorCode::Conflict, "somebody else reads the volume, and it is not made larger under that")
                .hint("try again when that has ended")
        }
        _ => ApiError::new(ErrorCode::Failed, format!("the volume cannot be made larger: {error}")),
    })?;
    pool.note_grown(id, size_bytes).map_err(|error| store_error(&error))?;
    Ok(true)
}

/// The volume as it is, made when it never was.
///
/// # Errors
/// When somebody else has it, or it cannot be opened.
pub fn open(pool: &Pool, volume: &DesiredVolume, writable: bool) -> Result<Contents, ApiError> {
    let open = || {
        // What a restore that was interrupted left to do.
        pool.settle_restore(&volume.id, volume.restored.as_ref())?;
        let entry = pool.ensure(&volume.id, volume.format, volume.size_bytes)?;
        // As when a VM starts: it may have been resized while somebody had it.
        if entry.size_bytes < volume.size_bytes
            && let Err(error) = pool.grow(&volume.id, volume.size_bytes)
            && !matches!(error, StoreError::VolumeInUse { .. })
        {
            return Err(error);
        }
        pool.open_growable(&volume.id, !writable)
    };
    let opened = open().map_err(|error| {
        let error = store_error(&error);
        ApiError { message: format!("volume/{}: {}", volume.name, error.message), ..error }
    })?;
    Contents::new(opened, writable)
        .map_err(|error| ApiError::new(ErrorCode::Failed, format!("volume/{} cannot be read: {error}", volume.name)))
}

/// Lets in who may use the agent's own socket. Where that cannot be, the export stays root's.
fn share(path: &Path, like: &Path) {
    let shared = fs::metadata(like).and_then(|meta| {
        chown(path, None, Some(meta.gid()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(meta.mode() & 0o660))
    });
    if let Err(error) = shared {
        tracing::warn!(%error, path = %path.display(), "only root may use the export");
    }
}

fn uri(place: &Place, name: &Name, tls: bool) -> String {
    let place = match place {
        Place::Tcp(address) => form_nbd::Place::Tcp { host: address.ip().to_string(), port: address.port() },
        Place::Unix(path) => form_nbd::Place::Unix(path.clone()),
    };
    Uri { place, export: name.to_string(), tls, certificates: None }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_others_reach_are_refused() {
        let listen = |text: &str| ExportRequest { listen: Some(text.parse().unwrap()), ..ExportRequest::default() };
        assert!(check(&ExportRequest::default()).is_ok());
        assert!(check(&listen("127.0.0.1:0")).is_ok() && check(&listen("[::1]:10809")).is_ok());
        for open in ["0.0.0.0:10809", "[::]:10809", "192.0.2.1:1", "[::ffff:127.0.0.1]:1"] {
            assert_eq!(check(&listen(open)).unwrap_err().code, ErrorCode::Invalid, "{open}");
        }
        let client_certificate = Some(tls::Credentials::for_client().unwrap().certificate);
        let secure = |text: &str| ExportRequest { client_certificate: client_certificate.clone(), ..listen(text) };
        assert!(check(&secure("192.0.2.1:0")).is_ok() && check(&secure("[::1]:1")).is_ok());
        assert!(check(&secure("0.0.0.0:1")).is_err(), "whose certificate would that be?");
        assert!(check(&ExportRequest { listen: None, ..secure("[::1]:1") }).is_err());
        for none in ["", "PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &"x".repeat(1 << 20)] {
            let request = ExportRequest { client_certificate: Some(none.to_owned()), ..listen("192.0.2.1:1") };
            assert_eq!(check(&request).unwrap_err().code, ErrorCode::Invalid, "{none:.40}");
        }
    }

    #[test]
    fn uris_are_as_clients_take_them() {
        let name: Name = "data".parse().unwrap();
        let unix = uri(&Place::Unix("/run/a b&/data.sock".into()), &name, false);
        assert_eq!(unix, "nbd+unix:///data?socket=/run/a%20b%26/data.sock");
        assert_eq!(uri(&Place::Tcp("[::1]:10809".parse().unwrap()), &name, false), "nbd://[::1]:10809/data");
        assert_eq!(uri(&Place::Tcp("192.0.2.1:1".parse().unwrap()), &name, true), "nbds://192.0.2.1:1/data");
    }

    #[test]
    fn what_a_killed_agent_left_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("nbd");
        Exports::open(&directory).unwrap();
        fs::write(directory.join("data.sock"), "").unwrap();
        Exports::open(&directory).unwrap();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }
}
