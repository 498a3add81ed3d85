//! The grammar of our statements, on sqlparser's tokenizer; one file per noun.
//!
//! Only statements that begin with our words are looked at. Whatever is not one of ours is PostgreSQL's: nothing is ever rejected
//! here because it is unknown. Options are only read: which exist and what they take is the catalog's to say.
//! The parser crate's types do not leave this module.

mod alert;
mod comment;
mod cursor;
pub(crate) mod execute;
mod explain;
mod help;
mod mirror;
mod options;
mod peer;
mod privileges;
mod tables;
mod task;

use pg::SqlState;

use crate::split::Slice;
use crate::statement::Statement;
use cursor::Cursor;
pub(crate) use cursor::{NAME_BYTES_MAX, truncated};
pub use execute::ExecutePeer;

/// What a statement of a query text is to us.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// One of ours.
    Ours(Box<Ours>),
    /// It begins as one of ours and must fail.
    Refused(Refusal),
    /// A text for a peer. [`parse`] does not know the peers and never says this: [`crate::rewrite::plan_with`] does.
    Execute(ExecutePeer),
    /// The schema that stands for the first two parts of a table's name; not from [`parse`] either.
    Relation(String),
    /// Not ours.
    Theirs,
}

/// One of our statements, and where its parts are.
#[derive(Debug, PartialEq, Eq)]
pub struct Ours {
    /// What it says.
    pub statement: Statement,
    /// Where its parts are.
    pub spans: Spans,
}

/// Why a statement that begins as one of ours cannot be obeyed.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of error; 42601 fails the whole text, as PostgreSQL's own syntax errors do.
    pub sqlstate: SqlState,
    /// The message; never with a literal's text in it.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// Where, in characters from the start of the statement.
    pub at: usize,
}

impl Refusal {
    fn unsupported(what: &str, at: usize) -> Refusal {
        Refusal {
            sqlstate: SqlState::FEATURE_NOT_SUPPORTED,
            message: format!("{what} is not supported yet"),
            detail: None,
            hint: None,
            at,
        }
    }
}

/// Where the parts of a statement are, by the keys that the catalog's errors name them with: `name`, `name.2`, `type`, `source`,
/// `target`, `new_name`, `state`, `task`, `role`, `role.1`, `schema.1`, `tables`, `table.3`, `query`, `options`, `option.host`, `option.host.value`,
/// `on`, `condition.1.value`, `channel.2.option.url.value`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(Vec<(String, usize)>);

impl Spans {
    fn add(&mut self, key: impl Into<String>, at: usize) {
        self.0.push((key.into(), at));
    }

    /// The only part is where a refusal stands.
    pub(crate) fn refusal(at: usize) -> Spans {
        Spans(vec![("refusal".to_owned(), at)])
    }

    /// The only part that can be at fault is the name.
    pub(crate) fn name(at: usize) -> Spans {
        Spans(vec![("name".to_owned(), at)])
    }

    /// Returns where a part is, in characters from the start of the statement. For one that was not written, where what holds it
    /// is: `option.host.value`, then `option.host`, then `options`.
    pub fn find(&self, key: &str) -> Option<usize> {
        let exact = |key: &str| self.0.iter().find(|(k, _)| k == key).map(|(_, at)| *at);
        let mut key = key;
        loop {
            if let Some(at) = exact(key) {
                return Some(at);
            }
            match key.rsplit_once('.') {
                Some((holder, _)) => key = holder,
                None => break,
            }
        }
        match key {
            "option" => exact("options").or_else(|| exact("name")),
            "table" => exact("tables"),
            "condition" => exact("on").or_else(|| exact("name")),
            "name" => exact("name.1"),
            "options" => exact("name"),
            _ => None,
        }
    }
}

