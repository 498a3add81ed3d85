//! A source in memory: tables, transactions, what its walsender would send of them, and its slot.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use catalog::mirror::Bookkeeping;
use pg::{Lsn, TableName};
use rand::rngs::StdRng;
use rand::{RngExt, seq::IndexedRandom};

use crate::sink::memory::{Field, Rows, State, is_marked, marked};

/// What a table is like, by how its rows are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// By a primary key of one column: updates send the old key when it changes.
    Key,
    /// By two columns.
    TwoKeys,
    /// Updates and deletes send whole old rows.
    Full,
    /// Not at all: only inserts are published.
    Keyless,
}

/// A table of four text columns: `k1`, `k2`, `v` and `big`, the last stored out of line.
pub(super) struct SourceTable {
    pub(super) oid: u32,
    pub(super) kind: Kind,
}

impl SourceTable {
    pub(super) fn name(&self) -> TableName {
        TableName::new("public", format!("t{}", self.oid))
    }

    pub(super) fn key(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Key | Kind::Full => &["k1"],
            Kind::TwoKeys => &["k1", "k2"],
            Kind::Keyless => &[],
        }
    }
}

pub(super) const COLUMNS: [&str; 4] = ["k1", "k2", "v", "big"];

/// A change, as it is published.
#[derive(Clone, Debug)]
enum Change {
    Insert(u32, Vec<Field>),
    Update(u32, Vec<Field>, Vec<Field>),
    Delete(u32, Vec<Field>),
    Truncate(Vec<u32>),
}

/// A committed transaction in the WAL.
struct Transaction {
    commit_lsn: Lsn,
    end_lsn: Lsn,
    changes: Vec<Change>,
}

/// The source: tables, their rows now and at each commit, the WAL and the mirror's slot.
pub(super) struct Source {
    pub(super) tables: Vec<SourceTable>,
    state: State,
    end: Lsn,
    wal: Vec<Transaction>,
    history: Vec<(Lsn, State)>,
    /// The slot's position; `None`: there is no slot.
    pub(super) confirmed: Option<Lsn>,
    /// The mirror marks rows that are deleted, and they stay on the target.
    softly: bool,
}

impl Source {
    pub(super) fn new(softly: bool) -> Source {
        let kinds = [Kind::Key, Kind::TwoKeys, Kind::Full, Kind::Keyless];
        let tables = kinds.into_iter().enumerate().map(|(n, kind)| SourceTable { oid: n as u32 + 1, kind }).collect();
        let (state, end) = (State::new(), Lsn(1000));
        Source { tables, history: vec![(end, state.clone())], state, end, wal: Vec::new(), confirmed: None, softly }
    }

    /// Where the WAL ends.
    pub(super) fn end(&self) -> Lsn {
        self.end
    }

    /// The rows as of everything before a position.
    pub(super) fn state_at(&self, position: Lsn) -> &State {
        let after = self.history.partition_point(|(lsn, _)| *lsn <= position);
        &self.history[after.checked_sub(1).expect("no position is before the beginning")].1
    }

    /// The columns that the mirror writes by itself.
    pub(super) fn bookkeeping(&self) -> Bookkeeping {
        Bookkeeping { soft_delete: self.softly.then(|| "deleted".to_owned()), synced_at: None }
    }

    /// What the target must hold at a position when the rows before `snapshot` were copied. Row by row, without batches.
    pub(super) fn mirrored(&self, snapshot: Lsn, position: Lsn) -> State {
        if !self.softly {
            return self.state_at(position).clone();
        }
        let mut state = self.state_at(snapshot).clone();
        for transaction in self.wal.iter().filter(|t| t.end_lsn > snapshot && t.end_lsn <= position) {
            transaction.changes.iter().for_each(|change| self.mirror(&mut state, change));
        }
        state.retain(|_, rows| !rows.is_empty());
        state
    }

