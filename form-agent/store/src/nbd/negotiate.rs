//! The handshake: what a client asks for, one option after the other, and what it gets ("Newstyle negotiation", "Option haggling").
//! Decides only; the connection carries the bytes.

use form_nbd::wire::{
    BASE_ALLOCATION, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, MAX_PAYLOAD, Terms, export_flag, info, option, option_reply,
    put_option_reply,
};

/// The number by which block status of [`BASE_ALLOCATION`] is known on a connection.
pub const ALLOCATION_ID: u32 = 1;

/// What a server offers: one export, under its name and under the empty name.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    pub name: &'a str,
    pub size: u64,
    pub writable: bool,
}

/// Whether a connection is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Security {
    /// It cannot be.
    #[default]
    None,
    /// It has to be before anything else is asked for.
    Wanted,
    Begun,
}

/// What a client has got so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Negotiation {
    security: Security,
    no_zeroes: bool,
    structured: bool,
    allocation: bool,
}

/// What to send, and what comes then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Another option.
    Next(Vec<u8>),
    /// TLS, and then another option.
    Secure(Vec<u8>),
    /// Requests.
    Begin(Vec<u8>, Terms),
    /// Nothing.
    End(Vec<u8>),
}

impl Negotiation {
    /// Begins with the client's flags. None when it wants what this server does not know, or what is older than options.
    pub fn new(flags: u32, security: Security) -> Option<Self> {
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        let fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
        (flags & !known == 0 && fixed).then(|| Self { security, no_zeroes: flags & u32::from(FLAG_NO_ZEROES) != 0, ..Self::default() })
    }

