//! What is in an image, for who takes it elsewhere: its manifest and its blocks. Whoever has the manifest's digest checks all of it.

use std::{fs::File, io::Read};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
};
use form_api::{
    ApiError, ErrorCode,
    image::{BlockFrame, ReadBlocksRequest},
    server::read_json,
};
use form_types::ImageReference;

use super::{
    Segment, Shared, blocking,
    image::{found, store_error},
    openapi::{Binary, Missing, Refused, Unreadable},
    parsed, reading,
};
use crate::heap;

/// What of a manifest is in memory at a time, in bytes.
const PIECE: usize = 256 << 10;

type Octets = ([(&'static str, &'static str); 1], Body);

fn octets(body: Body) -> Octets {
    ([("content-type", "application/octet-stream")], body)
}

/// The text of an image's manifest. Its BLAKE3 is the image's digest.
#[utoipa::path(
    get,
    path = "/v1/images/{reference}/manifest",
    operation_id = "read_manifest",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image")),
    responses((status = 200, description = "The text", body = inline(Binary), content_type = "application/octet-stream"), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn manifest(State(agent): State<Shared>, Segment(reference): Segment, request: Request) -> Result<Octets, ApiError> {
    reading(&agent, request).await?;
    let reference: ImageReference = parsed(&reference)?;
    let file = blocking(move || {
        let entry = found(&agent, &reference)?;
        agent.store.manifest_file(&entry.digest).map_err(|error| store_error(&error))
    });
    let pieces = futures_util::stream::try_unfold(file.await?, |file| async {
        let (piece, file) = tokio::task::spawn_blocking(|| next_piece(file)).await.map_err(std::io::Error::other)??;
        Ok::<_, std::io::Error>((!piece.is_empty()).then_some((piece, file)))
    });
    Ok(octets(Body::from_stream(pieces)))
}

fn next_piece(mut file: File) -> std::io::Result<(Bytes, File)> {
    let mut piece = Vec::new();
    (&mut file).take(PIECE as u64).read_to_end(&mut piece)?;
    Ok((piece.into(), file))
}

/// Blocks of an image, as they are on the host's disk.
///
/// Each frame has the digest of what is there: where that is not the manifest's, the block is damaged.
#[utoipa::path(
    post,
    path = "/v1/images/{reference}/blocks",
    operation_id = "read_blocks",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image")),
    request_body(content = ReadBlocksRequest, description = "The numbers of the blocks"),
    responses((status = 200, description = "A frame for each block, in the order asked, without padding: the digest (32 bytes), the length of what follows (u32, little-endian), the block compressed with zstd", body = inline(Binary), content_type = "application/octet-stream"), Refused, Unreadable, Missing),
    security((), ("key" = []))
)]
pub async fn blocks(State(agent): State<Shared>, Segment(reference): Segment, request: Request) -> Result<Octets, ApiError> {
    let (_, body) = reading(&agent, request).await?;
    let reference: ImageReference = parsed(&reference)?;
    let wanted: ReadBlocksRequest = read_json(&body)?;
    if wanted.blocks.is_empty() || wanted.blocks.len() > ReadBlocksRequest::MAX {
        return Err(ApiError::new(ErrorCode::Invalid, format!("ask for 1 to {} blocks at a time", ReadBlocksRequest::MAX)));
    }
    let body = blocking(move || {
        let entry = found(&agent, &reference)?;
        let blocks = agent.store.read_blocks(&entry.digest, &wanted.blocks).map_err(|error| store_error(&error))?;
        let mut body = Vec::with_capacity(blocks.iter().map(|(_, frame)| BlockFrame::HEADER + frame.len()).sum());
        for (digest, frame) in blocks {
            // A frame is at most 66 KiB.
            body.extend_from_slice(&BlockFrame::header(&digest, frame.len() as u32));
            body.extend_from_slice(&frame);
        }
        heap::give_back();
        Ok(body)
    });
    Ok(octets(Body::from(body.await?)))
}
