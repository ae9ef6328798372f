use std::{fs, net::TcpStream, os::unix::net::UnixStream, sync::mpsc};

use form_nbd::{
    Client, Uri,
    socket::UNREAD,
    wire::{Fields, REQUEST_MAGIC, chunk, command, option},
};
use form_types::{VolumeFormat, VolumeId};

use super::*;
use crate::{Store, local_pool};

const ID: VolumeId = VolumeId::from_bytes([7; 16]);
const SIZE: u64 = 16 << 20;

struct Export {
    server: Option<Server>,
    store: Store,
    root: tempfile::TempDir,
}

fn contents(store: &Store, writable: bool) -> Contents {
    let pool = store.pool(&local_pool()).unwrap();
    Contents::new(pool.open_volume(&ID, !writable).unwrap(), writable).unwrap()
}

fn export(format: VolumeFormat, writable: bool) -> Export {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    store.pool(&local_pool()).unwrap().create(&ID, format, SIZE).unwrap();
    let server = Server::start(contents(&store, writable), "data", &Place::Unix(root.path().join("nbd.sock"))).unwrap();
    Export { server: Some(server), store, root }
}

impl Export {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.root.path().join("nbd.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// A client that has structured replies and block status.
    fn client(&self) -> UnixStream {
        let mut stream = self.connect();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        let context = [&4_u32.to_be_bytes()[..], b"data", &1_u32.to_be_bytes(), &15_u32.to_be_bytes(), b"base:allocation"].concat();
        let go = [&4_u32.to_be_bytes()[..], b"data", &[0, 0]].concat();
        for (option, data) in [(option::STRUCTURED_REPLY, vec![]), (option::SET_META_CONTEXT, context), (option::GO, go)] {
            stream.write_all(b"IHAVEOPT").unwrap();
            stream.write_all(&option.to_be_bytes()).unwrap();
            stream.write_all(&(data.len() as u32).to_be_bytes()).unwrap();
            stream.write_all(&data).unwrap();
            loop {
                let mut head = [0; 20];
                stream.read_exact(&mut head).unwrap();
                let (kind, length) =
                    (u32::from_be_bytes(head[12..16].try_into().unwrap()), u32::from_be_bytes(head[16..].try_into().unwrap()));
                stream.read_exact(&mut vec![0; length as usize]).unwrap();
                assert!(kind < 1 << 31, "{kind:x}");
                if kind == 1 {
                    break;
                }
            }
        }
        stream
    }
}

fn send(stream: &mut UnixStream, command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(77_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).unwrap();
}

/// The error of a simple reply.
fn simple(stream: &mut UnixStream) -> u32 {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!((&bytes[..4], &bytes[8..]), (&[0x67, 0x44, 0x66, 0x98][..], &77_u64.to_be_bytes()[..]));
    u32::from_be_bytes(bytes[4..8].try_into().unwrap())
}

/// The chunks of a structured reply.
fn chunks(stream: &mut UnixStream) -> Vec<(u16, Vec<u8>)> {
    let mut found = Vec::new();
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let mut fields = Fields(&head);
        assert_eq!(fields.u32(), Some(0x668e_33ef));
        let (flags, kind) = (fields.u16().unwrap(), fields.u16().unwrap());
        assert_eq!(fields.u64(), Some(77));
        let mut data = vec![0; fields.u32().unwrap() as usize];
        stream.read_exact(&mut data).unwrap();
        found.push((kind, data));
        if flags & chunk::DONE != 0 {
            return found;
        }
    }
}

fn ask(stream: &mut UnixStream, command: u16, flags: u16, offset: u64, length: u32) -> Vec<(u16, Vec<u8>)> {
    send(stream, command, flags, offset, length, &[]);
    chunks(stream)
}

