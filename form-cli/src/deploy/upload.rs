//! Sends a host just what it lacks: blocks of the image and of the kernel bundle, then their manifests.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use form_api::{
    ErrorCode,
    client::{Client, ClientError},
    image::{BlockFrame, ImportRequest, MissingRequest},
};
use form_bundle::{BLOCK_SIZE, BlockMap, KernelManifest, Manifest, blocks, travel};
use form_image::{BuiltImage, ImageStore, KernelBundle};
use form_types::Digest;
use futures_util::{Stream, stream};
use indicatif::ProgressBar;

use super::Prepared;
use crate::{
    failure::Failure,
    session::Session,
    ui::{bytes, count},
};

/// Blocks asked for at once: their digests fit a request's body well.
const ASK: usize = 50_000;

/// Blocks in one upload: what is lost of it when the connection breaks is little.
const SEND: usize = 2048;

/// Blocks read and compressed in one go.
const BATCH: usize = 32;

/// How often an upload that breaks is taken up again.
const ATTEMPTS: u32 = 4;

/// What went over the wire, repetitions after a break included.
#[derive(Default)]
struct Sent {
    blocks: AtomicUsize,
    bytes: AtomicU64,
}

/// Where blocks come from.
pub trait Blocks: Send + Sync + 'static {
    /// A block as one zstd frame.
    fn frame(&self, digest: &Digest) -> io::Result<Vec<u8>>;
}

impl Blocks for BuiltImage {
    fn frame(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        self.read_frame(digest).map_err(|error| io::Error::other(error.to_string()))
    }
}

impl Blocks for ImageStore {
    fn frame(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        self.read_frame(digest).map_err(|error| io::Error::other(error.to_string()))
    }
}

/// The files of a kernel bundle by their blocks.
struct KernelBlocks(BTreeMap<Digest, (PathBuf, u64, usize)>);

impl KernelBlocks {
    fn new<'a>(files: impl Iterator<Item = (PathBuf, &'a BlockMap)>) -> Self {
        let of = |(path, map): (PathBuf, &BlockMap)| -> Vec<(Digest, (PathBuf, u64, usize))> {
            map.iter().map(|(index, digest)| (*digest, (path.clone(), index, map.block_len(index)))).collect()
        };
        Self(files.flat_map(of).collect())
    }
}

impl Blocks for KernelBlocks {
    fn frame(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        let (path, index, length) = self.0.get(digest).ok_or_else(|| io::Error::other(format!("no file has the block {digest}")))?;
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(index * BLOCK_SIZE as u64))?;
        let mut plain = vec![0; *length];
        file.read_exact(&mut plain)?;
        blocks::compress(&plain).map_err(io::Error::other)
    }
}

/// Brings image and kernel to the host, as far as they are not there.
///
/// # Errors
/// When the host does not take them, or a block cannot be read here.
pub async fn upload(session: &Session, client: &Client, prepared: &Prepared) -> Result<(), Failure> {
    upload_kernel(session, client, &prepared.kernel).await?;
    let image = &prepared.image;
    upload_image(session, client, &image.digest, &image.manifest, Arc::new(image.clone())).await
}

/// # Errors
/// As [`upload`].
pub async fn upload_kernel(session: &Session, client: &Client, kernel: &KernelBundle) -> Result<(), Failure> {
    upload_kernel_files(session, client, (&kernel.digest, &kernel.manifest), kernel.files()).await
}

