//! Replicas that talk over a bad network, in virtual time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use proptest::prelude::*;

use super::{Event, Session, Time};
use crate::{
    Document, Scalar, Table, Write,
    testing::{Dice, Host, id, key, request},
};

/// How bad the network is, in percent.
#[derive(Clone, Copy, Debug)]
struct Weather {
    lost: u64,
    doubled: u64,
    garbled: u64,
}

const FAIR: Weather = Weather { lost: 0, doubled: 0, garbled: 0 };
const FOUL: Weather = Weather { lost: 30, doubled: 20, garbled: 0 };

/// Arrival time, a number to break ties, from, to, message.
type Parcel = (Time, u64, usize, usize, Vec<u8>);

struct World {
    hosts: Vec<Host>,
    sessions: BTreeMap<(usize, usize), Session>,
    wire: BinaryHeap<Reverse<Parcel>>,
    dice: Dice,
    weather: Weather,
    now: Time,
    count: u64,
    faults: Vec<(usize, usize)>,
    events: Vec<(usize, Event)>,
}

impl World {
    fn new(hosts: Vec<Host>, seed: u64, weather: Weather) -> Self {
        let pairs = (0..hosts.len()).flat_map(|from| (0..hosts.len()).map(move |to| (from, to))).filter(|(from, to)| from != to);
        let sessions = pairs.map(|pair| (pair, Session::new())).collect();
        let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let wire = BinaryHeap::new();
        Self { hosts, sessions, wire, dice, weather, now: 0, count: 0, faults: Vec::new(), events: Vec::new() }
    }

    fn send(&mut self, from: usize, to: usize, mut message: Vec<u8>) {
        if self.dice.roll(100) < self.weather.lost {
            return;
        }
        if self.dice.roll(100) < self.weather.garbled {
            let place = self.dice.roll(message.len() as u64) as usize;
            message[place] ^= 1 << self.dice.roll(8);
        }
        if self.dice.roll(100) < self.weather.doubled {
            self.post(from, to, message.clone());
        }
        self.post(from, to, message);
    }

    fn post(&mut self, from: usize, to: usize, message: Vec<u8>) {
        self.count += 1;
        let at = self.now + 1 + self.dice.roll(200);
        self.wire.push(Reverse((at, self.count, from, to, message)));
    }

    fn poll_all(&mut self) {
        let pairs: Vec<_> = self.sessions.keys().copied().collect();
        for (from, to) in pairs {
            while let Some(message) =
                self.sessions.get_mut(&(from, to)).and_then(|session| session.poll(&self.hosts[from].replica, self.now).unwrap())
            {
                self.send(from, to, message);
            }
        }
    }

    /// Lets time pass until `until`.
    fn run(&mut self, until: Time) {
        loop {
            self.poll_all();
            let wake = self.sessions.values().map(Session::wake_at).min().unwrap_or(until).max(self.now + 1);
            let arrival = self.wire.peek().map_or(until, |Reverse((at, ..))| *at);
            self.now = wake.min(arrival).min(until);
            while self.wire.peek().is_some_and(|Reverse((at, ..))| *at <= self.now) {
                let Some(Reverse((_, _, from, to, message))) = self.wire.pop() else { break };
                let Some(session) = self.sessions.get_mut(&(to, from)) else { continue };
                match session.handle(&self.hosts[to].replica, &message) {
                    Ok(events) => self.events.extend(events.into_iter().map(|event| (to, event))),
                    Err(_) => {
                        // What an agent does: hang up. On a garbling network it calls again.
                        self.faults.push((to, from));
                        let again = if self.weather.garbled > 0 { Some(Session::new()) } else { None };
                        self.sessions.remove(&(to, from));
                        self.sessions.extend(again.map(|session| ((to, from), session)));
                    }
                }
            }
            if self.now >= until {
                return;
            }
        }
    }

    /// Runs until the replicas in `who` are the same, and says when; fails when they are not by `limit`.
    fn converge(&mut self, who: &[usize], limit: Time) -> Time {
        while !self.is_same(who) {
            assert!(self.now < limit, "no convergence: {:?}", who.iter().map(|n| self.hosts[*n].replica.clock()).collect::<Vec<_>>());
            self.run(self.now + 100);
        }
        self.now
    }

    fn is_same(&self, who: &[usize]) -> bool {
        let replica = |n: &usize| &self.hosts[*n].replica;
        who.windows(2).all(|pair| replica(&pair[0]).clock() == replica(&pair[1]).clock())
    }

    /// The same heads, the same signed changes byte for byte, the same view, and the same document when automerge applies
    /// the changes in one order. (Its own saved bytes tell in which order they came, so those may differ.)
    fn assert_identical(&self, who: &[usize]) {
        for pair in who.windows(2) {
            let (left, right) = (&self.hosts[pair[0]].replica, &self.hosts[pair[1]].replica);
            assert_eq!(left.view(), right.view());
            assert_eq!(left.documents(), right.documents());
            for document in left.documents() {
                assert_eq!(left.heads(document), right.heads(document));
                assert!(canonical(left, document) == canonical(right, document), "{document}");
            }
        }
    }
}

