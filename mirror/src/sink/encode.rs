//! Rows in COPY's binary form.
//!
//! A value's bytes are the same in a tuple of the stream and in COPY's form, so nothing is parsed; in text mode the bytes are those of a
//! text value, which the target casts.
//!
//! Source: PostgreSQL docs, sql-copy, "Binary Format".

use bytes::{BufMut, BytesMut};

/// Signature, flags and an empty header extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// Begins a COPY stream.
pub fn begin(out: &mut BytesMut) {
    out.put_slice(HEADER);
}

/// Ends a COPY stream.
pub fn finish(out: &mut BytesMut) {
    out.put_i16(-1);
}

/// Begins a row of so many values; they follow one by one.
pub fn row(out: &mut BytesMut, count: usize) {
    out.put_i16(i16::try_from(count).expect("a table has at most 1,600 columns, and a staging table a few more"));
}

/// Appends a group's number.
pub fn group(out: &mut BytesMut, group: i16) {
    out.put_i32(2);
    out.put_i16(group);
}

/// Begins a value of so many bytes, which follow; `None` is NULL, and nothing follows.
pub fn value(out: &mut BytesMut, length: Option<usize>) {
    out.put_i32(length.map_or(-1, |length| i32::try_from(length).expect("a value has less than 2 GiB")));
}
