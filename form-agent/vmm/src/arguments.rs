//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use form_vmm::config::DiskFormat;
use lexopt::ValueExt;
use lexopt::prelude::{Long, Short, Value};

pub const USAGE: &str = "\
usage: form-vmm --control-fd N [--name TEXT]
           Wait for a configuration on the listening SOCK_SEQPACKET socket that was inherited as descriptor N.
           The name is for those who list processes.
       form-vmm run --kernel FILE [option]...
           Open the files of one VM and run it with its console on standard input and output.
             --initrd FILE          a segment of the initramfs; may be repeated
             --cmdline TEXT         kernel command line
             --cpus N               1 to 128 (default 1)
             --memory MIB           16 to 262144 (default 256)
             --disk PATH[,serial=S][,format=raw|qcow2][,backing=PATH][,readonly]
             --tap NAME[,mac=XX:XX:XX:XX:XX:XX][,mtu=N]
             --vsock-cid N
             --rng
             --balloon
             --control PATH         also listen for control requests here
             --console-log PATH     print to this log ring instead of standard output
             --exit-record PATH
             --user UID[:GID]       run as this user
             --no-jail              keep all privileges";

#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Help,
    Serve { control_fd: i32 },
    Run(Box<Run>),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub kernel: PathBuf,
    pub initramfs: Vec<PathBuf>,
    pub cmdline: String,
    pub cpus: u8,
    pub memory_mib: u64,
    pub disks: Vec<Disk>,
    pub taps: Vec<Tap>,
    pub vsock_cid: Option<u64>,
    pub rng: bool,
    pub balloon: bool,
    pub control: Option<PathBuf>,
    pub console_log: Option<PathBuf>,
    pub exit_record: Option<PathBuf>,
    pub user: Option<(u32, u32)>,
    pub jail: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    pub path: PathBuf,
    pub serial: Option<String>,
    pub format: DiskFormat,
    /// Files behind a qcow2 overlay, the nearest first; those that end in `.qcow2` are qcow2 themselves.
    pub backing: Vec<PathBuf>,
    pub read_only: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Tap {
    pub name: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: u16,
}

pub fn parse(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    match parser.next()? {
        Some(Value(verb)) if verb == "run" => run(parser),
        Some(Long("control-fd")) => {
            let control_fd = parser.value()?.parse()?;
            while let Some(argument) = parser.next()? {
                match argument {
                    Long("name") => drop(parser.value()?),
                    other => return Err(other.unexpected()),
                }
            }
            Ok(Command::Serve { control_fd })
        }
        Some(Long("help") | Short('h')) => Ok(Command::Help),
        Some(argument) => Err(argument.unexpected()),
        None => Err("give --control-fd or run".into()),
    }
}

fn run(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut kernel = None;
    let mut run = Run {
        kernel: PathBuf::new(),
        initramfs: Vec::new(),
        cmdline: String::new(),
        cpus: 1,
        memory_mib: 256,
        disks: Vec::new(),
        taps: Vec::new(),
        vsock_cid: None,
        rng: false,
        balloon: false,
        control: None,
        console_log: None,
        exit_record: None,
        user: None,
        jail: true,
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("kernel") => kernel = Some(parser.value()?.into()),
            Long("initrd") => run.initramfs.push(parser.value()?.into()),
            Long("cmdline") => run.cmdline = parser.value()?.string()?,
            Long("cpus") => run.cpus = parser.value()?.parse()?,
            Long("memory") => run.memory_mib = parser.value()?.parse()?,
            Long("disk") => run.disks.push(disk(parser.value()?)?),
            Long("tap") => run.taps.push(tap(parser.value()?)?),
            Long("vsock-cid") => run.vsock_cid = Some(parser.value()?.parse()?),
            Long("rng") => run.rng = true,
            Long("balloon") => run.balloon = true,
            Long("control") => run.control = Some(parser.value()?.into()),
            Long("console-log") => run.console_log = Some(parser.value()?.into()),
            Long("exit-record") => run.exit_record = Some(parser.value()?.into()),
            Long("user") => run.user = Some(parser.value()?.parse_with(user)?),
            Long("no-jail") => run.jail = false,
            Long("help") | Short('h') => return Ok(Command::Help),
            other => return Err(other.unexpected()),
        }
    }
    run.kernel = kernel.ok_or("give --kernel")?;
    Ok(Command::Run(Box::new(run)))
}

