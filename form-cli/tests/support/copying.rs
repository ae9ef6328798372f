//! Copies with a guest that is honest for some paths, and for others is not.

use std::io;

use axum::{
    body::Body,
    extract::{Path, Query, Request, State},
    response::Response,
};
use form_api::{
    ApiError, ErrorCode,
    copy::{CopyQuery, Direction, SIZE_HEADER},
    exec::{Frame, HEADER, MAX_PAYLOAD},
    server,
};
use tar::{Builder, EntryType, Header};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Vms, find};

fn entry(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, link: &str, size: u64, content: &[u8]) {
    let mut header = Header::new_gnu();
    // As the crate's own setters refuse to write it.
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

fn stream(make: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    make(&mut builder);
    builder.into_inner().unwrap()
}

/// A stream for a path, with what is wrong in it.
fn bytes_of(path: &str) -> Option<Vec<u8>> {
    use EntryType::{Directory, Regular, Symlink};
    let file = |name: &str| stream(|stream| entry(stream, name, Regular, "", 5, b"hello"));
    Some(match path {
        "/file" => file("file"),
        "/tree" => stream(|stream| {
            entry(stream, "tree/", Directory, "", 0, b"");
            entry(stream, "tree/a", Regular, "", 5, b"hello");
        }),
        "/named" => file(".bashrc"),
        "/escape" => stream(|stream| {
            entry(stream, "x", Directory, "", 0, b"");
            entry(stream, "x/../../escaped", Regular, "", 5, b"hello");
        }),
        "/through" => stream(|stream| {
            entry(stream, "x", Directory, "", 0, b"");
            entry(stream, "x/way", Symlink, "..", 0, b"");
            entry(stream, "x/way/escaped", Regular, "", 5, b"hello");
        }),
        "/link" => stream(|stream| entry(stream, "x", Symlink, "/etc/passwd", 0, b"")),
        "/nonsense" => vec![b'n'; 2000],
        "/short" => stream(|stream| {
            entry(stream, "x", Directory, "", 0, b"");
            entry(stream, "x/a", Regular, "", 5, b"hello");
        })[..1536]
            .to_vec(),
        // The first megabyte of a file that is said to have many more.
        "/endless" | "/dying" | "/failing" | "/frames" => {
            stream(|stream| entry(stream, "x", Regular, "", 1 << 40, &vec![7; 1 << 20]))[..1 << 20].to_vec()
        }
        _ => return None,
    })
}

pub async fn copy(
    State(vms): Vms,
    Path(name): Path<String>,
    Query(query): Query<CopyQuery>,
    mut request: Request<Body>,
) -> Result<Response, ApiError> {
    find(&vms, &name)?;
    let bytes = bytes_of(&query.path);
    if query.direction == Direction::Out && bytes.is_none() {
        return Err(ApiError::new(ErrorCode::NotFound, format!("there is no {} in the guest", query.path)));
    }
    let (mut response, upgraded) = server::upgrade(&mut request, "form-copy")?;
    response.headers_mut().insert(SIZE_HEADER, 5.into());
    tokio::spawn(async move {
        let Ok(mut tunnel) = upgraded.await else { return };
        // The other side may hang up at any time: that is what some tests are about.
        let _ = match query.direction {
            Direction::In => take(&mut tunnel, &query.path).await,
            Direction::Out => give(&mut tunnel, &query.path, &bytes.unwrap_or_default()).await,
        };
        let _ = tunnel.shutdown().await;
    });
    Ok(response)
}

async fn give(tunnel: &mut (impl AsyncWrite + Unpin), path: &str, bytes: &[u8]) -> io::Result<()> {
    for piece in bytes.chunks(MAX_PAYLOAD) {
        tunnel.write_all(&Frame::Stdout(piece.to_vec()).encode()).await?;
    }
    let last = match path {
        "/dying" => return Ok(()),
        "/failing" => Frame::Error("the disk is on fire\u{1b}[31m".to_owned()),
        "/frames" => Frame::Resize { rows: 1, columns: 1 },
        "/endless" => loop {
            tunnel.write_all(&Frame::Stdout(vec![7; MAX_PAYLOAD]).encode()).await?;
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        },
        _ => Frame::Exit { code: 0 },
    };
    tunnel.write_all(&last.encode()).await
}

/// Takes a whole tar stream; of a path where there is no room only its beginning.
async fn take(tunnel: &mut (impl AsyncRead + AsyncWrite + Unpin), path: &str) -> io::Result<()> {
    let mut all = Vec::new();
    loop {
        let mut header = [0; HEADER];
        tunnel.read_exact(&mut header).await?;
        let (kind, length) = Frame::parse_header(&header).unwrap();
        let mut payload = vec![0; length];
        tunnel.read_exact(&mut payload).await?;
        match Frame::decode(kind, payload).unwrap() {
            Frame::Stdin(_) if path == "/full" => {
                return tunnel.write_all(&Frame::Error("there is no room left for /full in the guest".to_owned()).encode()).await;
            }
            Frame::Stdin(bytes) => all.extend(bytes),
            Frame::StdinClosed => break,
            other => panic!("{other:?}"),
        }
    }
    let whole = all.len().is_multiple_of(512) && all.ends_with(&[0; 1024]);
    let answer = if whole { Frame::Exit { code: 0 } } else { Frame::Error("this is not all of it".to_owned()) };
    tunnel.write_all(&answer.encode()).await
}
