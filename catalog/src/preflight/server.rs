//! What the server is and how it is set.

use std::time::Instant;

use pg::name::quote_ident;
use tokio_postgres::Client;

use super::{Check, Uses};
use crate::connect::Attempt;

/// The versions that can be peers, and that are tested.
const OLDEST_MAJOR: i32 = 13;
const NEWEST_MAJOR: i32 = 18;

/// The largest difference of clocks that nothing is said about, in seconds.
const CLOCK_SECONDS: f64 = 1.0;

/// A server as one look found it.
pub(super) struct Server {
    pub(super) role: String,
    pub(super) database: String,
    pub(super) version: i32,
    version_text: String,
    encoding: String,
    pub(super) standby: bool,
    read_only: bool,
    wal_level: String,
    slots: (i64, i64),
    senders: (i64, i64),
    superuser: bool,
    replication: bool,
    slot_wal_keep: String,
    tls: Option<String>,
    extensions: Option<String>,
}

/// Asks for all of it in one query.
pub(super) async fn look(client: &Client) -> Result<Server, tokio_postgres::Error> {
    let query = "
        select current_user::text, pg_catalog.current_database()::text, pg_catalog.current_setting('server_version_num')::int4,
               pg_catalog.current_setting('server_version'), pg_catalog.current_setting('server_encoding'),
               pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('default_transaction_read_only')::bool,
               pg_catalog.current_setting('wal_level'),
               (select count(*) from pg_catalog.pg_replication_slots), pg_catalog.current_setting('max_replication_slots')::int8,
               (select count(*) from pg_catalog.pg_stat_replication), pg_catalog.current_setting('max_wal_senders')::int8,
               r.rolsuper, r.rolreplication, coalesce(pg_catalog.current_setting('max_slot_wal_keep_size', true), '-1'),
               (select s.version || ', ' || s.cipher from pg_catalog.pg_stat_ssl s where s.pid = pg_catalog.pg_backend_pid() and s.ssl),
               (select pg_catalog.string_agg(e.extname || ' ' || e.extversion, ', ' order by e.extname)
                from pg_catalog.pg_extension e where e.extname <> 'plpgsql')
        from pg_catalog.pg_roles r where r.rolname = current_user";
    let row = client.query_one(query, &[]).await?;
    Ok(Server {
        role: row.get(0),
        database: row.get(1),
        version: row.get(2),
        version_text: row.get(3),
        encoding: row.get(4),
        standby: row.get(5),
        read_only: row.get(6),
        wal_level: row.get(7),
        slots: (row.get(8), row.get(9)),
        senders: (row.get(10), row.get(11)),
        superuser: row.get(12),
        replication: row.get(13),
        slot_wal_keep: row.get(14),
        tls: row.get(15),
        extensions: row.get(16),
    })
}

/// Compares the peer's clock with the catalog's; the time that asking takes is no difference.
pub(super) async fn clock(peer: &Client, catalog: &Client) -> Result<Check, tokio_postgres::Error> {
    let query = "select extract(epoch from pg_catalog.clock_timestamp())::float8";
    let catalog_time: f64 = catalog.query_one(query, &[]).await?.get(0);
    let asked = Instant::now();
    let peer_time: f64 = peer.query_one(query, &[]).await?.get(0);
    let elapsed = asked.elapsed().as_secs_f64();
    let difference = peer_time - catalog_time;
    // The peer looked at its clock some time between the question and the answer.
    let skew = if difference > elapsed { difference - elapsed } else { difference.min(0.0) };
    let detail = format!("{:.1} s from the catalog's", skew.abs());
    Ok(if skew.abs() < CLOCK_SECONDS {
        Check::ok("clock", detail)
    } else {
        Check::warning("clock", detail).hint("Synchronise the clocks (NTP): lag in seconds compares them.")
    })
}

impl Server {
    fn major(&self) -> i32 {
        self.version / 10_000
    }

    pub(super) fn tls(&self, peer: &str, attempt: &Attempt, strength: u8) -> Check {
        let alter = |mode: &str| format!("ALTER PEER {} SET (sslmode = '{mode}')", quote_ident(peer));
        let local = ["/", "localhost:", "127.", "::1:"].iter().any(|begin| attempt.address.starts_with(begin));
        match &self.tls {
            Some(_) if strength >= 4 => {
                Check::ok("tls", self.tls.clone().unwrap_or_default() + ", certificate verified")
            }
            Some(tls) => Check::warning("tls", format!("{tls}; the server's certificate is not verified"))
                .hint(alter("verify-full")),
            None if local => Check::ok("tls", "not used, on this machine"),
            None => Check::warning("tls", "the connection is not encrypted").hint(alter("verify-full")),
        }
    }

