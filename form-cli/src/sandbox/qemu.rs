//! QEMU's command line, and what of this machine it depends on.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::Path,
};

use form_api::DEFAULT_PORT;
use serde::{Deserialize, Serialize};

use super::{process::PID_FILE, qmp::SOCKET, settings::MAC};

pub const PROGRAM: &str = "qemu-system-x86_64";
pub const DISK: &str = "disk.raw";
pub const INITRAMFS: &str = "initramfs";
/// The host's serial console, from its last start on.
pub const CONSOLE: &str = "console.log";
/// `VIRTIO_BLK_ID` of the root disk.
pub const ROOT_SERIAL: &str = "sandbox-root";

/// A panic ends QEMU, which then shows as a sandbox that does not run. QEMU's clock counter is the real one in both ways of running,
/// and its timer's interrupts arrive; on a busy machine they come too late for the kernel's check, which then gives up on them.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check";

/// Who executes the host's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    Kvm,
    /// QEMU itself, which emulates AMD's virtualisation as well. About ten times slower.
    Software,
}

impl Accelerator {
    /// The best one that can run a host which itself runs VMs.
    pub fn detect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let nested = |module: &str| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok();
        // Not opened for a machine that could not use it.
        let usable = || File::options().read(true).write(true).open("/dev/kvm").is_ok();
        Self::choose(&cpuinfo, nested("kvm_amd").or_else(|| nested("kvm_intel")).as_deref(), usable)
    }

    /// `/dev/kvm` alone says little: a paravirtual one cannot run ordinary guests, and its processor shows neither `svm` nor `vmx`.
    fn choose(cpuinfo: &str, nested: Option<&str>, usable: impl FnOnce() -> bool) -> Self {
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let virtualises = flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
        let nests = nested.is_some_and(|value| matches!(value.trim(), "Y" | "1"));
        if virtualises && nests && usable() { Self::Kvm } else { Self::Software }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "hardware virtualisation",
            Self::Software => "software emulation",
        }
    }
}

/// A host's place in the network of its sandbox's hosts. It is for them alone: the agents encrypt what they say, but any program of this
/// machine may listen in on the group, so nothing else should be said there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Of the host, from 1.
    pub number: u32,
    /// UDP port of the group.
    pub port: u16,
}

/// From the block that is for use within one organisation (RFC 2365, 6.2); on the loopback address it leaves no machine.
const GROUP: &str = "239.192.70.77";

impl Link {
    pub fn mac(self) -> String {
        format!("52:54:00:12:35:{:02x}", self.number)
    }
}

/// What a start needs to know. Paths are absolute; QEMU runs in the sandbox's directory and finds everything else there.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    pub name: &'a str,
    pub directory: &'a Path,
    pub kernel: &'a Path,
    pub accelerator: Accelerator,
    pub cpus: u32,
    pub memory_mib: u64,
    pub port: u16,
    pub link: Option<Link>,
}