    fn mirror(&self, state: &mut State, change: &Change) {
        let table = |oid: &u32| &self.tables[*oid as usize - 1];
        let come = |state: &mut State, oid: &u32, new: &Vec<Field>| {
            let key_length = table(oid).key().len();
            let rows = state.entry(table(oid).name()).or_default();
            rows.retain(|row, _| key_length == 0 || !is_marked(row) || row[..key_length] != new[..key_length]);
            *rows.entry(new.clone()).or_default() += 1;
        };
        let bury = |rows: &mut Rows, old: &Vec<Field>| {
            let count = rows.remove(old).expect("the row is there");
            *rows.entry(marked(old.clone())).or_default() += count;
        };
        match change {
            Change::Insert(oid, new) => come(state, oid, new),
            Change::Update(oid, old, new) => {
                state.entry(table(oid).name()).or_default().remove(old);
                come(state, oid, new);
            }
            Change::Delete(oid, old) => bury(state.entry(table(oid).name()).or_default(), old),
            Change::Truncate(oids) => {
                for oid in oids {
                    let rows = state.entry(table(oid).name()).or_default();
                    let live: Vec<Vec<Field>> = rows.keys().filter(|row| !is_marked(row)).cloned().collect();
                    live.iter().for_each(|row| bury(rows, row));
                }
            }
        }
    }

    /// Something happens: a transaction of random changes commits, one aborts, or one concerns tables that are not mirrored.
    pub(super) fn act(&mut self, random: &mut StdRng) {
        let mut changes = Vec::new();
        let mut state = self.state.clone();
        for _ in 0..random.random_range(0..9) {
            // A subtransaction that is rolled back is not published, whatever it did.
            if random.random_bool(0.1) {
                let mut rolled_back = state.clone();
                let _ = self.change(&mut rolled_back, random);
                continue;
            }
            changes.extend(self.change(&mut state, random));
        }
        state.retain(|_, rows| !rows.is_empty());
        self.end.0 += random.random_range(1..200);
        if random.random_bool(0.1) {
            return;
        }
        let commit_lsn = self.end;
        self.end.0 += random.random_range(1..50);
        self.state = state.clone();
        self.history.push((self.end, state));
        self.wal.push(Transaction { commit_lsn, end_lsn: self.end, changes });
    }

    /// Makes a change that the tables allow; several when one could not do.
    fn change(&self, state: &mut State, random: &mut StdRng) -> Vec<Change> {
        let table = self.tables.choose(random).expect("there are tables");
        let (oid, name) = (table.oid, table.name());
        let key_length = table.key().len();
        let rows = state.entry(name).or_default();
        let existing = rows.keys().nth(random.random_range(0..rows.len().max(1))).cloned();
        let is_taken = |rows: &Rows, row: &[Field]| {
            key_length > 0 && rows.keys().any(|other| other[..key_length] == row[..key_length])
        };
        let keyless = table.kind == Kind::Keyless;
        match (random.random_range(0..20), existing) {
            (0, _) => {
                let emptied: Vec<&SourceTable> = self.tables.iter().filter(|_| random.random_bool(0.4)).collect();
                emptied.iter().for_each(|t| drop(state.remove(&t.name())));
                let oids: Vec<u32> = emptied.iter().map(|t| t.oid).collect();
                if oids.is_empty() { Vec::new() } else { vec![Change::Truncate(oids)] }
            }
            (1..4, Some(old)) if !keyless => {
                rows.remove(&old);
                vec![Change::Delete(oid, old)]
            }
            (4..7, Some(old)) if !keyless => {
                // A new key, with or without a new large value.
                let mut new = random_row(random);
                if random.random_bool(0.6) {
                    new[3].clone_from(&old[3]);
                }
                if new[..key_length] != old[..key_length] && is_taken(rows, &new) {
                    return Vec::new();
                }
                rows.remove(&old);
                rows.insert(new.clone(), 1);
                vec![Change::Update(oid, old, new)]
            }
            (7..9, Some(old)) if !keyless => swap(rows, oid, key_length, &old, random),
            (9..14, Some(old)) if !keyless => {
                let mut new = old.clone();
                new[2] = random_value(random);
                if random.random_bool(0.3) {
                    new[3] = random_value(random);
                }
                rows.remove(&old);
                rows.insert(new.clone(), 1);
                vec![Change::Update(oid, old, new)]
            }
            _ => {
                let mut new = random_row(random);
                if keyless {
                    // Rows that are there more than once, and not too many of them.
                    new.splice(1.., [None, None, None]);
                }
                if is_taken(rows, &new) {
                    return Vec::new();
                }
                *rows.entry(new.clone()).or_default() += 1;
                vec![Change::Insert(oid, new)]
            }
        }
    }

