//! Our statements as values, and their canonical text.
//!
//! `parser` makes them and `rewrite` turns them into catalog calls. Printing one and parsing it again gives the same value. The
//! text of a CREATE PEER holds its password: it is for tests and for the parser, never for a log.

mod alert;
mod print;

use std::fmt;

use catalog::peer::may_be_secret;

pub use alert::{AlertChange, AlertChannel, AlertCondition, AlertOn, AlterAlert, CreateAlert};

/// One of our statements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// `CREATE PEER`.
    CreatePeer(CreatePeer),
    /// `ALTER PEER`.
    AlterPeer(AlterPeer),
    /// `VALIDATE PEER`.
    ValidatePeer {
        /// The peer.
        name: String,
        /// The grants that it needs are shown, too.
        verbose: bool,
    },
    /// `DROP PEER`.
    DropPeer {
        /// The peers, at least one.
        names: Vec<String>,
        /// A missing one is a NOTICE.
        if_exists: bool,
        /// Mirrors that use them are dropped too.
        cascade: bool,
    },
    /// `CREATE MIRROR`.
    CreateMirror(CreateMirror),
    /// `DROP MIRROR`.
    DropMirror {
        /// The mirrors, at least one.
        names: Vec<String>,
        /// A missing one is a NOTICE.
        if_exists: bool,
        /// The progress row on the target stays.
        keep_target_metadata: bool,
        /// A peer that cannot be reached is given up.
        force: bool,
    },
    /// `ALTER MIRROR`.
    AlterMirror {
        /// The mirror.
        name: String,
        /// What is changed.
        change: MirrorChange,
    },
    /// `EXPLAIN` of CREATE or ALTER MIRROR.
    ExplainMirror {
        /// What is explained.
        statement: Box<Statement>,
        /// As JSON.
        json: bool,
    },
    /// `RESYNC MIRROR`.
    ResyncMirror {
        /// The mirror.
        name: String,
        /// A missing one is a NOTICE.
        if_exists: bool,
        /// These tables; empty: all of it.
        tables: Vec<Table>,
    },
    /// `VERIFY MIRROR`.
    VerifyMirror {
        /// The mirror.
        name: String,
        /// These tables; empty: all of it.
        tables: Vec<Table>,
        /// Rows that differ are mended.
        repair: bool,
    },
    /// `EXECUTE MIRROR`.
    ExecuteMirror {
        /// The mirror, which is one of a query.
        name: String,
        /// A missing one is a NOTICE.
        if_exists: bool,
    },
    /// `PAUSE MIRROR`.
    PauseMirror {
        /// The mirror.
        name: String,
        /// A missing one is a NOTICE.
        if_exists: bool,
    },
    /// `RESUME MIRROR`.
    ResumeMirror {
        /// The mirror.
        name: String,
        /// A missing one is a NOTICE.
        if_exists: bool,
    },
    /// `WAIT FOR MIRROR`.
    WaitForMirror {
        /// The mirror.
        name: String,
        /// What is waited for.
        until: Until,
        /// How long at the most, as an interval.
        timeout: Option<Value>,
    },
    /// `GRANT USAGE ON PEER`.
    GrantPeer {
        /// The peers, at least one.
        peers: Vec<String>,
        /// Who is to have it, at least one.
        roles: Vec<Role>,
    },
    /// `REVOKE USAGE ON PEER`.
    RevokePeer {
        /// The peers, at least one.
        peers: Vec<String>,
        /// Who is to have it no more, at least one.
        roles: Vec<Role>,
    },
    /// `CREATE ALERT`.
    CreateAlert(CreateAlert),
    /// `ALTER ALERT`.
    AlterAlert(AlterAlert),
    /// `DROP ALERT`.
    DropAlert {
        /// The alerts, at least one.
        names: Vec<String>,
        /// A missing one is a NOTICE.
        if_exists: bool,
    },
    /// `TEST ALERT`.
    TestAlert {
        /// The alert.
        name: String,
    },
    /// `WAIT FOR ALERT`.
    WaitForAlert {
        /// The alert.
        name: String,
        /// How long at the most, as an interval.
        timeout: Option<Value>,
    },
    /// `SHOW ALERTS`.
    ShowAlerts,
    /// `SHOW ALERT`.
    ShowAlert {
        /// The alert.
        name: String,
    },
    /// `COMMENT ON PEER`, `MIRROR` and `ALERT`.
    CommentOn {
        /// What kind of thing.
        noun: Noun,
        /// Its name.
        name: String,
        /// The comment; `None` takes it away.
        comment: Option<Value>,
    },
    /// `SHOW PEERS`.
    ShowPeers,
    /// `SHOW PEER`.
    ShowPeer {
        /// The peer.
        name: String,
    },
    /// `SHOW MIRRORS`.
    ShowMirrors,
    /// `SHOW MIRROR`.
    ShowMirror {
        /// The mirror.
        name: String,
    },
    /// `SHOW TASKS`.
    ShowTasks,
    /// `SHOW TASK`.
    ShowTask {
        /// The task's number.
        id: Value,
    },
    /// `CANCEL TASK`.
    CancelTask {
        /// The task's number.
        id: Value,
    },
    /// `HELP`.
    Help {
        /// On what, word by word; empty: on everything.
        words: Vec<String>,
    },
}