    pub fn answer(&mut self, offer: &Offer<'_>, option: u32, data: &[u8]) -> Answer {
        let mut out = Vec::new();
        match option {
            // "FORCEDTLS mode": not even the names are told, and what cannot be refused is hung up on.
            option::EXPORT_NAME if self.security == Security::Wanted => return Answer::End(out),
            option::ABORT | option::STARTTLS => {}
            _ if self.security == Security::Wanted => {
                refuse(&mut out, option, option_reply::TLS_REQUIRED, "this server wants TLS first");
                return Answer::Next(out);
            }
            _ => {}
        }
        match option {
            option::EXPORT_NAME => return self.export_name(offer, data),
            option::ABORT => {
                put_option_reply(&mut out, option, option_reply::ACK, &[]);
                return Answer::End(out);
            }
            option::LIST if data.is_empty() => {
                let mut server = (offer.name.len() as u32).to_be_bytes().to_vec();
                server.extend(offer.name.as_bytes());
                put_option_reply(&mut out, option, option_reply::SERVER, &server);
                put_option_reply(&mut out, option, option_reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                put_option_reply(&mut out, option, option_reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => refuse(&mut out, option, option_reply::INVALID, "this option has no data"),
            option::INFO | option::GO => {
                if self.describe(offer, option, data, &mut out) && option == option::GO {
                    return Answer::Begin(out, self.terms(offer));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(offer, option, data, &mut out),
            option::STARTTLS if !data.is_empty() => refuse(&mut out, option, option_reply::INVALID, "this option has no data"),
            option::STARTTLS => match self.security {
                Security::None => refuse(&mut out, option, option_reply::POLICY, "this server has no TLS"),
                Security::Begun => refuse(&mut out, option, option_reply::INVALID, "there is TLS already"),
                Security::Wanted => {
                    // Whatever was agreed on before could have been said by anybody.
                    *self = Self { security: Security::Begun, no_zeroes: self.no_zeroes, ..Self::default() };
                    put_option_reply(&mut out, option, option_reply::ACK, &[]);
                    return Answer::Secure(out);
                }
            },
            _ => refuse(&mut out, option, option_reply::UNSUPPORTED, "this server does not know the option"),
        }
        Answer::Next(out)
    }

    fn terms(&self, offer: &Offer<'_>) -> Terms {
        Terms { size: offer.size, writable: offer.writable, structured: self.structured, allocation: self.allocation }
    }

    fn flags(&self, offer: &Offer<'_>) -> u16 {
        // A flush of one connection is for what all have written: they share one file.
        let always = export_flag::HAS_FLAGS | export_flag::SEND_FLUSH | export_flag::SEND_FUA | export_flag::CAN_MULTI_CONN;
        let writing = if offer.writable { export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES } else { export_flag::READ_ONLY };
        always | writing | if self.structured { export_flag::SEND_DF } else { 0 }
    }

    /// The oldest way to begin, which cannot be refused but by hanging up.
    fn export_name(&self, offer: &Offer<'_>, name: &[u8]) -> Answer {
        if !std::str::from_utf8(name).is_ok_and(|name| offer.has(name)) {
            return Answer::End(Vec::new());
        }
        let mut out = offer.size.to_be_bytes().to_vec();
        out.extend(self.flags(offer).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Answer::Begin(out, self.terms(offer))
    }

    /// Whether the client may begin with what it was told.
    fn describe(&self, offer: &Offer<'_>, option: u32, data: &[u8], out: &mut Vec<u8>) -> bool {
        let Some((name, wanted)) = asked_info(data) else {
            refuse(out, option, option_reply::INVALID, "the option's data is not as it should be");
            return false;
        };
        if !offer.has(name) {
            refuse(out, option, option_reply::UNKNOWN, "there is no export of this name");
            return false;
        }
        let mut put = |kind: u16, what: &[&[u8]]| {
            let data = [&kind.to_be_bytes()[..], &what.concat()].concat();
            put_option_reply(out, option, option_reply::INFO, &data);
        };
        put(info::EXPORT, &[&offer.size.to_be_bytes(), &self.flags(offer).to_be_bytes()]);
        if wanted.contains(&info::NAME) {
            put(info::NAME, &[offer.name.as_bytes()]);
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            // Any byte can be had; a page at a time is what costs least.
            put(info::BLOCK_SIZE, &[&1_u32.to_be_bytes(), &4096_u32.to_be_bytes(), &MAX_PAYLOAD.to_be_bytes()]);
        }
        put_option_reply(out, option, option_reply::ACK, &[]);
        true
    }

    /// "Metadata querying".
    fn contexts(&mut self, offer: &Offer<'_>, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let sets = option == option::SET_META_CONTEXT;
        if sets {
            // Whatever becomes of it, it takes the place of an earlier choice.
            self.allocation = false;
        }
        let Some((name, queries)) = asked_contexts(data).filter(|_| self.structured) else {
            return refuse(out, option, option_reply::INVALID, "structured replies first, then well-formed queries");
        };
        if !offer.has(name) {
            return refuse(out, option, option_reply::UNKNOWN, "there is no export of this name");
        }
        let has = if sets {
            queries.contains(&BASE_ALLOCATION)
        } else {
            queries.is_empty() || queries.iter().any(|query| ["base:", BASE_ALLOCATION].contains(query))
        };
        if has {
            self.allocation |= sets;
            let id: u32 = if sets { ALLOCATION_ID } else { 0 };
            let context = [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
            put_option_reply(out, option, option_reply::META_CONTEXT, &context);
        }
        put_option_reply(out, option, option_reply::ACK, &[]);
    }
}

impl Offer<'_> {
    fn has(&self, name: &str) -> bool {
        name.is_empty() || name == self.name
    }
}

fn refuse(out: &mut Vec<u8>, option: u32, reply: u32, why: &str) {
    put_option_reply(out, option, reply, why.as_bytes());
}

/// The name and the wanted information of `NBD_OPT_INFO` and `NBD_OPT_GO`.
fn asked_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.text()?;
    // Bounded by the data, whatever the number says.
    let wanted = (0..fields.u16()?).map(|_| fields.u16()).collect::<Option<Vec<u16>>>()?;
    fields.is_empty().then_some((name, wanted))
}

/// The name and the queries of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
fn asked_contexts(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = fields.text()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.text()?);
    }
    fields.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Offer<'_> = Offer { name: "data", size: 1 << 30, writable: true };

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
    }

    fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
        let wanted: Vec<u8> = [wanted.len() as u16].iter().chain(wanted).flat_map(|number| number.to_be_bytes()).collect();
        [text(name), wanted].concat()
    }

    fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = [&text(name)[..], &(queries.len() as u32).to_be_bytes()].concat();
        queries.iter().for_each(|query| data.extend(text(query)));
        data
    }

