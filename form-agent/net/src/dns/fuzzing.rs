//! For tests/fuzz: what becomes of bytes that claim to be a question of a guest, or a reply of a name server. Without sockets.

use std::net::IpAddr;

use hickory_server::{
    net::xfer::Protocol,
    proto::op::{Message, OpCode},
    server::Request,
};

use super::{answer, forward, names::Names};

/// Reads a question as the server does and answers it if it is about our names; gives the answer as bytes.
pub fn answer(names: &Names, packet: &[u8], asker: IpAddr) -> Option<Vec<u8>> {
    let request = Request::from_bytes(packet.to_vec(), (asker, 53).into(), Protocol::Udp).ok()?;
    let [query] = request.queries.queries() else { return None };
    let reply = answer::own(&names.map(), query, asker)?;
    let mut message = Message::response(0, OpCode::Query);
    message.add_query(query.original().clone());
    message.metadata.response_code = reply.code;
    message.answers = reply.answers;
    message.authorities = reply.authorities;
    message.to_vec().ok()
}

/// Whether `reply` is one to the question in `packet`; what is passed on is written and read again.
///
/// # Panics
/// When what would be passed on cannot be read.
pub fn reply(packet: &[u8], reply: &[u8]) -> bool {
    let Ok(request) = Request::from_bytes(packet.to_vec(), ([10, 77, 0, 2], 53).into(), Protocol::Udp) else { return false };
    let [query] = request.queries.queries() else { return false };
    let Some(message) = forward::parse(reply, packet, query) else { return false };
    if let Ok(bytes) = message.to_vec() {
        assert!(Message::from_vec(&bytes).is_ok(), "a reply that is passed on cannot be read");
    }
    true
}