#[test]
fn what_is_written_is_read_and_holes_are_told_of() {
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let mut export = export(format, true);
        let mut stream = export.client();
        send(&mut stream, command::WRITE, 1, 1 << 20, 1 << 20, &vec![5; 1 << 20]);
        assert_eq!(simple(&mut stream), 0);
        let found = ask(&mut stream, command::READ, 0, 0, 4 << 20);
        let kinds: Vec<u16> = found.iter().map(|(kind, _)| *kind).collect();
        assert_eq!((kinds[0], *kinds.last().unwrap()), (chunk::OFFSET_HOLE, chunk::OFFSET_HOLE), "{format:?}");
        let data: Vec<u8> = found.iter().filter(|(kind, _)| *kind == chunk::OFFSET_DATA).flat_map(|(_, data)| data[8..].to_vec()).collect();
        assert!(data == vec![5; 1 << 20], "{format:?}: {} bytes", data.len());
        let status = ask(&mut stream, command::BLOCK_STATUS, 0, 0, 4 << 20).remove(0).1;
        let numbers: Vec<u32> = status.chunks(4).map(|number| u32::from_be_bytes(number.try_into().unwrap())).collect();
        assert_eq!(numbers, [1, 1 << 20, 3, 1 << 20, 0, 2 << 20, 3], "{format:?}");
        let status = ask(&mut stream, command::BLOCK_STATUS, 8, 0, 4 << 20).remove(0).1;
        assert_eq!(status.len(), 12, "one was asked for");

        send(&mut stream, command::TRIM, 0, 1 << 20, 1 << 19, &[]);
        assert_eq!(simple(&mut stream), 0);
        send(&mut stream, command::WRITE_ZEROES, 2, 3 << 19, 1 << 18, &[]);
        assert_eq!(simple(&mut stream), 0);
        send(&mut stream, command::FLUSH, 0, 0, 0, &[]);
        assert_eq!(simple(&mut stream), 0);
        let whole = ask(&mut stream, command::READ, 4, (3 << 19) + (1 << 18) - 2, 4);
        assert_eq!(whole[0], (chunk::OFFSET_DATA, [&((3_u64 << 19) + (1 << 18) - 2).to_be_bytes()[..], &[0, 0, 5, 5]].concat()));
        assert_eq!(ask(&mut stream, command::READ, 0, 0, 0), [(chunk::NONE, vec![])]);
        drop(export.server.take());
        assert!(matches!(stream.read(&mut [0]), Ok(0)), "it was hung up on");
        let mut bytes = [0; 4];
        contents(&export.store, true).read_at(&mut bytes, (3 << 19) + (1 << 18) - 2).unwrap();
        assert_eq!(bytes, [0, 0, 5, 5], "{format:?}");
    }
}

#[test]
fn a_client_is_told_what_it_may_not_do_and_goes_on() {
    let export = export(VolumeFormat::Raw, false);
    let mut stream = export.client();
    send(&mut stream, command::WRITE, 0, 0, 512, &[1; 512]);
    assert_eq!(simple(&mut stream), 1, "EPERM");
    send(&mut stream, command::TRIM, 0, 0, 512, &[]);
    assert_eq!(simple(&mut stream), 1);
    let error = |found: Vec<(u16, Vec<u8>)>| {
        assert_eq!(found[0].0, chunk::ERROR);
        u32::from_be_bytes(found[0].1[..4].try_into().unwrap())
    };
    assert_eq!(error(ask(&mut stream, command::READ, 0, SIZE, 1)), 22, "EINVAL");
    assert_eq!(error(ask(&mut stream, command::READ, 0, 0, SIZE as u32 + 1)), 22);
    assert_eq!(error(ask(&mut stream, command::READ, 4, 0, SIZE as u32)), 75, "EOVERFLOW: not in one chunk");
    assert_eq!(ask(&mut stream, command::READ, 0, 0, 512)[0].0, chunk::OFFSET_HOLE);
    send(&mut stream, command::DISC, 0, 0, 0, &[]);
    assert!(matches!(stream.read(&mut [0]), Ok(0)));
}

