//! Interfaces that come to a VM that runs, and leave it. What should be is in the state; this makes it so without a restart.

use std::{os::fd::AsFd, sync::PoisonError, time::Duration};

use form_api::{ApiError, ErrorCode};
use form_guest::protocol::{ErrorKind as GuestErrorKind, InterfaceReport, Reply, Request};
use form_types::{Failpoint, VmId, failpoint::reach};
use form_vmm::{
    config::Fd,
    control::{Client, ClientError, ErrorKind},
};
use tokio::runtime::Handle;

use super::{
    describe::{device, numbers},
    name_of, table_of,
};
use crate::{
    agent::{Agent, internal},
    desired::DesiredVm,
    driver::{
        guest::{GuestError, ask},
        let_go,
    },
    vm::carried_by_kernel,
    volume::live::{directory, is_possible},
};

/// A guest waits half a minute for an interface.
const GUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to see who uses one.
const WORD_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest's kernel may take to let an interface go.
const GONE_LIMIT: Duration = Duration::from_secs(30);

/// An interface of a VM that runs.
struct Plug<'a> {
    agent: &'a Agent,
    vm: &'a DesiredVm,
    number: u8,
    client: Client,
}

impl<'a> Plug<'a> {
    fn new(agent: &'a Agent, vm: &'a DesiredVm, number: u8) -> Result<Self, ApiError> {
        let client = Client::connect(&directory(agent, &vm.id).control())
            .map_err(|error| ApiError::new(ErrorCode::Failed, format!("vm/{}: the VM process: {error}", vm.name())))?;
        Ok(Self { agent, vm, number, client })
    }

    fn text(&self, what: &str) -> String {
        format!("{} of vm/{}: {what}", name_of(self.number), self.vm.name())
    }

    fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> ApiError {
        ApiError::new(ErrorCode::Failed, self.text(&format!("{what}: {error}")))
    }

    /// Somebody is of an earlier release.
    fn unknown(&self, who: &str) -> ApiError {
        ApiError::new(
            ErrorCode::Conflict,
            self.text(&format!("{who} is of an earlier release, which has interfaces from its start on only")),
        )
        .hint(format!("restart the VM: `form vm restart {}`", self.vm.name()))
    }

    fn guest_fault(&self, what: &str, error: GuestError) -> ApiError {
        match error {
            GuestError::Refused(refusal) if refusal.kind == GuestErrorKind::InUse => {
                ApiError::new(ErrorCode::Conflict, self.text(&format!("it cannot be detached: {}", refusal.message)))
                    .hint("end what uses it and try again, or take it away with --force: who uses it then gets errors")
            }
            GuestError::Refused(refusal) if refusal.kind == GuestErrorKind::Invalid => self.unknown("its guest"),
            GuestError::Refused(refusal) => self.failed(what, &refusal.message),
            error => ApiError::new(ErrorCode::TimedOut, self.text(&format!("{what}: {error}"))).hint("try again when its guest answers"),
        }
    }

    fn ask(&self, request: &Request, limit: Duration) -> Result<Reply, GuestError> {
        Handle::current().block_on(ask(&directory(self.agent, &self.vm.id).control(), request, limit))
    }

    fn is_held(&self) -> Result<bool, ApiError> {
        let metrics = self.client.metrics().map_err(|error| self.failed("the VM process", &error))?;
        Ok(numbers(&metrics.networks).contains(&self.number))
    }