    /// Makes the slot: streaming begins here, and the snapshot shows everything before.
    pub(super) fn make_slot(&mut self) -> Lsn {
        self.confirmed = Some(self.end);
        self.end
    }

    /// Starts a walsender. It sends what commits at or after both `from` and the slot's position; an overeager one only minds the slot's.
    pub(super) fn start(&self, from: Lsn, overeager: bool) -> Walsender {
        let confirmed = self.confirmed.expect("checked by the caller");
        let from = if overeager { confirmed } else { from.max(confirmed) };
        let next = self.wal.partition_point(|t| t.commit_lsn < from);
        Walsender { next, queue: VecDeque::new(), described: Vec::new() }
    }
}

/// Two rows exchange their keys by way of a third, in one transaction.
fn swap(rows: &mut Rows, oid: u32, key_length: usize, one: &[Field], random: &mut StdRng) -> Vec<Change> {
    let others: Vec<Vec<Field>> = rows.keys().filter(|row| row.as_slice() != one).cloned().collect();
    let Some(other) = others.choose(random) else { return Vec::new() };
    let with_key = |row: &[Field], key: &[Field]| [&key[..key_length], &row[key_length..]].concat();
    let aside: Vec<Field> = (0..key_length).map(|_| Some(b"aside".to_vec())).collect();
    let steps = [
        (one.to_vec(), with_key(one, &aside)),
        (other.clone(), with_key(other, one)),
        (with_key(one, &aside), with_key(one, other)),
    ];
    steps
        .into_iter()
        .map(|(old, new)| {
            rows.remove(&old);
            rows.insert(new.clone(), 1);
            Change::Update(oid, old, new)
        })
        .collect()
}

/// Few keys, so that rows meet again.
fn random_row(random: &mut StdRng) -> Vec<Field> {
    let mut key = || Some(vec![b'a' + random.random_range(0..4u8)]);
    let (first, second) = (key(), key());
    vec![first, second, random_value(random), random_value(random)]
}

fn random_value(random: &mut StdRng) -> Field {
    random.random_bool(0.8).then(|| vec![random.random_range(b'0'..=b'9'); random.random_range(0..3)])
}

/// What a walsender has sent and will send.
pub(super) struct Walsender {
    next: usize,
    queue: VecDeque<(Lsn, Bytes)>,
    described: Vec<u32>,
}

impl Walsender {
    /// The next message, and where it is in the WAL; `None` when everything was sent.
    pub(super) fn next(&mut self, source: &Source, random: &mut StdRng) -> Option<(Lsn, Bytes)> {
        while self.queue.is_empty() {
            let transaction = source.wal.get(self.next)?;
            self.next += 1;
            self.encode(source, transaction, random);
        }
        self.queue.pop_front()
    }

    /// Everything before this was sent.
    pub(super) fn sent(&self, source: &Source) -> Option<Lsn> {
        (self.queue.is_empty() && self.next == source.wal.len()).then_some(source.end)
    }

