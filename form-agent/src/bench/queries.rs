//! How many questions about VMs an agent answers when several ask at once, each on a connection that stays.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use form_api::bench::{BenchRow, Unit};

use super::{Bench, BenchError, Stop, row::Line};
use crate::config::Paths;

/// VMs on the record.
const VMS: u32 = 200;
const CLIENTS: u32 = 8;
/// Of each client, in one sample.
const QUERIES: u32 = 1000;

/// Milliseconds: ten thousand queries in a second, and all 200 VMs for one `form ps`.
const QUERY: f64 = 0.1;
const LIST: f64 = 50.0;

/// The longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

impl Bench<'_> {
    pub(super) fn queries(&self) -> Vec<BenchRow> {
        let query = Line::new("query", "one question for a VM's state, of 8 clients that ask at once; 200 recorded", Unit::Milliseconds)
            .budget(QUERY);
        let list = Line::new("query/list", "one question for all 200 VMs, of one client", Unit::Milliseconds).budget(LIST);
        match self.query_times() {
            Ok((single, all)) => vec![query.measured(&single), list.measured(&all)],
            Err(error) => vec![query.failed(error.to_string())],
        }
    }

    fn query_times(&self) -> Result<(Vec<f64>, Vec<f64>), BenchError> {
        let root = self.directory.join("queries");
        drop(self.fill(&Paths::new(&root), VMS)?);
        let agent = self.throw_away(&root)?;
        agent.settle()?;
        // The first ones pay for what is kept afterwards.
        ask_at_once(agent.socket(), self.stop)?;
        let single = (0..self.runs()).map(|_| ask_at_once(agent.socket(), self.stop)).collect::<Result<_, _>>()?;
        let mut client = Client::connect(agent.socket())?;
        let once = || {
            self.stop.check()?;
            let begun = Instant::now();
            let listed = client.get("/v1/vms")?;
            let took = begun.elapsed().as_secs_f64() * 1e3;
            let vms: serde_json::Value = serde_json::from_slice(&listed).map_err(|error| BenchError::Agent(error.to_string()))?;
            match vms.as_array() {
                Some(vms) if vms.len() == VMS as usize => Ok(took),
                _ => Err(BenchError::Agent(format!("it does not name its {VMS} VMs"))),
            }
        };
        let all = std::iter::repeat_with(once).take(self.runs() as usize * 10).collect::<Result<_, _>>()?;
        Ok((single, all))
    }
}

/// The milliseconds of one query, as all clients together get them answered.
fn ask_at_once(socket: &Path, stop: &Stop) -> Result<f64, BenchError> {
    let ask = |client: u32| -> Result<(), BenchError> {
        let mut connection = Client::connect(socket)?;
        for number in 0..QUERIES {
            if number.is_multiple_of(100) {
                stop.check()?;
            }
            let name = format!("vm-{}", (client * 31 + number) % VMS);
            let answer = connection.get(&format!("/v1/vms/{name}"))?;
            if !answer.windows(name.len()).any(|window| window == name.as_bytes()) {
                return Err(BenchError::Agent(format!("an answer about vm/{name} does not name it")));
            }
        }
        Ok(())
    };
    let begun = Instant::now();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(move || ask(client))).collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| Err(BenchError::Agent("a client panicked".to_owned()))))
    })?;
    Ok(begun.elapsed().as_secs_f64() * 1e3 / f64::from(CLIENTS * QUERIES))
}

/// A client of the agent's socket that keeps its connection.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(socket: &Path) -> Result<Self, BenchError> {
        let stream = UnixStream::connect(socket).and_then(|stream| stream.set_read_timeout(Some(PATIENCE)).map(|()| stream));
        stream.map(|stream| Self(BufReader::new(stream))).map_err(super::io_error("reach an agent"))
    }

    /// The body of an answer that says how long it is.
    fn get(&mut self, path: &str) -> Result<Vec<u8>, BenchError> {
        let failed = super::io_error("hear an agent's answer");
        let mut ask = || -> std::io::Result<(String, Vec<u8>)> {
            self.0.get_mut().write_all(format!("GET {path} HTTP/1.1\r\nhost: agent\r\n\r\n").as_bytes())?;
            let (mut status, mut line, mut length) = (String::new(), String::new(), 0);
            self.0.read_line(&mut status)?;
            while self.0.read_line(&mut line)? > 2 {
                if let Some(("content-length", value)) = line.split_once(':') {
                    length = value.trim().parse().map_err(std::io::Error::other)?;
                }
                line.clear();
            }
            let mut body = vec![0; length];
            self.0.read_exact(&mut body)?;
            Ok((status, body))
        };
        let (status, body) = ask().map_err(failed)?;
        if status.starts_with("HTTP/1.1 200 ") { Ok(body) } else { Err(BenchError::Agent(format!("GET {path}: {}", status.trim()))) }
    }
}
