//! Questions of guests and replies of name servers.

#![no_main]

use arbitrary::Arbitrary;
use form_fuzz::format::{Edit, alter};
use form_net::dns::{
    NameEntry, Names,
    fuzzing::{answer, reply},
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// A packet of any bytes.
    Packet { known: bool, packet: &'a [u8] },
    /// A guest's question.
    Question { message: Message<'a>, edits: Vec<Edit<'a>>, known: bool },
    /// A reply to that question, or to nearly that.
    Reply { question: Query<'a>, other: Option<Query<'a>>, message: Message<'a>, edits: Vec<Edit<'a>> },
}

#[derive(Arbitrary, Debug)]
struct Message<'a> {
    flags: u16,
    question: Query<'a>,
    records: Vec<Record<'a>>,
    /// What the header says of how many records there are in a section, where it lies.
    counts: [Option<u8>; 3],
}

#[derive(Arbitrary, Debug)]
struct Query<'a> {
    name: Name<'a>,
    kind: Kind,
    class: Class,
}

#[derive(Arbitrary, Debug)]
struct Record<'a> {
    section: u8,
    name: Name<'a>,
    kind: Kind,
    class: Class,
    ttl: u32,
    data: Vec<Piece<'a>>,
    /// What it says of its length, when it lies.
    length: Option<u16>,
}