impl Launch<'_> {
    pub fn arguments(&self) -> Vec<OsString> {
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            // With these two a kernel copies and clears memory byte by byte, which is fast in a processor and slow in software.
            Accelerator::Software => ("tcg,thread=multi", "max,erms=off,fsrm=off"),
        };
        let mut arguments: Vec<OsString> = Vec::new();
        let mut option = |name: &str, value: OsString| {
            arguments.push(format!("-{name}").into());
            if !value.is_empty() {
                arguments.push(value);
            }
        };
        option("name", format!("form-{}", self.name).into());
        for alone in ["nodefaults", "no-user-config", "no-reboot"] {
            option(alone, OsString::new());
        }
        option("display", "none".into());
        // A guest that breaks out finds a process that can neither start another nor gain rights.
        option("sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        option("machine", "q35".into());
        option("accel", accelerator.into());
        option("cpu", cpu.into());
        option("smp", self.cpus.to_string().into());
        option("m", format!("{}M", self.memory_mib).into());
        option("kernel", self.kernel.into());
        option("initrd", INITRAMFS.into());
        option("append", COMMAND_LINE.into());
        option("chardev", format!("file,id=console,path={CONSOLE}").into());
        option("serial", "chardev:console".into());
        option("drive", format!("if=none,id=root,format=raw,discard=unmap,file={DISK}").into());
        option("device", format!("virtio-blk-pci,drive=root,serial={ROOT_SERIAL}").into());
        option("netdev", format!("user,id=net,ipv6=off,hostfwd=udp:127.0.0.1:{}-:{DEFAULT_PORT}", self.port).into());
        option("device", format!("virtio-net-pci,netdev=net,mac={MAC},romfile=").into());
        if let Some(link) = self.link {
            option("netdev", format!("socket,id=link,mcast={GROUP}:{},localaddr=127.0.0.1", link.port).into());
            option("device", format!("virtio-net-pci,netdev=link,mac={},romfile=", link.mac()).into());
        }
        option("device", "virtio-rng-pci".into());
        // Memory that the host does not use goes back to the machine.
        option("device", "virtio-balloon-pci,free-page-reporting=on".into());
        option("chardev", format!("socket,id=qmp,path={SOCKET},server=on,wait=off").into());
        option("mon", "chardev=qmp,mode=control".into());
        option("pidfile", self.directory.join(PID_FILE).into());
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_only_where_it_nests() {
        let amd = "processor : 0\nflags\t\t: fpu svm lm\n";
        assert_eq!(Accelerator::choose(amd, Some("1\n"), || true), Accelerator::Kvm);
        assert_eq!(Accelerator::choose(amd, Some("Y"), || true), Accelerator::Kvm);
        assert_eq!(Accelerator::choose(amd, Some("0"), || true), Accelerator::Software);
        assert_eq!(Accelerator::choose(amd, Some("1"), || false), Accelerator::Software);
        assert_eq!(Accelerator::choose("flags : fpu lm\n", Some("1"), || panic!("opened")), Accelerator::Software);
    }

    #[test]
    fn the_command_line() {
        let launch = Launch {
            name: "box",
            directory: Path::new("/home/u, v/box"),
            kernel: Path::new("/k/vmlinux"),
            accelerator: Accelerator::Software,
            cpus: 2,
            memory_mib: 2048,
            port: 40_000,
            link: None,
        };
        let arguments: Vec<String> = launch.arguments().into_iter().map(|argument| argument.into_string().unwrap()).collect();
        let value = |option: &str| arguments.iter().skip_while(|argument| *argument != option).nth(1).unwrap().as_str();
        assert_eq!(
            (value("-accel"), value("-cpu"), value("-smp"), value("-m")),
            ("tcg,thread=multi", "max,erms=off,fsrm=off", "2", "2048M")
        );
        assert_eq!(value("-netdev"), "user,id=net,ipv6=off,hostfwd=udp:127.0.0.1:40000-:7846");
        assert_eq!(value("-pidfile"), "/home/u, v/box/qemu.pid");
        // Within a list of options a comma would have to be doubled: no path is in one.
        assert!(arguments.iter().filter(|argument| argument.contains("/home")).count() == 1);
        assert!(ROOT_SERIAL.len() <= 20);
        assert_eq!(arguments.iter().filter(|argument| *argument == "-netdev").count(), 1);
        let linked = Launch { link: Some(Link { number: 3, port: 40_001 }), ..launch.clone() }.arguments();
        assert!(linked.iter().any(|argument| argument == "socket,id=link,mcast=239.192.70.77:40001,localaddr=127.0.0.1"));
        assert!(linked.iter().any(|argument| argument == "virtio-net-pci,netdev=link,mac=52:54:00:12:35:03,romfile="));
        let kvm = Launch { accelerator: Accelerator::Kvm, ..launch }.arguments();
        assert!(kvm.windows(2).any(|pair| pair[0] == "-cpu" && pair[1] == "host"));
    }
}
