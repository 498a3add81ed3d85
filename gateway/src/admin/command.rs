//! The console's statements, as text and as meant. Pure.

use std::ops::Range;

use pg::SqlState;

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    Config,
    Databases,
    Help,
    Lists,
    Listeners,
    Mem,
    Pools,
    Sessions,
    State,
    Stats,
    StatsAverages,
    StatsTotals,
    Users,
    Version,
}

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Shows a table.
    Show(Show),
    /// Ends a session.
    Kill(u64),
    /// Cancels what a session is doing.
    Cancel(u64),
    /// Reads the configuration again.
    Reload,
    /// Takes no new sessions, and ends those that are idle.
    Drain,
    /// Stops the process, as SIGTERM does.
    Shutdown,
    /// What drivers say beside what they were asked to, and which changes nothing here; it is answered with this tag.
    Courtesy(&'static str),
}

/// Why a text is none of the console's statements, or cannot be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConsoleError {
    pub(crate) sqlstate: SqlState,
    pub(crate) message: String,
    /// Where in the text, in characters from 1.
    pub(crate) position: Option<usize>,
    pub(crate) detail: Option<String>,
    pub(crate) hint: Option<String>,
}

impl ConsoleError {
    pub(crate) fn new(sqlstate: SqlState, message: impl Into<String>) -> ConsoleError {
        ConsoleError { sqlstate, message: message.into(), position: None, detail: None, hint: None }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> ConsoleError {
        ConsoleError { hint: Some(hint.into()), ..self }
    }
}

/// The statements that show something, with what each shows. The first name of each is its own.
pub(crate) const SHOWS: [(&[&str], Show, &str); 14] = [
    (&["CONFIG"], Show::Config, "settings, and whether RELOAD can change them"),
    (&["DATABASES"], Show::Databases, "databases and peers that have sessions, and where they are"),
    (&["HELP"], Show::Help, "this list"),
    (&["LISTENERS"], Show::Listeners, "where clients connect to"),
    (&["LISTS"], Show::Lists, "how many there are of what"),
    (&["MEM"], Show::Mem, "memory in use"),
    (&["POOLS"], Show::Pools, "sessions by database and role"),
    (&["SESSIONS", "CLIENTS"], Show::Sessions, "sessions, one by one"),
    (&["STATE"], Show::State, "whether new sessions are taken"),
    (&["STATS"], Show::Stats, "what the sessions of each database have done"),
    (&["STATS_AVERAGES"], Show::StatsAverages, "that, for each second since the start"),
    (&["STATS_TOTALS"], Show::StatsTotals, "that, in all"),
    (&["USERS"], Show::Users, "roles that have sessions"),
    (&["VERSION"], Show::Version, "the version"),
];

/// The statements that do something.
pub(crate) const ACTIONS: [(&str, &str); 5] = [
    ("KILL id", "ends a session"),
    ("CANCEL id", "cancels what a session is doing"),
    ("RELOAD", "reads the configuration file, certificates and keys again, as SIGHUP"),
    ("DRAIN", "takes no new sessions and ends idle ones; the process goes on"),
    ("SHUTDOWN", "drains and stops the process, as SIGTERM"),
];

/// What users of pgbouncer type and what there is instead.
const ELSEWHERE: [(&str, &str); 11] = [
    ("PAUSE", "Sessions are not pooled, so none can be made to wait. DRAIN ends idle sessions and takes no new ones."),
    ("RESUME", "There is no PAUSE. After DRAIN only a restart takes sessions again."),
    ("SUSPEND", "For a restart, DRAIN or SHUTDOWN lets running statements finish."),
    ("RECONNECT", "Each session has a server session of its own; KILL ends one."),
    ("ENABLE", "Use ALTER DATABASE … ALLOW_CONNECTIONS in the catalog's server."),
    ("DISABLE", "Use ALTER DATABASE … ALLOW_CONNECTIONS in the catalog's server."),
    ("WAIT_CLOSE", "Each session has a server session of its own, which ends with it."),
    ("KILL_CLIENT", "KILL takes the id that SHOW SESSIONS shows."),
    ("SERVERS", "Each session has a server session of its own: SHOW SESSIONS has its process id."),
    ("PEERS", "Connect to the catalog's database for SHOW PEERS."),
    ("MIRRORS", "Connect to the catalog's database for SHOW MIRRORS."),
];

/// What SQL begins with. Whoever says that is in the wrong database.
const SQL: [&str; 12] =
    ["SELECT", "WITH", "INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP", "TABLE", "VALUES", "COPY", "EXPLAIN"];

/// What SET may name: drivers do so on their own, and nothing here depends on it.
const SESSION_SETTINGS: [&str; 7] = [
    "application_name",
    "client_encoding",
    "client_min_messages",
    "datestyle",
    "extra_float_digits",
    "standard_conforming_strings",
    "timezone",
];

/// Reads a text of any number of statements, without running any of them.
///
/// # Errors
/// [`ConsoleError`] for the first that is none.
pub(crate) fn parse(text: &str) -> Result<Vec<Command>, ConsoleError> {
    let mut commands = Vec::new();
    let mut statement = Vec::new();
    for token in tokens(text) {
        if &text[token.clone()] == ";" {
            commands.extend(parse_one(text, &statement)?);
            statement.clear();
        } else {
            statement.push(token);
        }
    }
    commands.extend(parse_one(text, &statement)?);
    Ok(commands)
}

fn parse_one(text: &str, tokens: &[Range<usize>]) -> Result<Option<Command>, ConsoleError> {
    let word = |n: usize| tokens.get(n).map(|token| text[token.clone()].to_ascii_uppercase());
    let Some(first) = word(0) else { return Ok(None) };
    let (command, length) = match first.as_str() {
        "SHOW" => match word(1) {
            None => return Err(unfinished(text, "SHOW what?")),
            Some(what) => match SHOWS.iter().find(|(names, ..)| names.contains(&what.as_str())) {
                Some((_, show, _)) => (Command::Show(*show), 2),
                None => return Err(unknown(text, &tokens[1], &what, "SHOW ")),
            },
        },
        "KILL" | "CANCEL" => {
            let Some(token) = tokens.get(1) else {
                return Err(unfinished(text, &format!("{first} needs the id of a session")));
            };
            let id = text[token.clone()].parse().map_err(|_| {
                let message = format!("\"{}\" is not the id of a session", &text[token.clone()]);
                at(text, token, ConsoleError::new(SqlState::SYNTAX_ERROR, message)).hint("SHOW SESSIONS has the ids.")
            })?;
            (if first == "KILL" { Command::Kill(id) } else { Command::Cancel(id) }, 2)
        }
        "RELOAD" => (Command::Reload, 1),
        "DRAIN" => (Command::Drain, 1),
        "SHUTDOWN" => (Command::Shutdown, 1),
        "BEGIN" => (Command::Courtesy("BEGIN"), tokens.len()),
        "START" => (Command::Courtesy("START TRANSACTION"), tokens.len()),
        "COMMIT" | "END" => (Command::Courtesy("COMMIT"), tokens.len()),
        "ROLLBACK" | "ABORT" => (Command::Courtesy("ROLLBACK"), tokens.len()),
        "DISCARD" | "RESET" => {
            (Command::Courtesy(if first == "RESET" { "RESET" } else { "DISCARD ALL" }), tokens.len())
        }
        "SET" => {
            let names = tokens.iter().skip(1).take(2).map(|token| text[token.clone()].to_ascii_lowercase());
            if !names.into_iter().any(|name| SESSION_SETTINGS.contains(&name.as_str())) {
                let error = ConsoleError::new(SqlState::FEATURE_NOT_SUPPORTED, "the console cannot change settings");
                return Err(at(text, &tokens[0], error).hint("Change the configuration file and RELOAD."));
            }
            (Command::Courtesy("SET"), tokens.len())
        }
        _ => return Err(unknown(text, &tokens[0], &first, "")),
    };
    match tokens.get(length) {
        None => Ok(Some(command)),
        Some(token) => {
            let message = format!("syntax error at or near \"{}\"", &text[token.clone()]);
            Err(at(text, token, ConsoleError::new(SqlState::SYNTAX_ERROR, message)))
        }
    }
}

fn at(text: &str, token: &Range<usize>, error: ConsoleError) -> ConsoleError {
    ConsoleError { position: Some(text[..token.start].chars().count() + 1), ..error }
}

fn unfinished(text: &str, message: &str) -> ConsoleError {
    let end = text.trim_end().trim_end_matches(';').len();
    at(text, &(end..end), ConsoleError::new(SqlState::SYNTAX_ERROR, message)).hint(all_statements())
}

fn unknown(text: &str, token: &Range<usize>, word: &str, before: &str) -> ConsoleError {
    let error = if let Some((_, instead)) = ELSEWHERE.iter().find(|(name, _)| *name == word) {
        let message = format!("the console has no {before}{word}");
        ConsoleError::new(SqlState::FEATURE_NOT_SUPPORTED, message).hint(*instead)
    } else if before.is_empty() && SQL.contains(&word) {
        let hint = format!("Connect to another database for SQL. {}", all_statements());
        ConsoleError::new(SqlState::SYNTAX_ERROR, "the console takes no SQL").hint(hint)
    } else {
        let message = format!("the console has no statement \"{before}{}\"", &text[token.clone()]);
        ConsoleError::new(SqlState::SYNTAX_ERROR, message).hint(all_statements())
    };
    at(text, token, error)
}

fn all_statements() -> String {
    let shows: Vec<&str> = SHOWS.iter().map(|(names, ..)| names[0]).collect();
    let actions: Vec<&str> = ACTIONS.iter().map(|(action, _)| *action).collect();
    format!("There are SHOW {}, and {}.", shows.join(" | "), actions.join(", "))
}

/// Splits a text into words and single other characters; space and comments are left out.
fn tokens(text: &str) -> Vec<Range<usize>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let length = if c.is_whitespace() {
            c.len_utf8()
        } else if rest.starts_with("--") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else {
            let length = if is_word(c) { rest.find(|c| !is_word(c)).unwrap_or(rest.len()) } else { c.len_utf8() };
            tokens.push(at..at + length);
            length
        };
        at += length;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_read_in_any_case_and_number() {
        assert_eq!(parse("show Clients;"), Ok(vec![Command::Show(Show::Sessions)]));
        let several = "/* first */ kill 7; -- then\nRELOAD ;; cancel 18446744073709551615";
        assert_eq!(parse(several), Ok(vec![Command::Kill(7), Command::Reload, Command::Cancel(u64::MAX)]));
        assert_eq!(parse(" ; /* open"), Ok(vec![]));
        for (names, show, _) in SHOWS {
            for name in names {
                assert_eq!(parse(&format!("SHOW {name}")), Ok(vec![Command::Show(show)]));
            }
        }
        for said in [
            "BEGIN",
            "BEGIN ISOLATION LEVEL READ COMMITTED",
            "SET extra_float_digits = 3",
            "set session timezone to 'x'",
        ] {
            assert!(matches!(parse(said).as_deref(), Ok([Command::Courtesy(_)])), "{said}");
        }
    }