    /// Puts the device into the VM, with a tap of its own.
    fn insert(&self) -> Result<(), ApiError> {
        let (agent, runtime) = (self.agent, Handle::current());
        let links = agent.links(self.vm);
        let attachments = agent.attachments(self.vm);
        let found = links.iter().zip(&attachments).find(|(_, (number, _))| *number == self.number);
        let (link, (_, attachment)) = found.ok_or_else(|| internal(&self.text("it is not in the state")))?;
        runtime.block_on(agent.apply_rules()).map_err(|error| self.failed("the firewall", &error))?;
        let tap = runtime.block_on(agent.network.attach(attachment)).map_err(|error| self.failed("its tap", &error))?;
        reach(Failpoint::InterfaceTapMade);
        let mut config = [link.config(Fd(0), self.vm.limits)];
        let by_kernel = carried_by_kernel(&mut config, 1);
        let descriptors: Vec<_> = std::iter::once(tap.as_fd()).chain(by_kernel.iter().map(AsFd::as_fd)).collect();
        let plugged = match self.client.plug_network(&config[0], &descriptors) {
            // A VM process of an earlier release moves the packets itself.
            Err(ClientError::Refused { kind: ErrorKind::Invalid, message }) if message.contains("`vhost`") => {
                self.client.plug_network(&link.config(Fd(0), self.vm.limits), &[tap.as_fd()])
            }
            plugged => plugged,
        };
        match plugged {
            Ok(()) => Ok(()),
            Err(ClientError::Refused { kind: ErrorKind::Invalid, message }) if message.contains("plug_network") => {
                Err(self.unknown("the VM process"))
            }
            Err(error) => Err(self.failed("the VM does not take it", &error)),
        }
    }

    /// Has the guest set it up, which says what it calls it.
    fn set_up(&self) -> Result<(), ApiError> {
        let links = self.agent.links(self.vm);
        let link = links.iter().find(|link| link.name == name_of(self.number));
        let link = link.ok_or_else(|| internal(&self.text("it is not in the state")))?;
        match self.ask(&Request::AddInterface(link.interface()), GUEST_LIMIT) {
            Ok(Reply::Interface(report)) => {
                self.note(Some(report));
                Ok(())
            }
            Ok(_) => Err(self.failed("the guest", &"answered something else")),
            Err(error) => Err(self.guest_fault("the guest does not take it", error)),
        }
    }

    /// Has the guest give it back, after its word unless with `force`.
    fn let_go(&self, force: bool) -> Result<(), ApiError> {
        let id = super::id_of(&self.vm.id, self.number);
        let mac = form_net::Mac::of(&id).to_string();
        match self.ask(&Request::RemoveInterface { mac, table: Some(table_of(self.number)), force }, WORD_LIMIT) {
            Ok(_) => {}
            // Its kernel may still answer.
            Err(error) if force => {
                tracing::warn!(vm = %self.vm.id, "{}", self.text(&format!("it is taken away without the guest's word: {error}")))
            }
            Err(error) => return Err(self.guest_fault("the guest does not let it go", error)),
        }
        match self.client.unplug(&name_of(self.number)) {
            Ok(gone) if let_go::within(&gone, GONE_LIMIT) => {}
            Ok(_) => {
                let text = self.text(&format!("the kernel of its guest did not let it go within {} s", GONE_LIMIT.as_secs()));
                let now = match self.set_up() {
                    Ok(()) => "it is in use as before",
                    Err(_) => "it is out of use, and stays with the VM",
                };
                return Err(ApiError::new(ErrorCode::TimedOut, format!("{text}; {now}")).hint("try again, or stop the VM"));
            }
            Err(ClientError::Refused { kind: ErrorKind::NotFound, .. }) => {}
            Err(error) => return Err(self.failed("the VM does not give it back", &error)),
        }
        self.note(None);
        reach(Failpoint::InterfaceUnplugged);
        Ok(())
    }

    /// What the guest says of it from now on.
    fn note(&self, report: Option<InterfaceReport>) {
        let before = self.vm.interfaces.get(&self.number);
        self.agent.fleet.update(&self.vm.id, |observed| {
            let Some(guest) = &mut observed.guest else { return };
            let known =
                before.and_then(|ipv4| device(&guest.addresses, ipv4)).or_else(|| report.as_ref().map(|report| report.name.clone()));
            if let Some(known) = known {
                guest.addresses.retain(|entry| entry.split_once(' ').is_none_or(|(name, _)| name != known));
            }
            let of_it = report.iter().flat_map(|report| report.addresses.iter().map(|address| format!("{} {address}", report.name)));
            guest.addresses.extend(of_it);
        });
    }
}