/// The same of files that lie anywhere: with their blocks, as the manifest has them.
///
/// # Errors
/// As [`upload`]; also when a file has changed meanwhile.
pub async fn upload_kernel_files<'a>(
    session: &Session,
    client: &Client,
    (digest, kernel): (&Digest, &KernelManifest),
    files: impl Iterator<Item = (PathBuf, &'a BlockMap)>,
) -> Result<(), Failure> {
    match client.kernel(digest).await {
        Ok(_) => Ok(()),
        Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => {
            let source = KernelBlocks::new(files);
            let digests = source.0.keys().copied().collect();
            send(session, client, &format!("kernel {}", kernel.release), digests, Arc::new(source)).await?;
            manifest(client, digest, kernel.encode()).await?;
            client.import_kernel(&ImportRequest { manifest: *digest }).await?;
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// # Errors
/// As [`upload`].
pub async fn upload_image(
    session: &Session,
    client: &Client,
    digest: &Digest,
    image: &Manifest,
    source: Arc<dyn Blocks>,
) -> Result<(), Failure> {
    let there = client.images().await?.iter().any(|known| known.digest == *digest);
    if !there {
        let digests = image.rootfs.blocks.digests().into_iter().collect();
        send(session, client, &format!("image {}", image.name), digests, source).await?;
        manifest(client, digest, image.encode()).await?;
        client.import(&ImportRequest { manifest: *digest }).await?;
    }
    Ok(())
}

/// Sends a manifest on its own: that of a large image is too long for a request's body.
async fn manifest(client: &Client, digest: &Digest, text: Result<Vec<u8>, serde_json::Error>) -> Result<(), Failure> {
    let unwritable = |error: String| Failure::failed(format!("a manifest cannot be written: {error}"));
    let text = text.map_err(|error| unwritable(error.to_string()))?;
    let packed = travel::pack(&text).map_err(|error| unwritable(error.to_string()))?;
    client.put_manifest(digest, packed).await?;
    Ok(())
}

/// Sends the blocks that are missing. When the connection breaks, what has arrived has arrived: the rest is asked for anew.
async fn send(session: &Session, client: &Client, what: &str, digests: Vec<Digest>, source: Arc<dyn Blocks>) -> Result<(), Failure> {
    let step = session.terminal.step(format!("sending {what}"));
    let sent = Arc::new(Sent::default());
    let mut attempt = 1;
    loop {
        let missing = missing(client, &digests).await?;
        if missing.is_empty() {
            break;
        }
        match send_missing(session, client, &missing, &source, &sent).await {
            Ok(()) => break,
            Err(error) if error.is_unreachable() && attempt < ATTEMPTS => {
                session.terminal.note(format!("{error}; going on with what is missing"));
                tokio::time::sleep(std::time::Duration::from_secs(1) * attempt).await;
                attempt += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let (blocks, moved) = (sent.blocks.load(Ordering::Relaxed), sent.bytes.load(Ordering::Relaxed));
    let result = if blocks == 0 { "all blocks are there".to_owned() } else { format!("{}, {}", count(blocks, "block"), bytes(moved)) };
    step.done(&result);
    Ok(())
}

async fn missing(client: &Client, digests: &[Digest]) -> Result<Vec<Digest>, Failure> {
    let mut missing = Vec::new();
    for part in digests.chunks(ASK) {
        missing.extend(client.missing(&MissingRequest { blocks: part.to_vec() }).await?.missing);
    }
    Ok(missing)
}

async fn send_missing(
    session: &Session,
    client: &Client,
    missing: &[Digest],
    source: &Arc<dyn Blocks>,
    sent: &Arc<Sent>,
) -> Result<(), ClientError> {
    let bar = session.terminal.bar((missing.len() * BLOCK_SIZE) as u64);
    for part in missing.chunks(SEND) {
        client.put_blocks(frames(part.to_vec(), Arc::clone(source), bar.handle(), Arc::clone(sent))).await?;
    }
    Ok(())
}

/// The bytes of the frames of `digests`, read and compressed on another thread as they are wanted.
fn frames(
    digests: Vec<Digest>,
    source: Arc<dyn Blocks>,
    bar: ProgressBar,
    sent: Arc<Sent>,
) -> impl Stream<Item = io::Result<bytes::Bytes>> + Send + 'static {
    stream::unfold((digests.into_iter(), source), move |(mut digests, source)| {
        let (bar, sent) = (bar.clone(), Arc::clone(&sent));
        async move {
            let batch: Vec<Digest> = digests.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return None;
            }
            let reader = Arc::clone(&source);
            let length = batch.len();
            let read = tokio::task::spawn_blocking(move || encode(&batch, reader.as_ref())).await;
            let piece = read.unwrap_or_else(|error| Err(io::Error::other(error)));
            if let Ok(piece) = &piece {
                bar.inc((length * BLOCK_SIZE) as u64);
                sent.blocks.fetch_add(length, Ordering::Relaxed);
                sent.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
            Some((piece, (digests, source)))
        }
    })
}

fn encode(batch: &[Digest], source: &dyn Blocks) -> io::Result<bytes::Bytes> {
    let mut piece = Vec::new();
    for digest in batch {
        let frame = source.frame(digest)?;
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        piece.extend_from_slice(&BlockFrame::header(digest, length));
        piece.extend_from_slice(&frame);
    }
    Ok(piece.into())
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    struct Fixed;

    impl Blocks for Fixed {
        fn frame(&self, digest: &Digest) -> io::Result<Vec<u8>> {
            blocks::compress(digest.as_bytes()).map_err(io::Error::other)
        }
    }

    #[tokio::test]
    async fn frames_follow_each_other() {
        let digests: Vec<Digest> = (0..BATCH as u32 + 3).map(|number| Digest::of(&number.to_le_bytes())).collect();
        let sent = Arc::new(Sent::default());
        let pieces: Vec<_> = frames(digests.clone(), Arc::new(Fixed), ProgressBar::hidden(), Arc::clone(&sent)).collect().await;
        let wire: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.unwrap().to_vec()).collect();
        assert_eq!(sent.bytes.load(Ordering::Relaxed), wire.len() as u64);
        let mut rest = wire.as_slice();
        for expected in digests {
            let (header, body) = rest.split_first_chunk::<{ BlockFrame::HEADER }>().unwrap();
            let (digest, length) = BlockFrame::parse_header(header);
            let (frame, after) = body.split_at(length as usize);
            assert_eq!((digest, blocks::decompress(frame).unwrap()), (expected, expected.as_bytes().to_vec()));
            rest = after;
        }
        assert!(rest.is_empty());
    }
}
