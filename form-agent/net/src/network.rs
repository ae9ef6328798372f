//! The host's network as one object: the agent calls it, one change at a time.

use std::{
    fmt,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU16, Ordering},
};

use form_types::VmId;
use rtnetlink::Handle;
use tokio::sync::Mutex;

use crate::{
    address::{Ipv4Range, Ipv6Prefix},
    attachment::{Attachment, Mark},
    dns::{self, DnsServer, Names},
    error::{NetError, Result},
    link, nft, rules,
    rules::RuleContext,
    sysctl::HostSwitches,
    tap,
};

#[derive(Clone, Debug)]
pub struct NetworkConfig {
    pub mark: Mark,
    /// The agent's state directory: `<root>/formnet` keeps what the host's switches were before.
    pub root: PathBuf,
    /// The same on every host of a cluster: [`Ipv4Range::for_cluster`] unless the owner chose one.
    pub ipv4_range: Ipv4Range,
    /// The same on every host of a cluster: [`Ipv6Prefix::for_cluster`].
    pub ipv6_prefix: Ipv6Prefix,
    /// Where names that are not ours are asked for. Empty: the name servers in the host's `/etc/resolv.conf`, read afresh.
    pub dns_upstreams: Vec<SocketAddr>,
}

/// Something that this agent made and that no VM it knows needs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// An interface.
    Tap { name: String },
    /// The nftables table: left over only while this object has not made it itself.
    Table { name: String },
}

impl fmt::Display for Leftover {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap { name } => write!(formatter, "tap/{name}"),
            Self::Table { name } => write!(formatter, "table/{name}"),
        }
    }
}

pub struct Network {
    config: NetworkConfig,
    handle: Handle,
    /// Held while the socket gives a list.
    listing: Mutex<()>,
    switches: HostSwitches,
    names: Names,
    /// Zero: DNS is not served.
    dns_port: AtomicU16,
    dns: Mutex<Option<DnsServer>>,
    /// Whether the table is there because this object made it.
    table_in_use: AtomicBool,
}

