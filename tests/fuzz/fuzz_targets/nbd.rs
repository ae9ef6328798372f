//! A client of the NBD server that says anything. What the server answers is read as a client would (NetworkBlockDevice/nbd, `doc/proto.md`), and
//! compared with what the export has to hold by then.

#![no_main]

use std::fs::File;

use arbitrary::Arbitrary;
use form_fuzz::format::{
    Edit, alter,
    nbd::{Agreed, Export, OPTION_MAGIC, REQUEST_MAGIC, check_handshake},
};
use form_store::nbd::fuzzing::{contents, empty, serve};
use form_types::VolumeFormat;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

/// More than the server's buffer holds, and no whole number of anything.
const SIZE: u64 = 300 * 1024 + 123;
/// Behind the export, in the same file, lies what no client may see or change.
const BEHIND: u64 = 68 * 1024;
const SECRET: u8 = 0xc7;
const NAME: &str = "data";
const MAX_REQUESTS: usize = 24;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    qcow2: bool,
    writable: bool,
    /// Zero for a server that wants it.
    tls: u8,
    /// Mostly both that there are; others are hung up on.
    flags: u8,
    options: Vec<Ask<'a>>,
    begin: Begin,
    requests: Vec<Request>,
    edits: Vec<Edit<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Begin {
    Go,
    /// With structured replies and block status.
    GoWithAll,
    ExportName,
    Not,
}

#[derive(Arbitrary, Debug)]
enum Ask<'a> {
    /// An export's name, as options carry it, and numbers behind it.
    Named {
        option: u8,
        other: Option<&'a str>,
        wanted: Vec<u16>,
    },
    Contexts {
        sets: bool,
        queries: Vec<Option<&'a str>>,
        count: Option<u32>,
    },
    Bytes {
        option: u8,
        data: &'a [u8],
        length: Option<u32>,
    },
}

#[derive(Arbitrary, Debug)]
struct Request {
    command: u8,
    flags: u8,
    cookie: u64,
    at: Place,
    length: Length,
    fill: u8,
}

/// Mostly near where something ends.
#[derive(Arbitrary, Debug)]
enum Place {
    Page(u8, i8),
    End(i8),
    BeforeEnd(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Length {
    Little(u16),
    ToEnd(i8),
    Pages(u8, i8),
    Any(u32),
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn option(option: u32, length: Option<u32>, data: &[u8]) -> Vec<u8> {
    let length = length.unwrap_or(data.len() as u32);
    [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

impl Ask<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Named { option: number, other, wanted } => {
                let numbers = [wanted.len() as u16].into_iter().chain(wanted.iter().copied()).take(16).flat_map(u16::to_be_bytes);
                option(u32::from(number % 12), None, &[text(other.unwrap_or(NAME)), numbers.collect()].concat())
            }
            Self::Contexts { sets, queries, count } => {
                let mut data = text(NAME);
                data.extend(count.unwrap_or(queries.len() as u32).to_be_bytes());
                queries.iter().take(8).for_each(|query| data.extend(text(query.unwrap_or("base:allocation"))));
                option(if *sets { 10 } else { 9 }, None, &data)
            }
            Self::Bytes { option: number, data, length } => option(u32::from(number % 12), *length, data),
        }
    }
}

impl Begin {
    fn bytes(&self) -> Vec<u8> {
        let go = || option(7, None, &[&text(NAME)[..], &[0, 0]].concat());
        match self {
            Self::Go => go(),
            Self::GoWithAll => {
                let contexts = Ask::Contexts { sets: true, queries: vec![None], count: None };
                [option(8, None, &[]), contexts.bytes(), go()].concat()
            }
            Self::ExportName => option(1, None, NAME.as_bytes()),
            Self::Not => Vec::new(),
        }
    }
}

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let command = u16::from(self.command % 9);
        let at = match self.at {
            Place::Page(page, more) => (u64::from(page) * 4096).wrapping_add_signed(more.into()),
            Place::End(more) => SIZE.wrapping_add_signed(more.into()),
            Place::BeforeEnd(bytes) => SIZE - u64::from(bytes),
            Place::Any(at) => at,
        };
        let length = match self.length {
            Length::Little(bytes) => bytes.into(),
            Length::ToEnd(more) => SIZE.wrapping_sub(at).wrapping_add_signed(more.into()) as u32,
            Length::Pages(pages, more) => (u32::from(pages) * 4096).wrapping_add_signed(more.into()),
            Length::Any(bytes) => bytes,
        };
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(u16::from(self.flags).to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(at.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        // The bytes of a write are alike but for where pages begin.
        bytes.extend(
            (0..if command == 1 { length.min(2 * SIZE as u32) } else { 0 }).map(|at| if at % 4096 == 0 { !self.fill } else { self.fill }),
        );
        bytes
    }
}

fuzz_target!(|input: Input| {
    let format = if input.qcow2 { VolumeFormat::Qcow2 } else { VolumeFormat::Raw };
    let file = File::from(memfd_create("volume", MemfdFlags::CLOEXEC).expect("a file in memory"));
    let open = |size, writable| contents(file.try_clone().expect("a descriptor"), format, size, writable).expect("a sound volume");
    empty(&file, format, SIZE + BEHIND).expect("an empty volume");
    let mut sound = vec![0; SIZE as usize];
    sound[4000..9000].fill(7);
    sound[SIZE as usize - 70_000..].fill(9);
    {
        let whole = open(SIZE + BEHIND, true);
        whole.write_at(&sound[4000..9000], 4000).expect("it can be written");
        whole.write_at(&sound[SIZE as usize - 70_000..], SIZE - 70_000).expect("it can be written");
        whole.write_at(&vec![SECRET; BEHIND as usize], SIZE).expect("it can be written");
    }
    let flags = if input.flags < 192 { 3 } else { u32::from(input.flags % 8) };
    let mut client = flags.to_be_bytes().to_vec();
    let tls = input.tls == 0;
    input.options.iter().take(16).for_each(|ask| client.extend(ask.bytes()));
    client.extend(input.begin.bytes());
    input.requests.iter().take(MAX_REQUESTS).for_each(|request| client.extend(request.bytes()));
    alter(&mut client, &input.edits);

    let said = serve(&open(SIZE, input.writable), NAME, tls, &client);
    let agreed = check_handshake(&client, &said.handshake, tls, NAME, SIZE);
    let mut export = Export::new(sound.clone(), input.writable);
    assert_eq!(agreed, said.began.map(|(terms, _)| Agreed { structured: terms.structured, allocation: terms.allocation }));
    if let (Some(agreed), Some((terms, read))) = (agreed, said.began) {
        assert!(!tls && terms.size == SIZE && terms.writable == input.writable);
        export.check(agreed, &client[read..], &said.replies);
    }
    let whole = open(SIZE + BEHIND, false);
    let mut now = vec![0; (SIZE + BEHIND) as usize];
    whole.read_at(&mut now, 0).expect("it can be read");
    let (inside, behind) = now.split_at(SIZE as usize);
    assert!(behind.iter().all(|byte| *byte == SECRET), "what lies behind the export changed");
    assert!(export.is(inside), "the export holds something else than was written");
    assert!(input.writable || inside == sound, "an export for reading changed");
});
