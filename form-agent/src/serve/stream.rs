//! Exchanges that turn into streams: a command, a copy, the console, a port.

use axum::{
    extract::{Request, State},
    response::Response,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use form_api::{
    ApiError, ErrorCode,
    copy::{CopyQuery, Direction, SIZE_HEADER},
    exec::{self, EXEC_HEADER, ExecRequest},
    server,
    vm::{ForwardQuery, VmState},
};
use form_guest::protocol::{self, Reply, TtySize};
use form_types::Name;
use form_vmm::control::Client;
use http::request::Parts;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    Segment, Shared,
    openapi::{ChangeHeaders, ExecHeader, Impossible, InTheWay, Missing, NoRoom, Refused, UpgradeHeaders},
    parsed, query,
};
use crate::{
    action::{self, Action},
    agent::{Agent, internal},
    authorise,
    driver::{
        guest::{Connection, GuestError},
        process::RuntimeDirectory,
    },
};

/// The control socket of a VM of which this can be asked now.
pub(super) fn control_of(agent: &Agent, name: &Name, action: Action) -> Result<std::path::PathBuf, ApiError> {
    let vm = agent.vm_named(name)?;
    let state = agent.fleet.observed(&vm.id).map_or(VmState::Pending, |observed| observed.state);
    action::check_vm(action, state, &vm)?;
    let control = RuntimeDirectory::new(&agent.paths().vm_runtime(), &vm.id).control();
    if control.exists() {
        Ok(control)
    } else {
        // A process that is only now being made, or has just gone.
        Err(ApiError::new(ErrorCode::Conflict, format!("vm/{name} is {}", state.as_str()))
            .hint(format!("wait for it with `form wait vm/{name} --for=running`")))
    }
}

/// An Upgrade is a change: what it does to the guest, nobody can tell.
fn authorised(agent: &Agent, request: Request, name: &str) -> Result<(Request, Parts, Name), ApiError> {
    let (parts, body) = request.into_parts();
    authorise::change(agent, &parts, &axum::body::Bytes::new())?;
    let request = Request::from_parts(parts.clone(), body);
    // The upgrade is in the extensions of the request that goes on; what is kept of it here is for reading only.
    Ok((request, parts, parsed(name)?))
}

pub(super) fn guest_error(error: &GuestError) -> ApiError {
    match error {
        GuestError::Refused(reply) => {
            let code = match reply.kind {
                protocol::ErrorKind::Invalid => ErrorCode::Invalid,
                protocol::ErrorKind::NotFound => ErrorCode::NotFound,
                protocol::ErrorKind::Unsupported => ErrorCode::Unsupported,
                protocol::ErrorKind::Busy => ErrorCode::Unavailable,
                protocol::ErrorKind::Failed => ErrorCode::Failed,
                protocol::ErrorKind::InUse => ErrorCode::Conflict,
                protocol::ErrorKind::NoRoom => ErrorCode::NoRoom,
            };
            ApiError::new(code, reply.message.clone())
        }
        other => ApiError::new(ErrorCode::Unavailable, other.to_string()).hint("is it still starting? see `form ps`"),
    }
}

/// Runs a command in a VM: an Upgrade to `form-exec`.
///
/// The signature is over the header that says what to run: there is no body.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/exec",
    operation_id = "exec",
    tag = "streams",
    params(("name" = Name, Path, description = "The VM"), UpgradeHeaders, ExecHeader, ChangeHeaders),
    responses((status = 101, description = "Frames both ways: one byte of kind, a length (u32, little-endian), the payload. From the client 1 standard input, 2 its end, 3 rows and columns (u16 each), 4 a signal; from the host 5 standard output, 6 standard error, 7 the exit code, 8 an error"), Refused, Missing, InTheWay, Impossible),
    security((), ("key" = [], "signature" = []))
)]
pub async fn exec(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (mut request, parts, name) = authorised(&agent, request, &name)?;
    let header = parts
        .headers
        .get(EXEC_HEADER)
        .ok_or_else(|| ApiError::new(ErrorCode::Invalid, format!("the header `{EXEC_HEADER}` is missing")))?;
    let asked: ExecRequest = URL_SAFE_NO_PAD
        .decode(header.as_bytes())
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .ok_or_else(|| ApiError::new(ErrorCode::Invalid, format!("the header `{EXEC_HEADER}` holds no exec request")))?;
    let control = control_of(&agent, &name, Action::Exec)?;
    let to_guest = protocol::Request::Exec(protocol::ExecRequest {
        command: asked.command,
        env: asked.env,
        user: asked.user,
        workdir: asked.workdir,
        tty: asked.terminal.map(|terminal| TtySize { rows: terminal.rows, cols: terminal.columns, term: Some(terminal.kind) }),
        stdin: true,
    });
    let mut guest = Connection::open(&control, &to_guest).await.map_err(|error| guest_error(&error))?;
    let started = guest.reply().await.map_err(|error| guest_error(&error))?;
    if !matches!(started, Reply::Started { .. }) {
        return Err(internal(&"the guest answered something else"));
    }
    let (response, upgraded) = server::upgrade(&mut request, "form-exec")?;
    tokio::spawn(async move {
        if let Ok(client) = upgraded.await {
            relay(client, guest, frame_to_guest, frame_to_client).await;
        }
    });
    Ok(response)
}

