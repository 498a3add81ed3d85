//! What was asked for: which tables, from where to where, and how.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pg::{Lsn, TableName};
use serde_json::Value;
use tokio_postgres::GenericClient;

use super::query::{QueryMirror, query_mirror};
use super::{Applied, lsn};
use crate::peer::PeerOptions;
use crate::{Catalog, Error};

/// What a mirror does with the rows that are there when it is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Copy them, then stream what changes.
    CopyAndStream,
    /// Copy them and be done.
    CopyOnly,
    /// Stream what changes from now on.
    StreamOnly,
}

/// What a row that cannot be written does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// It stops the mirror.
    Stop,
    /// It stops its table; the others go on.
    QuarantineTable,
}

/// What a mirror does about changes of its tables' schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ddl {
    /// The target is changed alike.
    Apply,
    /// The mirror stops there until the target has been changed.
    Block,
    /// The target is left alone; columns that it lacks are left out.
    Ignore,
}

/// A mirror's options, with defaults filled in.
#[derive(Clone, Debug)]
pub struct MirrorOptions {
    /// Copy, stream, or both.
    pub mode: Mode,
    /// Create tables that the target lacks.
    pub create_tables: bool,
    /// Create secondary indexes on tables that the mirror created.
    pub copy_indexes: bool,
    /// What is done about changes of schema.
    pub ddl: Ddl,
    /// Create CHECK and foreign key constraints on tables that the mirror created.
    pub copy_constraints: bool,
    /// Keep the target's sequences at or ahead of the source's.
    pub copy_sequences: bool,
    /// Empty target tables that hold rows before they are copied.
    pub truncate_target: bool,
    /// Sessions that copy at the same time; at least 1.
    pub copy_parallel_workers: usize,
    /// Row changes after which a batch is written; at least 1.
    pub batch_rows_max: usize,
    /// Bytes of row changes after which a batch is written.
    pub batch_bytes_max: usize,
    /// What a row that cannot be written does.
    pub on_error: OnError,
    /// Memory that changes may take which were read and not written yet.
    pub memory_max: usize,
    /// Shortest time between two commits on the target; zero: none.
    pub sync_interval: Duration,
    /// Silence after which a connection to a peer is taken for dead.
    pub silence_max: Duration,
    /// Mark the transactions on the target with a replication origin, if the role may.
    pub replication_origin: bool,
    /// Make the slot one that standbys of the source can synchronize.
    pub failover_slot: bool,
    /// How often a heartbeat is sent from the source to the target; zero: never.
    pub heartbeat_interval: Duration,
    /// What the target's tables have besides the source's columns.
    pub bookkeeping: Bookkeeping,
}

/// Columns that only the target has, and the mirror writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bookkeeping {
    /// True in rows that were deleted on the source, which stay; `None`: they go.
    pub soft_delete: Option<String>,
    /// When the mirror wrote the row last: the time of the target's transaction.
    pub synced_at: Option<String>,
}

impl Bookkeeping {
    /// Returns whether a column of that name is one of these.
    pub fn has(&self, column: &str) -> bool {
        [&self.soft_delete, &self.synced_at].into_iter().flatten().any(|name| name == column)
    }
}

/// The least silence that can mean anything: a walsender is asked to answer every ten seconds.
const SILENCE_MIN: Duration = Duration::from_secs(15);

/// A day: who asks for more means never.
const SILENCE_LIMIT: Duration = Duration::from_secs(86_400);

