//! What the tests of this crate share: hosts with keys, rules that a test can follow, and a way to forge.

use std::sync::Arc;

use form_types::{ClusterId, PublicKey, SecretKey};
use tempfile::TempDir;

use crate::{ChangeHash, Claim, Document, RecordId, Refusal, Replica, Rules, Scalar, SignedRequest, StateError, Table, View, Write};

pub(crate) const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);

pub(crate) fn key(number: u8) -> SecretKey {
    SecretKey::from_bytes([number; 32])
}

/// Rules for tests. A request's envelope is `HOST-NUMBER OWNER`, its body the writes in Borsh. It may be used by the host of
/// that number only, and never touches a VM of another owner; hosts numbered 200 and above are strangers. Of its own accord
/// a host may write to the `hosts` table.
#[derive(Debug, Default)]
pub(crate) struct TestRules;

pub(crate) fn request(host: u8, owner: &str, writes: &[Write]) -> SignedRequest {
    SignedRequest { envelope: format!("{host} {owner}"), body: borsh::to_vec(writes).unwrap() }
}

fn is_stranger(author: &PublicKey) -> bool {
    (200..=255).any(|number| key(number).public() == *author)
}

impl Rules for TestRules {
    fn derive(&self, request: &SignedRequest, claim: &Claim, view: &View) -> Result<Vec<Write>, Refusal> {
        let (host, owner) = request.envelope.split_once(' ').ok_or_else(|| Refusal::new("no envelope"))?;
        let host: u8 = host.parse().map_err(|_| Refusal::new("no host"))?;
        if key(host).public() != claim.author {
            return Err(Refusal::new("the request was made to another host"));
        }
        let writes: Vec<Write> = borsh::from_slice(&request.body).map_err(|_| Refusal::new("no body"))?;
        for write in &writes {
            let there = view.cluster().field(Table::Vms, write.id(), "owner").and_then(|owner| owner.as_text());
            if there.is_some_and(|there| there != owner) {
                return Err(Refusal::new("another's"));
            }
        }
        Ok(writes)
    }

    fn permit(&self, claim: &Claim, writes: &[Write], _view: &View) -> Result<(), Refusal> {
        if is_stranger(&claim.author) {
            return Err(Refusal::new("no member"));
        }
        let allowed = |write: &Write| claim.document != Document::Cluster || write.table() == Table::Hosts;
        if writes.iter().all(allowed) { Ok(()) } else { Err(Refusal::new("only with a request")) }
    }
}

/// A replica in a directory of its own.
pub(crate) struct Host {
    pub directory: TempDir,
    pub number: u8,
    pub replica: Replica,
}

impl Host {
    pub fn new(number: u8) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let replica = Self::open_in(&directory, number).unwrap();
        Self { directory, number, replica }
    }

    /// A host that follows no rules.
    pub fn lawless(number: u8) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let replica = Replica::open(&directory.path().join("state.redb"), &key(number), CLUSTER, Arc::new(NoRules)).unwrap();
        Self { directory, number, replica }
    }

    /// A second host with the same key and the same history: what a restored backup makes.
    pub fn double(self) -> (Self, Self) {
        let Self { directory, number, replica } = self;
        drop(replica);
        let second = tempfile::tempdir().unwrap();
        std::fs::copy(directory.path().join("state.redb"), second.path().join("state.redb")).unwrap();
        let open = |directory: TempDir| Self { number, replica: Self::open_in(&directory, number).unwrap(), directory };
        (open(directory), open(second))
    }

    /// Puts a field of a VM, at a user's request to this host.
    pub fn put(&self, vm: u8, field: &str, value: impl Into<Scalar>) -> ChangeHash {
        let write = Write::put(Table::Vms, id(vm), field, value);
        self.replica.submit(request(self.number, "ann", &[write])).unwrap().unwrap()
    }

    pub fn open_in(directory: &TempDir, number: u8) -> Result<Replica, StateError> {
        Replica::open(&directory.path().join("state.redb"), &key(number), CLUSTER, Arc::new(TestRules))
    }

    pub fn reopen(self) -> Self {
        let Self { directory, number, replica } = self;
        drop(replica);
        let replica = Self::open_in(&directory, number).unwrap();
        Self { directory, number, replica }
    }
}

/// Takes everything for good, as the replica of a liar does.
#[derive(Debug)]
struct NoRules;

impl Rules for NoRules {
    fn derive(&self, request: &SignedRequest, _: &Claim, _: &View) -> Result<Vec<Write>, Refusal> {
        borsh::from_slice(&request.body).map_err(|_| Refusal::new("no body"))
    }

    fn permit(&self, _: &Claim, _: &[Write], _: &View) -> Result<(), Refusal> {
        Ok(())
    }
}

pub(crate) fn id(number: u8) -> RecordId {
    RecordId([number; 16])
}

/// A small generator (xorshift64*), so that a seed tells the whole story.
pub(crate) struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % sides
    }
}
