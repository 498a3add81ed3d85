//! The first packet of a connection. It is forwarded as it came where it can be; here it is looked at. Pure.
//!
//! Source: PostgreSQL docs, protocol-message-formats, "StartupMessage", "CancelRequest" and "SSLRequest".

use pg::frame::cstr;

use crate::fields::frame;

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

/// What a client wants of its session.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Startup {
    /// The protocol's version, major and minor.
    pub(crate) version: (u16, u16),
    /// All parameters, in order. Their encoding is not known yet.
    pub(crate) parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// The role to log in as.
    pub(crate) user: String,
    /// The database; that of the role's name if none was given.
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
            version => First::Session(Startup::read(version, &packet[8..])),
        }
    }
}

impl Startup {
    fn read(version: (u16, u16), mut bytes: &[u8]) -> Startup {
        let mut startup = Startup { version, ..Startup::default() };
        while let Some((name, rest)) = cstr(bytes).filter(|(name, _)| !name.is_empty()) {
            let Some((value, rest)) = cstr(rest) else { break };
            startup.parameters.push((name.to_vec(), value.to_vec()));
            bytes = rest;
        }
        startup.user = startup.text("user").unwrap_or_default();
        startup.database = startup.text("database").filter(|d| !d.is_empty()).unwrap_or_else(|| startup.user.clone());
        startup.replication = startup.value("replication").is_some_and(|value| !is_false(value));
        startup
    }

    /// Returns a parameter's value; the last one, as for PostgreSQL, if it was given more than once.
    pub(crate) fn value(&self, name: &str) -> Option<&[u8]> {
        self.parameters.iter().rev().find(|(n, _)| n == name.as_bytes()).map(|(_, value)| value.as_slice())
    }

    /// Returns a parameter's value for people to read.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        self.value(name).map(|value| String::from_utf8_lossy(value).into_owned())
    }

    /// Returns the NegotiateProtocolVersion that is due when only protocol 3.0 and none of its extensions is spoken.
    pub(crate) fn negotiation(&self) -> Option<Vec<u8>> {
        let unknown: Vec<&[u8]> =
            self.parameters.iter().map(|(n, _)| n.as_slice()).filter(|n| n.starts_with(b"_pq_.")).collect();
        if self.version.1 == 0 && unknown.is_empty() {
            return None;
        }
        let mut body = [0x0003_0000_u32.to_be_bytes(), (unknown.len() as u32).to_be_bytes()].concat();
        for name in unknown {
            body.extend_from_slice(name);
            body.push(0);
        }
        Some(frame(b'v', &body))
    }
}

/// Writes a StartupMessage of protocol 3.0.
pub(crate) fn startup_packet(parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut packet = vec![0, 0, 0, 0, 0, 3, 0, 0];
    for (name, value) in parameters {
        packet.extend_from_slice(&[name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
    }
    packet.push(0);
    let length = packet.len() as u32;
    packet[..4].copy_from_slice(&length.to_be_bytes());
    packet
}

/// Anything else is a kind of replication, or an error.
fn is_false(value: &[u8]) -> bool {
    [&b"false"[..], b"off", b"no", b"0", b"f", b"n"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(packet: &[u8]) -> Startup {
        match First::read(packet) {
            First::Session(startup) => startup,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_session_s_wishes_are_read() {
        let wishes = session(b"\0\0\0\0\0\x03\0\x02user\0ann\0database\0shop\0replication\0database\0user\0bob\0\0");
        assert_eq!((wishes.user.as_str(), wishes.database.as_str(), wishes.replication), ("bob", "shop", true));
        assert_eq!((wishes.version, wishes.parameters.len()), ((3, 2), 4));
        let wishes = session(b"\0\0\0\0\0\x03\0\0user\0ann\0replication\0off\0\0");
        assert_eq!((wishes.database.as_str(), wishes.replication), ("ann", false));
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
            assert_eq!(session(packet), Startup { version: (3, 0), ..Startup::default() });
        }
    }

    #[test]
    fn only_what_is_newer_is_negotiated() {
        assert_eq!(session(b"\0\0\0\0\0\x03\0\0user\0ann\0\0").negotiation(), None);
        let newer = session(b"\0\0\0\0\0\x03\x27\x0fuser\0ann\0_pq_.x\0on\0\0").negotiation().unwrap();
        assert_eq!(newer, frame(b'v', b"\0\x03\0\0\0\0\0\x01_pq_.x\0"));
    }

    #[test]
    fn a_packet_that_is_written_can_be_read() {
        let packet = startup_packet(&[("user", "ann"), ("database", "shop")]);
        assert_eq!(packet.len(), u32::from_be_bytes(packet[..4].try_into().unwrap()) as usize);
        assert_eq!(session(&packet).database, "shop");
    }
}
