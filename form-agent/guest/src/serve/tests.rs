//! The requests, over a socket pair.

use std::os::unix::net::UnixStream;

use form_guest::protocol::{ErrorReply, ExecRequest, ExitStatus, Frame, LogLine, LogStream, TtySize, read_frame, write_frame};

use super::*;
use crate::{machine::tests::machine, settings::tests::empty};

/// A machine with its collector of children, and a way to ask it.
struct Guest(Arc<Machine>);

impl Guest {
    fn new() -> Self {
        let machine = machine(empty());
        Self(machine)
    }

    fn ask(&self, request: &Request) -> UnixStream {
        let (mut host, guest) = UnixStream::pair().expect("a socket pair");
        let machine = Arc::clone(&self.0);
        thread::spawn(move || serve_connection(&machine, &Channel::socket(guest.into())));
        let frame = Frame::json(FrameKind::Request, request).expect("has a JSON form");
        write_frame(&mut host, frame.kind, &frame.payload).expect("open");
        host
    }

    fn one(&self, request: &Request) -> Frame {
        read_frame(&mut self.ask(request)).expect("valid").expect("an answer")
    }
}

fn all(mut stream: UnixStream) -> Vec<Frame> {
    std::iter::from_fn(|| read_frame(&mut stream).expect("valid")).collect()
}

#[test]
fn ready_status_and_refusals() {
    let guest = Guest::new();
    let Reply::Ready(report) = guest.one(&Request::Ready { wait_ms: 0 }).parse().expect("a reply") else { panic!("not ready's reply") };
    assert_eq!(report.phase, Phase::Starting);
    let waiting = guest.ask(&Request::Ready { wait_ms: 60_000 });
    guest.0.started();
    let Reply::Ready(report) = all(waiting)[0].parse().expect("a reply") else { panic!("not ready's reply") };
    assert_eq!((report.phase, report.boot_id.len()), (Phase::Ready, 36));
    let Reply::Status(status) = guest.one(&Request::Status).parse().expect("a reply") else { panic!("not status' reply") };
    assert!(status.memory_total_bytes > 0 && status.uptime_ms > 0);
    let Reply::Metrics(metrics) = guest.one(&Request::Metrics).parse().expect("a reply") else { panic!("not metrics' reply") };
    assert!(metrics.cpus > 0 && metrics.processes > 0 && metrics.root_total_bytes > 0);
    let error: ErrorReply = guest.one(&Request::CopyOut { path: "/no/such/file".into() }).parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::NotFound);
    let error: ErrorReply = guest.one(&Request::CopyOut { path: "relative".into() }).parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::Failed);
    let error: ErrorReply =
        guest.one(&Request::Exec(ExecRequest { user: Some("nobody-here".into()), ..ExecRequest::default() })).parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::NotFound);
}

#[test]
fn watching_tells_each_change() {
    let guest = Guest::new();
    let mut stream = guest.ask(&Request::Watch);
    let mut phase = || match read_frame(&mut stream).expect("valid").expect("a frame").parse().expect("a reply") {
        Reply::Status(status) => status.phase,
        other => panic!("{other:?}"),
    };
    assert_eq!(phase(), Phase::Starting);
    guest.0.started();
    assert_eq!(phase(), Phase::Ready);
}

#[test]
fn logs_end_or_follow() {
    let guest = Guest::new();
    guest.0.log.push(LogStream::Stdout, b"one", false);
    guest.0.log.push(LogStream::Stderr, b"two", false);
    let frames = all(guest.ask(&Request::Logs(LogsRequest::default())));
    let texts: Vec<_> = frames.iter().filter_map(|frame| LogLine::from_frame(frame).ok()).map(|line| line.bytes).collect();
    assert_eq!(texts, [b"one".to_vec(), b"two".to_vec()]);
    assert_eq!(frames.last().map(|frame| frame.kind), Some(FrameKind::End));
    let mut stream = guest.ask(&Request::Logs(LogsRequest { from_sequence: Some(1), follow: true, ..LogsRequest::default() }));
    let mut next = || read_frame(&mut stream).expect("valid").expect("a frame");
    assert_eq!(LogLine::from_frame(&next()).expect("a line").sequence, 1);
    guest.0.log.push(LogStream::Guest, b"three", false);
    assert_eq!(LogLine::from_frame(&next()).expect("a line").bytes, b"three");
    write_frame(&mut stream, FrameKind::Cancel, &[]).expect("open");
    assert_eq!(all(stream), [Frame::new(FrameKind::End, [])]);
}