impl MirrorOptions {
    fn from_value(value: &Value) -> Result<MirrorOptions, Error> {
        let text = |name: &str| {
            value
                .get(name)
                .and_then(Value::as_str)
                .ok_or_else(|| Error::Unexpected(format!("option {name} is missing")))
        };
        let number = |name: &str| -> Result<usize, Error> {
            text(name)?.parse().map_err(|_| Error::Unexpected(format!("option {name} is not a number")))
        };
        let seconds = |name: &str| -> Result<Duration, Error> {
            let seconds = text(name)?.parse::<f64>().ok().filter(|s| s.is_finite() && *s > 0.0).unwrap_or(0.0);
            Ok(Duration::from_secs_f64(seconds))
        };
        // PeerDB's way to say none is an empty name.
        let name =
            |option: &str| value.get(option).and_then(Value::as_str).filter(|name| !name.is_empty()).map(str::to_owned);
        Ok(MirrorOptions {
            mode: match text("mode")? {
                "copy_and_stream" => Mode::CopyAndStream,
                "copy_only" => Mode::CopyOnly,
                "stream_only" => Mode::StreamOnly,
                other => return Err(Error::Unexpected(format!("mode {other}"))),
            },
            create_tables: text("create_tables")? == "true",
            copy_indexes: text("copy_indexes")? == "true",
            ddl: match text("ddl")? {
                "apply" => Ddl::Apply,
                "block" => Ddl::Block,
                "ignore" => Ddl::Ignore,
                other => return Err(Error::Unexpected(format!("ddl {other}"))),
            },
            copy_constraints: text("copy_constraints")? == "true",
            copy_sequences: text("copy_sequences")? == "true",
            truncate_target: text("truncate_target")? == "true",
            copy_parallel_workers: number("copy_parallel_workers")?.max(1),
            batch_rows_max: number("batch_rows_max")?.max(1),
            batch_bytes_max: number("batch_bytes_max")?,
            on_error: if text("on_error")? == "quarantine_table" { OnError::QuarantineTable } else { OnError::Stop },
            memory_max: number("memory_max")?,
            sync_interval: seconds("sync_interval")?,
            silence_max: seconds("wal_receiver_timeout")?.clamp(SILENCE_MIN, SILENCE_LIMIT),
            replication_origin: text("replication_origin")? == "true",
            failover_slot: text("failover_slot")? == "true",
            heartbeat_interval: seconds("heartbeat_interval")?,
            bookkeeping: if text("disable_peerdb_columns")? == "true" {
                Bookkeeping::default()
            } else {
                Bookkeeping { soft_delete: name("soft_delete_column"), synced_at: name("synced_at_column") }
            },
        })
    }
}

/// Which columns of a table a mirror takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnChoice {
    /// Only these; `None`: all.
    pub only: Option<Vec<String>>,
    /// Not these.
    pub except: Vec<String>,
}

impl ColumnChoice {
    /// Returns whether the mirror takes the column.
    pub fn takes(&self, column: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|c| c == column))
            && !self.except.iter().any(|c| c == column)
    }
}

/// One table that a mirror names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedTable {
    /// On the source.
    pub source: TableName,
    /// On the target.
    pub target: TableName,
    /// Which of its columns.
    pub columns: ColumnChoice,
    /// Which of its rows, in SQL for the source; `None`: all.
    pub condition: Option<String>,
}

/// Which tables a mirror takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All tables of the database but these.
    All {
        /// Tables that are left out.
        except: Vec<TableName>,
    },
    /// All tables of these schemas (source schema → target schema) but these.
    Schemas {
        /// Target schema by source schema.
        schemas: BTreeMap<String, String>,
        /// Tables that are left out.
        except: Vec<TableName>,
    },
    /// These tables.
    Tables(Vec<SelectedTable>),
    /// None: the mirror is one of a query ([`Mirror::query`]).
    Query,
}

impl Selection {
    /// Returns whether the mirror takes a table of that name on the source, if there is one.
    pub fn takes(&self, table: &TableName) -> bool {
        match self {
            Selection::All { except } => !except.contains(table),
            Selection::Schemas { schemas, except } => schemas.contains_key(&table.schema) && !except.contains(table),
            Selection::Tables(tables) => tables.iter().any(|t| t.source == *table),
            Selection::Query => false,
        }
    }