fn user(text: &str) -> Result<(u32, u32), std::num::ParseIntError> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    Ok((uid.parse()?, gid.parse()?))
}

fn disk(value: OsString) -> Result<Disk, lexopt::Error> {
    let text = value.string()?;
    let mut parts = text.split(',');
    let mut disk = Disk {
        path: parts.next().unwrap_or_default().into(),
        serial: None,
        format: DiskFormat::Raw,
        backing: Vec::new(),
        read_only: false,
    };
    for part in parts {
        match part.split_once('=').unwrap_or((part, "")) {
            ("serial", serial) => disk.serial = Some(serial.to_owned()),
            ("format", "raw") => disk.format = DiskFormat::Raw,
            ("format", "qcow2") => disk.format = DiskFormat::Qcow2,
            ("backing", path) => disk.backing.push(path.into()),
            ("readonly", "") => disk.read_only = true,
            _ => return Err(format!("unknown disk option: {part}").into()),
        }
    }
    Ok(disk)
}

fn tap(value: OsString) -> Result<Tap, lexopt::Error> {
    let text = value.string()?;
    let mut parts = text.split(',');
    let mut tap = Tap { name: parts.next().unwrap_or_default().to_owned(), mac: None, mtu: 1500 };
    for part in parts {
        match part.split_once('=') {
            Some(("mac", mac)) => tap.mac = Some(parse_mac(mac).ok_or_else(|| format!("not a MAC address: {mac}"))?),
            Some(("mtu", mtu)) => tap.mtu = mtu.parse().map_err(|_| format!("not an MTU: {mtu}"))?,
            _ => return Err(format!("unknown tap option: {part}").into()),
        }
    }
    Ok(tap)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Command, lexopt::Error> {
        parse(lexopt::Parser::from_args(arguments))
    }

    #[test]
    fn a_full_command_line_is_understood() {
        let command = parsed(&[
            "run",
            "--kernel",
            "k",
            "--initrd=a",
            "--initrd",
            "b",
            "--cmdline",
            "x y",
            "--cpus",
            "8",
            "--memory",
            "5120",
            "--disk",
            "d.raw,serial=S1,readonly",
            "--disk",
            "o.qcow2,format=qcow2,backing=base",
            "--tap",
            "t0,mac=02:00:00:00:00:0a,mtu=9000",
            "--vsock-cid",
            "3",
            "--rng",
            "--balloon",
            "--user",
            "1000:2000",
            "--no-jail",
        ]);
        let Ok(Command::Run(run)) = command else { panic!("{command:?}") };
        assert_eq!((run.initramfs.len(), run.cpus, run.memory_mib, run.jail), (2, 8, 5120, false));
        assert_eq!(run.disks[0].serial.as_deref(), Some("S1"));
        assert_eq!((run.disks[1].format, run.disks[1].backing.len()), (DiskFormat::Qcow2, 1));
        assert_eq!((run.taps[0].mac, run.taps[0].mtu), (Some([2, 0, 0, 0, 0, 10]), 9000));
        assert_eq!(run.user, Some((1000, 2000)));
    }

    #[test]
    fn mistakes_are_told() {
        for wrong in [
            &[][..],
            &["walk"],
            &["run"],
            &["run", "--kernel"],
            &["run", "--kernel", "k", "--cpus", "many"],
            &["run", "--kernel", "k", "--disk", "d,colour=red"],
            &["run", "--kernel", "k", "--tap", "t,mac=1:2"],
            &["--control-fd", "3", "more"],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(parsed(&["--control-fd", "3"]).unwrap(), Command::Serve { control_fd: 3 });
        assert_eq!(parsed(&["--control-fd", "3", "--name", "web"]).unwrap(), Command::Serve { control_fd: 3 });
        assert!(parsed(&["--control-fd", "3", "--name"]).is_err());
    }
}
