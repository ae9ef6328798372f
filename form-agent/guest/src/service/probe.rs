//! One probe of a HEALTHCHECK.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use form_types::spec::{self, Healthcheck, HealthcheckKind};
use rustix::process::Signal;

use crate::{process::Children, sys};

/// How the command of a probe is started: as the service is.
pub struct CommandSetting<'a> {
    pub children: &'a Children,
    pub launch: sys::Launch,
    pub env: &'a [(String, String)],
    pub workdir: &'a str,
}

/// Gives `Err` with the reason when the service is not well.
pub fn probe(check: &Healthcheck, setting: &CommandSetting<'_>) -> Result<(), String> {
    let timeout = Duration::from_millis(check.timeout_ms.max(1));
    match (check.kind, check.port, &check.command) {
        (HealthcheckKind::Tcp, Some(port), _) => connect(port, timeout).map(drop),
        (HealthcheckKind::Http, Some(port), _) => http(port, check.path.as_deref().unwrap_or("/"), timeout),
        (HealthcheckKind::Command, _, Some(command)) => run(command, timeout, setting),
        _ => Err("the healthcheck names neither a port nor a command".to_owned()),
    }
}

/// Connects on the loopback address, IPv6 when nothing listens on IPv4.
fn connect(port: u16, timeout: Duration) -> Result<TcpStream, String> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&v4, timeout)
        .or_else(|error| TcpStream::connect_timeout(&v6, timeout).map_err(|_| error))
        .map_err(|error| format!("cannot connect to port {port}: {error}"))
}

/// A GET; 2xx and 3xx are well.
fn http(port: u16, path: &str, timeout: Duration) -> Result<(), String> {
    let until = Instant::now() + timeout;
    let mut stream = connect(port, timeout)?;
    let failed = |error: std::io::Error| format!("no answer from port {port}: {error}");
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    let path: String = path.chars().filter(|letter| !letter.is_control() && *letter != ' ').collect();
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nUser-Agent: form-guest\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut head = Vec::new();
    let mut buffer = [0; 512];
    while !head.contains(&b'\n') && head.len() < 1024 {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no answer from port {port} within {} ms", timeout.as_millis()));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut buffer).map_err(failed)? {
            0 => break,
            count => head.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
    match http_status(&head) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("{path} answers with status {status}")),
        None => Err(format!("port {port} does not speak HTTP")),
    }
}

fn http_status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    words.next().filter(|version| version.starts_with("HTTP/"))?;
    words.next()?.parse().ok()
}

fn run(command: &spec::Command, timeout: Duration, setting: &CommandSetting<'_>) -> Result<(), String> {
    let words: Vec<&str> = match command {
        spec::Command::Shell(text) => vec!["/bin/sh", "-c", text],
        spec::Command::Exec(words) => words.iter().map(String::as_str).collect(),
    };
    let Some((program, arguments)) = words.split_first() else { return Err("the healthcheck's command is empty".to_owned()) };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(setting.env.iter().map(|(key, value)| (key, value))).current_dir(setting.workdir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::prepare(&mut command, &setting.launch);
    let child = setting.children.spawn(&mut command).map_err(|error| format!("cannot start {program}: {error}"))?;
    let status = child.wait_for(timeout);
    // What it left behind must not pile up probe by probe.
    child.signal_group(Signal::KILL);
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("{program} ended with {status}")),
        None => Err(format!("{program} did not end within {} ms", timeout.as_millis())),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn status_lines() {
        assert_eq!(http_status(b"HTTP/1.1 200 OK\r\n"), Some(200));
        assert_eq!(http_status(b"HTTP/1.0 503 \r\nx"), Some(503));
        for bad in [&b""[..], b"SSH-2.0 200", b"HTTP/1.1", b"HTTP/1.1 two", b"\xff\xfe"] {
            assert_eq!(http_status(bad), None);
        }
    }

    #[test]
    fn http_and_tcp_against_a_real_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let server = std::thread::spawn(move || {
            for answer in ["HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 500 Oh\r\n\r\n", ""] {
                let (mut stream, _) = listener.accept().expect("a connection");
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).expect("a request");
                    request.push(byte[0]);
                }
                assert!(request.starts_with(b"GET /health HTTP/1.1\r\n"));
                stream.write_all(answer.as_bytes()).expect("writable");
            }
        });
        let timeout = Duration::from_secs(5);
        assert_eq!(http(port, "/health", timeout), Ok(()));
        assert!(http(port, "/health", timeout).expect_err("500").contains("status 500"));
        assert!(http(port, "/health", timeout).expect_err("nothing").contains("does not speak HTTP"));
        server.join().expect("no panic");
        assert!(connect(port, timeout).expect_err("closed").contains("cannot connect"));
    }
}