    /// The kinds and the data of the answers to an option.
    fn replies(answer: &Answer) -> Vec<(u32, Vec<u8>)> {
        let (Answer::Next(bytes) | Answer::Secure(bytes) | Answer::Begin(bytes, _) | Answer::End(bytes)) = answer;
        let mut fields = Fields(bytes);
        let mut found = Vec::new();
        while !fields.is_empty() {
            assert_eq!(fields.u64(), Some(form_nbd::wire::OPTION_REPLY_MAGIC));
            fields.u32().unwrap();
            let kind = fields.u32().unwrap();
            let length = fields.u32().unwrap();
            found.push((kind, fields.bytes(length as usize).unwrap().to_vec()));
        }
        found
    }

    fn kinds(answer: &Answer) -> Vec<u32> {
        replies(answer).into_iter().map(|(kind, _)| kind).collect()
    }

    #[test]
    fn a_client_that_knows_everything_gets_everything() {
        let mut client = Negotiation::new(3, Security::None).unwrap();
        assert_eq!(kinds(&client.answer(&OFFER, option::STRUCTURED_REPLY, &[])), [option_reply::ACK]);
        let listed = client.answer(&OFFER, option::LIST, &[]);
        assert_eq!(replies(&listed)[0], (option_reply::SERVER, text("data")));
        let set = client.answer(&OFFER, option::SET_META_CONTEXT, &queries("data", &["qemu:x", BASE_ALLOCATION]));
        assert_eq!(replies(&set)[0], (option_reply::META_CONTEXT, [&[0, 0, 0, 1], BASE_ALLOCATION.as_bytes()].concat()));
        let Answer::Begin(_, terms) = client.answer(&OFFER, option::GO, &go("data", &[info::BLOCK_SIZE, info::NAME])) else {
            panic!("it may begin")
        };
        assert_eq!(terms, Terms { size: 1 << 30, writable: true, structured: true, allocation: true });
        // A later choice takes the place of the first.
        client.answer(&OFFER, option::SET_META_CONTEXT, &queries("data", &[]));
        let Answer::Begin(_, terms) = client.answer(&OFFER, option::GO, &go("", &[])) else { panic!("it may begin") };
        assert!(!terms.allocation);
    }

    #[test]
    fn what_is_said_of_the_export_fits_what_it_is() {
        let flags = |writable: bool, structured: bool| {
            let mut client = Negotiation { structured, ..Negotiation::new(3, Security::None).unwrap() };
            let answer = client.answer(&Offer { writable, ..OFFER }, option::INFO, &go("data", &[]));
            assert!(matches!(answer, Answer::Next(_)));
            let (kind, told) = replies(&answer).remove(0);
            assert_eq!((kind, &told[..10]), (option_reply::INFO, &[0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0][..]));
            u16::from_be_bytes(told[10..].try_into().unwrap())
        };
        let (writable, read_only) = (flags(true, true), flags(false, false));
        assert_eq!(writable & export_flag::READ_ONLY, 0);
        let all = export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_DF;
        assert_eq!(writable & all, all);
        assert_eq!(read_only & (export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_DF), 0);
        assert_ne!(read_only & export_flag::READ_ONLY, 0);
    }

