//! What goes over the wire, counted on it.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// A Unix socket that passes everything on to another, and counts it, both ways. It ends with the test's process.
pub struct CountingProxy {
    passed: Arc<AtomicU64>,
}

impl CountingProxy {
    /// Listens at `socket` for clients of the server at `server`.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn start(socket: &Path, server: &Path) -> Self {
        let listener = UnixListener::bind(socket).expect("the counting socket can be made");
        let passed = Arc::new(AtomicU64::new(0));
        let (server, counter) = (server.to_owned(), Arc::clone(&passed));
        thread::spawn(move || {
            for client in listener.incoming() {
                // A client that went away, or a server that is away: the client sees a closed connection.
                let (Ok(client), Ok(server)) = (client, UnixStream::connect(&server)) else { continue };
                let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else { continue };
                let (there, back) = (Arc::clone(&counter), Arc::clone(&counter));
                thread::spawn(move || pass(client, server, &there));
                thread::spawn(move || pass(server_too, client_too, &back));
            }
        });
        Self { passed }
    }

    /// Bytes that clients and the server have sent so far.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }
}

/// Until one side closes.
fn pass(mut from: UnixStream, mut to: UnixStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    let mut copy = || -> io::Result<()> {
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return to.shutdown(Shutdown::Write);
            }
            counter.fetch_add(count as u64, Ordering::SeqCst);
            to.write_all(&buffer[..count])?;
        }
    };
    // A connection that breaks ends both directions, as it would without us.
    if copy().is_err() {
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_counted_and_arrives() {
        let directory = tempfile::tempdir().unwrap();
        let (counted, real) = (directory.path().join("counted"), directory.path().join("real"));
        let listener = UnixListener::bind(&real).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            stream.write_all(format!("{text}, and more back").as_bytes()).unwrap();
        });
        let proxy = CountingProxy::start(&counted, &real);
        let mut client = UnixStream::connect(&counted).unwrap();
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        server.join().unwrap();
        assert_eq!((answer.as_str(), proxy.passed()), ("hello, and more back", 25));
    }
}