/// Gives an interface, which the state says it has, to a VM that runs, and has its guest set it up. Nothing is left of one that could not be
/// given. Under the VM's turn ([`Agent::volumes_of`]).
///
/// # Errors
/// When the VM has no room for it, or the guest does not find it or set it up; a conflict when one of them is of an earlier release.
pub fn plug(agent: &Agent, vm: &DesiredVm, number: u8) -> Result<(), ApiError> {
    let plug = Plug::new(agent, vm, number)?;
    if plug.is_held()? {
        return plug.set_up();
    }
    plug.insert()?;
    reach(Failpoint::InterfacePlugged);
    plug.set_up().inspect_err(|_| {
        // It is told why it failed, not that what is left over could not be taken back: `form doctor` finds that.
        if let Err(stays) = plug.let_go(true) {
            tracing::warn!(vm = %vm.id, "{stays}");
        }
    })
}

/// Takes an interface from a VM that runs, whose guest takes it out of use before. Under the VM's turn.
///
/// # Errors
/// `conflict` while something in the guest uses it, unless with `force`; when the guest does not answer, or does not let it go.
pub fn unplug(agent: &Agent, vm: &DesiredVm, number: u8, force: bool) -> Result<(), ApiError> {
    let plug = Plug::new(agent, vm, number)?;
    if plug.is_held()? { plug.let_go(force) } else { Ok(()) }
}

/// The further interfaces that the process of a VM says it has; none when it does not answer.
pub fn held(agent: &Agent, vm: &VmId) -> Option<Vec<u8>> {
    let directory = directory(agent, vm);
    directory.read_record().filter(|record| record.booted)?;
    let metrics = Client::connect(&directory.control()).and_then(|client| client.metrics()).ok()?;
    Some(numbers(&metrics.networks))
}

/// Where a VM that runs and the state do not agree, by number.
#[derive(Default)]
struct Differences {
    missing: Vec<u8>,
    too_many: Vec<u8>,
    /// It has them, and its guest has not set them up.
    unseen: Vec<u8>,
}

fn differences(agent: &Agent, vm: &DesiredVm) -> Differences {
    if !is_possible(agent, &vm.id) {
        return Differences::default();
    }
    let Some(held) = held(agent, &vm.id) else { return Differences::default() };
    let addresses = agent.fleet.observed(&vm.id).and_then(|observed| observed.guest).map(|guest| guest.addresses).unwrap_or_default();
    let desired = &vm.interfaces;
    let is_unseen = |(number, ipv4): (&u8, &std::net::Ipv4Addr)| held.contains(number) && device(&addresses, ipv4).is_none();
    Differences {
        missing: desired.keys().copied().filter(|number| !held.contains(number)).collect(),
        too_many: held.iter().copied().filter(|number| !desired.contains_key(number)).collect(),
        unseen: desired.iter().filter(|entry| is_unseen(*entry)).map(|(number, _)| *number).collect(),
    }
}

/// In words. Nothing is said of a VM that is being changed.
pub fn drift(agent: &Agent, vm: &VmId) -> Vec<String> {
    let turn = agent.volumes_of(vm);
    let Ok(_turn) = turn.try_lock() else { return Vec::new() };
    let Some(desired) = agent.desired(vm) else { return Vec::new() };
    let found = differences(agent, &desired);
    let missing = found.missing.iter().map(|number| format!("it runs without {}, which it should have", name_of(*number)));
    let too_many = found.too_many.iter().map(|number| format!("it has {}, which it should not have", name_of(*number)));
    let unseen = found.unseen.iter().map(|number| format!("its guest has not set up {}", name_of(*number)));
    missing.chain(too_many).chain(unseen).collect()
}

/// Brings a VM whose guest answers in line with the state: an agent that was killed may have left it with an interface that it should not
/// have, or without one that it should. What cannot be done is logged, and `form doctor` shows it. Blocks.
pub fn reconcile(agent: &Agent, vm: &VmId) {
    let turn = agent.volumes_of(vm);
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(desired) = agent.desired(vm) else { return };
    let found = differences(agent, &desired);
    let taken = found.too_many.iter().map(|number| unplug(agent, &desired, *number, false));
    let given = found.missing.iter().chain(&found.unseen).map(|number| plug(agent, &desired, *number));
    for error in taken.chain(given).filter_map(Result::err) {
        tracing::warn!(%vm, "{error}");
    }
}
