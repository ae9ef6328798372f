//! What a client has to know before it connects to the SSH server of this machine.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use form_guest::protocol::{SshReport, SshServer};

use crate::{accounts::Table, machine::Machine, sshd};

/// How long a server that is just being started may take.
const START_LIMIT: Duration = Duration::from_secs(10);
const GLANCE: Duration = Duration::from_millis(50);
/// The longest host key file that is read, in bytes.
const LONGEST: u64 = 64 << 10;

pub fn report(machine: &Machine) -> SshReport {
    let root = Path::new("/");
    let server = match sshd::image_server(root) {
        Some(path) => SshServer::Image { path: path.to_string_lossy().into_owned() },
        None if sshd::wanted(&machine.settings, root).is_some() => SshServer::Ours,
        None => SshServer::None,
    };
    let until = Instant::now() + START_LIMIT;
    let mut listening = sshd::listens(sshd::PORT);
    while !listening && server == SshServer::Ours && Instant::now() < until {
        thread::sleep(GLANCE);
        listening = sshd::listens(sshd::PORT);
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    SshReport { server, listening, host_keys: host_keys(&root.join("etc/ssh")), accounts: accounts(&passwd) }
}

/// The public halves, as they stand in known_hosts: algorithm and key.
fn host_keys(directory: &Path) -> Vec<String> {
    let mut keys = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let small = entry.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() <= LONGEST);
        if !small || !name.starts_with("ssh_host_") || !name.ends_with("_key.pub") {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let words: Vec<&str> = text.split_whitespace().take(2).collect();
        if words.len() == 2 {
            keys.push(words.join(" "));
        }
    }
    keys.sort();
    keys
}

/// Those with a shell that lets somebody in.
fn accounts(passwd: &str) -> Vec<String> {
    let passwd = Table::parse(passwd);
    let closed = |shell: &str| ["nologin", "false", "sync"].contains(&shell.rsplit('/').next().unwrap_or_default());
    let open = passwd.rows().filter(|row| row.number(2).is_some() && !closed(row.field(6)));
    open.map(|row| row.field(0).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_host_keys_alone_are_told() {
        let directory = std::env::temp_dir().join(format!("form-guest-ssh-report-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (name, text) in [
            ("ssh_host_rsa_key.pub", "ssh-rsa AAAAB root@image\n"),
            ("ssh_host_ed25519_key.pub", "ssh-ed25519 AAAAC"),
            ("ssh_host_ed25519_key", "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n"),
            ("ssh_host_dsa_key.pub", "broken\n"),
            ("other.pub", "ssh-ed25519 AAAAD"),
        ] {
            fs::write(directory.join(name), text).unwrap();
        }
        assert_eq!(host_keys(&directory), ["ssh-ed25519 AAAAC", "ssh-rsa AAAAB"]);
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(host_keys(&directory), Vec::<String>::new());
    }

    #[test]
    fn accounts_are_those_that_somebody_can_use() {
        let passwd =
            "root:x:0:0::/root:/bin/bash\ndaemon:x:1:1::/:/usr/sbin/nologin\nada:x:1000:1000::/home/ada:\nbad\nno:x:1:1::/:/bin/false\n";
        assert_eq!(accounts(passwd), ["root", "ada"]);
    }
}