/// Reads one statement; `text` is its slice of the query text.
///
/// Never fails on what is not ours: that is [`Parsed::Theirs`].
pub fn parse(slice: &Slice, query: &[u8], text: &str) -> Parsed {
    let begins = |words: &[&str]| slice.begins_with(query, words);
    let ends_with_word = |index: usize| slice.word(index).is_some_and(|word| word.end == slice.range.end);
    let read: fn(&mut Cursor<'_>) -> Result<Ours, Refusal> =
        if begins(&["CREATE", "PEER"]) || begins(&["CREATE", "OR", "REPLACE", "PEER"]) {
            peer::create
        } else if begins(&["HELP"]) {
            help::help
        } else if begins(&["VALIDATE", "PEER"]) {
            peer::validate
        } else if begins(&["ALTER", "PEER"]) {
            peer::alter
        } else if begins(&["DROP", "PEER"]) {
            peer::drop
        } else if begins(&["EXPLAIN"]) && explain::is_ours(text) {
            explain::explain
        } else if begins(&["CREATE", "MIRROR"]) {
            mirror::create
        } else if begins(&["ALTER", "MIRROR"]) {
            mirror::alter
        } else if begins(&["RESYNC", "MIRROR"]) {
            mirror::resync
        } else if begins(&["VERIFY", "MIRROR"]) {
            mirror::verify
        } else if begins(&["DROP", "MIRROR"]) {
            mirror::drop
        } else if begins(&["PAUSE", "MIRROR"]) || begins(&["RESUME", "MIRROR"]) {
            mirror::pause_or_resume
        } else if begins(&["EXECUTE", "MIRROR"]) && is_followed_by_name(slice, query) {
            mirror::execute
        } else if begins(&["WAIT", "FOR", "MIRROR"]) {
            mirror::wait
        } else if begins(&["CREATE", "ALERT"]) || begins(&["CREATE", "OR", "REPLACE", "ALERT"]) {
            alert::create
        } else if begins(&["ALTER", "ALERT"]) {
            alert::alter
        } else if begins(&["DROP", "ALERT"]) {
            alert::drop
        } else if begins(&["TEST", "ALERT"]) {
            alert::test
        } else if begins(&["WAIT", "FOR", "ALERT"]) {
            alert::wait
        } else if begins(&["SHOW", "ALERTS"]) && ends_with_word(1) {
            |_| Ok(Ours { statement: Statement::ShowAlerts, spans: Spans::default() })
        } else if begins(&["SHOW", "ALERT"]) && !ends_with_word(1) && !is_setting(slice, query) {
            alert::show
        } else if begins(&["SHOW", "PEERS"]) && ends_with_word(1) {
            |_| Ok(Ours { statement: Statement::ShowPeers, spans: Spans::default() })
        } else if begins(&["SHOW", "MIRRORS"]) && ends_with_word(1) {
            |_| Ok(Ours { statement: Statement::ShowMirrors, spans: Spans::default() })
        } else if begins(&["SHOW", "TASKS"]) && ends_with_word(1) {
            |_| Ok(Ours { statement: Statement::ShowTasks, spans: Spans::default() })
        } else if begins(&["SHOW", "MIRROR"]) && !ends_with_word(1) && !is_setting(slice, query) {
            mirror::show
        } else if begins(&["SHOW", "PEER"]) && !ends_with_word(1) && !is_setting(slice, query) {
            peer::show
        } else if begins(&["SHOW", "TASK"]) && !ends_with_word(1) && !is_setting(slice, query) {
            task::show
        } else if begins(&["CANCEL", "TASK"]) {
            task::cancel
        } else if ["PEER", "MIRROR", "ALERT"].iter().any(|noun| begins(&["COMMENT", "ON", noun])) {
            comment::comment
        } else if is_on_peer(slice, query, "GRANT", "TO") {
            privileges::grant
        } else if is_on_peer(slice, query, "REVOKE", "FROM") {
            privileges::revoke
        } else {
            return Parsed::Theirs;
        };
    match Cursor::new(text).and_then(|mut cursor| {
        let ours = read(&mut cursor)?;
        if !matches!(
            ours.statement,
            Statement::ShowPeers | Statement::ShowMirrors | Statement::ShowTasks | Statement::ShowAlerts
        ) {
            cursor.expect_end()?;
        }
        Ok(ours)
    }) {
        Ok(ours) => Parsed::Ours(Box::new(ours)),
        Err(refusal) => Parsed::Refused(refusal),
    }
}

/// Whether it is `GRANT … ON PEER name`, and not `GRANT … ON peer TO …`, where `peer` is a table.
fn is_on_peer(slice: &Slice, query: &[u8], verb: &str, before_roles: &str) -> bool {
    let forms =
        [&[verb, "USAGE", "ON", "PEER"][..], &[verb, "ALL", "ON", "PEER"], &[verb, "ALL", "PRIVILEGES", "ON", "PEER"]];
    let Some(form) = forms.into_iter().find(|form| slice.begins_with(query, form)) else { return false };
    let rest = slice.word(form.len() - 1).map_or(&[][..], |word| &query[word.end..slice.range.end]);
    let rest = rest.trim_ascii_start();
    let word = rest.split(|b| !(b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$') || *b >= 0x80)).next();
    match rest.first() {
        // A comment may stand anywhere; nobody puts one between a table and what it is granted to.
        Some(b'"' | b'/' | b'-') => true,
        _ => word.is_some_and(|word| !word.is_empty() && !word.eq_ignore_ascii_case(before_roles.as_bytes())),
    }
}

/// Whether `EXECUTE mirror` goes on with a name: PostgreSQL's, of a prepared statement of that name, ends there or has its arguments next.
fn is_followed_by_name(slice: &Slice, query: &[u8]) -> bool {
    let rest = slice.word(1).map_or(&[][..], |word| &query[word.end..slice.range.end]);
    !matches!(rest.trim_ascii_start().first(), None | Some(b'('))
}

/// Whether `SHOW mirror` goes on as the name of a setting, `mirror.something`.
fn is_setting(slice: &Slice, query: &[u8]) -> bool {
    let rest = slice.word(1).map_or(&[][..], |word| &query[word.end..slice.range.end]);
    rest.trim_ascii_start().starts_with(b".")
}

#[cfg(test)]
mod tests;
