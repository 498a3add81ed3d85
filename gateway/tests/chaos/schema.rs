//! Random tables, and the fixed ones whose rows tell a reader of the target whether it sees whole transactions.

use std::fmt;

use rand::RngExt;
use rand::rngs::StdRng;

/// How rows of a table are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Integer,
    Text,
    Uuid,
    /// Two columns.
    Composite,
    /// A unique index that is the replica identity, and no primary key.
    Index,
    /// A primary key, and whole old rows.
    Full,
    /// None: rows are only inserted.
    None,
}

const KEYS: [Key; 7] = [Key::Integer, Key::Text, Key::Uuid, Key::Composite, Key::Index, Key::Full, Key::None];

/// A random table: `k1`, `k2`, then some of the others.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) key: Key,
    pub(crate) unique: bool,
    pub(crate) partitioned: bool,
    generated: bool,
    /// Types that make the stream travel as text.
    odd_types: bool,
}

/// A life's tables.
pub(crate) struct Schema {
    pub(crate) tables: Vec<Table>,
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tables.iter().try_for_each(|t| write!(f, "\n           {t:?}"))
    }
}

/// Keys are few, so that rows meet again.
pub(crate) const KEYS_MAX: u32 = 150;

/// Accounts on each side of a transfer.
pub(crate) const ACCOUNTS: u32 = 40;

impl Schema {
    pub(crate) fn random(random: &mut StdRng) -> Schema {
        let tables = (0..random.random_range(2..6))
            .map(|n| {
                let key = KEYS[random.random_range(0..KEYS.len())];
                let partitioned = matches!(key, Key::Integer | Key::Text) && random.random_bool(0.25);
                Table {
                    name: if random.random_bool(0.2) { format!("\"Odd \"\"{n}\"\" é\"") } else { format!("t{n}") },
                    key,
                    unique: !partitioned && key != Key::None && random.random_bool(0.4),
                    partitioned,
                    generated: random.random_bool(0.3),
                    odd_types: random.random_bool(0.2),
                }
            })
            .collect();
        Schema { tables }
    }

    /// The statements that make the tables on the source, with some rows.
    pub(crate) fn create(&self) -> String {
        let mut sql = format!(
            "create table acc_a (id int primary key, n bigint not null); create table acc_b (id int primary key, n bigint not null);
             insert into acc_a select i, 0 from generate_series(1, {ACCOUNTS}) i; insert into acc_b select i, 0 from generate_series(1, {ACCOUNTS}) i;
             create table mark_a (id bigint primary key); create table mark_b (id bigint);"
        );
        for table in &self.tables {
            sql += &table.create();
        }
        sql
    }
}

impl Table {
    fn create(&self) -> String {
        let name = &self.name;
        let key_type = match self.key {
            Key::Text => "text",
            Key::Uuid => "uuid",
            _ => "int",
        };
        let primary = match self.key {
            Key::Composite => ", primary key (k2, k1)",
            Key::Index | Key::None => "",
            _ => ", primary key (k1)",
        };
        let unique = if self.unique { ", unique (u)" } else { "" };
        let generated = if self.generated { ", g int generated always as (k2 * 2) stored" } else { "" };
        let odd = if self.odd_types { ", o numrange, c pg_lsn[], r regclass" } else { "" };
        let partition = if self.partitioned { " partition by hash (k1)" } else { "" };
        let mut sql = format!(
            "create table {name} (k1 {key_type} not null, k2 int not null, u int, v text, big text, num numeric, arr int[], js jsonb,
                at timestamptz{odd}{generated}{primary}{unique}){partition};"
        );
        if self.partitioned {
            for n in 0..3 {
                let part = format!("{}_{n}\"", name.trim_end_matches('"').trim_start_matches('"'));
                sql +=
                    &format!("create table \"{part} partition of {name} for values with (modulus 3, remainder {n});");
            }
        } else {
            sql += &format!("alter table {name} alter big set storage external;");
        }
        if self.key == Key::Index {
            let index = format!("index_{}", self.name.chars().filter(char::is_ascii_alphanumeric).collect::<String>());
            sql += &format!(
                "create unique index {index} on {name} (k1); alter table {name} replica identity using index {index};"
            );
        }
        if self.key == Key::Full {
            sql += &format!("alter table {name} replica identity full;");
        }
        let rows = format!("generate_series(1, {KEYS_MAX}, 2) i");
        sql + &format!("insert into {name} ({}) select {} from {rows};", self.columns(), self.row("i", "i"))
    }

    /// The columns that are given.
    pub(crate) fn columns(&self) -> String {
        format!("k1, k2, u, v, big, num, arr, js, at{}", if self.odd_types { ", o, c, r" } else { "" })
    }

    /// A row's values, as SQL; `key` and `salt` are expressions.
    pub(crate) fn row(&self, key: &str, salt: &str) -> String {
        let u = if self.unique { "null" } else { key };
        let odd = if self.odd_types {
            format!(", numrange({salt}, {salt} + 1), array['0/1'::pg_lsn, null], 'pg_class'::regclass")
        } else {
            String::new()
        };
        format!(
            "{}, {key}, {u}, 'v' || {salt}, case when {salt} % 3 = 0 then repeat(md5(({salt})::text), 120) end, {salt} / 7.0, array[{salt}, null],
             jsonb_build_object('n', {salt}), '2000-01-01 00:00Z'::timestamptz + {salt} * interval '1 hour 1 microsecond'{odd}",
            self.key(key)
        )
    }

    /// The first key column's value, as SQL.
    pub(crate) fn key(&self, n: &str) -> String {
        match self.key {
            Key::Text => format!("'clé ' || ({n})"),
            Key::Uuid => format!("md5(({n})::text)::uuid"),
            _ => format!("({n})"),
        }
    }
}

/// Options of a mirror, as JSON. Batches are small often enough that transactions are written in parts.
pub(crate) fn mirror_options(random: &mut StdRng) -> String {
    let rows = [40, 300, 5_000, 200_000][random.random_range(0..4)];
    let workers = random.random_range(1..4);
    let interval = ["0", "0", "200 ms"][random.random_range(0..3)];
    format!(
        "{{\"batch_rows_max\": \"{rows}\", \"copy_parallel_workers\": \"{workers}\", \"sync_interval\": \"{interval}\"}}"
    )
}