/// Copies a file or a directory into a VM or out of it: an Upgrade to `form-copy`.
///
/// The signature is over the query, which says what to copy: there is no body.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/copy",
    operation_id = "copy",
    tag = "streams",
    params(("name" = Name, Path, description = "The VM"), CopyQuery, UpgradeHeaders, ChangeHeaders),
    responses((status = 101, description = "Frames as of an exec, with a tar stream in them. In: the client sends 1 and at the end 2. Out: the host sends 5. The host's last frame is 7 with code 0 when all of it arrived, else 8", headers(("form-copy-bytes" = u64, description = "Out: the bytes of content that will come; absent when the guest does not know that soon"))), Refused, Missing, InTheWay, Impossible, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn copy(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (mut request, parts, name) = authorised(&agent, request, &name)?;
    let asked: CopyQuery = query(&parts.uri)?;
    let direction = asked.direction;
    let to_guest = copy_request(asked)?;
    let control = control_of(&agent, &name, Action::Copy)?;
    let mut guest = Connection::open(&control, &to_guest).await.map_err(|error| guest_error(&error))?;
    let size = match (direction, guest.reply().await.map_err(|error| guest_error(&error))?) {
        (Direction::In, Reply::Done) => None,
        (Direction::Out, Reply::Tree(tree)) => tree.bytes,
        _ => return Err(internal(&"the guest answered something else")),
    };
    let (mut response, upgraded) = server::upgrade(&mut request, "form-copy")?;
    if let Some(size) = size {
        response.headers_mut().insert(SIZE_HEADER, size.into());
    }
    tokio::spawn(async move {
        if let Ok(client) = upgraded.await {
            relay(client, guest, copied_to_guest, copied_to_client).await;
        }
    });
    Ok(response)
}

/// What the guest has to do. What does not fit together is refused, not passed over.
fn copy_request(asked: CopyQuery) -> Result<protocol::Request, ApiError> {
    let invalid = |message: &str| Err(ApiError::new(ErrorCode::Invalid, message));
    match asked {
        CopyQuery { owner: Some(_), keep_owner: true, .. } => invalid("`owner` and `keep_owner` exclude each other"),
        CopyQuery { direction: Direction::In, path, contents, owner, keep_owner } => {
            Ok(protocol::Request::Unpack { path, contents, owner, keep_owner })
        }
        CopyQuery { direction: Direction::Out, path, contents: false, owner: None, keep_owner: false } => {
            Ok(protocol::Request::Pack { path })
        }
        CopyQuery { direction: Direction::Out, .. } => invalid("a copy out of a VM has no `contents`, `owner` or `keep_owner`"),
    }
}

/// Carries frames both ways, each as the other side knows it, until the last one or until one side is gone; the guest then ends what it does.
async fn relay(
    client: impl AsyncRead + AsyncWrite + Send + 'static,
    mut guest: Connection,
    to_guest: fn(exec::Frame) -> Option<protocol::Frame>,
    from_guest: fn(&protocol::Frame) -> Vec<exec::Frame>,
) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (sender, mut frames) = tokio::sync::mpsc::channel(16);
    let reader = tokio::spawn(async move {
        while let Ok(frame) = read_frame(&mut from_client).await {
            if sender.send(frame).await.is_err() {
                break;
            }
        }
    });
    let mut guest_takes = true;
    loop {
        tokio::select! {
            frame = frames.recv(), if guest_takes => {
                let Some(frame) = frame else { break };
                let Some(frame) = to_guest(frame) else { break };
                // A command that has ended takes nothing any more, and how it ended may be still to be read.
                guest_takes = guest.send(&frame).await.is_ok();
            }
            frame = guest.next() => {
                let frame = match frame {
                    Ok(Some(frame)) => from_guest(&frame),
                    Ok(None) => vec![exec::Frame::Error("the guest hung up".to_owned())],
                    Err(error) => vec![exec::Frame::Error(error.to_string())],
                };
                let mut ended = false;
                for frame in frame {
                    ended |= matches!(frame, exec::Frame::Exit { .. } | exec::Frame::Error(_));
                    if to_client.write_all(&frame.encode()).await.is_err() { ended = true }
                }
                if ended { break }
            }
        }
    }
    let _ = to_client.shutdown().await;
    reader.abort();
}

