//! Names: the machine's own, those it knows, and whom it asks; and its identity.

use std::{fmt::Write, fs, net::IpAddr, path::Path};

use form_types::settings::Settings;

use crate::{
    error::{Context, Error},
    files,
    report::BootReport,
};

/// Tells the kernel.
///
/// # Errors
/// When the name is longer than 64 bytes.
pub fn set_hostname(name: &str) -> Result<(), Error> {
    rustix::system::sethostname(name.as_bytes()).doing(format!("set the host name `{name}`"))
}

/// Writes /etc/hostname, /etc/hosts, /etc/resolv.conf and a machine id where there is none.
pub fn write_files(settings: &Settings, report: &mut BootReport) {
    report.warn_on("names", files::write_if_changed(Path::new("/etc/hostname"), &format!("{}\n", settings.hostname), Some(0o644)));
    report.warn_on("names", files::write_if_changed(Path::new("/etc/hosts"), &hosts(settings), Some(0o644)));
    if let Some(text) = resolv_conf(settings) {
        report.warn_on("names", files::write_if_changed(Path::new("/etc/resolv.conf"), &text, Some(0o644)));
    }
    report.warn_on("names", machine_id());
}

/// Gives a running machine another name.
///
/// # Errors
/// When the name is no host name, or a file cannot be written.
pub fn rename(settings: &Settings, hostname: String, hosts_known: Vec<(IpAddr, Vec<String>)>) -> Result<(), Error> {
    let renamed = Settings { hostname, hosts: hosts_known, ..settings.clone() };
    set_hostname(&renamed.hostname)?;
    files::write_if_changed(Path::new("/etc/hostname"), &format!("{}\n", renamed.hostname), Some(0o644))?;
    files::write_if_changed(Path::new("/etc/hosts"), &hosts(&renamed), Some(0o644))
}

/// hosts(5)
fn hosts(settings: &Settings) -> String {
    let mut text =
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n".to_owned();
    let own: Vec<IpAddr> = settings
        .interfaces
        .iter()
        .flat_map(|interface| {
            [interface.ipv4.as_ref().map(|route| route.address.into()), interface.ipv6.as_ref().map(|route| route.address.into())]
        })
        .flatten()
        .collect();
    // A name of its own must have an address even without a network.
    let own = if own.is_empty() { vec![IpAddr::from([127, 0, 1, 1])] } else { own };
    for address in own {
        let listed = settings.hosts.iter().any(|(other, names)| *other == address && names.contains(&settings.hostname));
        if !listed {
            let _ = writeln!(text, "{address}\t{}", settings.hostname);
        }
    }
    for (address, names) in &settings.hosts {
        let _ = writeln!(text, "{address}\t{}", names.join(" "));
    }
    text
}

/// resolv.conf(5); `None` when there is nothing to say and the image's own file stays.
fn resolv_conf(settings: &Settings) -> Option<String> {
    if settings.nameservers.is_empty() && settings.search_domains.is_empty() {
        return None;
    }
    let mut text = String::new();
    if !settings.search_domains.is_empty() {
        let _ = writeln!(text, "search {}", settings.search_domains.join(" "));
    }
    for server in &settings.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    Some(text)
}

/// machine-id(5): each machine has its own, and the image must not bring one.
///
/// # Errors
/// Those of the file system.
pub fn machine_id() -> Result<(), Error> {
    let path = Path::new("/etc/machine-id");
    let now = fs::read_to_string(path).unwrap_or_default();
    if !matches!(now.trim(), "" | "uninitialized") {
        return Ok(());
    }
    let mut random = [0_u8; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).doing("get random bytes")?;
    // Version 4, variant 1: some read it as a UUID.
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let text = random.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    files::write(path, format!("{text}\n").as_bytes(), Some(0o444))
}

#[cfg(test)]
mod tests {
    use form_types::settings::{Interface, Route4};

    use super::*;
    use crate::settings::tests::empty;

    #[test]
    fn the_machine_knows_itself_and_its_neighbours() {
        let mut settings = empty();
        assert!(hosts(&settings).ends_with("127.0.1.1\tvm\n"));
        settings.interfaces.push(Interface {
            mac: "52:54:00:00:00:01".into(),
            name: "eth0".into(),
            ipv4: Some(Route4 { address: [10, 0, 0, 2].into(), prefix: 32, gateway: None }),
            ipv6: None,
            mtu: 1500,
            table: None,
        });
        settings.hosts.push(([10, 0, 0, 3].into(), vec!["db".into(), "db.default.form.internal".into()]));
        assert!(hosts(&settings).ends_with("10.0.0.2\tvm\n10.0.0.3\tdb db.default.form.internal\n"), "{}", hosts(&settings));
        settings.hosts.push(([10, 0, 0, 2].into(), vec!["vm".into()]));
        assert_eq!(hosts(&settings).matches("10.0.0.2").count(), 1);
    }

    #[test]
    fn the_image_keeps_its_resolver_when_we_know_none() {
        let mut settings = empty();
        assert_eq!(resolv_conf(&settings), None);
        settings.nameservers = vec![[10, 0, 0, 1].into()];
        settings.search_domains = vec!["default.form.internal".into()];
        assert_eq!(resolv_conf(&settings).as_deref(), Some("search default.form.internal\nnameserver 10.0.0.1\n"));
    }
}
