//! Changes altered at random and signed again by their author, as a lying host would.

use crate::{
    Applied, Refused, SignedChange, Table, Write,
    testing::{Dice, Host, id, key, request},
};

const SIGNATURE: usize = 64;

/// `FORM_STATE_MUTATIONS` sets another number.
fn rounds() -> u64 {
    std::env::var("FORM_STATE_MUTATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(12_000)
}

fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>) {
    for _ in 0..=dice.roll(3) {
        let length = bytes.len() as u64;
        let place = dice.roll(length) as usize;
        match dice.roll(6) {
            0 => bytes[place] ^= 1 << dice.roll(8),
            1 => bytes[place] = [0, 1, 0x7f, 0x80, 0xff][dice.roll(5) as usize],
            2 => bytes.insert(place, dice.roll(256) as u8),
            3 if length > 2 => _ = bytes.remove(place),
            4 => {
                let end = (place + 1 + dice.roll(16) as usize).min(bytes.len());
                let part = bytes[place..end].to_vec();
                let at = dice.roll(length) as usize;
                bytes.splice(at..at, part);
            }
            _ => {
                let other = dice.roll(length) as usize;
                bytes.swap(place, other);
            }
        }
    }
}

/// The encoded body of a change, altered and validly signed.
fn altered(dice: &mut Dice, author: u8, signed: &[u8]) -> Vec<u8> {
    let mut body = signed[..signed.len() - SIGNATURE].to_vec();
    mutate(dice, &mut body);
    SignedChange::sign_bytes(body, &key(author))
}

#[test]
fn altered_changes_never_panic_and_never_get_in() {
    let (author, other, reader) = (Host::new(1), Host::new(2), Host::new(3));
    let get = |host: &Host, hash| host.replica.signed_change(&hash).unwrap().unwrap();
    let base = get(&author, author.put(1, "owner", "ann"));
    other.replica.receive(&base).unwrap();
    reader.replica.receive(&base).unwrap();
    let concurrent = get(&other, other.put(1, "name", "web"));
    author.replica.receive(&concurrent).unwrap();
    reader.replica.receive(&concurrent).unwrap();
    let writes =
        [Write::put(Table::Vms, id(1), "name", "db"), Write::put(Table::Vms, id(2), "epoch", 7_u64), Write::remove(Table::Vms, id(9))];
    let asked = author.replica.submit(request(1, "ann", &writes)).unwrap().unwrap();
    let own = author.replica.commit(None, vec![Write::put(Table::ObservedVms, id(1), "state", "running")]).unwrap().unwrap();
    let victims = [get(&author, asked), get(&author, own)];

    let before = (reader.replica.view(), reader.replica.clock());
    let mut dice = Dice(0x5eed);
    let mut signed_well = 0;
    for round in 0..rounds() {
        let victim = &victims[(round % 2) as usize];
        let change = altered(&mut dice, 1, victim);
        if change == *victim {
            continue;
        }
        signed_well += u64::from(SignedChange::decode(&change).is_ok());
        match reader.replica.receive(&change) {
            Ok(Applied::Held) | Err(_) => {}
            Ok(Applied::New(hash)) => panic!("round {round}: {hash} got in"),
        }
        assert_eq!((reader.replica.view(), reader.replica.clock()), before, "round {round}");
    }
    assert!(signed_well > rounds() / 10, "most mutants should reach the checks behind the decoder: {signed_well}");
    for victim in &victims {
        assert!(matches!(reader.replica.receive(victim), Ok(Applied::New(_))), "the honest change is still welcome");
    }
}

#[test]
fn unsigned_garbage_is_refused() {
    let reader = Host::new(3);
    let mut dice = Dice(7);
    for length in 0..300_u64 {
        let bytes: Vec<u8> = (0..length).map(|_| dice.roll(256) as u8).collect();
        assert!(matches!(reader.replica.receive(&bytes), Err(Refused::Undecodable(_))));
    }
    assert!(reader.replica.receive(&vec![1; crate::MAX_SIGNED_CHANGE + 1]).is_err());
}

/// A change with dependencies by the thousand, writes by the thousand, or a value at the limit costs no more than it should.
#[test]
fn large_changes_are_within_bounds() {
    let (author, reader) = (Host::new(1), Host::new(2));
    let writes: Vec<_> = (0..2000_u64).map(|n| Write::put(Table::Hosts, id((n / 10) as u8), format!("f{}", n % 10), n)).collect();
    let hash = author.replica.commit(None, writes).unwrap().unwrap();
    let change = author.replica.signed_change(&hash).unwrap().unwrap();
    reader.replica.receive(&change).unwrap();
    let large = vec![Write::put(Table::Hosts, id(1), "blob", "x".repeat(crate::MAX_VALUE))];
    let hash = author.replica.commit(None, large).unwrap().unwrap();
    reader.replica.receive(&author.replica.signed_change(&hash).unwrap().unwrap()).unwrap();
    assert_eq!(reader.replica.view(), author.replica.view());
}
