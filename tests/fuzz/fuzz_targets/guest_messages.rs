//! What host and guest say to each other, in both directions: frames cut anywhere, JSON and binary payloads.

#![no_main]

use arbitrary::Arbitrary;
use form_fuzz::format::{Alteration, Samples};
use form_guest::protocol::{
    Decoder, ErrorReply, ExitStatus, Frame, FrameKind, HEADER_BYTES, LogLine, MAX_FRAME_BYTES, Reply, Request, TtySize, read_frame,
};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Pieces of these lengths, in turn.
    pieces: [u8; 4],
    frames: Vec<Made<'a>>,
    /// Bytes that are no frame, at the end.
    rest: &'a [u8],
}

#[derive(Arbitrary, Debug)]
struct Made<'a> {
    content: Content<'a>,
    /// What the header says, when it lies.
    length: Option<u32>,
}

#[derive(Arbitrary, Debug)]
enum Content<'a> {
    Bytes { kind: u8, payload: &'a [u8] },
    Request(u8, Vec<Alteration<'a>>),
    Reply(u8, Vec<Alteration<'a>>),
    Error(Vec<Alteration<'a>>),
    Resize(Vec<Alteration<'a>>),
    Log { numbers: [u64; 2], stream: u8, flags: u8, line: &'a [u8] },
    Exit { kind: u8, number: i32 },
}

static REQUESTS: Samples = Samples::new(requests);
static REPLIES: Samples = Samples::new(replies);
static ERRORS: Samples = Samples::new(|| vec![json!({"kind": "not_found", "message": "no such user"})]);
static SIZES: Samples = Samples::new(|| vec![json!({"rows": 24, "cols": 80, "term": null})]);

fn requests() -> Vec<Value> {
    vec![
        json!({"request": "ready", "wait_ms": 1000}),
        json!({"request": "status"}),
        json!({"request": "watch"}),
        json!({"request": "logs", "from_sequence": 7, "tail": 20, "follow": true}),
        json!({
            "request": "exec", "command": ["sh", "-c", "ls"], "env": {"A": "b"}, "user": "ada:adm", "workdir": "/srv",
            "tty": {"rows": 24, "cols": 80, "term": "xterm"}, "stdin": true,
        }),
        json!({"request": "shutdown", "reboot": true}),
        json!({"request": "sync_time", "unix_ns": 1_800_000_000_000_000_000_u64}),
        json!({"request": "set_name", "hostname": "web", "hosts": [["10.77.0.2", ["web", "web.default"]], ["fd00::2", ["web"]]]}),
        json!({"request": "set_restart", "restart": {"policy": "on-failure", "max_retries": 3}}),
        json!({"request": "metrics"}),
        json!({"request": "forward", "port": 80}),
        json!({"request": "copy_in", "path": "/etc/motd", "mode": 420, "owner": "ada"}),
        json!({"request": "copy_out", "path": "/etc/motd"}),
        json!({"request": "mount", "serial": "v1", "path": "/data", "read_only": false}),
        json!({"request": "unmount", "path": "/data"}),
        json!({"request": "sync", "token": 99}),
        json!({"request": "ssh"}),
        json!({"request": "use_processors", "count": 4}),
    ]
}

fn replies() -> Vec<Value> {
    let device = json!({"serial": "v1", "path": "/dev/vdb", "size_bytes": 1_073_741_824, "mounted": "/data"});
    let service =
        json!({"phase": "restarting", "pid": null, "last_exit": {"signal": 9}, "restarts": 2, "started_ms": 1_800_000_000_000_u64});
    vec![
        json!({"reply": "done"}),
        json!({
            "reply": "ready", "protocol": 1, "version": "0.1.0", "phase": "ready", "boot_id": "b", "kernel": "6.1", "hostname": "web",
            "devices": [device], "addresses": {"eth0": ["10.77.0.2/32"]}, "service": service, "health": "healthy",
            "faults": [{"step": "volumes", "message": "no such serial", "fatal": true}], "boot_ms": 700,
        }),
        json!({
            "reply": "status", "protocol": 1, "phase": "stopping", "service": service, "health": "unhealthy", "health_message": "refused",
            "uptime_ms": 9, "memory_total_bytes": 8, "memory_used_bytes": 7, "load_hundredths": [1, 2, 3], "next_log_sequence": 4,
        }),
        json!({
            "reply": "metrics", "uptime_ms": 1, "cpus": 2, "cpu_busy_ms": 3, "cpu_steal_ms": 4, "memory_total_bytes": 5,
            "memory_available_bytes": 6, "root_total_bytes": 7, "root_available_bytes": 8, "network_received_bytes": 9,
            "network_sent_bytes": 10, "disk_read_bytes": 11, "disk_written_bytes": 12, "processes": 13,
        }),
        json!({"reply": "started", "pid": 7}),
        json!({"reply": "connected"}),
        json!({"reply": "file", "size_bytes": 9, "mode": 420}),
        json!({"reply": "mounted", "serial": "v1", "path": "/dev/vdb", "size_bytes": 9, "mounted": null}),
        json!({"reply": "synced", "token": 99}),
        json!({
            "reply": "ssh", "server": {"kind": "image", "path": "/usr/sbin/sshd"}, "listening": true, "host_keys": ["ssh-ed25519 AAAA"],
            "accounts": ["root", "ada"],
        }),
    ]
}

impl Made<'_> {
    fn bytes(&self) -> Vec<u8> {
        let (kind, payload) = match &self.content {
            Content::Bytes { kind, payload } => (kind % 15, payload.to_vec()),
            Content::Request(which, alterations) => (FrameKind::Request as u8, REQUESTS.altered::<Request>(*which, alterations)),
            Content::Reply(which, alterations) => (FrameKind::Reply as u8, REPLIES.altered::<Reply>(*which, alterations)),
            Content::Error(alterations) => (FrameKind::Error as u8, ERRORS.altered::<ErrorReply>(0, alterations)),
            Content::Resize(alterations) => (FrameKind::Resize as u8, SIZES.altered::<TtySize>(0, alterations)),
            Content::Log { numbers, stream, flags, line } => {
                let fixed = [numbers[0].to_le_bytes(), numbers[1].to_le_bytes()].concat();
                (FrameKind::Log as u8, [fixed.as_slice(), &[stream % 4, *flags], line].concat())
            }
            Content::Exit { kind, number } => (FrameKind::Exit as u8, [&[kind % 3], number.to_le_bytes().as_slice()].concat()),
        };
        let length = self.length.unwrap_or(payload.len() as u32 + 1);
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.push(kind);
        bytes.extend(payload);
        bytes
    }
}

/// Reads the payload as its kind says; what can be read is written and read again.
fn look(frame: &Frame) {
    match frame.kind {
        FrameKind::Request => {
            if let Ok(request) = frame.parse::<Request>() {
                let again = Frame::json(FrameKind::Request, &request).expect("a request has a JSON form");
                assert_eq!(again.parse::<Request>().ok(), Some(request));
            }
        }
        FrameKind::Reply => {
            if let Ok(reply) = frame.parse::<Reply>() {
                let again = Frame::json(FrameKind::Reply, &reply).expect("a reply has a JSON form");
                assert_eq!(again.parse::<Reply>().ok(), Some(reply));
            }
        }
        FrameKind::Error => {
            if let Ok(error) = frame.parse::<ErrorReply>() {
                let again = Frame::json(FrameKind::Error, &error).expect("an error has a JSON form");
                assert_eq!(again.parse::<ErrorReply>().ok(), Some(error));
            }
        }
        FrameKind::Resize => _ = frame.parse::<TtySize>(),
        FrameKind::Log => {
            if let Ok(line) = LogLine::from_frame(frame) {
                assert_eq!(LogLine::from_frame(&line.to_frame()), Ok(line));
            }
        }
        FrameKind::Exit => {
            if let Ok(status) = ExitStatus::from_frame(frame) {
                assert_eq!(ExitStatus::from_frame(&status.to_frame()), Ok(status));
                let _ = (status.shell_code(), status.to_string());
            }
        }
        _ => {}
    }
}

fuzz_target!(|input: Input| {
    let mut bytes: Vec<u8> = input.frames.iter().flat_map(Made::bytes).collect();
    bytes.extend(input.rest);

    // The blocking reader, which sees the stream whole.
    let mut whole = Vec::new();
    let mut stream = bytes.as_slice();
    while let Ok(Some(frame)) = read_frame(&mut stream) {
        whole.push(frame);
    }
    // The decoder, fed in pieces, finds the same frames.
    let mut decoder = Decoder::default();
    let mut pieced = Vec::new();
    let mut left = bytes.as_slice();
    let mut pieces = input.pieces.iter().cycle();
    'feeding: while !left.is_empty() {
        let length = pieces.next().map_or(1, |piece| usize::from(*piece).max(1)).min(left.len());
        let (piece, others) = left.split_at(length);
        left = others;
        decoder.feed(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => pieced.push(frame),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next_frame(), Err(error), "an error stays");
                    break 'feeding;
                }
            }
        }
    }
    assert_eq!(whole, pieced);
    assert!(decoder.into_rest().len() <= MAX_FRAME_BYTES + HEADER_BYTES + usize::from(u8::MAX));
    for frame in &whole {
        assert_eq!(frame.encode().map(|bytes| bytes.len()), Ok(frame.payload.len() + HEADER_BYTES));
        look(frame);
    }
});
