use std::net::Shutdown;

use proptest::prelude::*;

use super::*;
use crate::wire::{SIMPLE_REPLY_BYTES, chunk_head, greeting, put_option_reply, simple_reply};

const SIZE: u64 = 8192;

fn uri() -> Uri {
    Uri { place: Place::Unix("/nowhere".into()), export: "disk".to_owned(), tls: false, certificates: None }
}

/// All that a server says to a client that asks what is at the beginning, and then for the first 4096 bytes: 512 of data, and a hole.
fn said() -> Vec<u8> {
    let mut bytes = greeting();
    put_option_reply(&mut bytes, option::STRUCTURED_REPLY, option_reply::ACK, &[]);
    let context = [&7_u32.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
    put_option_reply(&mut bytes, option::SET_META_CONTEXT, option_reply::META_CONTEXT, &context);
    put_option_reply(&mut bytes, option::SET_META_CONTEXT, option_reply::ACK, &[]);
    let export = [&info::EXPORT.to_be_bytes()[..], &SIZE.to_be_bytes(), &export_flag::HAS_FLAGS.to_be_bytes()].concat();
    put_option_reply(&mut bytes, option::GO, option_reply::INFO, &export);
    put_option_reply(&mut bytes, option::GO, option_reply::ACK, &[]);
    bytes.extend(chunk_head(1, true, chunk::BLOCK_STATUS, 4 + 3 * 8));
    for number in [7, 512, 0, 3584, STATE_ZERO, 4096, STATE_ZERO] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(chunk_head(2, false, chunk::OFFSET_DATA, 8 + 512));
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend([5; 512]);
    bytes.extend(chunk_head(2, true, chunk::OFFSET_HOLE, 12));
    bytes.extend(512_u64.to_be_bytes());
    bytes.extend(3584_u32.to_be_bytes());
    bytes
}

/// A client of a server that says this, whatever it is asked, and then nothing more.
fn client_of(said: &[u8]) -> Result<(Client, UnixStream), Error> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(said).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    Client::begin(Socket::Unix(ours), &uri()).map(|client| (client, theirs))
}

#[test]
fn data_and_holes_are_told_apart() {
    let (mut client, _server) = client_of(&said()).unwrap();
    assert_eq!(client.size(), SIZE);
    assert_eq!(client.extent(0).unwrap(), Extent { length: 512, is_hole: false });
    let mut bytes = [1; 4096];
    client.read_at(&mut bytes, 0).unwrap();
    assert!(bytes[..512] == [5; 512] && bytes[512..].iter().all(|byte| *byte == 0));
}

#[test]
fn servers_of_before_structured_replies_are_read_as_well() {
    let mut bytes = greeting();
    put_option_reply(&mut bytes, option::STRUCTURED_REPLY, option_reply::UNSUPPORTED, &[]);
    put_option_reply(&mut bytes, option::GO, option_reply::UNSUPPORTED, b"what?");
    bytes.extend([&SIZE.to_be_bytes()[..], &1_u16.to_be_bytes()].concat());
    bytes.extend(simple_reply(1, None));
    bytes.extend([9; 512]);
    bytes.extend(&simple_reply(2, Some(wire::Failure::Io))[..SIMPLE_REPLY_BYTES]);
    let (mut client, _server) = client_of(&bytes).unwrap();
    assert_eq!(client.extent(0).unwrap(), Extent { length: SIZE, is_hole: false }, "nobody knows of holes");
    let mut read = [0; 512];
    client.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [9; 512]);
    assert!(matches!(client.read_at(&mut read, 512), Err(Error::Disk { at: 512, number: 5 })));
}

#[test]
fn what_a_server_refuses_is_told() {
    let refused = |option: u32, kind: u32, text: &[u8]| {
        let mut bytes = greeting();
        if option == option::GO {
            put_option_reply(&mut bytes, option::STRUCTURED_REPLY, option_reply::UNSUPPORTED, &[]);
        }
        put_option_reply(&mut bytes, option, kind, text);
        client_of(&bytes).map(drop).unwrap_err()
    };
    assert!(matches!(refused(option::GO, option_reply::UNKNOWN, b""), Error::Unknown(name) if name == "disk"));
    assert!(matches!(refused(option::GO, option_reply::TLS_REQUIRED, b""), Error::WantsTls));
    let said = refused(option::GO, option_reply::POLICY, b"not \x1b[31myou\n");
    assert!(matches!(&said, Error::Refused(text) if text == "not [31myou"), "nothing that a terminal obeys: {said}");
    assert!(matches!(client_of(b"HTTP/1.1 400 Bad Request\r\n").unwrap_err(), Error::Nonsense(_)));
    assert!(matches!(client_of(b"").unwrap_err(), Error::Broken(_)));
}

proptest! {
    /// A server may say what it likes: there is an error, or what was asked for, and never a panic nor an extent beyond the end.
    #[test]
    fn a_hostile_server_does_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in any::<prop::option::Probability>(), end in any::<prop::sample::Index>()) {
        let mut bytes = said();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if f64::from(cut) < 0.2 {
            bytes.truncate(end.index(bytes.len()));
        }
        if let Ok((mut client, _server)) = client_of(&bytes) {
            if let Ok(extent) = client.extent(0) {
                prop_assert!(extent.length > 0 && extent.length <= client.size());
            }
            let _ = client.read_at(&mut [0; 4096], 0);
        }
    }
}
