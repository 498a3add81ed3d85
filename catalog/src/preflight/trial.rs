//! What the role may do, found out by doing it: privileges have too many ways to come about to be computed, on managed services above
//! all. Nothing stays: each trial is rolled back, and the slot is a temporary one.

use pg::name::quote_ident;
use tokio_postgres::Client;

use super::server::Server;
use super::{Check, Uses};

/// Something to try, and what it means when it fails.
struct Trial {
    name: &'static str,
    statement: String,
    fine: &'static str,
    /// Whether mirrors cannot work without it.
    needed: bool,
    hint: String,
}

/// Tries what mirrors do.
pub(super) async fn check(
    client: &Client,
    server: &Server,
    uses: Uses,
    checks: &mut Vec<Check>,
) -> Result<(), tokio_postgres::Error> {
    let (role, database) = (quote_ident(&server.role), quote_ident(&server.database));
    let name = format!("peergate_trial_{:08x}", rand::random::<u32>());
    let create = format!("GRANT CREATE ON DATABASE {database} TO {role}");
    let parameter = if server.version >= 150_000 {
        format!("GRANT SET ON PARAMETER session_replication_role TO {role}")
    } else {
        "Before version 15 only superusers may, or what a managed service offers in their place.".to_owned()
    };
    let trials = [
        Trial {
            name: "replication",
            // A logical slot would wait for all transactions that are open; the privilege is the same.
            statement: format!(
                "select pg_catalog.pg_create_physical_replication_slot('{name}', false, true); \
                 select pg_catalog.pg_drop_replication_slot('{name}')"
            ),
            fine: "replication slots can be made",
            needed: uses.may_be_source(),
            hint: format!("ALTER ROLE {role} REPLICATION"),
        },
        Trial {
            name: "publication",
            statement: format!("create publication {name}"),
            fine: "publications can be made",
            needed: uses.may_be_source(),
            hint: create.clone(),
        },
        Trial {
            name: "schema",
            statement: format!(
                "do $$ begin if pg_catalog.to_regnamespace('peergate') is null then create schema {name}; else
                     create table peergate.{name} (); end if; end $$"
            ),
            fine: "schema peergate can be made or used",
            needed: uses.may_be_target(),
            hint: create,
        },
        Trial {
            name: "temporary tables",
            statement: format!("create temporary table {name} ()"),
            fine: "temporary tables can be made",
            needed: uses.may_be_target(),
            hint: format!("GRANT TEMPORARY ON DATABASE {database} TO {role}"),
        },
        Trial {
            name: "session_replication_role",
            statement: "set local session_replication_role = replica".to_owned(),
            fine: "triggers and foreign keys of a target can be held back",
            needed: false,
            hint: parameter,
        },
        Trial {
            name: "replication origins",
            statement: "select pg_catalog.pg_replication_origin_session_is_setup()".to_owned(),
            fine: "origin functions can be called",
            needed: false,
            hint: "Not needed for mirrors in one direction. VALIDATE PEER … VERBOSE has the grants.".to_owned(),
        },
    ];
    for trial in trials {
        // On a standby all of them fail for that reason, which is said already.
        if server.standby {
            break;
        }
        client.batch_execute("begin").await?;
        let result = client.batch_execute(&trial.statement).await;
        client.batch_execute("rollback").await?;
        checks.push(match result {
            Ok(()) => Check::ok(trial.name, trial.fine),
            Err(error) => {
                let Some(refused) = error.as_db_error() else { return Err(error) };
                let detail = refused.message().replace(&name, "…");
                // Slots that are all in use have a check of their own.
                let hint = match refused.code().code() {
                    "53400" if server.may_replicate() => "See replication slots.".to_owned(),
                    _ => trial.hint,
                };
                let check =
                    if trial.needed { Check::failed(trial.name, detail) } else { Check::warning(trial.name, detail) };
                check.hint(hint)
            }
        });
    }
    Ok(())
}
