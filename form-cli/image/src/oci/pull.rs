//! From a reference to blobs on the disk.

use std::{
    path::PathBuf,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use super::{
    BlobStore, Defaults, OciDigest, OciError, OciReference, Registries,
    client::Client,
    document::{Compression, Document, ImageConfig, ImageManifest},
};
use crate::Cancel;

/// An image of a registry, on the disk.
#[derive(Debug)]
pub(crate) struct Fetched {
    /// Of the manifest for this architecture.
    pub manifest: OciDigest,
    pub defaults: Defaults,
    /// The lowest first.
    pub layers: Vec<LayerBlob>,
}

#[derive(Debug)]
pub(crate) struct LayerBlob {
    pub path: PathBuf,
    pub compression: Compression,
    /// Of the layer as it is unpacked.
    pub diff_id: OciDigest,
}

/// Asks a registry which digest a reference has now.
///
/// # Errors
/// When there is no such image or the registry does not answer.
pub(crate) fn resolve(
    reference: &OciReference,
    registries: &Registries,
    blobs: &BlobStore,
    cancel: &Cancel,
) -> Result<OciDigest, OciError> {
    let (reference, registries, blobs, stop) = (reference.clone(), registries.clone(), blobs.clone(), cancel.clone());
    on_thread(cancel, &mut |_| {}, move |_| {
        let mut client = Client::new(&reference, &registries, &stop)?;
        let target = reference.target();
        match client.resolve(&target)? {
            Some(digest) => Ok(digest),
            None => blobs.add(&client.manifest(&target)?.bytes),
        }
    })
}

/// Fetches what is not on the disk yet of the image that `digest` names: an index or a manifest. `limit`: more compressed bytes than
/// these cannot be unpacked either.
///
/// # Errors
/// When something cannot be had, is not what its digest says, or is no image for this architecture.
pub(crate) fn fetch(
    reference: &OciReference,
    digest: OciDigest,
    registries: &Registries,
    blobs: &BlobStore,
    limit_gib: u64,
    cancel: &Cancel,
    each_line: &mut dyn FnMut(&str),
) -> Result<Fetched, OciError> {
    let (reference, registries, blobs, stop) = (reference.clone(), registries.clone(), blobs.clone(), cancel.clone());
    on_thread(cancel, each_line, move |line| {
        let client = Client::new(&reference, &registries, &stop)?;
        Pull { client, blobs: &blobs, line, cancel: &stop }.run(digest, limit_gib)
    })
}

struct Pull<'a> {
    client: Client<'a>,
    blobs: &'a BlobStore,
    line: &'a dyn Fn(String),
    cancel: &'a Cancel,
}

impl Pull<'_> {
    fn run(&mut self, digest: OciDigest, limit_gib: u64) -> Result<Fetched, OciError> {
        let (digest, manifest) = match self.document(digest)? {
            Document::Manifest(manifest) => (digest, manifest),
            Document::Index(descriptor) => match self.document(descriptor.digest)? {
                Document::Manifest(manifest) => (descriptor.digest, manifest),
                Document::Index(_) => return Err(OciError::Unsupported { what: "an index of indexes, not an image".to_owned() }),
            },
        };
        let config = self.config(&manifest)?;
        let total: u64 = manifest.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        if total > limit_gib << 30 {
            return Err(OciError::DiskBudget { limit_gib });
        }
        let count = manifest.layers.len();
        let mut layers = Vec::with_capacity(count);
        for (index, (layer, diff_id)) in manifest.layers.iter().zip(&config.rootfs.diff_ids).enumerate() {
            if self.cancel.is_cancelled() {
                return Err(OciError::Cancelled);
            }
            let number = index + 1;
            if self.blobs.has(&layer.digest) {
                (self.line)(format!("layer {number} of {count}: here already"));
            } else {
                (self.line)(format!("layer {number} of {count}: {}", bytes(layer.size)));
                self.blobs.fetch(&mut self.client, &layer.digest, layer.size, &format!("layer {number}"))?;
            }
            let compression = Compression::of(&layer.media_type)?;
            layers.push(LayerBlob { path: self.blobs.path(&layer.digest), compression, diff_id: *diff_id });
        }
        Ok(Fetched { manifest: digest, defaults: Defaults::new(config.config)?, layers })
    }

    fn document(&mut self, digest: OciDigest) -> Result<Document, OciError> {
        if let Some(bytes) = self.blobs.read(&digest) {
            return Document::parse(&bytes, None);
        }
        let answer = self.client.manifest(&digest.to_string())?;
        let found = OciDigest::of(&answer.bytes);
        if found != digest {
            return Err(OciError::Digest { what: "the manifest".to_owned(), expected: digest, found });
        }
        let document = Document::parse(&answer.bytes, answer.media_type.as_deref())?;
        self.blobs.add(&answer.bytes)?;
        Ok(document)
    }

    fn config(&mut self, manifest: &ImageManifest) -> Result<ImageConfig, OciError> {
        let digest = &manifest.config.digest;
        let bytes = match self.blobs.read(digest) {
            Some(bytes) => bytes,
            None => self.client.small_blob(digest)?,
        };
        let config = ImageConfig::parse(&bytes, manifest.layers.len())?;
        self.blobs.add(&bytes)?;
        Ok(config)
    }
}

/// A size for people.
pub(super) fn bytes(size: u64) -> String {
    if size < 1 << 20 { format!("{} KiB", size.div_ceil(1 << 10)) } else { format!("{:.1} MiB", size as f64 / f64::from(1 << 20)) }
}

enum Message<T> {
    Line(String),
    Done(Result<T, OciError>),
}

/// Runs `work` on a thread of its own: a registry that keeps silent must not keep a cancelled build. A thread that is left behind ends at
/// its next time-out, and what it had is dropped.
pub(super) fn on_thread<T: Send + 'static>(
    cancel: &Cancel,
    each_line: &mut dyn FnMut(&str),
    work: impl FnOnce(&dyn Fn(String)) -> Result<T, OciError> + Send + 'static,
) -> Result<T, OciError> {
    let (sender, receiver) = mpsc::channel();
    let started = thread::Builder::new().name("registry".to_owned()).spawn(move || {
        let lines = |line| {
            let _ = sender.send(Message::Line(line));
        };
        let result = work(&lines);
        let _ = sender.send(Message::Done(result));
    });
    started.map_err(|source| OciError::Io { action: "start a thread".to_owned(), source })?;
    loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(Message::Line(line)) => each_line(&line),
            Ok(Message::Done(result)) => return result,
            Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => return Err(OciError::Cancelled),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let source = std::io::Error::other("its thread ended");
                return Err(OciError::Io { action: "ask the registry".to_owned(), source });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Instant};

    use super::*;

    #[test]
    fn a_registry_that_keeps_silent_does_not_keep_a_cancelled_build() {
        // Connections are taken by the kernel, and never answered.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let reference = OciReference::parse(&format!("{}/a:1", listener.local_addr().unwrap()), None).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (cancel, blobs) = (Cancel::new(), BlobStore::new(directory.path().to_owned()));
        let stop = cancel.clone();
        let waker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            stop.cancel();
        });
        let begin = Instant::now();
        let error = resolve(&reference, &Registries::default(), &blobs, &cancel).unwrap_err();
        assert!(matches!(error, OciError::Cancelled), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        waker.join().unwrap();
    }
}
