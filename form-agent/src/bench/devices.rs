//! What a guest's disks and network do: a Linux guest reads, writes and sends as fast as it can, one VM a run.

use std::{
    io::{self, Read, Write},
    net::{Ipv6Addr, SocketAddrV6, TcpStream},
    time::{Duration, Instant},
};

use form_api::bench::{BenchRow, Unit};
use form_store::Store;
use form_types::{
    VolumeFormat, VolumeId,
    measure::{Access, Direction, Disk, FROM_GUEST, TO_GUEST, word},
};
use form_vmm::config::DiskFormat;

use super::{
    Bench, BenchError, Stop, guests, io_error,
    machine::{Machine, OtherDisk},
    row::Line,
};

/// Of each disk, and what goes over the network each way.
const SIZE: u64 = 256 << 20;
/// Requests of 4 KiB; those of 128 KiB are all of the disk.
const PLACES: u64 = 4096;
/// How much is made at once.
const PIECE: u64 = 1 << 20;
/// What the guest says when it is done.
const DONE: &str = "measured all";
const PORT: u16 = 5001;
/// The longest wait for the two ends of the network to have addresses.
const PATIENCE: Duration = Duration::from_secs(60);
/// For one answer over the network.
const SILENCE: Duration = Duration::from_secs(120);

/// A row: its name, what it is, and what the guest is asked for.
struct Requests {
    name: &'static str,
    what: &'static str,
    serial: &'static str,
    access: Access,
    depth: u16,
}

impl Requests {
    const fn new(name: &'static str, what: &'static str, serial: &'static str, access: Access, depth: u16) -> Self {
        Self { name, what, serial, access, depth }
    }

    fn disk(&self) -> Disk {
        let (request, count) = match self.access {
            Access::Random => (4 << 10, PLACES),
            Access::Sequential => (128 << 10, SIZE / (128 << 10)),
        };
        let direction = if WRITTEN.contains(&self.serial) { Direction::Write } else { Direction::Read };
        Disk { direction, serial: self.serial.to_owned(), size: SIZE, access: self.access, request, depth: self.depth, count }
    }

    const fn line(&self) -> Line {
        Line::new(self.name, self.what, Unit::Milliseconds)
    }
}

const RAW: &str = "raw";
const QCOW2: &str = "qcow2";
const RAW_WRITTEN: &str = "raw-written";
const QCOW2_WRITTEN: &str = "qcow2-written";
/// Disks that have other bytes before.
const WRITTEN: [&str; 2] = [RAW_WRITTEN, QCOW2_WRITTEN];
const AT_ONCE: &str = "the same with 32 requests at once";
const REQUESTS: [Requests; 16] = [
    Requests::new("disk/4k", "a guest reads 4 KiB at 4096 random places of a raw disk, past its own cache", RAW, Access::Random, 1),
    Requests::new("disk/4k/32", AT_ONCE, RAW, Access::Random, 32),
    Requests::new(
        "disk/128k",
        "a guest reads 256 MiB of a raw disk by requests of 128 KiB, past its own cache",
        RAW,
        Access::Sequential,
        1,
    ),
    Requests::new("disk/128k/32", AT_ONCE, RAW, Access::Sequential, 32),
    Requests::new("disk/qcow2/4k", "4 KiB at 4096 random places of a qcow2 disk", QCOW2, Access::Random, 1),
    Requests::new("disk/qcow2/4k/32", AT_ONCE, QCOW2, Access::Random, 32),
    Requests::new("disk/qcow2/128k", "256 MiB of a qcow2 disk by requests of 128 KiB", QCOW2, Access::Sequential, 1),
    Requests::new("disk/qcow2/128k/32", AT_ONCE, QCOW2, Access::Sequential, 32),
    Requests::new(
        "disk/write/4k",
        "a guest writes 4 KiB at 4096 random places of a raw disk, past its own cache, and flushes",
        RAW_WRITTEN,
        Access::Random,
        1,
    ),
    Requests::new("disk/write/4k/32", AT_ONCE, RAW_WRITTEN, Access::Random, 32),
    Requests::new("disk/write/128k", "it writes 256 MiB by requests of 128 KiB", RAW_WRITTEN, Access::Sequential, 1),
    Requests::new("disk/write/128k/32", AT_ONCE, RAW_WRITTEN, Access::Sequential, 32),
    Requests::new("disk/write/qcow2/4k", "4 KiB to 4096 random places of a qcow2 disk", QCOW2_WRITTEN, Access::Random, 1),
    Requests::new("disk/write/qcow2/4k/32", AT_ONCE, QCOW2_WRITTEN, Access::Random, 32),
    Requests::new("disk/write/qcow2/128k", "256 MiB to a qcow2 disk by requests of 128 KiB", QCOW2_WRITTEN, Access::Sequential, 1),
    Requests::new("disk/write/qcow2/128k/32", AT_ONCE, QCOW2_WRITTEN, Access::Sequential, 32),
];