impl Network {
    /// Opens a netlink socket; nothing of the host changes yet. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn new(config: NetworkConfig) -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::Socket)?;
        tokio::spawn(connection);
        let switches = HostSwitches::new(&config.root.join("formnet"));
        Ok(Self {
            config,
            handle,
            listing: Mutex::new(()),
            switches,
            names: Names::default(),
            dns_port: AtomicU16::new(0),
            dns: Mutex::new(None),
            table_in_use: AtomicBool::new(false),
        })
    }

    /// Turns on forwarding and makes the table, if it is not there. What VMs of an earlier run of the agent use is not touched:
    /// call [`Network::set_rules`] once they are known. Can be called any number of times.
    ///
    /// # Errors
    /// When the agent is not root, /proc/sys is read-only, or `nft` is missing or refuses.
    pub async fn ensure_host(&self) -> Result<()> {
        self.switches.enable()?;
        if !nft::tables().await?.contains(&self.config.mark) {
            self.set_rules(&[]).await?;
        }
        self.table_in_use.store(true, Ordering::Release);
        Ok(())
    }

    /// Starts answering names on the gateway's address. The rules that lead VMs there come with the next
    /// [`Network::set_rules`], so call this first. A second call does nothing.
    ///
    /// # Errors
    /// When no socket can be bound.
    pub async fn serve_dns(&self) -> Result<()> {
        let mut running = self.dns.lock().await;
        if running.is_none() {
            let server = dns::serve(self.names.clone(), self.config.dns_upstreams.clone()).await?;
            self.dns_port.store(server.port(), Ordering::Release);
            *running = Some(server);
        }
        Ok(())
    }

    /// The names that DNS answers.
    pub const fn names(&self) -> &Names {
        &self.names
    }

    /// Whether our firewall table is there.
    ///
    /// # Errors
    /// What `nft` says.
    pub async fn has_rules(&self) -> Result<bool> {
        Ok(nft::tables().await?.contains(&self.config.mark))
    }

    /// The name of the VM's tap, whether it exists or not.
    pub fn tap_name(&self, vm: &VmId) -> String {
        self.config.mark.tap(vm)
    }

    /// Makes the VM's tap, up and with its routes, and gives back its descriptor (non-blocking, with virtio-net headers). The
    /// tap lives as long as a copy of the descriptor is open. Until [`Network::set_rules`] knows the VM its packets are dropped.
    ///
    /// # Errors
    /// [`NetError::TapTaken`] while something still holds the VM's old tap, [`NetError::AddressTaken`] when another interface
    /// has its address; nothing is left behind then.
    pub async fn attach(&self, attachment: &Attachment) -> Result<OwnedFd> {
        let name = self.tap_name(&attachment.vm);
        let descriptor = tap::open(&name)?;
        // On an error the descriptor is dropped here, and the tap goes with it.
        link::configure(&self.handle, &name, attachment).await?;
        Ok(descriptor)
    }

    /// Removes taps by the ids of their attachments, even from under a process that holds them. That they are gone already is fine. Call
    /// [`Network::set_rules`] without them as well.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn detach(&self, ids: &[VmId]) -> Result<()> {
        for id in ids {
            link::remove(&self.handle, &self.tap_name(id)).await?;
        }
        Ok(())
    }

    /// Makes these VMs, and no others, the ones that the firewall lets through, and publishes their ports: one transaction.
    /// Connections that are open stay open.
    ///
    /// # Errors
    /// When `nft` is missing or refuses; the old rules stay then.
    pub async fn set_rules(&self, attachments: &[Attachment]) -> Result<()> {
        let port = self.dns_port.load(Ordering::Acquire);
        let context = RuleContext {
            mark: self.config.mark.clone(),
            ipv4_range: self.config.ipv4_range,
            ipv6_prefix: self.config.ipv6_prefix,
            dns_port: (port != 0).then_some(port),
        };
        nft::apply(&self.config.mark.table(), &rules::render(&context, attachments)).await?;
        self.table_in_use.store(true, Ordering::Release);
        Ok(())
    }

    /// What bears this agent's mark and belongs to none of the attachments with the ids `known`. The table counts only when no VM is known and
    /// [`Network::ensure_host`] was not called: then no agent is there to need it.
    ///
    /// # Errors
    /// When the kernel or `nft` will not list what is there.
    pub async fn leftovers(&self, known: &[VmId]) -> Result<Vec<Leftover>> {
        let expected: Vec<String> = known.iter().map(|vm| self.tap_name(vm)).collect();
        let listed = {
            let _turn = self.listing.lock().await;
            link::list(&self.handle).await?
        };
        let mut found: Vec<Leftover> = listed
            .into_iter()
            .map(|(_, name)| name)
            .filter(|name| self.config.mark.owns_interface(name) && !expected.contains(name))
            .map(|name| Leftover::Tap { name })
            .collect();
        let table_needed = self.table_in_use.load(Ordering::Acquire) || !known.is_empty();
        if !table_needed && nft::tables().await?.contains(&self.config.mark) {
            found.push(Leftover::Table { name: self.config.mark.table() });
        }
        found.sort();
        Ok(found)
    }

    /// Removes what [`Network::leftovers`] found; that it is gone already is fine.
    ///
    /// # Errors
    /// When the kernel or `nft` refuses.
    pub async fn remove(&self, leftover: &Leftover) -> Result<()> {
        match leftover {
            Leftover::Tap { name } => link::remove(&self.handle, name).await,
            Leftover::Table { name } => nft::apply(name, &rules::render_removal(&self.config.mark)).await,
        }
    }

    /// Removes everything that bears this agent's mark, stops DNS, and puts the host's switches back unless another agent on
    /// this machine needs them.
    ///
    /// # Errors
    /// When the kernel or `nft` refuses.
    pub async fn teardown(&self) -> Result<()> {
        *self.dns.lock().await = None;
        self.dns_port.store(0, Ordering::Release);
        self.table_in_use.store(false, Ordering::Release);
        for leftover in self.leftovers(&[]).await? {
            self.remove(&leftover).await?;
        }
        nft::apply(&self.config.mark.table(), &rules::render_removal(&self.config.mark)).await?;
        if nft::tables().await?.is_empty() { self.switches.restore() } else { self.switches.forget() }
    }
}
