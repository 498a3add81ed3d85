//! The first packet of a connection. It is forwarded as it came; here it is only looked at. Pure.
//!
//! Source: PostgreSQL docs, protocol-message-formats, "StartupMessage", "CancelRequest" and "SSLRequest".

use pg::frame::cstr;

/// What a connection begins with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// A session.
    Session(Startup),
    /// A cancel request; the key is what follows the code, as in BackendKeyData.
    Cancel(Vec<u8>),
    /// Something that can no longer be asked for here, such as encryption; protocol 1234 with a minor number.
    Negotiation(u16),
}

/// What a client wants of its session, as far as the gateway cares. Names are bytes: their encoding is not known yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Startup {
    /// The role to log in as.
    pub(crate) user: String,
    /// The database.
    pub(crate) database: String,
    /// The session speaks the replication protocol, whose grammar is another.
    pub(crate) replication: bool,
}

impl First {
    /// Reads a packet of at least 8 bytes whose length has been checked. Never panics; what is malformed is the server's to refuse.
    pub(crate) fn read(packet: &[u8]) -> First {
        let number = |at: usize| packet.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
        match (number(4), number(6)) {
            (1234, 5678) => First::Cancel(packet[8..].to_vec()),
            (1234, minor) => First::Negotiation(minor),
            _ => First::Session(Startup::read(&packet[8..])),
        }
    }
}

impl Startup {
    fn read(mut parameters: &[u8]) -> Startup {
        let mut startup = Startup::default();
        let mut database = None;
        while let Some((name, rest)) = cstr(parameters).filter(|(name, _)| !name.is_empty()) {
            let Some((value, rest)) = cstr(rest) else { break };
            let text = || String::from_utf8_lossy(value).into_owned();
            match name {
                b"user" => startup.user = text(),
                b"database" => database = Some(text()),
                b"replication" => startup.replication = !is_false(value),
                _ => {}
            }
            parameters = rest;
        }
        startup.database = database.filter(|d| !d.is_empty()).unwrap_or_else(|| startup.user.clone());
        startup
    }
}

/// Anything else is a kind of replication, or an error.
fn is_false(value: &[u8]) -> bool {
    [&b"false"[..], b"off", b"no", b"0", b"f", b"n"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_s_wishes_are_read() {
        let packet = b"\0\0\0\0\0\x03\0\0user\0ann\0database\0shop\0replication\0database\0\0";
        let wishes = Startup { user: "ann".to_owned(), database: "shop".to_owned(), replication: true };
        assert_eq!(First::read(packet), First::Session(wishes));
        let First::Session(startup) = First::read(b"\0\0\0\0\0\x03\0\0user\0ann\0replication\0off\0\0") else {
            panic!()
        };
        assert_eq!((startup.database.as_str(), startup.replication), ("ann", false));
    }

    #[test]
    fn other_first_packets_are_told_apart() {
        assert_eq!(First::read(b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01abcd"), First::Cancel(b"\0\0\0\x01abcd".to_vec()));
        assert_eq!(First::read(b"\0\0\0\x08\x04\xd2\x16\x2f"), First::Negotiation(5679));
        for packet in [
            &b"\0\0\0\x08\0\x03\0\0"[..],
            b"\0\0\0\x08\0\x03\0\0user",
            b"\0\0\0\x08\0\x03\0\0user\0",
            b"\0\0\0\x08\0\x03\0\0\xff\0\xff",
        ] {
            assert_eq!(First::read(packet), First::Session(Startup::default()));
        }
    }
}
