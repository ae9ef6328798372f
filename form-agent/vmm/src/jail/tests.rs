//! Each test runs itself again as a process of its own, which enters a jail and then does something forbidden.

use std::fs::File;
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use super::*;

const ATTEMPT: &str = "FORM_VMM_TEST_ATTEMPT";
/// What a process says that did the forbidden thing and lived.
const DONE: i32 = 42;
const REFUSED: i32 = 43;

/// Runs `test` of this file in a process of its own with `attempt` set.
fn outcome(test: &str, attempt: &str) -> ExitStatus {
    let name = format!("jail::tests::{test}");
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(ATTEMPT, attempt)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}

fn attempt() -> Option<String> {
    std::env::var(ATTEMPT).ok()
}

fn report<T, E>(result: Result<T, E>) -> ! {
    std::process::exit(if result.is_ok() { DONE } else { REFUSED })
}

fn seccomp() -> JailConfig {
    JailConfig { seccomp: true, ..JailConfig::default() }
}

fn act(what: &str) -> ! {
    match what {
        "file" => report(File::open("/etc/hostname")),
        "create" => report(File::create("/tmp/form-vmm-jail-test")),
        "tcp" => report(TcpStream::connect("127.0.0.1:9")),
        "unix" => report(UnixDatagram::unbound()),
        "pair" => report(UnixStream::pair()),
        "program" => report(Command::new("/bin/true").status()),
        "signal" => {
            // SAFETY: signal 0 only asks whether process 1 could be signalled.
            let result = unsafe { libc::kill(1, 0) };
            report(if result == 0 { Ok(()) } else { Err(()) })
        }
        "memory" => {
            // SAFETY: a read of no bytes from another process; every pointer is null with length zero.
            let result = unsafe { libc::process_vm_readv(1, std::ptr::null(), 0, std::ptr::null(), 0, 0) };
            report(if result == 0 { Ok(()) } else { Err(()) })
        }
        "executable" => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0) };
            report(if page == libc::MAP_FAILED { Err(()) } else { Ok(()) })
        }
        // Rings for disks are made before: one made later could be asked for anything.
        "ring" => report(io_uring::IoUring::new(1)),
        "thread" => report(std::thread::spawn(|| vec![1u8; 1 << 20].len()).join()),
        "print" => {
            println!("still here");
            report(Ok::<(), ()>(()))
        }
        other => panic!("unknown attempt {other}"),
    }
}

const FORBIDDEN: [&str; 9] = ["file", "create", "tcp", "unix", "program", "signal", "memory", "executable", "ring"];

#[test]
fn the_main_thread_is_killed_for_what_it_must_not_do() {
    if let Some(what) = attempt() {
        prepare(&seccomp()).unwrap();
        enter_main();
        act(&what);
    }
    for what in FORBIDDEN {
        let status = outcome("the_main_thread_is_killed_for_what_it_must_not_do", what);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {status}");
    }
    for what in ["pair", "thread", "print"] {
        let status = outcome("the_main_thread_is_killed_for_what_it_must_not_do", what);
        assert_eq!(status.code(), Some(DONE), "{what}: {status}");
    }
}

#[test]
fn a_vcpu_thread_is_killed_for_what_it_must_not_do() {
    if let Some(what) = attempt() {
        prepare(&seccomp()).unwrap();
        enter_vcpu();
        act(&what);
    }
    for what in FORBIDDEN.into_iter().chain(["pair", "thread"]) {
        let status = outcome("a_vcpu_thread_is_killed_for_what_it_must_not_do", what);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {status}");
    }
    assert_eq!(outcome("a_vcpu_thread_is_killed_for_what_it_must_not_do", "print").code(), Some(DONE));
}

#[test]
fn a_device_thread_is_killed_for_what_it_must_not_do() {
    if let Some(what) = attempt() {
        prepare(&seccomp()).unwrap();
        let (kind, what) = what.split_once('/').unwrap();
        let kind = match kind {
            "block" => WorkerKind::Block,
            "net" => WorkerKind::Net,
            "vsock" => WorkerKind::Vsock,
            "rng" => WorkerKind::Rng,
            "mem" => WorkerKind::Mem,
            _ => WorkerKind::Balloon,
        };
        let what = what.to_owned();
        // Device threads are made by the main thread, from within its own filter.
        enter_main();
        // The kill takes the whole process, not just the thread.
        let thread = crate::virtio::worker::spawn(kind, "worker", move || act(&what)).unwrap();
        report(thread.join().and(Ok::<(), _>(())));
    }
    for kind in ["block", "net", "vsock", "rng", "balloon", "mem"] {
        for what in ["file", "unix", "program", "executable", "ring"] {
            let status = outcome("a_device_thread_is_killed_for_what_it_must_not_do", &format!("{kind}/{what}"));
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{kind}/{what}: {status}");
        }
        let status = outcome("a_device_thread_is_killed_for_what_it_must_not_do", &format!("{kind}/print"));
        assert_eq!(status.code(), Some(DONE), "{kind}: {status}");
    }
}

#[test]
fn landlock_alone_denies_files_too() {
    if let Some(what) = attempt() {
        match prepare(&JailConfig { landlock: true, ..JailConfig::default() }) {
            Ok(()) => act(&what),
            Err(error) => panic!("{error}"),
        }
    }
    for what in ["file", "create"] {
        assert_eq!(outcome("landlock_alone_denies_files_too", what).code(), Some(REFUSED), "{what}");
    }
}

#[test]
fn a_user_and_namespaces_of_its_own_need_root() {
    let config = JailConfig { uid: Some(65_432), gid: Some(65_433), namespaces: true, ..JailConfig::default() };
    if attempt().is_some() {
        prepare(&config).unwrap();
        let ids = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        assert_eq!(ids, (65_432, 65_433));
        assert!(rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).is_err(), "root again");
        assert!(rustix::thread::capabilities(None).unwrap().permitted.is_empty());
        // Nothing is mounted, and the loopback device is down.
        let entries = std::fs::read_dir("/").unwrap().count();
        assert!(std::net::UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.connect("127.0.0.1:9")).is_err());
        std::process::exit(if entries == 0 { DONE } else { REFUSED });
    }
    if rustix::process::geteuid().is_root() {
        let status = outcome("a_user_and_namespaces_of_its_own_need_root", "look");
        assert_eq!(status.code(), Some(DONE), "{status}");
    } else {
        assert!(matches!(prepare(&config), Err(JailError::Io { .. })));
    }
}
