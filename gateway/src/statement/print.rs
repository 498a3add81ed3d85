//! Statements as canonical SQL, which parses to the same.

use std::fmt;

use super::{
    AlterPeer, CreateMirror, CreatePeer, GivenOption, MirrorChange, PeerChange, Role, SchemaMap, Selection, Statement,
    Table, TableMap, Until, Value,
};

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Text(text) => f.write_str(pg::name::quote_literal(text).trim_start()),
            Value::Parameter(n) => write!(f, "${n}"),
        }
    }
}

/// Words of our grammar that a name must be quoted to be.
const GRAMMAR_WORDS: &[&str] = &[
    "all",
    "disable",
    "enable",
    "cascade",
    "current_role",
    "current_user",
    "except",
    "exists",
    "for",
    "from",
    "group",
    "if",
    "in",
    "is",
    "keep",
    "lsn",
    "mapping",
    "not",
    "notify",
    "null",
    "on",
    "or",
    "owner",
    "rename",
    "reset",
    "restrict",
    "schema",
    "session_user",
    "set",
    "state",
    "table",
    "tables",
    "timeout",
    "to",
    "when",
    "where",
    "with",
];

/// Prints a name as it must be written.
pub(super) struct Ident<'a>(pub(super) &'a str);

impl fmt::Display for Ident<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = self.0.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && self.0.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            && !GRAMMAR_WORDS.contains(&self.0);
        if plain { f.write_str(self.0) } else { f.write_str(&pg::name::quote_ident(self.0)) }
    }
}

pub(super) fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

pub(super) fn idents(names: &[String]) -> String {
    list(names.iter().map(|n| Ident(n)))
}

pub(super) fn given(options: &[GivenOption]) -> String {
    list(options.iter().map(|o| format!("{} = {}", Ident(&o.name), o.value)))
}

pub(super) fn when(condition: bool, text: &'static str) -> &'static str {
    if condition { text } else { "" }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Statement::CreatePeer(CreatePeer { name, or_replace, if_not_exists, kind, options }) => {
                let (replace, exists) = (when(*or_replace, "OR REPLACE "), when(*if_not_exists, "IF NOT EXISTS "));
                write!(f, "CREATE {replace}PEER {exists}{} FROM {}{}", Ident(name), Ident(kind), With(options))
            }
            Statement::AlterPeer(AlterPeer { name, if_exists, change }) => {
                write!(f, "ALTER PEER {}{} ", when(*if_exists, "IF EXISTS "), Ident(name))?;
                match change {
                    PeerChange::Set(options) => write!(f, "SET ({})", given(options)),
                    PeerChange::Reset(names) => write!(f, "RESET ({})", idents(names)),
                    PeerChange::Rename(name) => write!(f, "RENAME TO {}", Ident(name)),
                    PeerChange::Owner(role) => write!(f, "OWNER TO {role}"),
                    PeerChange::Refresh(schemas) if schemas.is_empty() => f.write_str("REFRESH SCHEMA"),
                    PeerChange::Refresh(schemas) => write!(f, "REFRESH SCHEMA {}", idents(schemas)),
                }
            }
            Statement::ValidatePeer { name, verbose } => {
                write!(f, "VALIDATE PEER {}{}", Ident(name), when(*verbose, " VERBOSE"))
            }
            Statement::CommentOn { noun, name, comment } => {
                write!(f, "COMMENT ON {} {} IS ", noun.as_str().to_uppercase(), Ident(name))?;
                match comment {
                    Some(text) => text.fmt(f),
                    None => f.write_str("NULL"),
                }
            }
            Statement::ShowPeer { name } => write!(f, "SHOW PEER {}", Ident(name)),
            Statement::DropPeer { names, if_exists, cascade } => {
                let exists = when(*if_exists, "IF EXISTS ");
                write!(f, "DROP PEER {exists}{}{}", idents(names), when(*cascade, " CASCADE"))
            }
            Statement::CreateMirror(CreateMirror { name, if_not_exists, source, target, selection, options }) => {
                let exists = when(*if_not_exists, "IF NOT EXISTS ");
                write!(f, "CREATE MIRROR {exists}{} FROM {} TO {} ", Ident(name), Ident(source), Ident(target))?;
                write!(f, "{selection}{}", With(options))
            }
            Statement::DropMirror { names, if_exists, keep_target_metadata, force } => {
                let (exists, keep) =
                    (when(*if_exists, "IF EXISTS "), when(*keep_target_metadata, " KEEP TARGET METADATA"));
                write!(f, "DROP MIRROR {exists}{}{keep}{}", idents(names), when(*force, " FORCE"))
            }
            Statement::ExplainMirror { statement, json } => {
                write!(f, "EXPLAIN {}{statement}", when(*json, "(FORMAT JSON) "))
            }
            Statement::AlterMirror { name, change } => write!(f, "ALTER MIRROR {} {change}", Ident(name)),
            Statement::ResyncMirror { name, if_exists, tables } => {
                write!(f, "RESYNC MIRROR {}{}", when(*if_exists, "IF EXISTS "), Ident(name))?;
                if tables.is_empty() { Ok(()) } else { write!(f, " TABLE {}", list(tables)) }
            }
            Statement::VerifyMirror { name, tables, repair } => {
                write!(f, "VERIFY MIRROR {}", Ident(name))?;
                if !tables.is_empty() {
                    write!(f, " TABLE {}", list(tables))?;
                }
                f.write_str(when(*repair, " REPAIR"))
            }
            Statement::ExecuteMirror { name, if_exists } => {
                write!(f, "EXECUTE MIRROR {}{}", when(*if_exists, "IF EXISTS "), Ident(name))
            }
            Statement::PauseMirror { name, if_exists } => {
                write!(f, "PAUSE MIRROR {}{}", when(*if_exists, "IF EXISTS "), Ident(name))
            }
            Statement::ResumeMirror { name, if_exists } => {
                write!(f, "RESUME MIRROR {}{}", when(*if_exists, "IF EXISTS "), Ident(name))
            }
            Statement::WaitForMirror { name, until, timeout } => {
                write!(f, "WAIT FOR MIRROR {}", Ident(name))?;
                match until {
                    Until::CaughtUp => {}
                    Until::Lsn(lsn) => write!(f, " LSN {lsn}")?,
                    Until::State(state) => write!(f, " STATE {state}")?,
                }
                timeout.as_ref().map_or(Ok(()), |t| write!(f, " TIMEOUT {t}"))
            }
            Statement::GrantPeer { peers, roles } => {
                write!(f, "GRANT USAGE ON PEER {} TO {}", idents(peers), list(roles))
            }
            Statement::RevokePeer { peers, roles } => {
                write!(f, "REVOKE USAGE ON PEER {} FROM {}", idents(peers), list(roles))
            }
            Statement::CreateAlert(alert) => alert.fmt(f),
            Statement::AlterAlert(alert) => alert.fmt(f),
            Statement::DropAlert { names, if_exists } => {
                write!(f, "DROP ALERT {}{}", when(*if_exists, "IF EXISTS "), idents(names))
            }
            Statement::TestAlert { name } => write!(f, "TEST ALERT {}", Ident(name)),
            Statement::WaitForAlert { name, timeout } => {
                write!(f, "WAIT FOR ALERT {}", Ident(name))?;
                timeout.as_ref().map_or(Ok(()), |t| write!(f, " TIMEOUT {t}"))
            }
            Statement::ShowAlerts => f.write_str("SHOW ALERTS"),
            Statement::ShowAlert { name } => write!(f, "SHOW ALERT {}", Ident(name)),
            Statement::ShowPeers => f.write_str("SHOW PEERS"),
            Statement::ShowMirrors => f.write_str("SHOW MIRRORS"),
            Statement::ShowMirror { name } => write!(f, "SHOW MIRROR {}", Ident(name)),
            Statement::ShowTasks => f.write_str("SHOW TASKS"),
            Statement::ShowTask { id } => write!(f, "SHOW TASK {id}"),
            Statement::CancelTask { id } => write!(f, "CANCEL TASK {id}"),
            Statement::Help { words } => {
                f.write_str("HELP")?;
                words.iter().try_for_each(|word| write!(f, " {}", Ident(word)))
            }
        }
    }
}

