//! Signed changes on their way into a replica: altered and validly signed again by their author, as a lying host would; those of a
//! host that follows no rules; and the talk of two replicas with messages lost and altered. Nothing may panic, and nothing that an
//! honest host would not have made may get in.

#![no_main]

use std::{cell::RefCell, path::PathBuf, sync::Arc};

use arbitrary::Arbitrary;
use form_fuzz::format::{Edit, alter};
use form_state::{
    Applied, Claim, Document, RecordId, Refusal, Refused, Replica, Rules, Scalar, SignedChange, SignedRequest, Table, View, Write,
    sync::{Event, Session},
};
use form_types::{ClusterId, SecretKey};
use libfuzzer_sys::fuzz_target;

const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);
const SIGNATURE: usize = 64;
/// What a signature of a change is over, before the change's bytes.
const CONTEXT: &[u8] = b"formation change 1\0";

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Altered {
        victim: u8,
        edits: Vec<Edit<'a>>,
    },
    /// A body of any bytes.
    Signed(&'a [u8]),
    Unsigned(&'a [u8]),
    /// Changes of a host that takes everything for allowed.
    Lawless(Vec<(bool, Vec<Put<'a>>)>),
    /// Messages of a peer.
    Messages(Vec<&'a [u8]>),
    /// Writes of two hosts, and what becomes of the messages between them.
    Talk {
        writes: [Vec<Put<'a>>; 2],
        steps: Vec<Step<'a>>,
    },
}

#[derive(Arbitrary, Debug)]
struct Put<'a> {
    table: u8,
    id: u8,
    field: u8,
    value: Value<'a>,
}

#[derive(Arbitrary, Debug)]
enum Value<'a> {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Text(&'a str),
    Bytes(&'a [u8]),
    Remove,
}

#[derive(Arbitrary, Debug)]
struct Step<'a> {
    forward: bool,
    lost: bool,
    edits: Vec<Edit<'a>>,
}

impl Put<'_> {
    fn write(&self) -> Write {
        let (table, id) = (Table::ALL[usize::from(self.table) % Table::ALL.len()], id(self.id % 4));
        let field = ["name", "owner", "x", "epoch", "", "Ä"][usize::from(self.field) % 6];
        let value = match &self.value {
            Value::Bool(value) => Scalar::Bool(*value),
            Value::Int(value) => Scalar::Int(*value),
            Value::Uint(value) => Scalar::Uint(*value),
            Value::Text(value) => Scalar::from(*value),
            Value::Bytes(value) => Scalar::Bytes(value.to_vec()),
            Value::Remove => return Write::remove(table, id),
        };
        Write::put(table, id, field, value)
    }
}

fn writes(puts: &[Put]) -> Vec<Write> {
    puts.iter().take(32).map(Put::write).collect()
}

/// Takes everything for allowed, as a liar's replica does.
struct NoRules;

impl Rules for NoRules {
    fn derive(&self, request: &SignedRequest, _: &Claim, _: &View) -> Result<Vec<Write>, Refusal> {
        borsh::from_slice(&request.body).map_err(|_| Refusal::new("no writes"))
    }

    fn permit(&self, _: &Claim, _: &[Write], _: &View) -> Result<(), Refusal> {
        Ok(())
    }
}

fn is_allowed(document: Document, writes: &[Write]) -> bool {
    writes.iter().all(|write| document != Document::Cluster || write.table() == Table::Hosts)
}

struct AnyRequest;

impl Rules for AnyRequest {
    fn derive(&self, request: &SignedRequest, _: &Claim, _: &View) -> Result<Vec<Write>, Refusal> {
        borsh::from_slice(&request.body).map_err(|_| Refusal::new("no writes"))
    }

    fn permit(&self, claim: &Claim, writes: &[Write], _: &View) -> Result<(), Refusal> {
        if is_allowed(claim.document, writes) { Ok(()) } else { Err(Refusal::new("only with a request")) }
    }
}

fn key(number: u8) -> SecretKey {
    SecretKey::from_bytes([number; 32])
}

/// A replica in memory, below a directory of this process.
fn replica(number: u8) -> Replica {
    with_rules(number, Arc::new(AnyRequest))
}

fn with_rules(number: u8, rules: Arc<dyn Rules>) -> Replica {
    let directory = PathBuf::from(format!("/dev/shm/form-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("room in memory");
    let path = directory.join(format!("{number}.redb"));
    let _ = std::fs::remove_file(&path);
    let replica = Replica::open(&path, &key(number), CLUSTER, rules).expect("a new state");
    // It lives as long as it is open.
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&directory);
    replica
}

fn id(number: u8) -> RecordId {
    RecordId([number; 16])
}

struct Scene {
    reader: Replica,
    victims: Vec<Vec<u8>>,
}

impl Scene {
    fn new() -> Self {
        let (author, reader) = (replica(1), replica(3));
        let submit = |writes: &[Write]| {
            let request = SignedRequest { envelope: "asked".to_owned(), body: borsh::to_vec(writes).expect("writes have bytes") };
            author.submit(request).expect("allowed").expect("new")
        };
        let get = |hash| author.signed_change(&hash).expect("kept").expect("there");
        let base = get(submit(&[Write::put(Table::Vms, id(1), "owner", "ann")]));
        reader.receive(&base).expect("an honest change");
        let asked = submit(&[
            Write::put(Table::Vms, id(1), "name", "db"),
            Write::put(Table::Vms, id(2), "epoch", 7_u64),
            Write::remove(Table::Vms, id(9)),
        ]);
        let own = author.commit(None, vec![Write::put(Table::ObservedVms, id(1), "state", "running")]).expect("allowed").expect("new");
        let host = author.commit(None, vec![Write::put(Table::ObservedHosts, id(1), "kernel", "6.1")]).expect("allowed").expect("new");
        Self { victims: vec![get(asked), get(own), get(host)], reader }
    }
}

/// Puts the author's signature behind a body.
fn sign(body: &[u8]) -> Vec<u8> {
    let signature = key(1).sign(&[CONTEXT, body].concat());
    [body, signature.as_bytes()].concat()
}

thread_local! {
    static SCENE: RefCell<Option<Scene>> = const { RefCell::new(None) };
}

fn receive(scene: &mut Option<Scene>, change: &[u8]) {
    let here = scene.get_or_insert_with(Scene::new);
    let before = (here.reader.view(), here.reader.clock());
    let decoded = SignedChange::decode(change).is_ok();
    match here.reader.receive(change) {
        Ok(Applied::New(hash)) => {
            assert!(here.victims.iter().any(|victim| victim == change), "{hash} got in");
            // The next input meets the same state as this one.
            *scene = None;
        }
        Ok(Applied::Held) => assert!(decoded),
        Err(Refused::Panicked(reason)) => panic!("automerge was reached and panicked: {reason}"),
        Err(refused) => {
            assert_eq!((here.reader.view(), here.reader.clock()), before, "a refused change changed the state");
            if matches!(refused, Refused::Equivocation { .. }) {
                *scene = None;
            }
        }
    }
}

/// What a host that follows no rules makes is taken if, and only if, the rules allow it and all that it is built on.
fn lawless(changes: &[(bool, Vec<Put>)]) {
    let (liar, reader) = (with_rules(1, Arc::new(NoRules)), replica(3));
    let mut refused = Vec::new();
    for (asked, puts) in changes.iter().take(8) {
        let writes = writes(puts);
        let made = if *asked {
            liar.submit(SignedRequest { envelope: "asked".to_owned(), body: borsh::to_vec(&writes).expect("writes have bytes") })
        } else {
            liar.commit(None, writes.clone())
        };
        let Ok(Some(hash)) = made else { continue };
        let bytes = liar.signed_change(&hash).expect("kept").expect("there");
        let change = SignedChange::decode(&bytes).expect("it was signed");
        let lawful = (*asked || is_allowed(change.document, &writes)) && !refused.contains(&change.document);
        let received = reader.receive(&bytes);
        assert_eq!(matches!(received, Ok(Applied::New(_))), lawful, "{received:?} for {writes:?}");
        if !lawful {
            refused.push(change.document);
        }
    }
    if refused.is_empty() {
        assert_eq!(liar.view(), reader.view());
    }
}

/// Two honest replicas that have written at the same time. As long as no message is altered they come to the same state.
fn talk(writes_of: &[Vec<Put>; 2], steps: &[Step]) {
    let replicas = [replica(1), replica(2)];
    for (replica, puts) in replicas.iter().zip(writes_of) {
        for put in puts.iter().take(8) {
            let write = put.write();
            let is_own = matches!(write.table(), Table::ObservedVms | Table::ObservedHosts | Table::Hosts);
            let body = borsh::to_vec(&[&write]).expect("writes have bytes");
            // A write that no change may hold is refused here already.
            let _ = if is_own {
                replica.commit(None, vec![write])
            } else {
                replica.submit(SignedRequest { envelope: "asked".to_owned(), body })
            };
        }
    }
    let mut sessions = [Session::new(), Session::new()];
    let mut altered = false;
    let mut now = 0;
    let quiet = Step { forward: true, lost: false, edits: Vec::new() };
    let rest = (0..64).map(|number| (number % 2 == 0, &quiet));
    for (forward, step) in steps.iter().take(24).map(|step| (step.forward, step)).chain(rest) {
        let (from, to) = if forward { (0, 1) } else { (1, 0) };
        now += 1000;
        while let Some(mut message) = sessions[from].poll(&replicas[from], now).expect("the database can be read") {
            let sound = message.clone();
            alter(&mut message, &step.edits);
            altered |= message != sound;
            if step.lost {
                continue;
            }
            match sessions[to].handle(&replicas[to], &message) {
                Ok(events) => {
                    let sound = |event: &Event| matches!(event, Event::Applied(_));
                    assert!(altered || events.iter().all(sound), "between honest hosts: {events:?}");
                }
                Err(fault) => {
                    assert!(altered, "between honest hosts: {fault}");
                    return;
                }
            }
        }
    }
    assert!(altered || replicas[0].view() == replicas[1].view(), "two hosts that talked do not agree");
}

fuzz_target!(|input: Input| {
    SCENE.with_borrow_mut(|scene| match input {
        Input::Altered { victim, edits } => {
            let victims = &scene.get_or_insert_with(Scene::new).victims;
            let honest = victims[usize::from(victim) % victims.len()].clone();
            let mut body = honest[..honest.len() - SIGNATURE].to_vec();
            alter(&mut body, &edits);
            receive(scene, &sign(&body));
        }
        Input::Signed(body) => receive(scene, &sign(body)),
        Input::Unsigned(bytes) => receive(scene, bytes),
        Input::Lawless(changes) => lawless(&changes),
        Input::Messages(messages) => {
            let here = scene.get_or_insert_with(Scene::new);
            let mut session = Session::new();
            for (now, message) in (0..).zip(messages.iter().take(16)) {
                let _ = session.poll(&here.reader, now * 1000);
                if session.handle(&here.reader, message).is_err() {
                    break;
                }
            }
        }
        Input::Talk { writes, steps } => talk(&writes, &steps),
    });
});