    fn encode(&mut self, source: &Source, transaction: &Transaction, random: &mut StdRng) {
        // From 15 on, empty transactions are not sent.
        if transaction.changes.is_empty() && random.random_bool(0.5) {
            return;
        }
        let lsn = transaction.commit_lsn;
        let mut begin = BytesMut::from(&b"B"[..]);
        begin.put_u64(lsn.0);
        begin.put_i64(1);
        begin.put_u32(7);
        self.queue.push_back((lsn, begin.freeze()));
        for change in &transaction.changes {
            // An invalidation: the relations are described again.
            if random.random_bool(0.05) {
                self.described.clear();
            }
            let oids = match change {
                Change::Insert(oid, _) | Change::Update(oid, ..) | Change::Delete(oid, _) => vec![*oid],
                Change::Truncate(oids) => oids.clone(),
            };
            for oid in oids {
                if !self.described.contains(&oid) {
                    self.described.push(oid);
                    self.queue.push_back((lsn, describe(&source.tables[oid as usize - 1])));
                }
            }
            self.queue.push_back((lsn, encode_change(source, change)));
        }
        let mut commit = BytesMut::from(&b"C\0"[..]);
        commit.put_u64(lsn.0);
        commit.put_u64(transaction.end_lsn.0);
        commit.put_i64(1);
        self.queue.push_back((lsn, commit.freeze()));
    }
}

fn describe(table: &SourceTable) -> Bytes {
    let mut out = BytesMut::from(&b"R"[..]);
    out.put_u32(table.oid);
    out.put_slice(format!("public\0t{}\0", table.oid).as_bytes());
    out.put_u8(if table.kind == Kind::Full { b'f' } else { b'd' });
    out.put_u16(4);
    for column in COLUMNS {
        out.put_u8(u8::from(table.kind == Kind::Full || table.key().contains(&column)));
        out.put_slice(column.as_bytes());
        out.put_u8(0);
        out.put_u32(25);
        out.put_i32(-1);
    }
    out.freeze()
}

fn encode_change(source: &Source, change: &Change) -> Bytes {
    let table = |oid: &u32| &source.tables[*oid as usize - 1];
    let mut out = BytesMut::new();
    match change {
        Change::Insert(oid, new) => {
            out.put_u8(b'I');
            out.put_u32(*oid);
            out.put_u8(b'N');
            put_tuple(&mut out, new, |_| Sent::Whole);
        }
        Change::Update(oid, old, new) => {
            let key_length = table(oid).key().len();
            out.put_u8(b'U');
            out.put_u32(*oid);
            if table(oid).kind == Kind::Full {
                out.put_u8(b'O');
                put_tuple(&mut out, old, |_| Sent::Whole);
            } else if old[..key_length] != new[..key_length] {
                out.put_u8(b'K');
                put_tuple(&mut out, old, |n| if n < key_length { Sent::Whole } else { Sent::Null });
            }
            out.put_u8(b'N');
            // A large value that is the same is not sent, unless it is NULL.
            let same = old[3] == new[3] && new[3].is_some();
            put_tuple(&mut out, new, |n| if n == 3 && same { Sent::Unchanged } else { Sent::Whole });
        }
        Change::Delete(oid, old) => {
            let key_length = table(oid).key().len();
            let full = table(oid).kind == Kind::Full;
            out.put_u8(b'D');
            out.put_u32(*oid);
            out.put_u8(if full { b'O' } else { b'K' });
            put_tuple(&mut out, old, |n| if full || n < key_length { Sent::Whole } else { Sent::Null });
        }
        Change::Truncate(oids) => {
            out.put_u8(b'T');
            out.put_u32(oids.len() as u32);
            out.put_u8(0);
            oids.iter().for_each(|oid| out.put_u32(*oid));
        }
    }
    out.freeze()
}

enum Sent {
    Whole,
    Null,
    Unchanged,
}

fn put_tuple(out: &mut BytesMut, row: &[Field], sent: impl Fn(usize) -> Sent) {
    out.put_u16(row.len() as u16);
    for (n, field) in row.iter().enumerate() {
        match (sent(n), field) {
            (Sent::Unchanged, _) => out.put_u8(b'u'),
            (Sent::Null, _) | (_, None) => out.put_u8(b'n'),
            (Sent::Whole, Some(value)) => {
                out.put_u8(b't');
                out.put_u32(value.len() as u32);
                out.put_slice(value);
            }
        }
    }
}