impl fmt::Display for MirrorChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MirrorChange::AddTables(maps) => write!(f, "ADD TABLE {}", list(maps)),
            MirrorChange::AlterTable(map) => write!(f, "ALTER TABLE {map}"),
            MirrorChange::DropTables(tables) => write!(f, "DROP TABLE {}", list(tables)),
            MirrorChange::RefreshTables => f.write_str("REFRESH TABLES"),
            MirrorChange::SkipTo(lsn) => write!(f, "SKIP TO LSN {lsn}"),
            MirrorChange::Set(options) => {
                write!(f, "SET ({})", list(options.iter().map(|o| format!("{} = {}", Ident(&o.name), o.value))))
            }
            MirrorChange::Reset(names) => write!(f, "RESET ({})", idents(names)),
            MirrorChange::RenameTo(name) => write!(f, "RENAME TO {}", Ident(name)),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Named(name) => Ident(name).fmt(f),
            Role::Current => f.write_str("CURRENT_USER"),
            Role::Session => f.write_str("SESSION_USER"),
        }
    }
}

/// Prints ` WITH ( … )`, or nothing when there are no options.
pub(super) struct With<'a>(pub(super) &'a [GivenOption]);

impl fmt::Display for With<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, " WITH ({})", given(self.0))
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let except = match self {
            Selection::All { except } => {
                f.write_str("FOR ALL TABLES")?;
                except
            }
            Selection::Schemas { schemas, except } => {
                write!(f, "FOR TABLES IN SCHEMA {}", list(schemas))?;
                except
            }
            Selection::Tables(maps) => return write!(f, "FOR TABLE {}", list(maps)),
            Selection::Query(query) => return write!(f, "FOR {}", Query(query)),
        };
        if except.is_empty() { Ok(()) } else { write!(f, " EXCEPT ({})", list(except)) }
    }
}

/// Prints a query in dollar quotes, as people write it, if it can stand between them.
struct Query<'a>(&'a Value);

impl fmt::Display for Query<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Value::Text(text) if !text.contains("$$") && !text.ends_with('$') => write!(f, "$${text}$$"),
            other => other.fmt(f),
        }
    }
}

impl fmt::Display for SchemaMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Ident(&self.from))?;
        if self.to == self.from { Ok(()) } else { write!(f, " TO {}", Ident(&self.to)) }
    }
}

impl fmt::Display for TableMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.from)?;
        if !self.columns.is_empty() {
            write!(f, " ({})", idents(&self.columns))?;
        }
        if !self.exclude.is_empty() {
            write!(f, " EXCEPT ({})", idents(&self.exclude))?;
        }
        if let Some(condition) = &self.condition {
            write!(f, " WHERE ({condition})")?;
        }
        if self.to == self.from { Ok(()) } else { write!(f, " TO {}", self.to) }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", Ident(&self.schema), Ident(&self.name))
    }
}