/// All signed changes of a document in an order of their own, and what automerge saves when it applies them so.
fn canonical(replica: &crate::Replica, document: Document) -> (Vec<Vec<u8>>, Vec<u8>) {
    let signed = replica.changes_since(document, &[]).unwrap();
    let mut changes: Vec<_> = signed
        .into_iter()
        .map(|bytes| (automerge::Change::from_bytes(crate::SignedChange::decode(&bytes).unwrap().change).unwrap(), bytes))
        .collect();
    // An effect counts its operations from after its causes'.
    changes.sort_by_key(|(change, _)| (change.start_op(), change.hash()));
    let mut saved = automerge::Automerge::new();
    saved.apply_changes(changes.iter().map(|(change, _)| change.clone()).collect::<Vec<_>>()).unwrap();
    (changes.into_iter().map(|(_, bytes)| bytes).collect(), saved.save())
}

fn hosts(count: u8) -> Vec<Host> {
    (1..=count).map(Host::new).collect()
}

#[test]
fn two_replicas_exchange_what_they_have() {
    let hosts = hosts(2);
    for n in 0..5_u64 {
        hosts[0].put(1, "epoch", n);
        hosts[1].put(2, "epoch", n);
    }
    let mut world = World::new(hosts, 1, FAIR);
    assert!(world.converge(&[0, 1], 5_000) < 2_000);
    world.assert_identical(&[0, 1]);
    assert!(world.faults.is_empty());
    let quiet = world.count;
    world.run(world.now + 60_000);
    assert!(world.count - quiet <= 2 * 7, "equal replicas say only their clocks: {}", world.count - quiet);
}

#[test]
fn a_long_history_goes_over_in_pieces() {
    let hosts = hosts(2);
    for n in 0..60_u64 {
        hosts[0].put(n as u8 % 3, "request", format!("{n}{}", "x".repeat(20 << 10)));
    }
    let mut world = World::new(hosts, 2, FAIR);
    world.converge(&[0, 1], 20_000);
    world.assert_identical(&[0, 1]);
}

#[test]
fn three_replicas_converge_over_a_bad_network() {
    for seed in 0..6 {
        let mut world = World::new(hosts(3), seed, FOUL);
        for round in 0..8_u64 {
            for host in 0..3 {
                if world.dice.roll(3) > 0 {
                    let vm = world.dice.roll(4) as u8;
                    let host = &world.hosts[host];
                    let value: Scalar = (round * 10 + u64::from(host.number)).into();
                    if round == 5 {
                        let _ = host.replica.submit(request(host.number, "ann", &[Write::remove(Table::Vms, id(vm))])).unwrap();
                    } else {
                        let write = Write::put(Table::Vms, id(vm), "epoch", value.clone());
                        let _ = host.replica.submit(request(host.number, "ann", &[write])).unwrap();
                    }
                    host.replica.commit(None, vec![Write::put(Table::ObservedVms, id(vm), "seen", value)]).unwrap();
                }
            }
            world.run(world.now + 150);
        }
        world.converge(&[0, 1, 2], 600_000);
        world.assert_identical(&[0, 1, 2]);
        assert!(world.faults.is_empty(), "{:?}", world.faults);
    }
}

#[test]
fn garbled_messages_are_noticed_and_cost_only_time() {
    let mut world = World::new(hosts(2), 3, Weather { garbled: 30, ..FOUL });
    for n in 0..10_u64 {
        world.hosts[0].put(1, "epoch", n);
        world.hosts[1].put(2, "epoch", n);
        world.run(world.now + 100);
    }
    world.converge(&[0, 1], 900_000);
    world.assert_identical(&[0, 1]);
    assert!(!world.faults.is_empty());
}

#[test]
fn a_liar_is_cut_off_and_the_others_go_on() {
    let mut all = hosts(2);
    all.push(Host::lawless(3));
    all[0].put(1, "owner", "ann");
    let mut world = World::new(all, 4, FAIR);
    world.converge(&[0, 1, 2], 10_000);
    // The liar uses no request, somebody else's request, and a user who may not.
    let liar = &world.hosts[2].replica;
    liar.commit(None, vec![Write::put(Table::Vms, id(1), "owner", "eve")]).unwrap();
    liar.submit(request(1, "ann", &[Write::remove(Table::Vms, id(1))])).unwrap();
    liar.submit(request(3, "eve", &[Write::put(Table::Vms, id(1), "run", "stopped")])).unwrap();
    world.hosts[1].put(2, "name", "db");
    world.run(30_000);
    assert!(world.is_same(&[0, 1]));
    world.assert_identical(&[0, 1]);
    let view = world.hosts[0].replica.view();
    assert_eq!(view.cluster().field(Table::Vms, id(1), "owner"), Some(&"ann".into()));
    assert_eq!(view.cluster().field(Table::Vms, id(2), "name"), Some(&"db".into()));
    assert!(view.cluster().field(Table::Vms, id(1), "run").is_none());
    assert!(world.events.iter().any(|(at, event)| *at != 2 && matches!(event, Event::Refused(_))));
}