    /// Reads the selection as `mirror_definitions.selection` holds it.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if it has none of the documented forms.
    pub fn from_value(value: &Value) -> Result<Selection, Error> {
        let bad = || Error::Unexpected(format!("selection {value}"));
        let table = |v: &Value| -> Option<TableName> {
            Some(TableName::new(v.get("schema")?.as_str()?, v.get("name")?.as_str()?))
        };
        let names = |v: Option<&Value>| -> Option<Vec<String>> {
            v?.as_array()?.iter().map(|n| n.as_str().map(str::to_owned)).collect()
        };
        let except = || -> Option<Vec<TableName>> {
            value.get("except").map_or(Some(Vec::new()), |e| e.as_array()?.iter().map(table).collect())
        };
        if value.get("all").and_then(Value::as_bool) == Some(true) {
            return Ok(Selection::All { except: except().ok_or_else(bad)? });
        }
        if value.get("query").is_some_and(Value::is_string) {
            return Ok(Selection::Query);
        }
        if let Some(schemas) = value.get("schemas") {
            let pair = |v: &Value| Some((v.get("from")?.as_str()?.to_owned(), v.get("to")?.as_str()?.to_owned()));
            let schemas = schemas.as_array().and_then(|s| s.iter().map(pair).collect());
            return Ok(Selection::Schemas { schemas: schemas.ok_or_else(bad)?, except: except().ok_or_else(bad)? });
        }
        let selected = |v: &Value| {
            Some(SelectedTable {
                source: table(v.get("from")?)?,
                target: table(v.get("to")?)?,
                columns: ColumnChoice {
                    only: match v.get("columns") {
                        None | Some(Value::Null) => None,
                        given => Some(names(given)?),
                    },
                    except: v.get("exclude").map_or(Some(Vec::new()), |e| names(Some(e)))?,
                },
                condition: match v.get("where") {
                    None | Some(Value::Null) => None,
                    Some(given) => Some(given.as_str()?.to_owned()),
                },
            })
        };
        let tables = value.get("tables").and_then(Value::as_array).and_then(|t| t.iter().map(selected).collect());
        tables.map(Selection::Tables).ok_or_else(bad)
    }
}

/// A mirror as the engine needs it.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Identifies the mirror.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// Name of its slot, publication and progress.
    pub object_name: String,
    /// The source peer's name.
    pub source_name: String,
    /// How to connect to the source.
    pub source: PeerOptions,
    /// The target peer's name.
    pub target_name: String,
    /// How to connect to the target.
    pub target: PeerOptions,
    /// Which tables.
    pub selection: Selection,
    /// How.
    pub options: MirrorOptions,
    /// Which query, and how its rows are written, if the mirror is one of a query: the options above then have their defaults.
    pub query: Option<Arc<QueryMirror>>,
    /// Source transactions that commit exactly here are left out.
    pub skips: Vec<Lsn>,
    /// What the state was when it was read.
    pub state: String,
    /// The source's system identifier when the slot was made.
    pub system_id: Option<String>,
    /// The source's timeline when it was last seen.
    pub timeline: Option<i32>,
    /// Numbers by which the mirror's publications are known again.
    pub publications: Vec<u32>,
    /// The slot's consistent point; `None` before the slot is made.
    pub snapshot_lsn: Option<Lsn>,
    /// The copy is complete on the target.
    pub copied: bool,
    /// Row changes, bytes and transactions applied so far.
    pub applied: Applied,
}

impl Catalog {
    /// Reads a mirror with its peers, their secrets opened; `None` when it was dropped.
    ///
    /// # Errors
    /// [`Error::Secret`] if a secret cannot be opened, [`Error::Unexpected`] if the definition cannot be read.
    pub async fn mirror(&self, mirror_id: i64) -> Result<Option<Mirror>, Error> {
        self.read_mirror(&**self.client().await?, mirror_id).await
    }