#[test]
fn a_file_that_cannot_be_read_is_an_error_and_not_the_end() {
    let export = export(VolumeFormat::Raw, true);
    let mut stream = export.client();
    let file = export.store.pool(&local_pool()).unwrap().volume(&ID).unwrap().path;
    fs::File::options().write(true).open(file).unwrap().set_len(0).unwrap();
    send(&mut stream, command::WRITE, 0, 0, 4, b"back");
    assert_eq!(simple(&mut stream), 0);
    // Data up to the file's end, then what is no data and no hole of the file.
    let found = ask(&mut stream, command::READ, 4, 0, 8);
    assert_eq!((found[0].0, &found[0].1[..4]), (chunk::ERROR, &5_u32.to_be_bytes()[..]), "EIO: {found:?}");
    send(&mut stream, command::FLUSH, 0, 0, 0, &[]);
    assert_eq!(simple(&mut stream), 0);
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let export = export(VolumeFormat::Raw, true);
    let mut good = export.client();
    let hostile: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 64],
        &[0xff; 64],
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04nope",
        b"\0\0\0\x03XXXXXXXXXXXXXXXX",
    ];
    for bytes in hostile {
        let mut stream = export.connect();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // With unread bytes a Unix socket says that it was reset.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer.len(), 18, "a greeting, and nothing else: {bytes:?}");
    }
    // A write that is longer than any may be, and a request that is none.
    let mut stream = export.client();
    send(&mut stream, command::WRITE, 0, 0, u32::MAX, &[]);
    assert!(matches!(stream.read(&mut [0]), Ok(0)));
    let mut stream = export.client();
    stream.write_all(&[9; 28]).unwrap();
    assert!(matches!(stream.read(&mut [0]), Ok(0)));
    assert_eq!(ask(&mut good, command::READ, 0, 0, 512)[0].0, chunk::OFFSET_HOLE, "the others go on");
}

#[test]
fn who_does_not_read_holds_up_nobody_and_can_be_hung_up_on() {
    let mut export = export(VolumeFormat::Raw, true);
    let mut stuck = export.client();
    send(&mut stuck, command::WRITE, 0, 0, 8 << 20, &vec![5; 8 << 20]);
    assert_eq!(simple(&mut stuck), 0);
    for _ in 0..8 {
        send(&mut stuck, command::READ, 0, 0, 8 << 20, &[]);
    }
    let mut other = export.client();
    assert_eq!(ask(&mut other, command::READ, 4, 0, 4)[0].1[8..], [5; 4]);
    assert_eq!(export.server.as_ref().unwrap().clients(), 2);
    let (sender, ended) = mpsc::channel();
    let server = export.server.take();
    thread::spawn(move || {
        drop(server);
        let _ = sender.send(());
    });
    ended.recv_timeout(UNREAD / 2).expect("it ends before the stuck client's time is over");
    contents(&export.store, true);
}

#[test]
fn there_are_so_many_clients_and_no_more_and_the_end_leaves_nothing() {
    let mut export = export(VolumeFormat::Raw, false);
    let mut all: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| export.client()).collect();
    let mut late = export.connect();
    assert!(matches!(late.read(&mut [0]), Ok(0)), "one too many");
    send(&mut all[0], command::DISC, 0, 0, 0, &[]);
    assert!(matches!(all[0].read(&mut [0]), Ok(0)));
    // Its thread ends a moment after its socket.
    let deadline = Instant::now() + Duration::from_secs(60);
    while export.server.as_ref().unwrap().clients() == MAX_CLIENTS {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
    export.client();
    drop(export.server.take());
    assert!(!export.root.path().join("nbd.sock").exists());
    assert!(all.iter_mut().skip(1).all(|client| matches!(client.read(&mut [0]), Ok(0))));
    contents(&export.store, true);
}

#[test]
fn who_says_nothing_keeps_nobody_away() {
    let export = export(VolumeFormat::Raw, false);
    let mut greeted = [0; 18];
    let mut silent: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| export.connect()).collect();
    for stream in &mut silent {
        stream.read_exact(&mut greeted).unwrap();
    }
    let mut clients: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| export.client()).collect();
    // The clients have their places now, and keep them.
    assert!(silent.iter_mut().all(|stream| matches!(stream.read(&mut [0]), Ok(0))));
    assert!(matches!(export.connect().read(&mut [0]), Ok(0)), "one too many");
    assert_eq!(export.server.as_ref().unwrap().clients(), MAX_CLIENTS);
    assert!(!ask(&mut clients[0], command::READ, 0, 0, 512).is_empty());
}