#[test]
fn files_go_in_and_out() {
    let guest = Guest::new();
    let path = std::env::temp_dir().join(format!("form-guest-copy-{}/sub/file", std::process::id()));
    let text = path.to_str().expect("plain").to_owned();
    let me = format!("{}:{}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut stream = guest.ask(&Request::CopyIn { path: text.clone(), mode: 0o640, owner: Some(me) });
    assert_eq!(read_frame(&mut stream).expect("valid").expect("a reply").kind, FrameKind::Reply);
    let content = vec![5_u8; 200_000];
    for chunk in content.chunks(70_000) {
        write_frame(&mut stream, FrameKind::Data, chunk).expect("open");
    }
    write_frame(&mut stream, FrameKind::End, &[]).expect("open");
    assert_eq!(all(stream)[0].parse::<Reply>().expect("a reply"), Reply::Done);
    let frames = all(guest.ask(&Request::CopyOut { path: text }));
    let Reply::File(info) = frames[0].parse().expect("a reply") else { panic!("no file") };
    assert_eq!((info.size_bytes, info.mode), (200_000, 0o640));
    let data: Vec<u8> = frames.iter().filter(|frame| frame.kind == FrameKind::Data).flat_map(|frame| frame.payload.clone()).collect();
    assert_eq!(data, content);
    std::fs::remove_dir_all(path.parent().and_then(|path| path.parent()).expect("has parents")).expect("temporary directory");
}

#[test]
fn trees_go_out_and_in() {
    let guest = Guest::new();
    let directory = std::env::temp_dir().join(format!("form-guest-trees-{}", std::process::id()));
    std::fs::create_dir_all(directory.join("tree/sub")).expect("temporary directory");
    std::fs::write(directory.join("tree/sub/file"), vec![3_u8; 200_000]).expect("writable");
    let path = |name: &str| directory.join(name).to_str().expect("plain").to_owned();
    let frames = all(guest.ask(&Request::Pack { path: path("tree") }));
    let Reply::Tree(tree) = frames[0].parse().expect("a reply") else { panic!("no tree") };
    assert_eq!((tree.is_directory, tree.bytes), (true, Some(200_000)));
    assert_eq!(frames.last().map(|frame| frame.kind), Some(FrameKind::End));
    let data: Vec<u8> = frames.iter().filter(|frame| frame.kind == FrameKind::Data).flat_map(|frame| frame.payload.clone()).collect();

    let me = format!("{}:{}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let unpack = |name: &str| {
        let request = Request::Unpack { path: path(name), contents: false, owner: Some(me.clone()), keep_owner: false };
        let mut stream = guest.ask(&request);
        assert_eq!(read_frame(&mut stream).expect("valid").expect("a reply").kind, FrameKind::Reply);
        stream
    };
    let mut stream = unpack("copy");
    for chunk in data.chunks(70_000) {
        write_frame(&mut stream, FrameKind::Data, chunk).expect("open");
    }
    write_frame(&mut stream, FrameKind::End, &[]).expect("open");
    assert_eq!(all(stream)[0].parse::<Reply>().expect("a reply"), Reply::Done);
    assert_eq!(std::fs::read(directory.join("copy/sub/file")).expect("there"), vec![3_u8; 200_000]);

    let request = Request::Unpack { path: path("no/such"), contents: false, owner: Some(me.clone()), keep_owner: false };
    let error: ErrorReply = guest.one(&request).parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::NotFound);
    // What cannot be is said before all of it has come, and what was sent meanwhile is taken.
    std::fs::write(directory.join("file"), "a file").expect("writable");
    let mut stream = unpack("file");
    write_frame(&mut stream, FrameKind::Data, &data).expect("open");
    let error: ErrorReply = read_frame(&mut stream).expect("valid").expect("a frame").parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::Failed, "{}", error.message);
    write_frame(&mut stream, FrameKind::Data, &data).expect("taken");
    write_frame(&mut stream, FrameKind::End, &[]).expect("taken");
    assert!(all(stream).is_empty());

    // A host that hangs up in the middle leaves nothing.
    let mut stream = unpack("half");
    write_frame(&mut stream, FrameKind::Data, &data[..100_000]).expect("open");
    stream.shutdown(std::net::Shutdown::Write).expect("open");
    let error: ErrorReply = all(stream)[0].parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::Failed);
    let mut names: Vec<_> = std::fs::read_dir(&directory).expect("there").map(|entry| entry.expect("readable").file_name()).collect();
    names.sort();
    assert_eq!(names, ["copy", "file", "tree"]);
    let error: ErrorReply = guest.one(&Request::Pack { path: path("gone") }).parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::NotFound);
    std::fs::remove_dir_all(&directory).expect("temporary directory");
}

#[test]
fn forwarding_carries_both_ways() {
    use std::io::{Read, Write};
    let guest = Guest::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let mut stream = guest.ask(&Request::Forward { port });
    let (mut server, _) = listener.accept().expect("a connection");
    assert_eq!(read_frame(&mut stream).expect("valid").expect("a frame").parse::<Reply>().expect("a reply"), Reply::Connected);
    stream.write_all(b"ping").expect("open");
    stream.shutdown(std::net::Shutdown::Write).expect("open");
    let mut got = String::new();
    server.read_to_string(&mut got).expect("readable");
    server.write_all(b"pong").expect("open");
    drop(server);
    let mut back = String::new();
    stream.read_to_string(&mut back).expect("readable");
    assert_eq!((got.as_str(), back.as_str()), ("ping", "pong"));
    drop(listener);
    let error: ErrorReply = guest.one(&Request::Forward { port }).parse().expect("an error");
    assert_eq!(error.kind, ErrorKind::NotFound);
}