#[test]
fn a_host_with_two_histories_is_known_to_all() {
    let twins = Host::new(3);
    twins.put(1, "name", "web");
    let (left, right) = twins.double();
    left.put(1, "run", "running");
    right.put(1, "run", "stopped");
    for weather in [FAIR, FOUL] {
        // 0 hears one history from 2, 1 the other from 3; they compare.
        let mut hosts = hosts(2);
        let (left, right) =
            (left.replica.changes_since(Document::Cluster, &[]).unwrap(), right.replica.changes_since(Document::Cluster, &[]).unwrap());
        assert!(hosts[0].replica.receive_all(&left).iter().all(Result::is_ok));
        assert!(hosts[1].replica.receive_all(&right).iter().all(Result::is_ok));
        hosts.push(Host::new(4));
        let mut world = World::new(hosts, 5, weather);
        world.run(120_000);
        for host in &world.hosts {
            assert!(host.replica.is_equivocator(&key(3).public()), "host {} does not know", host.number);
        }
        assert!(world.faults.is_empty(), "{:?}", world.faults);
    }
}

#[test]
fn a_clock_full_of_lies_harms_nobody() {
    let host = Host::new(1);
    host.put(1, "name", "web");
    let mut lies = host.replica.clock();
    for entry in lies.values_mut() {
        *entry = (u64::MAX, crate::ChangeHash([7; 32]));
    }
    let mut session = Session::new();
    for clock in [lies, crate::Clock::new(), host.replica.clock()] {
        let message = super::message::Message::clock(&clock, std::iter::once((Document::Cluster, key(9).public()))).encode().unwrap();
        session.handle(&host.replica, &message).unwrap();
        let mut sent = 0;
        while session.poll(&host.replica, 0).unwrap().is_some() {
            sent += 1;
            assert!(sent < 10);
        }
    }
    for bytes in [&[][..], &[1], &[1, 9], &[2, 0], &[1, 0, 255, 255, 255, 255], &[1, 1, 255, 255, 255, 127]] {
        assert!(Session::new().handle(&host.replica, bytes).is_err());
    }
    assert!(Session::new().handle(&host.replica, &vec![1; super::MAX_MESSAGE + 1]).is_err());
}

/// What a host does in a random history.
#[derive(Clone, Debug)]
enum Act {
    Put {
        host: usize,
        vm: u8,
        field: u8,
        value: u8,
    },
    Remove {
        host: usize,
        vm: u8,
    },
    Observe {
        host: usize,
        value: u8,
    },
    /// Hands all that one has to another, in one go.
    Tell {
        from: usize,
        to: usize,
    },
}

fn act() -> impl Strategy<Value = Act> {
    let host = 0_usize..3;
    prop_oneof![
        4 => (host.clone(), 0_u8..3, 0_u8..3, 0_u8..4).prop_map(|(host, vm, field, value)| Act::Put { host, vm, field, value }),
        1 => (host.clone(), 0_u8..3).prop_map(|(host, vm)| Act::Remove { host, vm }),
        1 => (host.clone(), 0_u8..4).prop_map(|(host, value)| Act::Observe { host, value }),
        2 => (host.clone(), host).prop_map(|(from, to)| Act::Tell { from, to }),
    ]
}

fn tell(from: &Host, to: &Host) {
    let (changes, _) = from.replica.changes_after(&to.replica.clock(), usize::MAX).unwrap();
    for result in to.replica.receive_all(&changes) {
        result.unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_converge_and_survive_a_restart(acts in proptest::collection::vec(act(), 1..40)) {
        let hosts = hosts(3);
        for act in acts {
            match act {
                Act::Put { host, vm, field, value } => {
                    let write = Write::put(Table::Vms, id(vm), format!("f{field}"), u64::from(value));
                    hosts[host].replica.submit(request(hosts[host].number, "ann", &[write])).unwrap();
                }
                Act::Remove { host, vm } => {
                    hosts[host].replica.submit(request(hosts[host].number, "ann", &[Write::remove(Table::Vms, id(vm))])).unwrap();
                }
                Act::Observe { host, value } => {
                    hosts[host].replica.commit(None, vec![Write::put(Table::ObservedHosts, id(0), "load", u64::from(value))]).unwrap();
                }
                Act::Tell { from, to } => tell(&hosts[from], &hosts[to]),
            }
        }
        for (from, to) in [(0, 1), (1, 2), (2, 0), (0, 1)] {
            tell(&hosts[from], &hosts[to]);
        }
        let hosts: Vec<_> = hosts.into_iter().map(|host| {
            let before = (host.replica.view(), host.replica.clock(), host.replica.generation());
            let host = host.reopen();
            assert_eq!(before, (host.replica.view(), host.replica.clock(), host.replica.generation()));
            host
        }).collect();
        World::new(hosts, 1, FAIR).assert_identical(&[0, 1, 2]);
    }
}
