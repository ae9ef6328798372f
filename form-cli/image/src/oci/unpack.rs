//! From the blobs of an image to a base.

use std::{
    fs::File,
    io::{self, BufReader, Read},
};

use super::{Fetched, OciError, digest::HashingReader, document::Compression, merge::Merger, pull::LayerBlob};
use crate::{
    BuildError, Cancel,
    diff::Diff,
    sandbox::CancellableRead,
    tarball::{self, Origin, Spool},
};

/// More files than these need more memory than a builder has to have. A whole distribution has a tenth of them.
const MAX_FILES: usize = 2_000_000;
/// A frame that wants a longer window (2^27 bytes) is made to fill the memory.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Puts the layers together, with their contents in `spool`. All of them together unpack to at most `limit_gib` GiB.
///
/// # Errors
/// When a layer is damaged, malformed or hostile, or they are too large.
pub(crate) fn unpack(fetched: &Fetched, spool: &Spool, limit_gib: u64, cancel: &Cancel) -> Result<Diff, UnpackError> {
    let mut merger = Merger::new(MAX_FILES);
    let mut left = limit_gib << 30;
    for (index, layer) in fetched.layers.iter().enumerate() {
        merger.begin_layer();
        left -= unpack_layer(layer, index + 1, &mut merger, spool, (left, limit_gib), cancel)?;
    }
    Ok(merger.finish())
}

/// A fault of the image, or one of this machine.
#[derive(Debug)]
pub(crate) enum UnpackError {
    Image(OciError),
    Build(BuildError),
}

/// Gives the number of unpacked bytes.
fn unpack_layer(
    layer: &LayerBlob,
    number: usize,
    merger: &mut Merger,
    spool: &Spool,
    (left, limit_gib): (u64, u64),
    cancel: &Cancel,
) -> Result<u64, UnpackError> {
    let file = File::open(&layer.path)
        .map_err(|source| UnpackError::Image(OciError::Io { action: format!("open {}", layer.path.display()), source }))?;
    let damaged = |error: &io::Error| UnpackError::Image(OciError::Layer { number, reason: error.to_string() });
    let packed = CancellableRead { inner: BufReader::with_capacity(256 << 10, file), cancel };
    let plain: Box<dyn Read + '_> = match layer.compression {
        Compression::None => Box::new(packed),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(packed)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::new(packed).map_err(|error| damaged(&error))?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(|error| damaged(&error))?;
            Box::new(decoder)
        }
    };
    let mut stream = HashingReader::new(plain, left);
    let read = tarball::read_each(&mut stream, Origin::Layer, spool, &mut Vec::new(), &mut |entry| merger.add(entry));
    // The digest is one of everything, also of what follows the archive's end.
    let read = read.and_then(|()| {
        io::copy(&mut stream, &mut io::sink()).map(drop).map_err(|source| BuildError::Io {
            action: "read",
            path: tarball::STREAM.into(),
            source,
        })
    });
    if cancel.is_cancelled() {
        return Err(UnpackError::Build(BuildError::Cancelled));
    }
    if stream.is_exceeded() {
        return Err(UnpackError::Image(OciError::DiskBudget { limit_gib }));
    }
    if merger.is_too_many() {
        return Err(UnpackError::Image(OciError::TooManyFiles { limit: MAX_FILES }));
    }
    match read {
        Ok(()) => {}
        Err(BuildError::FileSystem { reason }) => return Err(UnpackError::Image(OciError::Layer { number, reason })),
        Err(BuildError::Io { path, source, .. }) if path.as_os_str() == tarball::STREAM => return Err(damaged(&source)),
        Err(other) => return Err(UnpackError::Build(other)),
    }
    let count = stream.count();
    let found = stream.digest();
    if found != layer.diff_id {
        let what = format!("layer {number}, unpacked,");
        return Err(UnpackError::Image(OciError::Digest { what, expected: layer.diff_id, found }));
    }
    Ok(count)
}

#[cfg(test)]
mod tests;