fn run(frames: &[Frame], kind: FrameKind) -> String {
    let bytes = frames.iter().filter(|frame| frame.kind == kind).flat_map(|frame| frame.payload.clone()).collect();
    String::from_utf8(bytes).expect("text")
}

// One test for all that starts processes: collecting them takes every child of this process.
#[test]
fn commands() {
    let guest = Guest::new();
    let machine = Arc::clone(&guest.0);
    thread::spawn(move || {
        loop {
            machine.children.collect();
            thread::sleep(Duration::from_millis(2));
        }
    });
    let me = rustix::process::getuid().as_raw().to_string();
    let exec = |words: &[&str]| ExecRequest {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        user: Some(me.clone()),
        workdir: Some("/".into()),
        ..ExecRequest::default()
    };
    let exit = |frames: &[Frame]| ExitStatus::from_frame(frames.last().expect("frames")).expect("an exit");

    let frames = all(guest.ask(&Request::Exec(exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]))));
    assert_eq!((run(&frames, FrameKind::Stdout).as_str(), run(&frames, FrameKind::Stderr).as_str()), ("out\n", "err\n"));
    assert_eq!(exit(&frames), ExitStatus::Code(3));

    let frames = all(guest.ask(&Request::Exec(exec(&["no-such-program"]))));
    assert_eq!(exit(&frames), ExitStatus::NOT_FOUND);
    assert!(run(&frames, FrameKind::Stderr).contains("no-such-program"));
    assert_eq!(exit(&all(guest.ask(&Request::Exec(exec(&["/etc/passwd"]))))), ExitStatus::NOT_EXECUTABLE);

    // Input, a lot of it, and its end.
    let mut stream = guest.ask(&Request::Exec(ExecRequest { stdin: true, ..exec(&["wc", "-c"]) }));
    for _ in 0..50 {
        write_frame(&mut stream, FrameKind::Stdin, &[b'x'; 10_000]).expect("open");
    }
    write_frame(&mut stream, FrameKind::StdinClose, &[]).expect("open");
    assert_eq!(run(&all(stream), FrameKind::Stdout).trim(), "500000");

    // What is left behind does not hold the answer back.
    let start = std::time::Instant::now();
    assert_eq!(run(&all(guest.ask(&Request::Exec(exec(&["sh", "-c", "sleep 30 & echo done"])))), FrameKind::Stdout), "done\n");
    assert!(start.elapsed() < Duration::from_secs(15));

    // Whoever started this program may have it ignore signals, as a shell does with what it puts into the background.
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
    let frames = all(guest.ask(&Request::Exec(exec(&["sh", "-c", "kill -USR2 $$; echo it goes on"]))));
    assert_eq!((exit(&frames), run(&frames, FrameKind::Stdout).as_str()), (ExitStatus::Signal(libc::SIGUSR2), ""));

    // A terminal: its size, a change of it, a signal by a key.
    let tty = Some(TtySize { rows: 10, cols: 40, term: Some("dumb".into()) });
    let script = "test -t 0 && echo $TERM $(stty size); read line; stty size; sleep 60";
    let mut stream = guest.ask(&Request::Exec(ExecRequest { tty, ..exec(&["sh", "-c", script]) }));
    let mut seen = String::new();
    while !seen.contains("dumb 10 40") {
        let frame = read_frame(&mut stream).expect("valid").expect("a frame");
        assert_ne!(frame.kind, FrameKind::Exit, "{seen}");
        seen.push_str(&run(&[frame], FrameKind::Stdout));
    }
    let size = Frame::json(FrameKind::Resize, &TtySize { rows: 20, cols: 50, term: None }).expect("has a JSON form");
    write_frame(&mut stream, size.kind, &size.payload).expect("open");
    write_frame(&mut stream, FrameKind::Stdin, b"go\n").expect("open");
    while !seen.contains("20 50") {
        seen.push_str(&run(&[read_frame(&mut stream).expect("valid").expect("a frame")], FrameKind::Stdout));
    }
    write_frame(&mut stream, FrameKind::Stdin, &[3]).expect("open");
    assert!(!exit(&all(stream)).success());

    // A hang-up ends the group.
    let mut stream = guest.ask(&Request::Exec(exec(&["sh", "-c", "sleep 61 & echo $$; wait"])));
    let Reply::Started { pid } = read_frame(&mut stream).expect("valid").expect("a frame").parse().expect("a reply") else {
        panic!("not started")
    };
    drop(stream);
    let group = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while rustix::process::test_kill_process_group(group).is_ok() {
        assert!(std::time::Instant::now() < until, "the group of {pid} lives on");
        thread::sleep(Duration::from_millis(10));
    }
}
