//! From a question to a reply.

use std::net::IpAddr;

use hickory_server::{
    net::runtime::Time,
    proto::{
        op::{Edns, Header, HeaderCounts, LowerQuery, Message, MessageType, Metadata, OpCode, ResponseCode},
        rr::{
            DNSClass, Name, RData, Record, RecordType,
            rdata::{A, AAAA, NS, PTR, SOA},
        },
    },
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};

use super::{
    forward::Forwarder,
    names::{Meaning, NameMap, Names, ZONE},
};
use crate::address::GATEWAY_V4;

/// Seconds that a resolver in a VM may keep an answer: VMs come and go.
const TTL: u32 = 5;
/// The most that a UDP reply may have, whatever the asker allows: more would be fragmented.
const MAX_UDP: u16 = 1232;

pub struct Answerer {
    names: Names,
    forwarder: Forwarder,
}

/// A reply before it is put on the wire.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) code: ResponseCode,
    authoritative: bool,
    truncated: bool,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    additionals: Vec<Record>,
}

impl Answerer {
    pub const fn new(names: Names, forwarder: Forwarder) -> Self {
        Self { names, forwarder }
    }

    async fn reply(&self, request: &Request) -> Reply {
        let [query] = request.queries.queries() else { return Reply::code(ResponseCode::FormErr) };
        if request.metadata.message_type != MessageType::Query {
            return Reply::code(ResponseCode::FormErr);
        }
        if request.metadata.op_code != OpCode::Query {
            return Reply::code(ResponseCode::NotImp);
        }
        if let Some(reply) = own(&self.names.map(), query, request.src().ip()) {
            return reply;
        }
        match self.forwarder.ask(request.as_slice(), query).await {
            Some(message) => Reply::from(message),
            None => Reply::code(ResponseCode::ServFail),
        }
    }
}

impl Reply {
    fn code(code: ResponseCode) -> Self {
        Self { code, ..Self::default() }
    }
}

impl From<Message> for Reply {
    fn from(message: Message) -> Self {
        Self {
            code: message.metadata.response_code,
            authoritative: false,
            truncated: message.metadata.truncation,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
        }
    }
}

/// The reply to a question about our names; `None` when it is somebody else's.
pub(super) fn own(map: &NameMap, query: &LowerQuery, asker: IpAddr) -> Option<Reply> {
    if query.query_class() != DNSClass::IN {
        return None;
    }
    let name: &Name = query.name();
    let labels: Vec<&str> = name.iter().map(std::str::from_utf8).collect::<Result<_, _>>().ok()?;
    let original = query.original().name().clone();
    let record = |data| Record::from_rdata(original.clone(), TTL, data);
    let records = match map.meaning(&labels, asker) {
        Meaning::Foreign => return None,
        Meaning::Missing => return Some(negative(map, ResponseCode::NXDomain)),
        Meaning::Empty => Vec::new(),
        Meaning::Vm { ipv4, ipv6 } => vec![record(RData::A(A(ipv4))), record(RData::AAAA(AAAA(ipv6)))],
        Meaning::Server => vec![record(RData::A(A(GATEWAY_V4)))],
        Meaning::Apex => vec![soa(map)?, record(RData::NS(NS(in_zone("ns.")?)))],
        Meaning::Reverse { name, network } => vec![record(RData::PTR(PTR(in_zone(&format!("{name}.{network}."))?)))],
    };
    let wanted = query.query_type();
    let answers: Vec<Record> = records.into_iter().filter(|record| wanted == RecordType::ANY || wanted == record.record_type()).collect();
    if answers.is_empty() {
        return Some(negative(map, ResponseCode::NoError));
    }
    Some(Reply { authoritative: true, answers, ..Reply::default() })
}

/// No such name, or no such record: the SOA says how long that may be remembered (RFC 2308).
fn negative(map: &NameMap, code: ResponseCode) -> Reply {
    Reply { code, authoritative: true, authorities: soa(map).into_iter().collect(), ..Reply::default() }
}

fn in_zone(prefix: &str) -> Option<Name> {
    Name::from_ascii(format!("{prefix}{ZONE}.")).ok()
}

fn soa(map: &NameMap) -> Option<Record> {
    let data = SOA::new(in_zone("ns.")?, in_zone("hostmaster.")?, map.serial(), 3600, 600, 86400, TTL);
    Some(Record::from_rdata(in_zone("")?, TTL, RData::SOA(data)))
}

/// What we say about ourselves in a reply to somebody who speaks EDNS (RFC 6891).
fn edns_for(request: &Request) -> Option<Edns> {
    let asked = request.edns.as_ref()?;
    let mut edns = Edns::new();
    edns.set_version(0);
    edns.set_max_payload(asked.max_payload().clamp(512, MAX_UDP));
    edns.set_dnssec_ok(asked.flags().dnssec_ok);
    Some(edns)
}

#[async_trait::async_trait]
impl RequestHandler for Answerer {
    async fn handle_request<R: ResponseHandler, T: Time>(&self, request: &Request, mut handle: R) -> ResponseInfo {
        let reply = self.reply(request).await;
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.truncation = reply.truncated;
        metadata.recursion_available = true;
        let edns = edns_for(request);
        let builder = MessageResponseBuilder::new(&request.queries, edns.as_ref());
        let response = builder.build(metadata, &reply.answers, &reply.authorities, [], &reply.additionals);
        match handle.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                tracing::debug!(%error, "cannot answer a DNS query");
                metadata.response_code = ResponseCode::ServFail;
                ResponseInfo::from(Header { metadata, counts: HeaderCounts::default() })
            }
        }
    }
}
