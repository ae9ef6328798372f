//! QEMU's control socket: QMP, JSON lines (`qemu-project/docs/interop/qmp-spec`).

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

/// Name of the socket in the sandbox's directory.
pub const SOCKET: &str = "qmp.sock";

/// QEMU answers between two pieces of its work; a busy machine makes it slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// QEMU sends little: a longer line is something else.
const LONGEST_LINE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU's control socket: {0}")]
    Io(#[from] io::Error),
    #[error("QEMU's control socket says something that is no QMP")]
    Protocol,
    #[error("QEMU refuses `{command}`: {reason}")]
    Refused { command: String, reason: String },
}

/// A connection. QEMU serves one at a time; others wait.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the QEMU of a sandbox.
    ///
    /// # Errors
    /// When it does not run, or does not answer.
    pub fn connect(directory: &Path) -> Result<Self, QmpError> {
        // A socket's path may have 107 bytes; this one is short however long the directory's is.
        let directory = File::open(directory)?;
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.read()?.get("QMP").ok_or(QmpError::Protocol)?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value, QmpError> {
        let mut line = String::new();
        io::Read::take(&mut self.reader, LONGEST_LINE).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        serde_json::from_str(&line).map_err(|_| QmpError::Protocol)
    }

    /// # Errors
    /// When QEMU is gone or refuses.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), reason });
            }
            // An event.
        }
    }

    /// Runs a command of the human monitor, where some things have no other, and gives what it says.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn human(&mut self, line: &str) -> Result<String, QmpError> {
        let answer = self.execute("human-monitor-command", &json!({ "command-line": line }))?;
        answer.as_str().map(str::to_owned).ok_or(QmpError::Protocol)
    }

    /// Ends QEMU.
    ///
    /// # Errors
    /// When it is gone already or refuses.
    pub fn quit(mut self) -> Result<(), QmpError> {
        match self.execute("quit", &json!({})) {
            // It may end before it answers.
            Err(QmpError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            answer => answer.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    /// A QEMU that reads one request an answer and gives back what it read.
    fn serve(directory: &Path, answers: &'static [&'static str]) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut seen = Vec::new();
            for answer in answers {
                seen.push(requests.next().unwrap().unwrap());
                stream.write_all(answer.as_bytes()).unwrap();
            }
            seen
        })
    }

    #[test]
    fn answers_are_told_from_events() {
        let directory = tempfile::tempdir().unwrap();
        let answers: &[&str] = &[
            "{\"return\": {}}\r\n",
            "{\"event\": \"X\"}\r\n{\"return\": \"text\\r\\n\"}\r\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n",
        ];
        let server = serve(directory.path(), answers);
        let mut qmp = Qmp::connect(directory.path()).unwrap();
        assert_eq!(qmp.human("info usernet").unwrap(), "text\r\n");
        assert!(matches!(qmp.execute("x", &json!({})), Err(QmpError::Refused { reason, .. }) if reason == "no"));
        let seen = server.join().unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&seen[1]).unwrap(),
            json!({ "execute": "human-monitor-command", "arguments": { "command-line": "info usernet" } })
        );
    }

    #[test]
    fn an_end_is_an_error_except_after_quit() {
        let directory = tempfile::tempdir().unwrap();
        let server = serve(directory.path(), &["{\"return\": {}}\r\n", ""]);
        Qmp::connect(directory.path()).unwrap().quit().unwrap();
        server.join().unwrap();
        assert!(matches!(Qmp::connect(directory.path()), Err(QmpError::Io(_))));
    }
}
