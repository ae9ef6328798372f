//! Leaving PID 1 to the image's own init, with this program beside it as the agent.

use std::{
    convert::Infallible,
    fs,
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use form_types::settings::{INTERFACES_MAX, Interface, Settings};

use crate::{
    error::{Context, Error},
    files,
    report::BootReport,
};

/// Where the agent finds itself, the settings and what PID 1 has to report.
pub const DIRECTORY: &str = "/run/form";
const INIT: &str = "/sbin/init";

/// The init of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageInit {
    Systemd,
    Other,
}

/// The image's own init, when there is one.
pub fn image_init() -> Option<ImageInit> {
    let target = resolve(Path::new(INIT))?;
    Some(if target.file_name().is_some_and(|name| name == "systemd") { ImageInit::Systemd } else { ImageInit::Other })
}

fn resolve(path: &Path) -> Option<PathBuf> {
    fs::canonicalize(path).ok().filter(|target| target.is_file())
}

/// Puts our program, the settings and the report where the agent finds them.
///
/// # Errors
/// Those of the file system.
pub fn prepare(settings: &Settings, program: &[u8]) -> Result<(), Error> {
    let directory = Path::new(DIRECTORY);
    files::write(&directory.join("form-guest"), program, Some(0o755))?;
    // The settings hold password hashes.
    let text = serde_json::to_vec(settings).map_err(|source| Error::Settings { source })?;
    files::write(&directory.join("settings.json"), &text, Some(0o600))
}

/// Gives PID 1 to the image's init.
///
/// # Errors
/// Only when it cannot be executed; otherwise it does not come back.
pub fn exec_init(init: &ImageInit, interfaces: &[Interface], report: &BootReport) -> Result<Infallible, Error> {
    let text = serde_json::to_vec(report).map_err(|source| Error::Settings { source })?;
    files::write(&Path::new(DIRECTORY).join("report.json"), &text, Some(0o600))?;
    match init {
        ImageInit::Systemd => {
            write_unit()?;
            keep_interfaces(interfaces)?;
        }
        ImageInit::Other => start_beside()?,
    }
    let error = Command::new(INIT).env_clear().env("PATH", crate::identity::DEFAULT_PATH).env("TERM", "linux").exec();
    Err(error).doing(format!("execute {INIT}"))
}

const UNIT: &str = "\
[Unit]
Description=Formation's agent in this machine
DefaultDependencies=no
After=systemd-remount-fs.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=simple
ExecStart=/run/form/form-guest agent
Restart=always
RestartSec=1
KillMode=mixed
TimeoutStopSec=5
OOMScoreAdjust=-500
StandardOutput=journal
StandardError=journal
";

/// A unit in /run: nothing of the image is changed.
fn write_unit() -> Result<(), Error> {
    let units = Path::new("/run/systemd/system");
    files::write(&units.join("form-guest.service"), UNIT.as_bytes(), Some(0o644))?;
    let wants = units.join("sysinit.target.wants");
    fs::create_dir_all(&wants).at("create", &wants)?;
    make_link("../form-guest.service", &wants.join("form-guest.service"))?;
    if has_udev() {
        return Ok(());
    }
    // Nobody would announce the console's device, and the start would wait 90 s for it.
    make_link("/dev/null", &units.join("serial-getty@ttyS0.service"))
}

/// An image that lets systemd-networkd ask for addresses would lose those that it has, and udev would call the interface otherwise. What is
/// told to them here comes before the image's own files (systemd.network(5), systemd.link(5): the first that matches, by name).
pub fn keep_interfaces(interfaces: &[Interface]) -> Result<(), Error> {
    for (number, Interface { name, mac, .. }) in interfaces.iter().enumerate() {
        let units = [("link", format!("[Match]\nMACAddress={mac}\n\n[Link]\nName={name}\n")), ("network", unmanaged(name))];
        for (kind, text) in units {
            files::write(&Path::new("/run/systemd/network").join(format!("05-form-{number}.{kind}")), text.as_bytes(), Some(0o644))?;
        }
    }
    // Those that may come while the machine runs: what manages networks reads this once, at its start.
    let names: Vec<String> = (1..INTERFACES_MAX).map(|number| format!("eth{number}")).collect();
    files::write(Path::new("/run/systemd/network/05-form-more.network"), unmanaged(&names.join(" ")).as_bytes(), Some(0o644))
}

/// By its name: a copy of this machine goes on with another address.
fn unmanaged(names: &str) -> String {
    format!("[Match]\nName={names}\n\n[Network]\nDHCP=no\nIPv6AcceptRA=no\nLinkLocalAddressing=ipv6\nKeepConfiguration=yes\n")
}

fn has_udev() -> bool {
    ["/lib/systemd/systemd-udevd", "/usr/lib/systemd/systemd-udevd"].iter().any(|program| Path::new(program).exists())
}

fn make_link(target: &str, link: &Path) -> Result<(), Error> {
    match symlink(target, link) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error).at("create", link),
        _ => Ok(()),
    }
}

/// Any other init: a child of PID 1 stays one whatever PID 1 becomes.
fn start_beside() -> Result<(), Error> {
    let mut command = Command::new(Path::new(DIRECTORY).join("form-guest"));
    command.arg("agent").env_clear().env("PATH", crate::identity::DEFAULT_PATH).stdin(Stdio::null());
    command.spawn().map(drop).doing("start the agent beside the image's init")
}