    /// As [`Catalog::mirror`], as a session sees it.
    pub(crate) async fn read_mirror(
        &self,
        client: &impl GenericClient,
        mirror_id: i64,
    ) -> Result<Option<Mirror>, Error> {
        let query = "
            select d.name, d.object_name, s.name, peergate.peer_document(s.id), t.name, peergate.peer_document(t.id), d.selection,
                   (select jsonb_object_agg(o.name, case o.type when 'interval' then extract(epoch from v.value::interval)::text
                                                                when 'bytes' then pg_size_bytes(v.value)::text else v.value end)
                    from peergate.settings o, lateral (select coalesce(case when not d.selection ? 'query' then d.options ->> o.name end, o.default_value) as value) v
                    where o.scope = 'mirror' and o.alias_of is null),
                   r.state, r.system_id, r.snapshot_lsn::text, r.copied_at is not null,
                   r.rows_applied, r.bytes_applied, r.transactions_applied, r.timeline, r.publications, d.skip_lsns::text[]
            from peergate.mirror_definitions d
            join peergate.peers s on s.id = d.source_id
            join peergate.peers t on t.id = d.target_id
            join peergate.mirror_runtime r on r.mirror_id = d.id
            where d.id = $1";
        let Some(row) = client.query_opt(query, &[&mirror_id]).await? else { return Ok(None) };
        let selection = Selection::from_value(&row.get(6))?;
        let of_query =
            if selection == Selection::Query { Some(Arc::new(query_mirror(client, mirror_id).await?)) } else { None };
        Ok(Some(Mirror {
            id: mirror_id,
            name: row.get(0),
            object_name: row.get(1),
            source_name: row.get(2),
            source: PeerOptions::from_document(&row.get(3), self.keyring())?,
            target_name: row.get(4),
            target: PeerOptions::from_document(&row.get(5), self.keyring())?,
            selection,
            query: of_query,
            options: MirrorOptions::from_value(&row.get(7))?,
            skips: row.get::<_, Vec<String>>(17).iter().filter_map(|lsn| lsn.parse().ok()).collect(),
            state: row.get(8),
            system_id: row.get(9),
            snapshot_lsn: lsn(&row, 10),
            copied: row.get(11),
            timeline: row.get(15),
            publications: row.get::<_, Option<Vec<u32>>>(16).unwrap_or_default(),
            applied: Applied { rows: row.get(12), bytes: row.get(13), transactions: row.get(14) },
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selections_are_read_in_all_their_forms() {
        let table = |s: &str, n: &str| TableName::new(s, n);
        assert_eq!(
            Selection::from_value(&json!({"all": true, "except": [{"schema": "a", "name": "b"}]})).unwrap(),
            Selection::All { except: vec![table("a", "b")] }
        );
        assert_eq!(
            Selection::from_value(&json!({"schemas": [{"from": "a", "to": "b"}]})).unwrap(),
            Selection::Schemas { schemas: BTreeMap::from([("a".into(), "b".into())]), except: Vec::new() }
        );
        let tables = json!({"tables": [{"from": {"schema": "a", "name": "t"}, "to": {"schema": "b", "name": "u"}, "columns": null, "exclude": ["x"]}]});
        let Selection::Tables(tables) = Selection::from_value(&tables).unwrap() else { panic!("not tables") };
        let named = Selection::Tables(tables.clone());
        assert!(named.takes(&table("a", "t")) && !named.takes(&table("b", "u")));
        assert_eq!((&tables[0].source, &tables[0].target), (&table("a", "t"), &table("b", "u")));
        assert!(tables[0].columns.takes("y") && !tables[0].columns.takes("x"));
    }

    #[test]
    fn what_is_no_selection_is_an_error() {
        for value in [
            json!({}),
            json!({"tables": [{}]}),
            json!({"schemas": 1}),
            json!({"all": false}),
            json!({"all": true, "except": [1]}),
        ] {
            assert!(Selection::from_value(&value).is_err(), "{value}");
        }
    }
}
