//! The console's tables: functions from a [`View`] to rows. Pure. Where pgbouncer has the column, it has pgbouncer's name.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use super::command::{ACTIONS, SHOWS, Show};
use super::view::{ServerView, SessionView, View};
use crate::registry::Totals;

/// The type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Int,
    BigInt,
}

/// A value; its column's type says how wide a number is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    Null,
    Text(String),
    Number(i64),
}

impl From<&str> for Cell {
    fn from(text: &str) -> Cell {
        Cell::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Cell {
        Cell::Text(text)
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Cell {
        Cell::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<usize> for Cell {
    fn from(number: usize) -> Cell {
        Cell::from(number as u64)
    }
}

impl From<i32> for Cell {
    fn from(number: i32) -> Cell {
        Cell::Number(number.into())
    }
}

impl From<u16> for Cell {
    fn from(number: u16) -> Cell {
        Cell::Number(number.into())
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Cell {
        value.map_or(Cell::Null, Into::into)
    }
}

macro_rules! row {
    ($($value:expr),* $(,)?) => { vec![$(Cell::from($value)),*] };
}

type Columns = &'static [(&'static str, Kind)];
type Rows = Vec<Vec<Cell>>;

use Kind::{BigInt, Int, Text};

const TOTALS: Columns = &[
    ("database", Text),
    ("xact_count", BigInt),
    ("query_count", BigInt),
    ("bytes_received", BigInt),
    ("bytes_sent", BigInt),
    ("xact_time", BigInt),
    ("query_time", BigInt),
    ("wait_time", BigInt),
];

/// Returns the columns of a table.
pub(crate) fn columns(show: Show) -> Columns {
    match show {
        Show::Config => &[("key", Text), ("value", Text), ("default", Text), ("changeable", Text)],
        Show::Databases => &[
            ("name", Text),
            ("host", Text),
            ("port", Int),
            ("database", Text),
            ("force_user", Text),
            ("pool_size", Int),
            ("min_pool_size", Int),
            ("reserve_pool", Int),
            ("pool_mode", Text),
            ("max_connections", Int),
            ("current_connections", Int),
            ("paused", Int),
            ("disabled", Int),
        ],
        Show::Help => &[("statement", Text), ("meaning", Text)],
        Show::Listeners => &[("addr", Text), ("port", Int), ("tls", Text), ("certificate_expires", Text)],
        Show::Lists => &[("list", Text), ("items", Int)],
        Show::Mem => &[("name", Text), ("size", BigInt), ("used", BigInt), ("free", BigInt), ("memtotal", BigInt)],
        Show::Pools => &[
            ("database", Text),
            ("user", Text),
            ("cl_active", Int),
            ("cl_waiting", Int),
            ("cl_active_cancel_req", Int),
            ("cl_waiting_cancel_req", Int),
            ("sv_active", Int),
            ("sv_active_cancel", Int),
            ("sv_being_canceled", Int),
            ("sv_idle", Int),
            ("sv_used", Int),
            ("sv_tested", Int),
            ("sv_login", Int),
            ("maxwait", Int),
            ("maxwait_us", Int),
            ("pool_mode", Text),
        ],
        Show::Sessions => &[
            ("id", BigInt),
            ("type", Text),
            ("user", Text),
            ("database", Text),
            ("state", Text),
            ("addr", Text),
            ("port", Int),
            ("connect_time", Text),
            ("remote_pid", Int),
            ("tls", Text),
            ("application_name", Text),
            ("xact_count", BigInt),
            ("query_count", BigInt),
            ("bytes_received", BigInt),
            ("bytes_sent", BigInt),
        ],
        Show::State => &[("key", Text), ("value", Text)],
        Show::Stats => &[
            ("database", Text),
            ("total_xact_count", BigInt),
            ("total_query_count", BigInt),
            ("total_received", BigInt),
            ("total_sent", BigInt),
            ("total_xact_time", BigInt),
            ("total_query_time", BigInt),
            ("total_wait_time", BigInt),
            ("avg_xact_count", BigInt),
            ("avg_query_count", BigInt),
            ("avg_recv", BigInt),
            ("avg_sent", BigInt),
            ("avg_xact_time", BigInt),
            ("avg_query_time", BigInt),
            ("avg_wait_time", BigInt),
        ],
        Show::StatsAverages | Show::StatsTotals => TOTALS,
        Show::Users => &[("name", Text), ("pool_mode", Text), ("current_connections", Int)],
        Show::Version => &[("version", Text)],
    }
}

/// Returns the rows of a table.
pub(crate) fn rows(show: Show, view: &View) -> Rows {
    match show {
        Show::Config => config(view),
        Show::Databases => databases(view),
        Show::Help => help(),
        Show::Listeners => vec![row![
            view.listener.address.ip().to_string(),
            view.listener.address.port(),
            view.listener.tls,
            view.listener.certificate_expires.map(date_time),
        ]],
        Show::Lists => lists(view),
        // All that the system counts is one number.
        Show::Mem => view.resident_bytes.iter().map(|bytes| row!["resident", *bytes, 1_u64, 0_u64, *bytes]).collect(),
        Show::Pools => pools(view),
        Show::Sessions => view.sessions.iter().map(session).collect(),
        Show::State => {
            let yes = |yes: bool| if yes { "yes" } else { "no" };
            // Nothing can be paused or suspended; pgbouncer's exporters ask for it.
            let states =
                [("active", !view.draining), ("draining", view.draining), ("paused", false), ("suspended", false)];
            states.into_iter().map(|(key, value)| row![key, yes(value)]).collect()
        }
        Show::Stats => with_averages(view)
            .map(|(name, t, a)| {
                row![
                    name,
                    t.transactions,
                    t.requests,
                    t.received,
                    t.sent,
                    0_u64,
                    0_u64,
                    0_u64,
                    a.transactions,
                    a.requests,
                    a.received,
                    a.sent,
                    0_u64,
                    0_u64,
                    0_u64
                ]
            })
            .collect(),
        Show::StatsAverages => with_averages(view).map(|(name, _, averages)| totals_row(name, averages)).collect(),
        Show::StatsTotals => view.totals.iter().map(|(name, totals)| totals_row(name, *totals)).collect(),
        Show::Users => users(view),
        Show::Version => vec![row![concat!("Peergate ", env!("CARGO_PKG_VERSION"))]],
    }
}

fn config(view: &View) -> Rows {
    let mut rows: Rows = view
        .settings
        .iter()
        .map(|s| row![s.name, s.value.as_str(), s.default.as_str(), if s.changeable { "yes" } else { "no" }])
        .collect();
    // Under pgbouncer's name too: its exporters look for it.
    if let Some(n) = view.settings.iter().position(|setting| setting.name == "sessions_max") {
        let mut alias = rows[n].clone();
        alias[0] = Cell::from("max_client_conn");
        let place = view.settings.iter().position(|setting| setting.name > "max_client_conn").unwrap_or(rows.len());
        rows.insert(place, alias);
    }
    rows
}

fn databases(view: &View) -> Rows {
    let mut databases: BTreeMap<&str, (&ServerView, usize)> = BTreeMap::new();
    databases.insert(&view.catalog.database, (&view.catalog, 0));
    for session in &view.sessions {
        if let Some(server) = &session.server {
            databases.entry(&session.database).or_insert((server, 0)).1 += 1;
        }
    }
    let row = |(name, (server, sessions)): (&str, (&ServerView, usize))| {
        row![
            name,
            server.host.as_str(),
            server.port,
            server.database.as_str(),
            None::<&str>,
            view.sessions_max,
            0_u64,
            0_u64,
            "session",
            view.sessions_max,
            sessions,
            0_u64,
            0_u64,
        ]
    };
    databases.into_iter().map(row).collect()
}

fn help() -> Rows {
    let shows = SHOWS.iter().map(|(names, _, meaning)| {
        let names: Vec<String> = names.iter().map(|name| format!("SHOW {name}")).collect();
        row![names.join(" or "), *meaning]
    });
    shows.chain(ACTIONS.iter().map(|(action, meaning)| row![*action, *meaning])).collect()
}

fn lists(view: &View) -> Rows {
    let relayed: Vec<&SessionView> = view.sessions.iter().filter(|s| s.server.is_some()).collect();
    let databases: BTreeSet<&str> = relayed.iter().map(|s| s.database.as_str()).collect();
    let users: BTreeSet<&str> = relayed.iter().map(|s| s.user.as_str()).collect();
    let pools: BTreeSet<(&str, &str)> = relayed.iter().map(|s| (s.database.as_str(), s.user.as_str())).collect();
    let login = view.sessions.iter().filter(|session| session.state.login).count();
    let used = view.sessions.len() - login;
    let lists = [
        ("databases", databases.len()),
        ("users", users.len()),
        ("pools", pools.len()),
        ("free_clients", view.sessions_max.saturating_sub(view.sessions.len())),
        ("used_clients", used),
        ("login_clients", login),
        // A server session is its client's alone: none is free.
        ("free_servers", 0),
        ("used_servers", relayed.len()),
        ("dns_names", 0),
        ("dns_zones", 0),
        ("dns_queries", 0),
        ("dns_pending", 0),
    ];
    lists.into_iter().map(|(list, items)| row![list, items]).collect()
}

fn pools(view: &View) -> Rows {
    #[derive(Default)]
    struct Pool {
        clients: usize,
        active: usize,
        idle: usize,
        login: usize,
    }
    let mut pools: BTreeMap<(&str, &str), Pool> = BTreeMap::new();
    for session in view.sessions.iter().filter(|session| session.server.is_some()) {
        let pool = pools.entry((&session.database, &session.user)).or_default();
        pool.clients += 1;
        match session.state {
            state if state.login => pool.login += 1,
            state if state.idle => pool.idle += 1,
            _ => pool.active += 1,
        }
    }
    let row = |((database, user), pool): ((&str, &str), Pool)| {
        let none = 0_u64;
        row![
            database,
            user,
            pool.clients,
            none,
            none,
            none,
            pool.active,
            none,
            none,
            pool.idle,
            none,
            none,
            pool.login,
            none,
            none,
            "session",
        ]
    };
    pools.into_iter().map(row).collect()
}

fn session(session: &SessionView) -> Vec<Cell> {
    row![
        session.id,
        // As pgbouncer's clients; the console's own are told apart.
        if session.console { "A" } else { "C" },
        session.user.as_str(),
        session.database.as_str(),
        session.state.name,
        session.client.ip().to_string(),
        session.client.port(),
        date_time(seconds(session.began)),
        session.server.as_ref().and_then(|server| server.pid),
        session.tls,
        session.application_name.as_str(),
        session.totals.transactions,
        session.totals.requests,
        session.totals.received,
        session.totals.sent,
    ]
}

fn users(view: &View) -> Rows {
    let mut users: BTreeMap<&str, usize> = BTreeMap::new();
    for session in view.sessions.iter().filter(|session| !session.state.login) {
        *users.entry(&session.user).or_default() += 1;
    }
    users.into_iter().map(|(name, sessions)| row![name, "session", sessions]).collect()
}

fn totals_row(database: &str, totals: Totals) -> Vec<Cell> {
    let none = 0_u64;
    row![database, totals.transactions, totals.requests, totals.received, totals.sent, none, none, none]
}

/// Each database with its totals, and those for each second since the process began.
fn with_averages(view: &View) -> impl Iterator<Item = (&str, Totals, Totals)> {
    let elapsed = view.now.duration_since(view.began).map_or(1, |elapsed| elapsed.as_secs().max(1));
    view.totals.iter().map(move |(name, totals)| {
        let averages = Totals {
            received: totals.received / elapsed,
            sent: totals.sent / elapsed,
            transactions: totals.transactions / elapsed,
            requests: totals.requests / elapsed,
        };
        (name.as_str(), *totals, averages)
    })
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Writes seconds since 1970 as pgbouncer writes times.
///
/// Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn date_time(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that the day that is not always there is the last.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::view::{Doing, ListenerView};
    use super::*;
    use crate::config::{Config, RawConfig};

    const IDLE: Doing = Doing { name: "idle", login: false, idle: true };
    const ACTIVE: Doing = Doing { name: "active", login: false, idle: false };
    const LOGIN: Doing = Doing { name: "login", login: true, idle: false };

    fn session(id: u64, user: &str, database: &str, state: Doing) -> SessionView {
        let server = ServerView { host: "db".to_owned(), port: 5432, database: database.to_owned(), pid: Some(42) };
        SessionView {
            id,
            user: user.to_owned(),
            database: database.to_owned(),
            application_name: "psql".to_owned(),
            tls: "TLSv1.3",
            client: "[::1]:4711".parse().unwrap(),
            began: UNIX_EPOCH + Duration::from_secs(951_782_400),
            state,
            console: false,
            totals: Totals { received: 1, sent: 2, transactions: 3, requests: 4 },
            server: (!state.login).then_some(server),
        }
    }

    fn view() -> View {
        let config: Config = RawConfig { sessions_max: Some(9), ..RawConfig::default() }.resolve(|_| None).unwrap();
        let totals = Totals { received: 100, sent: 200, transactions: 30, requests: 40 };
        View {
            now: UNIX_EPOCH + Duration::from_secs(110),
            began: UNIX_EPOCH + Duration::from_secs(100),
            sessions: vec![
                session(1, "ann", "shop", IDLE),
                session(2, "ann", "shop", ACTIVE),
                session(3, "bob", "peergate", IDLE),
                session(4, "", "", LOGIN),
            ],
            totals: BTreeMap::from([("shop".to_owned(), totals)]),
            settings: config.settings(),
            listener: ListenerView {
                address: "127.0.0.1:9900".parse().unwrap(),
                tls: "allow",
                certificate_expires: Some(2_000_000_000),
            },
            catalog: ServerView { host: "/run".to_owned(), port: 5432, database: "peergate".to_owned(), pid: None },
            sessions_max: 9,
            draining: false,
            resident_bytes: Some(4096),
        }
    }

    fn text(cells: &[Cell]) -> String {
        let text = |cell: &Cell| match cell {
            Cell::Null => "-".to_owned(),
            Cell::Text(text) => text.clone(),
            Cell::Number(number) => number.to_string(),
        };
        cells.iter().map(text).collect::<Vec<_>>().join("|")
    }

    fn shown(show: Show) -> Vec<String> {
        rows(show, &view()).iter().map(|row| text(row)).collect()
    }

    #[test]
    fn every_row_fits_its_columns() {
        for (_, show, _) in SHOWS {
            let columns = columns(show);
            for row in rows(show, &view()) {
                assert_eq!(row.len(), columns.len(), "{show:?}");
                for (cell, (name, kind)) in row.iter().zip(columns) {
                    let fits = match cell {
                        Cell::Null => true,
                        Cell::Text(_) => *kind == Text,
                        Cell::Number(n) => *kind == BigInt || *kind == Int && i32::try_from(*n).is_ok(),
                    };
                    assert!(fits, "{show:?} {name}: {cell:?}");
                }
            }
        }
    }

    #[test]
    fn sessions_are_shown_and_counted() {
        let sessions = shown(Show::Sessions);
        let first = "1|C|ann|shop|idle|::1|4711|2000-02-29 00:00:00 UTC|42|TLSv1.3|psql|3|4|1|2";
        assert_eq!((sessions.len(), sessions[0].as_str()), (4, first));
        assert_eq!(
            shown(Show::Pools),
            ["peergate|bob|1|0|0|0|0|0|0|1|0|0|0|0|0|session", "shop|ann|2|0|0|0|1|0|0|1|0|0|0|0|0|session",]
        );
        assert_eq!(
            shown(Show::Databases),
            ["peergate|/run|5432|peergate|-|9|0|0|session|9|1|0|0", "shop|db|5432|shop|-|9|0|0|session|9|2|0|0",]
        );
        assert_eq!(shown(Show::Users), ["ann|session|2", "bob|session|1"]);
        let lists = shown(Show::Lists).join(" ");
        assert!(
            lists.starts_with("databases|2 users|2 pools|2 free_clients|5 used_clients|3 login_clients|1"),
            "{lists}"
        );
    }

    #[test]
    fn totals_are_shown_with_averages_by_the_second() {
        assert_eq!(shown(Show::Stats), ["shop|30|40|100|200|0|0|0|3|4|10|20|0|0|0"]);
        assert_eq!(shown(Show::StatsTotals), ["shop|30|40|100|200|0|0|0"]);
        assert_eq!(shown(Show::StatsAverages), ["shop|3|4|10|20|0|0|0"]);
    }

    #[test]
    fn the_rest_is_shown() {
        assert_eq!(shown(Show::Listeners), ["127.0.0.1|9900|allow|2033-05-18 03:33:20 UTC"]);
        let config = shown(Show::Config);
        assert!(config.contains(&"sessions_max|9|10000|yes".to_owned()), "{config:?}");
        assert!(
            config.contains(&"max_client_conn|9|10000|yes".to_owned())
                && config.is_sorted_by_key(|row| row.split('|').next()),
            "{config:?}"
        );
        assert_eq!(shown(Show::State)[..2], ["active|yes", "draining|no"]);
        assert_eq!(shown(Show::Mem), ["resident|4096|1|0|4096"]);
        assert_eq!(shown(Show::Help).len(), SHOWS.len() + ACTIONS.len());
        assert!(shown(Show::Version)[0].starts_with("Peergate "));
    }

    #[test]
    fn dates_are_right() {
        for (seconds, written) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (68_169_599, "1972-02-28 23:59:59 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(date_time(seconds), written);
        }
    }
}