#[test]
fn tcp_gets_a_port() {
    let export = export(VolumeFormat::Raw, false);
    let server = Server::start(contents(&export.store, false), "data", &Place::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let Place::Tcp(address) = server.place() else { panic!("another place") };
    let mut greeting = [0; 18];
    TcpStream::connect(address).unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    assert!(!server.is_writable());
}

/// All of an export, by our own client.
fn read_all(client: &mut Client) -> (Vec<u8>, Vec<(u64, bool)>) {
    let (mut whole, mut extents, mut at) = (vec![0; client.size() as usize], Vec::new(), 0);
    while at < client.size() {
        let extent = client.extent(at).unwrap();
        extents.push((extent.length, extent.is_hole));
        client.read_at(&mut whole[at as usize..(at + extent.length) as usize], at).unwrap();
        at += extent.length;
    }
    (whole, extents)
}

fn written(store: &Store) -> Vec<u8> {
    let mut expected = vec![0; SIZE as usize];
    let contents = contents(store, true);
    for (at, count, byte) in [(1 << 20, 3 << 20, 5), (SIZE - 4096, 4096, 9)] {
        expected[at as usize..at as usize + count].fill(byte);
        contents.write_at(&vec![byte; count], at).unwrap();
    }
    contents.flush().unwrap();
    expected
}

#[test]
fn our_own_client_reads_what_there_is() {
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let mut export = export(format, true);
        drop(export.server.take());
        let expected = written(&export.store);
        let path = export.root.path().join("a b.sock");
        export.server = Some(Server::start(contents(&export.store, false), "data", &Place::Unix(path.clone())).unwrap());
        let uri = Uri { place: form_nbd::Place::Unix(path), export: "data".to_owned(), tls: false, certificates: None };
        let (whole, extents) = read_all(&mut Client::connect(&uri).unwrap());
        assert!(whole == expected, "{format:?}");
        assert_eq!(extents.iter().filter(|(_, is_hole)| *is_hole).count(), 2, "{extents:?}");
        let nope = Client::connect(&Uri { export: "nope".to_owned(), ..uri.clone() });
        assert!(matches!(nope, Err(form_nbd::Error::Unknown(name)) if name == "nope"));
        assert!(matches!(Client::connect(&Uri { tls: true, ..uri }), Err(form_nbd::Error::NoTls)));
    }
}

#[test]
fn with_tls_one_client_is_let_in_and_nobody_else() {
    let mut export = export(VolumeFormat::Raw, true);
    drop(export.server.take());
    let expected = written(&export.store);
    let directory = |own: &Credentials, authorities: &[&str]| {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(tls::AUTHORITY_FILE), authorities.concat()).unwrap();
        fs::write(directory.path().join(tls::CERTIFICATE_FILE), &own.certificate).unwrap();
        fs::write(directory.path().join(tls::KEY_FILE), &own.key).unwrap();
        directory
    };
    let (own, other) = (Credentials::for_client().unwrap(), Credentials::for_client().unwrap());
    let address = "127.0.0.1:0".parse().unwrap();
    let (server, authority) = Server::start_secure(contents(&export.store, false), "data", address, &own.certificate).unwrap();
    let Place::Tcp(address) = *server.place() else { panic!("another place") };
    let place = form_nbd::Place::Tcp { host: address.ip().to_string(), port: address.port() };
    let reach = |directory: Option<&Path>, tls: bool| {
        let certificates = directory.map(Path::to_owned);
        Client::connect(&Uri { place: place.clone(), export: "data".to_owned(), tls, certificates })
    };
    let known = directory(&own, &[&own.authority, &authority]);
    assert!(read_all(&mut reach(Some(known.path()), true).unwrap()).0 == expected);
    assert!(matches!(reach(None, false), Err(form_nbd::Error::WantsTls)), "not even the size is told");
    assert!(reach(None, true).is_err());
    let stranger = directory(&other, &[&other.authority, &authority]);
    assert!(matches!(reach(Some(stranger.path()), true), Err(form_nbd::Error::Tls(_))), "the server does not know this client");
    let without = directory(&own, &[&authority]);
    fs::remove_file(without.path().join(tls::CERTIFICATE_FILE)).unwrap();
    assert!(reach(Some(without.path()), true).is_err(), "a client that shows nothing");
    let deceived = directory(&own, &[&other.authority]);
    assert!(matches!(reach(Some(deceived.path()), true), Err(form_nbd::Error::Tls(_))), "the client does not know this server");
    assert!(Server::start_secure(contents(&export.store, false), "data", address, "no certificate").is_err());
    // A client in the middle of its handshake does not hold up the end.
    let mut half = TcpStream::connect(address).unwrap();
    half.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0\x16\x03\x01").unwrap();
    half.read_exact(&mut [0; 38]).unwrap();
    drop(server);
    contents(&export.store, true);
}
