//! How fast a volume is read over NBD, beside qemu-nbd on the same file where it is installed. The client is the same.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use form_api::bench::{BenchRow, Peer, Unit};
use form_nbd::{Client, Uri};
use form_types::measure::{mixed, word};

use super::{
    Bench, BenchError, Stop,
    agents::{ThrowAway, form_program},
    devices, io_error,
    row::Line,
};

/// Of the volume.
const SIZE: u64 = 256 << 20;
/// A request of those that follow each other.
const LARGE: usize = 128 << 10;
/// A request of those at random places, and how many of them there are.
const SMALL: usize = 4 << 10;
const PLACES: u64 = 10_000;

/// The longest wait for the peer's socket.
const PATIENCE: Duration = Duration::from_secs(30);

/// Milliseconds of both ways to read, a value a run.
type Times = (Vec<f64>, Vec<f64>);

impl Bench<'_> {
    pub(super) fn nbd(&self) -> Vec<BenchRow> {
        let large = Line::new("nbd/128k", "256 MiB of a volume over NBD by requests of 128 KiB, one after the other", Unit::Milliseconds);
        let small = Line::new("nbd/4k", "4 KiB at 10000 random places of it", Unit::Milliseconds);
        match self.nbd_times() {
            Ok((own, peer)) => {
                let (mut large, mut small) = (large.measured(&own.0), small.measured(&own.1));
                if let Some(peer) = peer {
                    beside(&mut large, &peer.0);
                    beside(&mut small, &peer.1);
                }
                vec![large, small]
            }
            Err(error) => vec![large.failed(error.to_string())],
        }
    }

    fn nbd_times(&self) -> Result<(Times, Option<Times>), BenchError> {
        let root = self.directory.join("nbd");
        let agent = self.throw_away(&root)?;
        let file = self.directory.join("disk");
        write_disk(&file, self.stop).map_err(io_error("write a disk"))?;
        let form = |arguments: &[&str]| self.form(&agent, &root, arguments);
        form(&["volume", "import", "disk", &file.display().to_string()])?;
        fs::remove_file(&file).map_err(io_error("remove the disk"))?;
        form(&["volume", "export", "disk", "--nbd"])?;
        let socket = root.join("run/formation/nbd/disk.sock");
        let own = self.read_times(&format!("nbd+unix:///disk?socket={}", socket.display()))?;
        form(&["volume", "unexport", "disk"])?;

        // Of the file itself, as the agent left it.
        let id = form(&["volume", "show", "disk", "-o", "json"])?;
        let id: serde_json::Value = serde_json::from_str(&id).map_err(|error| BenchError::Agent(error.to_string()))?;
        let volume = root.join("var/lib/formation/volumes").join(id["id"].as_str().unwrap_or_default()).join("volume.raw");
        let Some(peer) = QemuNbd::start(&volume, &self.directory.join("peer.sock"), self.stop)? else { return Ok((own, None)) };
        let times = self.read_times(&format!("nbd+unix:///?socket={}", self.directory.join("peer.sock").display()));
        drop(peer);
        times.map(|times| (own, Some(times)))
    }

    /// What `form` prints.
    fn form(&self, agent: &ThrowAway<'_>, home: &Path, arguments: &[&str]) -> Result<String, BenchError> {
        self.stop.check()?;
        let output = Command::new(form_program()?)
            .args(arguments)
            .env("FORM_HOST", format!("unix:{}", agent.socket().display()))
            .env("XDG_CONFIG_HOME", home)
            .env("XDG_DATA_HOME", home)
            .stdin(Stdio::null())
            .output()
            .map_err(io_error("start form"))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(BenchError::Agent(format!("`form {}`: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
        }
    }

    fn read_times(&self, address: &str) -> Result<Times, BenchError> {
        let uri: Uri = address.parse().map_err(|error| BenchError::Agent(format!("{address}: {error}")))?;
        // The first one finds the file in memory or puts it there.
        read_all(&uri, self.stop)?;
        let mut times = Times::default();
        for _ in 0..self.runs() {
            times.0.push(read_all(&uri, self.stop)?);
            times.1.push(read_places(&uri, self.stop)?);
        }
        Ok(times)
    }
}

/// What the same took with the peer.
fn beside(row: &mut BenchRow, peer: &[f64]) {
    let value = Line::new("", "", Unit::Milliseconds).measured(peer).median;
    row.peer = Some(Peer { name: "qemu-nbd".to_owned(), value, ratio: row.median / value });
}

fn write_disk(path: &Path, stop: &Stop) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    devices::pieces(SIZE, stop, |piece, _| file.write_all(piece))?;
    file.sync_all()
}

fn connect(uri: &Uri) -> Result<Client, BenchError> {
    let client = Client::connect(uri).map_err(|error| BenchError::Agent(error.to_string()))?;
    if client.size() == SIZE { Ok(client) } else { Err(BenchError::Agent(format!("an export of {} bytes", client.size()))) }
}

/// Reads at `offset`, and looks whether that is what is there.
fn read(client: &mut Client, into: &mut [u8], offset: u64) -> Result<(), BenchError> {
    client.read_at(into, offset).map_err(|error| BenchError::Agent(error.to_string()))?;
    if into[..8] == word(offset).to_le_bytes() { Ok(()) } else { Err(BenchError::Agent(format!("other bytes at {offset}"))) }
}

fn read_all(uri: &Uri, stop: &Stop) -> Result<f64, BenchError> {
    let mut client = connect(uri)?;
    let mut buffer = vec![0; LARGE];
    let begun = Instant::now();
    for offset in (0..SIZE).step_by(LARGE) {
        stop.check()?;
        read(&mut client, &mut buffer, offset)?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn read_places(uri: &Uri, stop: &Stop) -> Result<f64, BenchError> {
    let mut client = connect(uri)?;
    let mut buffer = vec![0; SMALL];
    let begun = Instant::now();
    for number in 0..PLACES {
        stop.check()?;
        read(&mut client, &mut buffer, mixed(number) % (SIZE / SMALL as u64) * SMALL as u64)?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// The peer, which ends with this.
struct QemuNbd(Child);

impl QemuNbd {
    /// None where it is not installed.
    fn start(file: &Path, socket: &Path, stop: &Stop) -> Result<Option<Self>, BenchError> {
        let child = Command::new("qemu-nbd")
            .args(["--read-only", "--persistent", "--shared", "4", "--format", "raw", "--socket"])
            .args([socket, file])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut peer = match child {
            Ok(child) => Self(child),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("start qemu-nbd")(error)),
        };
        let begun = Instant::now();
        while !socket.exists() {
            stop.check()?;
            if begun.elapsed() > PATIENCE || !matches!(peer.0.try_wait(), Ok(None)) {
                return Err(BenchError::Missing("qemu-nbd does not start".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Some(peer))
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