    #[test]
    fn the_oldest_way_begins_too_and_an_unknown_name_ends() {
        for (flags, length) in [(1, 134), (3, 10)] {
            let mut client = Negotiation::new(flags, Security::None).unwrap();
            let Answer::Begin(bytes, terms) = client.answer(&OFFER, option::EXPORT_NAME, b"data") else { panic!("it may begin") };
            assert_eq!((bytes.len(), terms.structured), (length, false));
            assert_eq!(client.answer(&OFFER, option::EXPORT_NAME, b"other"), Answer::End(Vec::new()));
            assert_eq!(client.answer(&OFFER, option::EXPORT_NAME, &[0xff]), Answer::End(Vec::new()));
        }
        assert!(Negotiation::new(2, Security::None).is_none() && Negotiation::new(7, Security::None).is_none());
    }

    #[test]
    fn nothing_is_told_before_tls_and_nothing_of_before_counts_after_it() {
        let mut client = Negotiation::new(3, Security::Wanted).unwrap();
        for (option, data) in [
            (option::LIST, vec![]),
            (option::STRUCTURED_REPLY, vec![]),
            (option::INFO, go("data", &[])),
            (option::GO, go("data", &[])),
            (option::SET_META_CONTEXT, queries("data", &[BASE_ALLOCATION])),
            (u32::MAX, vec![]),
        ] {
            let answer = client.answer(&OFFER, option, &data);
            assert!(matches!(answer, Answer::Next(_)));
            assert_eq!(kinds(&answer), [option_reply::TLS_REQUIRED], "{option}");
        }
        assert_eq!(client.answer(&OFFER, option::EXPORT_NAME, b"data"), Answer::End(Vec::new()));
        assert_eq!(kinds(&client.answer(&OFFER, option::STARTTLS, &[1])), [option_reply::INVALID]);
        let answer = client.answer(&OFFER, option::STARTTLS, &[]);
        assert!(matches!(answer, Answer::Secure(_)));
        assert_eq!(kinds(&answer), [option_reply::ACK]);
        assert_eq!(kinds(&client.answer(&OFFER, option::STARTTLS, &[])), [option_reply::INVALID], "once is enough");
        let Answer::Begin(_, terms) = client.answer(&OFFER, option::GO, &go("data", &[])) else { panic!("it may begin") };
        assert!(!terms.structured);
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_the_client_may_go_on() {
        let mut client = Negotiation::new(3, Security::None).unwrap();
        let too_many = [text("data"), u32::MAX.to_be_bytes().to_vec()].concat();
        for (option, data, kind) in [
            (option::GO, go("other", &[]), option_reply::UNKNOWN),
            (option::GO, vec![], option_reply::INVALID),
            (option::GO, vec![0xff; 8], option_reply::INVALID),
            (option::INFO, [go("data", &[1]), vec![0]].concat(), option_reply::INVALID),
            (option::LIST, vec![1], option_reply::INVALID),
            (option::STRUCTURED_REPLY, vec![1], option_reply::INVALID),
            (option::STARTTLS, vec![], option_reply::POLICY),
            (option::SET_META_CONTEXT, queries("data", &[BASE_ALLOCATION]), option_reply::INVALID),
            (11, vec![], option_reply::UNSUPPORTED),
            (u32::MAX, vec![0; 99], option_reply::UNSUPPORTED),
        ] {
            let answer = client.answer(&OFFER, option, &data);
            assert!(matches!(answer, Answer::Next(_)));
            assert_eq!(kinds(&answer), [kind], "{option} {data:?}");
        }
        client.answer(&OFFER, option::STRUCTURED_REPLY, &[]);
        assert_eq!(kinds(&client.answer(&OFFER, option::SET_META_CONTEXT, &too_many)), [option_reply::INVALID]);
        assert_eq!(kinds(&client.answer(&OFFER, option::LIST_META_CONTEXT, &queries("data", &["base:"]))).len(), 2);
        assert_eq!(kinds(&client.answer(&OFFER, option::LIST_META_CONTEXT, &queries("data", &["x:"]))), [option_reply::ACK]);
        let end = client.answer(&OFFER, option::ABORT, &[]);
        assert!(matches!(&end, Answer::End(_)) && kinds(&end) == [option_reply::ACK]);
    }
}