impl Statement {
    /// Returns the options of a statement for which the gateway finds something out before it goes on, or seals secrets; `None` for the others.
    pub fn inspected_options(&self) -> Option<Vec<Inspected<'_>>> {
        let of_peer = |options| Some(inspected(options));
        match self {
            Statement::CreatePeer(peer) => of_peer(&peer.options),
            Statement::AlterPeer(AlterPeer { change: PeerChange::Set(options), .. }) => of_peer(options),
            Statement::AlterPeer(AlterPeer { change: PeerChange::Reset(_), .. })
            | Statement::ValidatePeer { .. }
            | Statement::ExplainMirror { .. } => Some(Vec::new()),
            Statement::CreateAlert(alert) => Some(alert::inspected(&alert.channels)),
            Statement::AlterAlert(AlterAlert { change: AlertChange::Define { channels, .. }, .. })
                if !channels.is_empty() =>
            {
                Some(alert::inspected(channels))
            }
            _ => None,
        }
    }
}

/// An option that the gateway looks at itself.
#[derive(Clone, Debug)]
pub struct Inspected<'a> {
    /// The part of the statement that it is, as errors name it: `option.host`, `channel.1.option.url`.
    pub part: String,
    /// The option.
    pub option: &'a GivenOption,
    /// Its value may be a secret, which the catalog must not see.
    pub may_be_secret: bool,
}

fn inspected(options: &[GivenOption]) -> Vec<Inspected<'_>> {
    options
        .iter()
        .map(|option| Inspected {
            part: format!("option.{}", option.name),
            option,
            may_be_secret: may_be_secret(&option.name),
        })
        .collect()
}

/// `CREATE PEER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatePeer {
    /// The new peer's name.
    pub name: String,
    /// An existing one gets these options.
    pub or_replace: bool,
    /// An existing one is a NOTICE.
    pub if_not_exists: bool,
    /// The kind of database, as written.
    pub kind: String,
    /// Options in the order given, secrets among them.
    pub options: Vec<GivenOption>,
}

/// `ALTER PEER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlterPeer {
    /// The peer.
    pub name: String,
    /// A missing one is a NOTICE.
    pub if_exists: bool,
    /// What is to be changed.
    pub change: PeerChange,
}