const TO_GUEST_ROW: Line = Line::new("network/to-guest", "256 MiB over one TCP connection from the host to a guest", Unit::Milliseconds);
const FROM_GUEST_ROW: Line = Line::new("network/from-guest", "the same from the guest to the host", Unit::Milliseconds);
const TO_GUEST_BY_VHOST: Line = Line::new("network/vhost/to-guest", "to the guest by the host's kernel (vhost-net)", Unit::Milliseconds);
const FROM_GUEST_BY_VHOST: Line = Line::new("network/vhost/from-guest", "from the guest by the host's kernel", Unit::Milliseconds);

impl Bench<'_> {
    /// The host has the disks in its memory: what is measured is the way there.
    pub(super) fn disk(&self) -> Vec<BenchRow> {
        match self.disk_times() {
            Ok(times) => REQUESTS.iter().zip(times).map(|(requests, times)| requests.line().measured(&times)).collect(),
            Err(error) => vec![REQUESTS[0].line().failed(error.to_string())],
        }
    }

    /// Milliseconds of each row, a value a run.
    fn disk_times(&self) -> Result<Vec<Vec<f64>>, BenchError> {
        let store = Store::open(&self.directory.join("disks")).map_err(|error| BenchError::Missing(error.to_string()))?;
        let disks = (1..).zip([
            (RAW, DiskFormat::Raw),
            (QCOW2, DiskFormat::Qcow2),
            (RAW_WRITTEN, DiskFormat::Raw),
            (QCOW2_WRITTEN, DiskFormat::Qcow2),
        ]);
        let disks = disks.map(|(number, (serial, format))| self.filled(&store, number, serial, format)).collect::<Result<_, _>>()?;
        let asked: String = REQUESTS.iter().map(|requests| format!("measure disk {}\n", requests.disk())).collect();
        let guest = self.measuring(&format!("{asked}echo '{DONE}'\n"), disks)?;
        let runs = self.starts(&guest, guests::LINE, |machine, _| {
            machine.wait_for(DONE)?;
            let said = machine.printed();
            REQUESTS.iter().map(|requests| time_of(&said, &requests.disk())).collect::<Result<Vec<f64>, _>>()
        })?;
        Ok((0..REQUESTS.len()).map(|row| runs.iter().map(|times| times[row]).collect()).collect())
    }

    /// A disk that is full of bytes: those that are to be read, or others where they are to be written.
    fn filled(&self, store: &Store, number: u8, serial: &'static str, format: DiskFormat) -> Result<OtherDisk, BenchError> {
        let kind = match format {
            DiskFormat::Raw => VolumeFormat::Raw,
            DiskFormat::Qcow2 => VolumeFormat::Qcow2,
        };
        let id = VolumeId::from_bytes([number; 16]);
        let failed = |error: form_store::StoreError| BenchError::Missing(error.to_string());
        let pool = store.pool(&form_store::local_pool()).map_err(failed)?;
        let others = vec![0xff; PIECE as usize];
        let fill = |contents: &form_store::Contents| {
            pieces(SIZE, self.stop, |piece, offset| contents.write_at(if WRITTEN.contains(&serial) { &others } else { piece }, offset))
        };
        pool.create_filled(&id, kind, SIZE, fill).map_err(failed)?;
        let read_only = !WRITTEN.contains(&serial);
        let file = pool.open_volume(&id, read_only).map_err(failed)?.file;
        Ok(OtherDisk { serial, format, read_only, file })
    }

    fn measuring(&self, commands: &str, disks: Vec<OtherDisk>) -> Result<super::Guest, BenchError> {
        let program = self.config.program("form-guest").map_err(|error| BenchError::Missing(error.to_string()))?;
        guests::measuring(&self.kernel()?, self.directory, &program, commands, disks)
    }

    /// Once more by the host's kernel, where the host has vhost-net.
    pub(super) fn network(&self) -> Vec<BenchRow> {
        let mut rows = self.network_by(false, TO_GUEST_ROW, FROM_GUEST_ROW);
        if form_net::tap::vhost().is_some() {
            rows.extend(self.network_by(true, TO_GUEST_BY_VHOST, FROM_GUEST_BY_VHOST));
        }
        rows
    }

    fn network_by(&self, vhost: bool, to: Line, from: Line) -> Vec<BenchRow> {
        let commands = format!("/bin/busybox ip link set eth0 up\nmeasure network {PORT} &\n");
        let times = self.measuring(&commands, Vec::new()).and_then(|guest| {
            let guest = super::Guest { vhost, ..guest };
            // Addresses of the link itself: nothing has to be set up, and nothing can be in anybody's way.
            self.starts(&guest, guests::LINE, |machine, _| Ok((to_guest(machine, self.stop)?, from_guest(machine, self.stop)?)))
        });
        match times {
            Ok(times) => {
                let (there, back): (Vec<f64>, Vec<f64>) = times.into_iter().unzip();
                vec![to.measured(&there), from.measured(&back)]
            }
            Err(error) => vec![to.failed(error.to_string())],
        }
    }
}