    /// What can be said without trying anything.
    pub(super) fn check(&self, uses: Uses, checks: &mut Vec<Check>) {
        let source_problem = |name, detail: String| {
            if uses.may_be_source() { Check::failed(name, detail) } else { Check::warning(name, detail) }
        };
        checks.push(match self.major() {
            major if major < OLDEST_MAJOR => Check::failed("version", &self.version_text)
                .hint("PostgreSQL 13 is the oldest version that can be a peer."),
            major if major > NEWEST_MAJOR => {
                Check::warning("version", format!("{}: newer than what Peergate is tested with", self.version_text))
            }
            _ => Check::ok("version", &self.version_text),
        });
        checks.push(match self.encoding.as_str() {
            "UTF8" => Check::ok("encoding", "UTF8"),
            "SQL_ASCII" => Check::warning("encoding", "SQL_ASCII: the server does not know what its texts mean")
                .hint("Bytes that are not UTF-8 stop a mirror; convert them, or the database."),
            other => Check::warning("encoding", format!("{other}: texts are converted to and from UTF-8"))
                .hint("A character that this encoding lacks stops a mirror that writes it here."),
        });
        checks.push(if self.standby {
            Check::failed("primary", "the server is a standby")
                .hint("Name its primary; with several hosts, target_session_attrs = 'primary' finds it.")
        } else {
            Check::ok("primary", "the server is no standby")
        });
        if self.read_only && !self.standby {
            checks.push(
                Check::failed("writable", "default_transaction_read_only is on")
                    .hint(format!("ALTER ROLE {} SET default_transaction_read_only = off", quote_ident(&self.role))),
            );
        }
        checks.push(if self.wal_level == "logical" {
            Check::ok("wal_level", "logical")
        } else {
            source_problem("wal_level", format!("{}: the server cannot be a source", self.wal_level))
                .hint("ALTER SYSTEM SET wal_level = 'logical', then restart the server.")
        });
        let room = |name: &'static str, (used, all): (i64, i64), hint: String| {
            let detail = format!("{used} of {all} in use");
            match all - used {
                left if left <= 0 => source_problem(name, detail).hint(hint),
                1 => Check::warning(name, detail).hint(hint),
                _ => Check::ok(name, detail),
            }
        };
        checks.push(room(
            "replication slots",
            self.slots,
            format!("ALTER SYSTEM SET max_replication_slots = {}, then restart the server; or drop a slot that nobody needs.", self.slots.1.max(5) * 2),
        ));
        checks.push(room(
            "wal senders",
            self.senders,
            format!("ALTER SYSTEM SET max_wal_senders = {}, then restart the server.", self.senders.1.max(5) * 2),
        ));
        checks.push(match self.slot_wal_keep.as_str() {
            "-1" => Check::ok(
                "max_slot_wal_keep_size",
                "no limit: a mirror that stands still holds the server's WAL for as long as it does",
            ),
            limit => Check::ok(
                "max_slot_wal_keep_size",
                format!("{limit}: a mirror that falls further behind than that must copy anew"),
            ),
        });
        checks.push(Check::ok(
            "extensions",
            match &self.extensions {
                Some(list) => format!("{list}; a target needs those whose types the mirrored tables use"),
                None => "none".to_owned(),
            },
        ));
    }

    /// Whether the role has replication by its attributes; on managed services another role may give it.
    pub(super) fn may_replicate(&self) -> bool {
        self.superuser || self.replication
    }

    /// What a superuser of the server runs to let the role do all that mirrors need.
    pub(super) fn grants_script(&self) -> String {
        let (role, database) = (quote_ident(&self.role), quote_ident(&self.database));
        let mut script = format!(
            "-- on database {database}, as a superuser\n\
             ALTER ROLE {role} REPLICATION;  -- slots and streaming\n\
             GRANT CREATE, TEMPORARY ON DATABASE {database} TO {role};  -- publications; schema peergate and staging on a target\n"
        );
        script.push_str(match self.major() {
            14.. => "GRANT pg_read_all_data, pg_write_all_data TO ROLE_;  -- or SELECT, INSERT, UPDATE, DELETE, TRUNCATE table by table\n",
            _ => "-- GRANT SELECT (source), INSERT, UPDATE, DELETE, TRUNCATE (target) ON each table TO ROLE_;\n",
        });
        script.push_str("-- GRANT <owner of the tables> TO ROLE_;  -- a publication needs the tables' owner\n");
        if self.major() >= 15 {
            script.push_str("GRANT SET ON PARAMETER session_replication_role TO ROLE_;  -- no triggers and foreign keys while applying\n");
        }
        if self.major() >= 14 {
            script.push_str(
                "GRANT EXECUTE ON FUNCTION pg_replication_origin_create(text), pg_replication_origin_drop(text), pg_replication_origin_oid(text),\n  \
                 pg_replication_origin_session_setup(text), pg_replication_origin_session_reset(), pg_replication_origin_session_is_setup(),\n  \
                 pg_replication_origin_session_progress(boolean), pg_replication_origin_xact_setup(pg_lsn, timestamptz),\n  \
                 pg_replication_origin_xact_reset(), pg_replication_origin_advance(text, pg_lsn), pg_replication_origin_progress(text, boolean)\n  \
                 TO ROLE_;  -- replication origins",
            );
        }
        script.trim_end().replace("ROLE_", &role)
    }
}