pub(super) async fn read_frame(from: &mut (impl AsyncRead + Unpin + Send)) -> std::io::Result<exec::Frame> {
    let mut header = [0; exec::HEADER];
    from.read_exact(&mut header).await?;
    let (kind, length) = exec::Frame::parse_header(&header).map_err(std::io::Error::other)?;
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).await?;
    exec::Frame::decode(kind, payload).map_err(std::io::Error::other)
}

fn frame_to_guest(frame: exec::Frame) -> Option<protocol::Frame> {
    use protocol::{Frame, FrameKind};
    match frame {
        exec::Frame::Stdin(bytes) => Some(Frame::new(FrameKind::Stdin, bytes)),
        exec::Frame::StdinClosed => Some(Frame::new(FrameKind::StdinClose, [])),
        exec::Frame::Resize { rows, columns } => Frame::json(FrameKind::Resize, &TtySize { rows, cols: columns, term: None }).ok(),
        exec::Frame::Signal(number) => Some(Frame::new(FrameKind::Signal, [number])),
        exec::Frame::Stdout(_) | exec::Frame::Stderr(_) | exec::Frame::Exit { .. } | exec::Frame::Error(_) => None,
    }
}

/// A guest's frame may be larger than a client's.
fn frame_to_client(frame: &protocol::Frame) -> Vec<exec::Frame> {
    use protocol::FrameKind;
    let pieces = |make: fn(Vec<u8>) -> exec::Frame| frame.payload.chunks(exec::MAX_PAYLOAD).map(|piece| make(piece.to_vec())).collect();
    match frame.kind {
        FrameKind::Stdout => pieces(exec::Frame::Stdout),
        FrameKind::Stderr => pieces(exec::Frame::Stderr),
        FrameKind::Exit => {
            let code = protocol::ExitStatus::from_frame(frame).map_or(125, protocol::ExitStatus::shell_code);
            vec![exec::Frame::Exit { code: u8::try_from(code).unwrap_or(255) }]
        }
        FrameKind::Error => {
            let message = frame.parse::<protocol::ErrorReply>().map_or_else(|error| error.to_string(), |error| error.message);
            vec![exec::Frame::Error(message)]
        }
        _ => Vec::new(),
    }
}

fn copied_to_guest(frame: exec::Frame) -> Option<protocol::Frame> {
    use protocol::{Frame, FrameKind};
    match frame {
        exec::Frame::Stdin(bytes) => Some(Frame::new(FrameKind::Data, bytes)),
        exec::Frame::StdinClosed => Some(Frame::new(FrameKind::End, [])),
        _ => None,
    }
}

fn copied_to_client(frame: &protocol::Frame) -> Vec<exec::Frame> {
    use protocol::FrameKind;
    match frame.kind {
        FrameKind::Data => frame.payload.chunks(exec::MAX_PAYLOAD).map(|piece| exec::Frame::Stdout(piece.to_vec())).collect(),
        // The end of what comes out, or the word that all has gone in.
        FrameKind::End | FrameKind::Reply => vec![exec::Frame::Exit { code: 0 }],
        FrameKind::Error => frame_to_client(frame),
        _ => Vec::new(),
    }
}

/// Opens the serial console of a VM: an Upgrade to `form-console`.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/console",
    operation_id = "console",
    tag = "streams",
    params(("name" = Name, Path, description = "The VM"), UpgradeHeaders, ChangeHeaders),
    responses((status = 101, description = "Bytes both ways: what is written is typed, what is read was printed"), Refused, Missing, InTheWay, Impossible),
    security((), ("key" = [], "signature" = []))
)]
pub async fn console(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (mut request, _, name) = authorised(&agent, request, &name)?;
    let control = control_of(&agent, &name, Action::Console)?;
    let fd = tokio::task::spawn_blocking(move || Client::connect(&control)?.console())
        .await
        .map_err(|error| internal(&error))?
        .map_err(|error| internal(&error))?;
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true).map_err(|error| internal(&error))?;
    let mut stream = tokio::net::UnixStream::from_std(stream).map_err(|error| internal(&error))?;
    let (response, upgraded) = server::upgrade(&mut request, "form-console")?;
    tokio::spawn(async move {
        if let Ok(mut client) = upgraded.await {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut stream).await;
        }
    });
    Ok(response)
}