/// What the guest says that `disk` took, in milliseconds.
fn time_of(said: &str, disk: &Disk) -> Result<f64, BenchError> {
    let head = format!("{disk} ");
    let nanoseconds = said.lines().find_map(|line| line.strip_prefix(&head)?.trim_end().parse::<f64>().ok());
    let unsaid = || BenchError::Guest { what: "did not use its disks", words: said.trim().to_owned() };
    nanoseconds.map(|nanoseconds| nanoseconds / 1e6).ok_or_else(unsaid)
}

/// Gives `take` all bytes of a measured disk, with where they belong.
///
/// # Errors
/// When `take` fails, or somebody wants the measuring to end.
pub(super) fn pieces(size: u64, stop: &Stop, mut take: impl FnMut(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
    for start in (0..size).step_by(PIECE as usize) {
        stop.check().map_err(|_| io::ErrorKind::Interrupted)?;
        let piece: Vec<u8> = (start..size.min(start + PIECE)).step_by(8).flat_map(|offset| word(offset).to_le_bytes()).collect();
        take(&piece, start)?;
    }
    Ok(())
}

fn to_guest(machine: &Machine<'_>, stop: &Stop) -> Result<f64, BenchError> {
    let mut connection = connect(machine, stop)?;
    timed(|| {
        connection.write_all(&asked(TO_GUEST))?;
        let piece = vec![0; PIECE as usize];
        for _ in 0..SIZE / PIECE {
            connection.write_all(&piece)?;
        }
        let mut came = [0; 8];
        connection.read_exact(&mut came)?;
        whole(u64::from_le_bytes(came))
    })
}

fn from_guest(machine: &Machine<'_>, stop: &Stop) -> Result<f64, BenchError> {
    let mut connection = connect(machine, stop)?;
    timed(|| {
        connection.write_all(&asked(FROM_GUEST))?;
        whole(io::copy(&mut connection, &mut io::sink())?)
    })
}

/// In milliseconds.
fn timed(act: impl FnOnce() -> io::Result<()>) -> Result<f64, BenchError> {
    let begun = Instant::now();
    act().map_err(io_error("move bytes between the host and the guest"))?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn asked(way: u8) -> Vec<u8> {
    [&[way][..], &SIZE.to_le_bytes()].concat()
}

fn whole(came: u64) -> io::Result<()> {
    if came == SIZE { Ok(()) } else { Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{came} bytes came of {SIZE}"))) }
}

/// To the guest's address of the link (RFC 4291, appendix A), as soon as both ends have theirs.
fn connect(machine: &Machine<'_>, stop: &Stop) -> Result<TcpStream, BenchError> {
    let index = machine.tap_up()?;
    let mac = super::machine::MAC;
    let address = Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        u16::from_be_bytes([mac[0] ^ 2, mac[1]]),
        u16::from_be_bytes([mac[2], 0xff]),
        u16::from_be_bytes([0xfe, mac[3]]),
        u16::from_be_bytes([mac[4], mac[5]]),
    );
    let begun = Instant::now();
    loop {
        stop.check()?;
        let tried = TcpStream::connect_timeout(&SocketAddrV6::new(address, PORT, 0, index).into(), Duration::from_secs(5));
        match tried.and_then(|connection| connection.set_read_timeout(Some(SILENCE)).map(|()| connection)) {
            Ok(connection) => return Ok(connection),
            Err(error) if begun.elapsed() > PATIENCE => {
                return Err(io_error("reach the guest over IPv6 (see that this host has it)")(error));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_a_disk_has_one_name_and_is_found_in_what_the_guest_said() {
        let said: String =
            REQUESTS.iter().zip(1_u32..).map(|(requests, number)| format!("{} {number}000000\r\n", requests.disk())).collect();
        for (requests, number) in REQUESTS.iter().zip(1_u32..) {
            assert_eq!(time_of(&said, &requests.disk()).unwrap(), f64::from(number), "{}", requests.name);
            assert_eq!(REQUESTS.iter().filter(|other| other.name == requests.name).count(), 1);
            assert_eq!(Disk::parse(&requests.disk().to_string().split(' ').collect::<Vec<_>>()), Some(requests.disk()));
        }
        assert!(time_of("nothing", &REQUESTS[0].disk()).is_err());
    }

    #[test]
    fn a_disk_is_given_whole_and_in_order() {
        let mut all = Vec::new();
        let take = |piece: &[u8], offset: u64| {
            assert_eq!(offset, all.len() as u64);
            all.extend_from_slice(piece);
            Ok(())
        };
        pieces(PIECE + 4096, &Stop::default(), take).unwrap();
        assert_eq!(all.len() as u64, PIECE + 4096);
        assert_eq!(all[4096..4104], word(4096).to_le_bytes());
    }
}
