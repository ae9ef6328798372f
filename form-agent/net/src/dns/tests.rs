//! The server over real sockets on the loopback interface, with an upstream of our own.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use hickory_server::proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::TXT},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

use super::{NameEntry, Names, serve_on};

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn ask(server: SocketAddr, question: &Message) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&question.to_vec().unwrap(), server).await.unwrap();
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).await.unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

async fn ask_tcp(server: SocketAddr, question: &Message) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let bytes = question.to_vec().unwrap();
    stream.write_u16(bytes.len() as u16).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut reply = vec![0; stream.read_u16().await.unwrap().into()];
    stream.read_exact(&mut reply).await.unwrap();
    Message::from_vec(&reply).unwrap()
}

/// An upstream that answers every question with a TXT record of `length` bytes, truncated over UDP when it is long.
async fn upstream(length: usize) -> SocketAddr {
    let (udp, tcp) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        // The same port of the other protocol may be somebody else's.
        match TcpListener::bind(udp.local_addr().unwrap()).await {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
            tcp => break (udp, tcp.unwrap()),
        }
    };
    let address = udp.local_addr().unwrap();
    let answer = move |bytes: &[u8], udp: bool| {
        let mut message = Message::from_vec(bytes).unwrap().into_response();
        let name = message.queries[0].name().clone();
        if udp && length > 400 {
            message.metadata.truncation = true;
        } else {
            message.add_answer(Record::from_rdata(name, 60, RData::TXT(TXT::new(vec!["x".repeat(200); length / 200]))));
        }
        message.to_vec().unwrap()
    };
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
            // A forged reply with another id first: it must not be believed.
            let mut forged = answer(&buffer[..length], true);
            forged[0] ^= 0xff;
            udp.send_to(&forged, from).await.unwrap();
            udp.send_to(&answer(&buffer[..length], true), from).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut bytes).await.unwrap();
            let reply = answer(&bytes, false);
            stream.write_u16(reply.len() as u16).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    });
    address
}

async fn server(upstream: SocketAddr) -> (super::DnsServer, SocketAddr, Names) {
    let names = Names::default();
    names.set([NameEntry {
        name: "web".parse().unwrap(),
        network: "default".parse().unwrap(),
        ipv4: Ipv4Addr::LOCALHOST,
        ipv6: Ipv6Addr::LOCALHOST,
    }]);
    let server = serve_on(Ipv4Addr::LOCALHOST, names.clone(), vec![upstream]).await.unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, server.port()));
    (server, address, names)
}

#[tokio::test]
async fn own_names_are_answered_with_authority() {
    let (_server, address, names) = server(upstream(200).await).await;
    let reply = ask(address, &question("Web.Default.FORM.internal.", RecordType::A)).await;
    assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
    assert_eq!((reply.metadata.id, reply.metadata.response_code), (77, ResponseCode::NoError));
    assert_eq!(reply.answers[0].data, RData::A(Ipv4Addr::LOCALHOST.into()));
    // The asker is at 127.0.0.1, which is the VM's own address: the bare name is looked for in its network.
    let reply = ask_tcp(address, &question("web.", RecordType::AAAA)).await;
    assert_eq!(reply.answers[0].data, RData::AAAA(Ipv6Addr::LOCALHOST.into()));
    names.set([]);
    let reply = ask(address, &question("web.default.form.internal.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn negative_answers_carry_the_soa() {
    let (_server, address, _) = server(upstream(200).await).await;
    for (name, kind, code) in [
        ("none.default.form.internal.", RecordType::A, ResponseCode::NXDomain),
        ("web.default.form.internal.", RecordType::MX, ResponseCode::NoError),
        ("default.form.internal.", RecordType::A, ResponseCode::NoError),
        ("form.internal.", RecordType::A, ResponseCode::NoError),
    ] {
        let reply = ask(address, &question(name, kind)).await;
        assert_eq!((reply.metadata.response_code, reply.answers.len()), (code, 0), "{name}");
        assert_eq!(reply.authorities[0].record_type(), RecordType::SOA, "{name}");
    }
    let reply = ask(address, &question("form.internal.", RecordType::SOA)).await;
    assert_eq!(reply.answers[0].record_type(), RecordType::SOA);
    let reply = ask(address, &question("1.0.0.127.in-addr.arpa.", RecordType::PTR)).await;
    assert_eq!(reply.answers[0].data.to_string(), "web.default.form.internal.");
}

#[tokio::test]
async fn other_names_are_forwarded() {
    let (_server, address, _) = server(upstream(200).await).await;
    let reply = ask(address, &question("www.example.org.", RecordType::TXT)).await;
    assert_eq!((reply.metadata.id, reply.metadata.authoritative, reply.answers.len()), (77, false, 1));
    assert_eq!(reply.answers[0].record_type(), RecordType::TXT);
}

#[tokio::test]
async fn long_answers_are_truncated_over_udp_and_whole_over_tcp() {
    let (_server, address, _) = server(upstream(3000).await).await;
    let mut long = question("www.example.org.", RecordType::TXT);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    long.set_edns(edns);
    let reply = ask(address, &long).await;
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    assert_eq!(reply.edns.unwrap().max_payload(), 1232);
    let reply = ask_tcp(address, &long).await;
    assert_eq!((reply.metadata.truncation, reply.answers.len()), (false, 1));
}

#[tokio::test]
async fn a_dead_upstream_is_a_failure_not_silence() {
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (_server, address, _) = server(closed).await;
    let reply = ask(address, &question("www.example.org.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
}
