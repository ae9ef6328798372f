//! `form-guest measure`: what `form bench` has a guest do to its disks and its network. Each result is one line on standard output, with
//! the time it took in nanoseconds; the guest's own clock counts, and nothing of the guest's kernel caches in between.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use form_types::measure::{Direction, Disk, TO_GUEST, word};

/// What `O_DIRECT` wants memory and places aligned to.
const ALIGNMENT: usize = 4096;
/// Moved at once over the network.
const PIECE: usize = 128 << 10;

/// Does what the arguments say: `disk DIRECTION SERIAL SIZE ACCESS REQUEST DEPTH COUNT`, or `network PORT`, which ends when nobody is there any more.
pub fn run(arguments: impl Iterator<Item = String>) -> ExitCode {
    let arguments: Vec<String> = arguments.collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["disk", rest @ ..] => Disk::parse(rest).ok_or_else(|| ErrorKind::InvalidInput.into()).and_then(|disk| use_disk(&disk)),
        ["network", port] => port.parse().map_err(|_| ErrorKind::InvalidInput.into()).and_then(serve),
        _ => Err(ErrorKind::InvalidInput.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("measure {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn use_disk(disk: &Disk) -> io::Result<()> {
    let device = device(Path::new("/sys/block"), &disk.serial)?;
    let writes = disk.direction == Direction::Write;
    let file = File::options().read(true).write(writes).custom_flags(libc::O_DIRECT).open(Path::new("/dev").join(device))?;
    let nanoseconds = timed(&file, disk)?;
    if writes {
        // What was written is there: that is no part of the time.
        all_requests(&file, &Disk { direction: Direction::Read, ..disk.clone() })?;
    }
    println!("{disk} {nanoseconds}");
    Ok(())
}

/// The disk with this serial.
fn device(block: &Path, serial: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|found| found.trim_end() == serial) {
            return Ok(entry.file_name().into());
        }
    }
    Err(io::Error::new(ErrorKind::NotFound, "no disk has this serial"))
}

/// In nanoseconds. What is written is flushed.
fn timed(file: &File, disk: &Disk) -> io::Result<u128> {
    let begun = Instant::now();
    all_requests(file, disk)?;
    if disk.direction == Direction::Write {
        file.sync_data()?;
    }
    Ok(begun.elapsed().as_nanos())
}

/// As many threads as there shall be requests at once; each takes the next one when its own is done.
fn all_requests(file: &File, disk: &Disk) -> io::Result<()> {
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        let all: Vec<_> = (0..disk.depth).map(|_| scope.spawn(|| some_requests(file, disk, &next))).collect();
        all.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| Err(ErrorKind::Other.into())))
    })
}

fn some_requests(file: &File, disk: &Disk, next: &AtomicU64) -> io::Result<()> {
    let mut memory = vec![0_u8; disk.request + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut memory[start..start + disk.request];
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= disk.count {
            return Ok(());
        }
        let offset = disk.offset(number);
        if disk.direction == Direction::Write {
            buffer[..8].copy_from_slice(&word(offset).to_le_bytes());
            file.write_all_at(buffer, offset)?;
            continue;
        }
        file.read_exact_at(buffer, offset)?;
        if buffer[..8] != word(offset).to_le_bytes() {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("other bytes at {offset}")));
        }
    }
}

/// Answers on each connection: a byte says which way, eight how many bytes. To the guest: it reads them all and says how many came. From
/// the guest: it sends them.
fn serve(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    loop {
        let (connection, _) = listener.accept()?;
        // The host measures, and sees what went wrong.
        if let Err(error) = answer(connection) {
            println!("measure network: {error}");
        }
    }
}

fn answer(mut connection: TcpStream) -> io::Result<()> {
    let mut asked = [0; 9];
    connection.read_exact(&mut asked)?;
    let mut length = [0; 8];
    length.copy_from_slice(&asked[1..]);
    let length = u64::from_le_bytes(length);
    let mut piece = vec![0; PIECE];
    if asked[0] == TO_GUEST {
        let mut came = 0;
        while came < length {
            match connection.read(&mut piece)? {
                0 => break,
                count => came += count as u64,
            }
        }
        return connection.write_all(&came.to_le_bytes());
    }
    let mut left = length;
    while left > 0 {
        let count = left.min(PIECE as u64) as usize;
        connection.write_all(&piece[..count])?;
        left -= count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use form_types::measure::Access;

    use super::*;

    fn disk(access: Access) -> Disk {
        Disk { direction: Direction::Read, serial: "one".to_owned(), size: 1 << 20, access, request: 4096, depth: 8, count: 256 }
    }

    #[test]
    fn every_byte_is_read_by_as_many_as_asked_and_others_are_noticed() {
        let file = tempfile::tempfile().unwrap();
        for offset in (0..1 << 20).step_by(8) {
            file.write_all_at(&word(offset).to_le_bytes(), offset).unwrap();
        }
        for access in [Access::Sequential, Access::Random] {
            all_requests(&file, &disk(access)).unwrap();
        }
        file.write_all_at(b"other", 40960).unwrap();
        let error = all_requests(&file, &disk(Access::Sequential)).unwrap_err();
        assert_eq!(error.to_string(), "other bytes at 40960");
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        for access in [Access::Random, Access::Sequential] {
            let disk = disk(access);
            assert!(all_requests(&file, &disk).is_err(), "nothing is there before it is written");
            timed(&file, &Disk { direction: Direction::Write, ..disk.clone() }).unwrap();
            all_requests(&file, &disk).unwrap();
        }
    }

    #[test]
    fn a_disk_is_found_by_its_serial() {
        let block = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root\n"), ("vdb", "one\n"), ("loop0", "")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("serial"), serial).unwrap();
        }
        assert_eq!(device(block.path(), "one").unwrap(), Path::new("vdb"));
        assert_eq!(device(block.path(), "two").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn bytes_go_both_ways_and_are_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || (0..2).try_for_each(|_| answer(listener.accept()?.0)));
        let ask = |way: u8, length: u64| {
            let mut connection = TcpStream::connect(address).unwrap();
            connection.write_all(&[&[way][..], &length.to_le_bytes()].concat()).unwrap();
            connection
        };
        let mut to = ask(TO_GUEST, 300_000);
        to.write_all(&vec![0; 300_000]).unwrap();
        let mut came = [0; 8];
        to.read_exact(&mut came).unwrap();
        assert_eq!(u64::from_le_bytes(came), 300_000);
        let mut all = Vec::new();
        ask(form_types::measure::FROM_GUEST, 300_001).read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 300_001);
        server.join().unwrap().unwrap();
    }
}
