//! The roles `peergate_reader`, `peergate_operator` and `peergate_admin`, and what each may do.
//!
//! They are made after each migration, if the catalog's owner may make roles; and whichever of them there is gets its privileges then, so
//! that what a migration adds is granted at once. Whoever makes the roles later need only start the server again.

use tokio_postgres::{Client, Error};

/// Each role, and what `\du+` says of it. A role has all that those before it have.
const ROLES: [(&str, &str); 3] = [
    ("peergate_reader", "May see peers, mirrors and their status in the catalog of Peergate."),
    (
        "peergate_operator",
        "May also pause, resume, resync and execute mirrors, wait for them, have peers validated, and test alerts.",
    ),
    ("peergate_admin", "May do everything in the catalog of Peergate but read secrets."),
];

/// Relations that hold secrets, sealed as they are.
const SECRET: &[&str] = &["alert_secrets", "mirror_drops", "peer_secrets"];

/// Routines that readers may call: what SHOW and HELP show, and what a rewritten statement calls to fail as it must.
const READ: &[&str] =
    &["fail", "finish", "raise_error", "show_*", "suggestion", "edit_distance", "truncate_identifier"];

/// Routines that operators may call.
const OPERATE: &[&str] = &[
    "cancel_task",
    "execute_mirror",
    "pause_mirror",
    "resume_mirror",
    "resync_mirror",
    "resync_table",
    "start_verification",
    "test_alert",
    "validate_peer",
    "verify_mirror",
    "wait_for_alert",
    "wait_for_mirror",
];

/// Makes the roles that are missing, where that is allowed, and grants what each is to have.
pub(crate) async fn provide(client: &Client) -> Result<(), Error> {
    for (role, comment) in ROLES {
        let (role, comment) = (pg::name::quote_ident(role), pg::name::quote_literal(comment));
        // Another catalog of the same cluster may make it at this moment.
        let create = format!(
            "do $$ begin
                 if pg_catalog.to_regrole('{role}') is null then create role {role}; comment on role {role} is {comment}; end if;
             exception when insufficient_privilege or duplicate_object or unique_violation then null; end $$"
        );
        client.batch_execute(&create).await?;
    }
    // Privileges are granted to each, and not handed down: granting a role to another takes more than owning the catalog.
    let mut patterns: Vec<String> = Vec::new();
    for ((role, _), routines) in ROLES.into_iter().zip([READ, OPERATE, &[]]) {
        patterns.extend(routines.iter().map(|name| name.replace('_', "\\_").replace('*', "%")));
        let missing = client.query_one(MISSING, &[&role, &SECRET, &patterns]).await?;
        let missing: Option<String> = missing.get(0);
        if let Some(grants) = missing {
            client.batch_execute(&grants).await?;
        }
    }
    Ok(())
}

/// The GRANTs that a role lacks, as one text. Admins get every routine, and plain DML on what it is made for.
const MISSING: &str = "
    with me as (select r.oid, r.rolname, r.rolname = 'peergate_admin' as admin from pg_catalog.pg_roles r where r.rolname = $1),
    lacking as (
        select pg_catalog.format('grant usage on schema peergate to %I', me.rolname) as command
        from me where not pg_catalog.has_schema_privilege(me.oid, 'peergate', 'usage')
        union all
        select pg_catalog.format('grant select on peergate.%I to %I', c.relname, me.rolname)
        from me, pg_catalog.pg_class c
        where c.relnamespace = 'peergate'::pg_catalog.regnamespace and c.relkind in ('r', 'v') and c.relname <> all ($2)
          and not pg_catalog.has_table_privilege(me.oid, c.oid, 'select')
        union all
        select pg_catalog.format('grant execute on routine %s to %I', f.oid::pg_catalog.regprocedure, me.rolname)
        from me, pg_catalog.pg_proc f
        where f.pronamespace = 'peergate'::pg_catalog.regnamespace
          and (f.proname like any ($3) or me.admin and f.proname <> 'peer_document')
          and f.prorettype <> 'pg_catalog.trigger'::pg_catalog.regtype
          and not pg_catalog.has_function_privilege(me.oid, f.oid, 'execute')
        union all
        select pg_catalog.format('grant %s on peergate.%I to %I', dml.privileges, dml.relation, me.rolname)
        from me, (values ('insert (name, type, options, comment), update (name, options, comment), delete', 'peers'),
                         ('insert, update, delete', 'mirrors'),
                         ('insert, update, delete', 'alerts')) dml (privileges, relation)
        where me.admin and not pg_catalog.has_table_privilege(me.oid, pg_catalog.format('peergate.%I', dml.relation), 'delete')
        union all
        select pg_catalog.format('grant update (desired_state) on peergate.mirrors to %I', me.rolname)
        from me where me.rolname = 'peergate_operator'
          and not pg_catalog.has_column_privilege(me.oid, 'peergate.mirrors', 'desired_state', 'update'))
    select pg_catalog.string_agg(command, '; ') from lacking";
