//! Whatever comes from a socket, a decoder answers with a value or an error and never panics.

use bytes::{BufMut, Bytes, BytesMut};
use pg::lsn::Lsn;
use pg::pgoutput::{Column, DecodeError, Identity, Message, Relation, Value};
use pg::stream::StreamMessage;
use proptest::prelude::*;

fn cstr(out: &mut BytesMut, text: &str) {
    out.put_slice(text.as_bytes());
    out.put_u8(0);
}

/// What a server would send for `message`; the other half of the round trip, needed by tests only.
fn encode(message: &Message) -> Bytes {
    let mut out = BytesMut::new();
    match message {
        Message::Begin { commit_lsn, commit_time, xid } => {
            out.put_u8(b'B');
            out.put_u64(commit_lsn.0);
            out.put_i64(*commit_time);
            out.put_u32(*xid);
        }
        Message::Commit { commit_lsn, end_lsn, commit_time } => {
            out.put_slice(b"C\0");
            out.put_u64(commit_lsn.0);
            out.put_u64(end_lsn.0);
            out.put_i64(*commit_time);
        }
        Message::Relation(relation) => {
            out.put_u8(b'R');
            out.put_u32(relation.oid);
            cstr(&mut out, &relation.schema);
            cstr(&mut out, &relation.name);
            out.put_u8(match relation.identity {
                Identity::Default => b'd',
                Identity::Nothing => b'n',
                Identity::Full => b'f',
                Identity::Index => b'i',
            });
            out.put_u16(relation.columns.len() as u16);
            for column in &relation.columns {
                out.put_u8(column.key.into());
                cstr(&mut out, &column.name);
                out.put_u32(column.type_oid);
                out.put_i32(column.type_modifier);
            }
        }
        Message::Truncate { relations, cascade, restart_identity } => {
            out.put_u8(b'T');
            out.put_u32(relations.len() as u32);
            out.put_u8(u8::from(*cascade) | u8::from(*restart_identity) << 1);
            relations.iter().for_each(|oid| out.put_u32(*oid));
        }
        Message::Message { transactional, lsn, prefix, content } => {
            out.put_u8(b'M');
            out.put_u8(u8::from(*transactional));
            out.put_u64(lsn.0);
            cstr(&mut out, prefix);
            out.put_u32(content.len() as u32);
            out.put_slice(content);
        }
        other => panic!("not encoded here: {other:?}"),
    }
    out.freeze()
}

/// An update that carries an old key, a NULL, an unchanged value, a text and a binary value.
fn update() -> Bytes {
    let mut out = BytesMut::new();
    out.put_slice(b"U\0\0\0\x07K\0\x01t\0\0\0\x011N\0\x04nut\0\0\0\x02ab");
    out.put_slice(b"b\0\0\0\x03\0\x01\x02");
    out.freeze()
}

fn messages() -> Vec<Bytes> {
    let mut all: Vec<Bytes> = samples().iter().map(encode).collect();
    all.push(update());
    all.push(Bytes::from_static(b"I\0\0\0\x07N\0\x01t\0\0\0\x01a"));
    all.push(Bytes::from_static(b"D\0\0\0\x07O\0\x01n"));
    all.push(Bytes::from_static(b"O\0\0\0\0\0\0\0\x01origin\0"));
    all.push(Bytes::from_static(b"Y\0\0\0\x07public\0mood\0"));
    all
}

fn samples() -> Vec<Message> {
    vec![
        Message::Begin { commit_lsn: Lsn(1 << 40), commit_time: -5, xid: 7 },
        Message::Commit { commit_lsn: Lsn(8), end_lsn: Lsn(9), commit_time: i64::MAX },
        Message::Relation(Relation {
            oid: 16_384,
            schema: "öffentlich".into(),
            name: "Odd\"Name".into(),
            identity: Identity::Index,
            columns: vec![
                Column { key: true, name: "id".into(), type_oid: 23, type_modifier: -1 },
                Column { key: false, name: "x".into(), type_oid: 1700, type_modifier: 655_366 },
            ],
        }),
        Message::Truncate { relations: vec![1, 2], cascade: true, restart_identity: false },
        Message::Message { transactional: true, lsn: Lsn(3), prefix: "p".into(), content: Bytes::from_static(b"c") },
    ]
}

#[test]
fn what_was_encoded_is_decoded() {
    for message in samples() {
        assert_eq!(Message::decode(encode(&message)), Ok(message));
    }
}

#[test]
fn every_kind_of_value_is_told_apart() {
    let Ok(Message::Update { relation: 7, old: Some(old), new }) = Message::decode(update()) else {
        panic!("not an update");
    };
    assert_eq!(old.values().collect::<Vec<_>>(), [Value::Text(b"1")]);
    assert!(new.has_unchanged() && !old.has_unchanged());
    assert_eq!(
        new.values().collect::<Vec<_>>(),
        [Value::Null, Value::Unchanged, Value::Text(b"ab"), Value::Binary(&[0, 1, 2])]
    );
}

#[test]
fn a_message_cut_anywhere_is_an_error() {
    for message in messages() {
        for length in 0..message.len() {
            assert!(Message::decode(message.slice(..length)).is_err(), "{message:?} cut at {length}");
        }
        let mut longer = BytesMut::from(&message[..]);
        longer.put_u8(0);
        assert_eq!(Message::decode(longer.freeze()), Err(DecodeError::TrailingBytes));
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(Bytes::from(bytes.clone()));
        let _ = StreamMessage::decode(Bytes::from(bytes));
    }

    #[test]
    fn a_changed_byte_never_panics(which in 0usize..10, at in 0usize..64, byte in any::<u8>()) {
        let all = messages();
        let mut bytes = all[which % all.len()].to_vec();
        let length = bytes.len();
        bytes[at % length] = byte;
        if let Ok(Message::Insert { new, .. } | Message::Update { new, .. }) = Message::decode(Bytes::from(bytes)) {
            prop_assert_eq!(new.values().count(), new.len());
        }
    }
}
