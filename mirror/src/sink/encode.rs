//! Rows in COPY's binary form.
//!
//! A value's bytes are the same in a tuple of the stream and in COPY's form, so nothing is parsed; in text mode the bytes are those of a
//! text value, which the target casts.
//!
//! Source: PostgreSQL docs, sql-copy, "Binary Format".

use bytes::{BufMut, BytesMut};
use pg::pgoutput::{Tuple, Value};

use crate::relation::TableMap;

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

/// Appends a row of the target's columns.
pub fn row(out: &mut BytesMut, table: &TableMap, tuple: &Tuple) {
    put_count(out, table.columns.len());
    put_values(out, table, tuple, |_| true);
}

/// Appends a row of a staging table: the group it belongs to, then the columns. With `only_key` the others are NULL: an old key has no
/// more.
pub fn staged_row(out: &mut BytesMut, group: i16, table: &TableMap, tuple: &Tuple, only_key: bool) {
    put_count(out, table.columns.len() + 1);
    out.put_i32(2);
    out.put_i16(group);
    put_values(out, table, tuple, |key| key || !only_key);
}

fn put_count(out: &mut BytesMut, count: usize) {
    out.put_i16(i16::try_from(count).expect("a table has at most 1,600 columns"));
}

fn put_values(out: &mut BytesMut, table: &TableMap, tuple: &Tuple, wanted: impl Fn(bool) -> bool) {
    let mut values = tuple.values();
    let mut next = 0;
    for column in &table.columns {
        let value = values.nth(column.position - next);
        next = column.position + 1;
        match value {
            Some(Value::Text(bytes) | Value::Binary(bytes)) if wanted(column.key) => {
                out.put_i32(i32::try_from(bytes.len()).expect("a value has less than 2 GiB"));
                out.put_slice(bytes);
            }
            _ => out.put_i32(-1),
        }
    }
}