/// What data of records is made of (RFC 1035 section 3.3 and its successors).
#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Byte(u8),
    Short(u16),
    Long(u32),
    Name(Name<'a>),
    /// A text behind its length.
    Text(&'a [u8]),
    Bytes(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known(u8),
    Labels(Vec<&'a [u8]>),
    /// Labels, then a pointer (RFC 1035 section 4.1.4).
    Pointer(Vec<&'a [u8]>, u16),
    /// The name of an address.
    Reverse([u8; 4]),
    Reverse6([u8; 16]),
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Known(u8),
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Class {
    Internet,
    Any(u16),
}

const NAMES: [&str; 9] = [
    "form.internal",
    "ns.form.internal",
    "default.form.internal",
    "web.default.form.internal",
    "web.other.form.internal",
    "no.default.form.internal",
    "web",
    "example.org",
    "",
];

/// A NS CNAME SOA NULL PTR HINFO MX TXT AAAA SRV NAPTR OPT DS SSHFP RRSIG NSEC DNSKEY NSEC3 NSEC3PARAM TLSA SVCB HTTPS CSYNC
/// TSIG ANY CAA.
const KINDS: [u16; 27] = [1, 2, 5, 6, 10, 12, 13, 15, 16, 28, 33, 35, 41, 43, 44, 46, 47, 48, 50, 51, 52, 64, 65, 62, 250, 255, 257];

fn label(bytes: &mut Vec<u8>, label: &[u8]) {
    let label = &label[..label.len().min(63)];
    if !label.is_empty() {
        bytes.push(label.len() as u8);
        bytes.extend(label);
    }
}

impl Name<'_> {
    fn put(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Known(number) => NAMES[usize::from(*number) % NAMES.len()].split('.').for_each(|part| label(bytes, part.as_bytes())),
            Self::Labels(labels) => labels.iter().take(140).for_each(|part| label(bytes, part)),
            Self::Pointer(labels, at) => {
                labels.iter().take(140).for_each(|part| label(bytes, part));
                // Mostly into what is there.
                let at = if *at < 0x3f00 { at % (bytes.len() as u16 + 1) } else { *at };
                bytes.extend((0xc000 | at).to_be_bytes());
                return;
            }
            Self::Reverse(address) => {
                address.iter().rev().for_each(|part| label(bytes, part.to_string().as_bytes()));
                label(bytes, b"in-addr");
                label(bytes, b"arpa");
            }
            Self::Reverse6(address) => {
                for byte in address.iter().rev() {
                    label(bytes, format!("{:x}", byte & 15).as_bytes());
                    label(bytes, format!("{:x}", byte >> 4).as_bytes());
                }
                label(bytes, b"ip6");
                label(bytes, b"arpa");
            }
        }
        bytes.push(0);
    }
}

impl Kind {
    fn number(&self) -> u16 {
        match self {
            Self::Known(number) => KINDS[usize::from(*number) % KINDS.len()],
            Self::Any(number) => *number,
        }
    }
}

impl Class {
    fn number(&self) -> u16 {
        if let Self::Any(number) = self { *number } else { 1 }
    }
}

impl Query<'_> {
    fn put(&self, bytes: &mut Vec<u8>) {
        self.name.put(bytes);
        bytes.extend(self.kind.number().to_be_bytes());
        bytes.extend(self.class.number().to_be_bytes());
    }
}

impl Record<'_> {
    fn put(&self, bytes: &mut Vec<u8>) {
        self.name.put(bytes);
        bytes.extend(self.kind.number().to_be_bytes());
        bytes.extend(self.class.number().to_be_bytes());
        bytes.extend(self.ttl.to_be_bytes());
        let at = bytes.len();
        bytes.extend([0, 0]);
        for piece in self.data.iter().take(32) {
            match piece {
                Piece::Byte(number) => bytes.push(*number),
                Piece::Short(number) => bytes.extend(number.to_be_bytes()),
                Piece::Long(number) => bytes.extend(number.to_be_bytes()),
                Piece::Name(name) => name.put(bytes),
                Piece::Text(text) => {
                    let text = &text[..text.len().min(255)];
                    bytes.push(text.len() as u8);
                    bytes.extend(text);
                }
                Piece::Bytes(more) => bytes.extend(*more),
            }
        }
        let length = self.length.unwrap_or((bytes.len() - at - 2) as u16);
        bytes[at..at + 2].copy_from_slice(&length.to_be_bytes());
    }
}

impl Message<'_> {
    /// The packet, with number 1 and these flags.
    fn packet(&self, question: &Query, flags: u16) -> Vec<u8> {
        let mut bytes = vec![0; 12];
        bytes[1] = 1;
        bytes[2..4].copy_from_slice(&flags.to_be_bytes());
        bytes[5] = 1;
        question.put(&mut bytes);
        for section in 0..3 {
            let records: Vec<&Record> = self.records.iter().take(24).filter(|record| record.section % 3 == section).collect();
            records.iter().for_each(|record| record.put(&mut bytes));
            let section = usize::from(section);
            bytes[7 + section * 2] = self.counts[section].unwrap_or(records.len() as u8);
        }
        bytes
    }
}

fn names() -> Names {
    let names = Names::default();
    let entry = |name: &str, network: &str, last: u8| NameEntry {
        name: name.parse().expect("a name"),
        network: network.parse().expect("a name"),
        ipv4: [10, 77, 0, last].into(),
        ipv6: [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)].into(),
    };
    names.set([entry("web", "default", 1), entry("db", "default", 2), entry("web", "other", 3)]);
    names
}

thread_local! {
    static NAMES_OF_VMS: Names = names();
}

fn ask(packet: &[u8], known: bool) {
    let asker = if known { [10, 77, 0, 2].into() } else { [192, 0, 2, 1].into() };
    NAMES_OF_VMS.with(|names| answer(names, packet, asker));
}

fuzz_target!(|input: Input| match input {
    Input::Packet { known, packet } => ask(packet, known),
    Input::Question { message, edits, known } => {
        let mut packet = message.packet(&message.question, message.flags & 0x7fff);
        alter(&mut packet, &edits);
        ask(&packet, known);
    }
    Input::Reply { question, other, message, edits } => {
        let mut asked = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        question.put(&mut asked);
        let mut packet = message.packet(other.as_ref().unwrap_or(&question), message.flags | 0x8000);
        alter(&mut packet, &edits);
        let _ = reply(&asked, &packet);
    }
});
