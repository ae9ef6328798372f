//! A machine that is a copy of another one: what two machines must not share is made anew. Of a disk it is forgotten before the first
//! start; a machine that was copied while it ran becomes another one before its processes go on.

use std::{fs, io, path::Path, process::Command};

use form_guest::protocol::NewIdentity;
use form_types::settings::Settings;
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    boot::handoff,
    error::{Context, Error},
    files, freeze,
    machine::Machine,
    network::{self, names},
    process::lock,
    report::say,
    serve, sys,
};

/// Files that only one machine may have: machine-id(5) and its older copy, the seed of systemd-random-seed(8).
const OWN: [&str; 3] = ["etc/machine-id", "var/lib/dbus/machine-id", "var/lib/systemd/random-seed"];

/// Removes what names the machine that the disk was copied from. It does no harm to do so twice.
///
/// # Errors
/// Those of the file system; what can be removed is removed all the same.
pub fn forget(root: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    let mut remove = |path: &Path| match fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            result = Err(error).at("remove", path);
        }
        _ => {}
    };
    OWN.iter().for_each(|path| remove(&root.join(path)));
    for entry in fs::read_dir(root.join("etc/ssh")).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            remove(&entry.path());
        }
    }
    result
}

/// Makes host keys where sshd is and has none: it does not start without, and an image should bring none.
///
/// # Errors
/// When `ssh-keygen` cannot make them.
pub fn host_keys() -> Result<(), Error> {
    if !Path::new("/usr/sbin/sshd").exists() || has_host_keys() {
        return Ok(());
    }
    let made = Command::new("ssh-keygen").arg("-A").env("PATH", crate::identity::DEFAULT_PATH).output();
    let output = made.doing("make host keys with ssh-keygen")?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Program {
        program: "ssh-keygen -A",
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn has_host_keys() -> bool {
    fs::read_dir("/etc/ssh").is_ok_and(|entries| {
        entries.filter_map(Result::ok).any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("ssh_host_") && name.ends_with("_key")
        })
    })
}

/// Makes this machine another one than that which it is a copy of, and lets its processes go on then.
///
/// # Errors
/// When it cannot be told apart from the other one: its processes are held on, until the host lets them go or ends it.
pub fn become_another(machine: &Machine, identity: &NewIdentity) -> Result<(), Error> {
    // It takes its time on a slow machine, and until it is done no other process may run.
    freeze::renew();
    let random = fs::File::options().write(true).open("/dev/urandom").at("open", "/dev/urandom")?;
    // What this very request makes, as keys, is drawn from it as well.
    sys::reseed(&random, &identity.seed).doing("reseed the random number generator")?;
    serve::set_time(identity.unix_ns)?;
    names::set_hostname(&identity.hostname)?;
    network::readdress(&identity.interfaces)?;
    *lock(&machine.interfaces) = Some(identity.interfaces.clone());
    // From here on the disk is its own as well.
    freeze::thaw_disks();
    names::rename(&machine.settings_now(), identity.hostname.clone(), identity.hosts.clone())?;
    let had_keys = has_host_keys();
    forget(Path::new("/"))?;
    names::machine_id()?;
    if had_keys {
        host_keys()?;
    }
    machine.sshd.renew();
    keep(machine, identity)?;
    for device in &mut lock(&machine.report).devices {
        if device.mounted.as_deref() == Some("/")
            && let Some(serial) = &identity.root_serial
        {
            device.serial.clone_from(serial);
        }
    }
    machine.resumed();
    freeze::thaw();
    if had_keys {
        reload_sshd();
    }
    Ok(())
}

/// For an agent beside the image's init that is started again.
fn keep(machine: &Machine, identity: &NewIdentity) -> Result<(), Error> {
    let path = Path::new(handoff::DIRECTORY).join("settings.json");
    if !path.exists() {
        return Ok(());
    }
    let settings = Settings {
        hostname: identity.hostname.clone(),
        hosts: identity.hosts.clone(),
        root_serial: identity.root_serial.clone(),
        ..machine.settings_now()
    };
    let text = serde_json::to_vec(&settings).map_err(|source| Error::Settings { source })?;
    files::write(&path, &text, Some(0o600))
}

/// It reads its keys when it starts, and starts itself anew when it is told to (sshd(8)).
fn reload_sshd() {
    let pid = fs::read_to_string("/run/sshd.pid").ok().and_then(|text| text.trim().parse().ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid
        && let Err(error) = kill_process(pid, Signal::HUP)
    {
        say(format_args!("sshd still has the host keys of the machine that this one is a copy of: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_others_goes_and_everything_else_stays() {
        let root = std::env::temp_dir().join(format!("form-guest-identity-{}", std::process::id()));
        let path = |name: &str| root.join(name);
        for name in ["etc/machine-id", "etc/ssh/ssh_host_ed25519_key", "etc/ssh/ssh_host_ed25519_key.pub", "etc/ssh/sshd_config"] {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), name).unwrap();
        }
        forget(&root).unwrap();
        forget(&root).unwrap();
        let left: Vec<_> = fs::read_dir(path("etc/ssh")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["sshd_config"]);
        assert!(!path("etc/machine-id").exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