    #[test]
    fn what_is_none_is_an_error_with_its_place() {
        for (text, position, sqlstate, hint) in [
            ("reload; größe", 9, SqlState::SYNTAX_ERROR, "There are SHOW CONFIG"),
            ("SHOW nothing", 6, SqlState::SYNTAX_ERROR, "KILL id"),
            ("SHOW", 5, SqlState::SYNTAX_ERROR, "There are"),
            ("KILL", 5, SqlState::SYNTAX_ERROR, "There are"),
            ("KILL shop", 6, SqlState::SYNTAX_ERROR, "SHOW SESSIONS"),
            ("KILL -1", 6, SqlState::SYNTAX_ERROR, "SHOW SESSIONS"),
            ("PAUSE shop", 1, SqlState::FEATURE_NOT_SUPPORTED, "DRAIN"),
            ("SHOW SERVERS", 6, SqlState::FEATURE_NOT_SUPPORTED, "process id"),
            ("SET max_client_conn = 5", 1, SqlState::FEATURE_NOT_SUPPORTED, "RELOAD"),
            ("SELECT 1", 1, SqlState::SYNTAX_ERROR, "another database"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!((error.position, error.sqlstate), (Some(position), sqlstate), "{text}: {error:?}");
            assert!(error.hint.unwrap().contains(hint), "{text}");
        }
        assert_eq!(parse("RELOAD now").unwrap_err().position, Some(8));
    }

    #[test]
    fn any_text_is_read_without_panic() {
        for text in ["ä--", "é/*", "\u{a0}SHOW\u{a0}STATS", "'", "💥;💥"] {
            let _ = parse(text);
        }
    }
}
