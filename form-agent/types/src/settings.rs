//! What a guest is told at its start: one JSON file, `/form/settings.json`, in the last segment of its initramfs.
//!
//! There is no DHCP, metadata server or cloud-init. The agent writes it for a VM, `form sandbox up` for a sandbox host,
//! and `form-guest` reads it before it does anything else.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

use crate::spec::{Healthcheck, Restart};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub hostname: String,
    /// Serial (`VIRTIO_BLK_ID`, at most 20 bytes) of the block device that holds the root file system (ext4). `None`: stay in the initramfs.
    pub root_serial: Option<String>,
    /// Grow the root file system to its device at each start: the image is made small, the disk as large as the Formfile says.
    pub grow_root: bool,
    pub interfaces: Vec<Interface>,
    pub nameservers: Vec<std::net::IpAddr>,
    pub search_domains: Vec<String>,
    /// Lines of `/etc/hosts` besides localhost: address, names.
    pub hosts: Vec<(std::net::IpAddr, Vec<String>)>,
    pub users: Vec<UserSettings>,
    /// Whether root may log in with a password or over SSH (`disable_root` of the Formfile turns it off).
    pub root_login: bool,
    /// Files to write before anything of the image runs.
    pub files: Vec<File>,
    pub volumes: Vec<VolumeMount>,
    /// The ENTRYPOINT and CMD, when there are any. With an init in the image (`/sbin/init`) and no ENTRYPOINT the image's init runs;
    /// otherwise `form-guest` stays PID 1 and supervises this.
    pub service: Option<Service>,
    /// Environment for every process of the machine (`ENV --scope=system`).
    pub env: BTreeMap<String, String>,
    /// Its root disk is a copy of another VM's and has not been started from: what has to be its own (machine-id, host keys) is made anew.
    #[serde(default)]
    pub new_identity: bool,
    /// How long `shutdown` waits between SIGTERM and SIGKILL.
    pub shutdown_timeout_ms: u64,
}

/// The most network interfaces of a VM: each takes one of the 31 slots of its PCI bus, which disks need more than interfaces do.
pub const INTERFACES_MAX: u8 = 8;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Six bytes, `52:54:00:…`: the interface is found by it, never by its index.
    pub mac: String,
    /// Given to it in the guest: `eth0`.
    pub name: String,
    pub ipv4: Option<Route4>,
    pub ipv6: Option<Route6>,
    pub mtu: u32,
    /// The routing table of its gateways, which is for what leaves from its addresses alone. `None`: the main one, which is for everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u8>,
}

/// An address with its prefix length. The gateway is on-link even when the prefix does not cover it (a /32).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route4 {
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Option<Ipv4Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route6 {
    pub address: Ipv6Addr,
    pub prefix: u8,
    pub gateway: Option<Ipv6Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserSettings {
    pub name: String,
    /// A crypt(5) hash; `None`: the account has no password and only a key opens it.
    pub passwd_hash: Option<String>,
    pub lock_passwd: bool,
    /// The password must be changed at the first login.
    pub expire_passwd: bool,
    pub ssh_password_login: bool,
    pub ssh_authorized_keys: Vec<String>,
    pub sudo: bool,
    pub shell: String,
    pub groups: Vec<String>,
    /// Environment for this user's logins (`ENV --scope=user:NAME`).
    pub env: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute; parent directories are made.
    pub path: String,
    pub mode: u32,
    pub content: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeMount {
    /// `VIRTIO_BLK_ID`: the device is found by it.
    pub serial: String,
    /// Where to mount it; `None`: its device is reported, and left to the image.
    pub path: Option<String>,
    pub read_only: bool,
    /// The host knows that nothing was ever written to it: a file system may be made on it.
    pub is_blank: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// ENTRYPOINT and CMD together; never empty.
    pub command: Vec<String>,
    pub workdir: Option<String>,
    /// A user name or number of the image; `None` is root.
    pub user: Option<String>,
    pub env: BTreeMap<String, String>,
    pub restart: Restart,
    pub healthcheck: Option<Healthcheck>,
}