/// What ALTER PEER changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerChange {
    /// `SET ( … )`: these options get these values.
    Set(Vec<GivenOption>),
    /// `RESET ( … )`: these options have their defaults again.
    Reset(Vec<String>),
    /// `RENAME TO`.
    Rename(String),
    /// `OWNER TO`.
    Owner(Role),
    /// `REFRESH SCHEMA`: these schemas' foreign tables; empty: all.
    Refresh(Vec<String>),
}

/// What can have a comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noun {
    /// A peer.
    Peer,
    /// A mirror.
    Mirror,
    /// An alert.
    Alert,
}

impl Noun {
    /// Returns the word for it, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Noun::Peer => "peer",
            Noun::Mirror => "mirror",
            Noun::Alert => "alert",
        }
    }
}

/// `CREATE MIRROR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateMirror {
    /// The new mirror's name.
    pub name: String,
    /// An existing one is a NOTICE.
    pub if_not_exists: bool,
    /// The peer it reads from.
    pub source: String,
    /// The peer it writes to.
    pub target: String,
    /// Which tables.
    pub selection: Selection,
    /// Options in the order given.
    pub options: Vec<GivenOption>,
}

/// What ALTER MIRROR changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorChange {
    /// `ADD TABLE`.
    AddTables(Vec<TableMap>),
    /// `ALTER TABLE`.
    AlterTable(TableMap),
    /// `DROP TABLE`.
    DropTables(Vec<Table>),
    /// `REFRESH TABLES`.
    RefreshTables,
    /// `SKIP TO LSN`.
    SkipTo(Value),
    /// `SET ( … )`.
    Set(Vec<GivenOption>),
    /// `RESET ( … )`.
    Reset(Vec<String>),
    /// `RENAME TO`.
    RenameTo(String),
}

/// A role as GRANT and REVOKE name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// By its name; `public` is all roles, as in Postgres.
    Named(String),
    /// `CURRENT_USER` or `CURRENT_ROLE`.
    Current,
    /// `SESSION_USER`.
    Session,
}

/// What WAIT FOR MIRROR waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Until {
    /// All that the source had committed when the statement came.
    CaughtUp,
    /// A position in the source's WAL.
    Lsn(Value),
    /// A state of the mirror.
    State(Value),
}

/// Which tables a mirror copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All of the source's.
    All {
        /// But not these.
        except: Vec<Table>,
    },
    /// All of some schemas.
    Schemas {
        /// The schemas, at least one.
        schemas: Vec<SchemaMap>,
        /// But not these tables.
        except: Vec<Table>,
    },
    /// The tables listed, at least one.
    Tables(Vec<TableMap>),
    /// None: the rows of this query, in SQL of the source.
    Query(Value),
}

/// A schema and where its tables go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaMap {
    /// The schema on the source.
    pub from: String,
    /// The schema on the target.
    pub to: String,
}

/// A table and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableMap {
    /// The table on the source.
    pub from: Table,
    /// The table on the target.
    pub to: Table,
    /// Only these columns; empty: all.
    pub columns: Vec<String>,
    /// All columns but these.
    pub exclude: Vec<String>,
    /// Only the rows that fulfil it; as it was written, without the parentheses.
    pub condition: Option<String>,
}

impl TableMap {
    /// A whole table.
    pub fn new(from: Table, to: Table) -> TableMap {
        TableMap { from, to, columns: Vec::new(), exclude: Vec::new(), condition: None }
    }
}

/// A table's name; `schema` is `public` when none was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The schema.
    pub schema: String,
    /// The table.
    pub name: String,
}

/// An option of `WITH ( … )`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenOption {
    /// The option's name, folded.
    pub name: String,
    /// Its value.
    pub value: Value,
}

/// A value: literal text, whatever form it was written in, or a parameter.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    /// A string, number or word.
    Text(String),
    /// `$n`.
    Parameter(u16),
}

/// Shows no text: it may be a password.
impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Text(_) => f.write_str("Text(…)"),
            Value::Parameter(n) => write!(f, "Parameter({n})"),
        }
    }
}