/// Opens a connection to a TCP port of a VM's loopback interface: an Upgrade to `form-forward`.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/forward",
    operation_id = "forward",
    tag = "streams",
    params(("name" = Name, Path, description = "The VM"), ForwardQuery, UpgradeHeaders, ChangeHeaders),
    responses((status = 101, description = "The bytes of the connection, both ways"), Refused, Missing, InTheWay, Impossible),
    security((), ("key" = [], "signature" = []))
)]
pub async fn forward(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (mut request, parts, name) = authorised(&agent, request, &name)?;
    let port = query::<ForwardQuery>(&parts.uri)?.port;
    let control = control_of(&agent, &name, Action::Forward)?;
    let mut guest = Connection::open(&control, &protocol::Request::Forward { port }).await.map_err(|error| guest_error(&error))?;
    if guest.reply().await.map_err(|error| guest_error(&error))? != Reply::Connected {
        return Err(internal(&"the guest answered something else"));
    }
    let (mut stream, rest) = guest.into_raw();
    let (response, upgraded) = server::upgrade(&mut request, "form-forward")?;
    tokio::spawn(async move {
        if let Ok(mut client) = upgraded.await
            && client.write_all(&rest).await.is_ok()
        {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut stream).await;
        }
    });
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn how_a_command_ended_is_told_even_when_it_takes_no_input() {
        // The order of what happens is chance: often enough, each comes up.
        for _ in 0..100 {
            let (guest, mut inside) = tokio::net::UnixStream::pair().unwrap();
            let exit = protocol::ExitStatus::Code(7).to_frame();
            inside.write_all(&exit.encode().unwrap()).await.unwrap();
            drop(inside);
            let (client, outside) = tokio::io::duplex(1024);
            let (mut reader, mut writer) = tokio::io::split(outside);
            writer.write_all(&exec::Frame::StdinClosed.encode()).await.unwrap();
            relay(client, Connection::over(guest), frame_to_guest, frame_to_client).await;
            assert_eq!(read_frame(&mut reader).await.unwrap(), exec::Frame::Exit { code: 7 });
        }
    }

    fn asked(text: &str) -> Result<protocol::Request, ApiError> {
        let uri: http::Uri = format!("http://agent/v1/vms/web/copy?{text}").parse().unwrap();
        copy_request(query(&uri)?)
    }

    #[test]
    fn a_copy_that_does_not_fit_together_is_refused() {
        let unpack = protocol::Request::Unpack { path: "/a".to_owned(), contents: true, owner: Some("ada".to_owned()), keep_owner: false };
        assert_eq!(asked("direction=in&path=/a&contents=true&owner=ada").unwrap(), unpack);
        assert_eq!(asked("direction=out&path=/a%20b").unwrap(), protocol::Request::Pack { path: "/a b".to_owned() });
        for bad in [
            "direction=in&path=/a&owner=ada&keep_owner=true",
            "direction=out&path=/a&owner=ada",
            "direction=out&path=/a&contents=true",
            "direction=out&path=/a&keep_owner=true",
            "direction=up&path=/a",
            "direction=in",
            "path=/a",
        ] {
            assert_eq!(asked(bad).unwrap_err().code, ErrorCode::Invalid, "{bad}");
        }
    }

    #[tokio::test]
    async fn what_a_guest_sends_of_a_copy_arrives_in_frames_that_a_client_takes() {
        use protocol::{ErrorKind, ErrorReply, Frame, FrameKind};
        let large = vec![7; 2 * exec::MAX_PAYLOAD + 1];
        let (guest, mut inside) = tokio::net::UnixStream::pair().unwrap();
        let (client, outside) = tokio::io::duplex(1024);
        let (mut reader, _writer) = tokio::io::split(outside);
        let relayed = tokio::spawn(relay(client, Connection::over(guest), copied_to_guest, copied_to_client));
        let refusal = ErrorReply { kind: ErrorKind::NoRoom, message: "full".to_owned() };
        let sent = large.clone();
        tokio::spawn(async move {
            inside.write_all(&Frame::new(FrameKind::Data, sent).encode().unwrap()).await.unwrap();
            inside.write_all(&Frame::json(FrameKind::Error, &refusal).unwrap().encode().unwrap()).await.unwrap();
        });
        let mut received = Vec::new();
        let last = loop {
            match read_frame(&mut reader).await.unwrap() {
                exec::Frame::Stdout(bytes) => received.extend(bytes),
                last => break last,
            }
        };
        assert!(received == large, "{} bytes", received.len());
        assert_eq!(last, exec::Frame::Error("full".to_owned()));
        relayed.await.unwrap();
    }
}
