//! Checks that a mirror can work, before anything is made. All that is wrong is found in one go.

use catalog::mirror::{ColumnChoice, Mirror, SelectedTable, Selection};
use pg::{SqlState, TableName};
use tokio_postgres::Client;

use crate::error::{Error, Problem};
use crate::schema::TablePlan;
use crate::schema::introspect::{list_tables, source_table};
use crate::session::PeerSession;

/// What keeps the mirror from working, gathered.
#[derive(Debug, Default)]
pub struct Findings {
    problems: Vec<Problem>,
}

impl Findings {
    /// Notes a problem.
    pub fn add(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// Notes the problem if there is one.
    pub fn check(&mut self, result: Result<(), Problem>) {
        if let Err(problem) = result {
            self.add(problem);
        }
    }

    /// Returns all that was found.
    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    /// Makes one error of all that was found: the first, with the others in its detail.
    ///
    /// # Errors
    /// [`Error`] as the SQLSTATE of the first says, if anything was found.
    pub fn into_result(self) -> Result<(), Error> {
        let mut problems = self.problems.into_iter();
        let Some(mut first) = problems.next() else { return Ok(()) };
        let also: Vec<String> = problems
            .map(|p| format!("Also: {}.{}", p.message, p.hint.map(|h| format!(" {h}")).unwrap_or_default()))
            .collect();
        if !also.is_empty() {
            let detail = first.detail.take().map(|d| format!("{d} ")).unwrap_or_default();
            first.detail = Some(format!("{detail}{}", also.join(" ")));
        }
        Err(Error::server(first))
    }
}

/// Returns the tables that a mirror takes, as they are on the source now.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says; tables that are missing or cannot be mirrored are put in `findings`.
pub async fn plan_tables(
    mirror: &Mirror,
    source: &PeerSession,
    findings: &mut Findings,
) -> Result<Vec<TablePlan>, Error> {
    let selected = select(source, &mirror.selection, findings).await?;
    if selected.is_empty() {
        findings.add(
            Problem::new(
                SqlState::UNDEFINED_TABLE,
                format!("mirror \"{}\" finds no tables on peer \"{}\"", mirror.name, source.peer),
            )
            .hint("Create them first, or name others."),
        );
    }
    describe(source, selected, findings).await
}

/// Returns the tables that a selection takes as the source is now.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn list_selected(source: &PeerSession, selection: &Selection) -> Result<Vec<SelectedTable>, Error> {
    // A table that is left out and gone is not missed.
    select(source, selection, &mut Findings::default()).await
}

async fn select(
    source: &PeerSession,
    selection: &Selection,
    findings: &mut Findings,
) -> Result<Vec<SelectedTable>, Error> {
    let listed = match selection {
        Selection::Tables(tables) => return Ok(tables.clone()),
        Selection::Query => return Ok(Vec::new()),
        Selection::All { except } => listed(&source.client, except, findings, |name| Some(name.schema.clone())).await,
        Selection::Schemas { schemas, except } => {
            listed(&source.client, except, findings, |name| schemas.get(&name.schema).cloned()).await
        }
    };
    listed.map_err(|e| source.error(&e))
}

/// Returns the tables of `known` as they are on the source now: the mirror's, whatever else its selection would take today.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says; tables that are missing are put in `findings`.
pub async fn plan_known_tables(
    mirror: &Mirror,
    source: &PeerSession,
    known: &[(TableName, TableName)],
    findings: &mut Findings,
) -> Result<Vec<TablePlan>, Error> {
    let listed = |name: &TableName| match &mirror.selection {
        Selection::Tables(tables) => tables.iter().find(|t| t.source == *name).cloned(),
        Selection::All { .. } | Selection::Schemas { .. } | Selection::Query => None,
    };
    let selected = known.iter().map(|(name, target)| {
        let (columns, condition) = listed(name).map(|t| (t.columns, t.condition)).unwrap_or_default();
        SelectedTable { source: name.clone(), target: target.clone(), columns, condition }
    });
    describe(source, selected.collect(), findings).await
}

async fn describe(
    source: &PeerSession,
    selected: Vec<SelectedTable>,
    findings: &mut Findings,
) -> Result<Vec<TablePlan>, Error> {
    let mut plans = Vec::new();
    for SelectedTable { source: name, target, columns, condition } in selected {
        match source_table(source, &name).await.map_err(|e| source.error(&e))? {
            None => findings.add(
                Problem::new(
                    SqlState::UNDEFINED_TABLE,
                    format!("table \"{name}\" does not exist on peer \"{}\"", source.peer),
                )
                .detail("Views, foreign tables and sequences cannot be mirrored."),
            ),
            Some(table) => {
                let plan = TablePlan { source: table, target_name: target, columns, condition };
                check_columns(&plan, findings);
                plans.push(plan);
            }
        }
    }
    Ok(plans)
}

/// The tables that are listed on the source, without exceptions, each with its schema on the target.
async fn listed(
    client: &Client,
    except: &[TableName],
    findings: &mut Findings,
    target_schema: impl Fn(&TableName) -> Option<String>,
) -> Result<Vec<SelectedTable>, tokio_postgres::Error> {
    let names = list_tables(client).await?;
    for missing in except.iter().filter(|e| !names.contains(e)) {
        findings.add(Problem::new(
            SqlState::UNDEFINED_TABLE,
            format!("table \"{missing}\" in EXCEPT does not exist on the source"),
        ));
    }
    Ok(names
        .into_iter()
        .filter(|name| !except.contains(name))
        .filter_map(|source| {
            let target = TableName::new(target_schema(&source)?, &source.name);
            Some(SelectedTable { source, target, columns: ColumnChoice::default(), condition: None })
        })
        .collect())
}

fn check_columns(plan: &TablePlan, findings: &mut Findings) {
    let name = &plan.source.name;
    let named = plan.columns.only.iter().flatten().chain(&plan.columns.except);
    for column in named {
        if !plan.source.columns.iter().any(|c| c.name == *column) {
            findings.add(Problem::new(
                SqlState::UNDEFINED_COLUMN,
                format!("column \"{column}\" of table \"{name}\" does not exist"),
            ));
        }
    }
    if let Some(column) = plan.key().into_iter().flatten().find(|c| !plan.columns.takes(c)) {
        findings.add(
            Problem::new(
                SqlState::INVALID_PARAMETER_VALUE,
                format!("column \"{column}\" of table \"{name}\" cannot be left out"),
            )
            .detail("Rows are found by it."),
        );
    }
}

/// Checks the source server: that it decodes, has room, and lets us in.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says; what is wrong is put in `findings`.
pub async fn check_source(source: &PeerSession, plans: &[TablePlan], findings: &mut Findings) -> Result<(), Error> {
    let query = "
        select pg_catalog.current_setting('wal_level'),
               pg_catalog.current_setting('max_replication_slots')::int8 - (select count(*) from pg_catalog.pg_replication_slots),
               pg_catalog.current_setting('max_wal_senders')::int8 - (select count(*) from pg_catalog.pg_stat_replication),
               (select r.rolsuper or r.rolreplication from pg_catalog.pg_roles r where r.rolname = current_user),
               pg_catalog.pg_is_in_recovery(),
               pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create'), current_user::text";
    let row = source.client.query_one(query, &[]).await.map_err(|e| source.error(&e))?;
    let (wal_level, slots, senders): (&str, i64, i64) = (row.get(0), row.get(1), row.get(2));
    let (replication, recovery, may_create, role): (bool, bool, bool, &str) =
        (row.get(3), row.get(4), row.get(5), row.get(6));
    let peer = &source.peer;
    if wal_level != "logical" {
        findings.add(
            Problem::new(SqlState::WRONG_STATE, format!("wal_level of peer \"{peer}\" is {wal_level}"))
                .hint("ALTER SYSTEM SET wal_level = 'logical', then restart the server."),
        );
    }
    if slots <= 0 {
        findings.add(
            Problem::new(SqlState::WRONG_STATE, format!("all replication slots of peer \"{peer}\" are in use"))
                .hint("Raise max_replication_slots, or drop a slot that nobody needs."),
        );
    }
    if senders <= 0 {
        findings.add(
            Problem::new(SqlState::WRONG_STATE, format!("all WAL senders of peer \"{peer}\" are in use"))
                .hint("Raise max_wal_senders."),
        );
    }
    if !replication {
        findings.add(
            Problem::new(
                SqlState::INSUFFICIENT_PRIVILEGE,
                format!("role \"{role}\" may not replicate from peer \"{peer}\""),
            )
            .hint(format!("ALTER ROLE {} REPLICATION", pg::name::quote_ident(role))),
        );
    }
    if recovery {
        findings.add(
            Problem::new(SqlState::WRONG_STATE, format!("peer \"{peer}\" is a standby"))
                .hint("Create the mirror from its primary: publications can only be made there."),
        );
    }
    if !may_create && !recovery {
        findings.add(
            Problem::new(
                SqlState::INSUFFICIENT_PRIVILEGE,
                format!("role \"{role}\" may not create a publication on peer \"{peer}\""),
            )
            .hint(format!("GRANT CREATE ON DATABASE … TO {}", pg::name::quote_ident(role))),
        );
    }
    let query = "select pg_catalog.has_table_privilege($1::oid, 'select'),
                        (select pg_catalog.pg_has_role(c.relowner, 'usage') from pg_catalog.pg_class c where c.oid = $1)";
    for plan in plans {
        let row = source.client.query_one(query, &[&plan.source.oid]).await.map_err(|e| source.error(&e))?;
        let (may_read, owns): (Option<bool>, Option<bool>) = (row.get(0), row.get(1));
        let name = &plan.source.name;
        if may_read == Some(false) {
            findings.add(
                Problem::new(
                    SqlState::INSUFFICIENT_PRIVILEGE,
                    format!("role \"{role}\" may not read table \"{name}\""),
                )
                .hint(format!("GRANT SELECT ON {} TO {}", name.quoted(), pg::name::quote_ident(role))),
            );
        }
        if owns == Some(false) {
            findings.add(
                Problem::new(
                    SqlState::INSUFFICIENT_PRIVILEGE,
                    format!("role \"{role}\" may not publish table \"{name}\""),
                )
                .hint("A publication needs the tables' owner: make the role a member of it."),
            );
        }
    }
    Ok(())
}

/// Checks that the target server takes writes.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says; what is wrong is put in `findings`.
pub async fn check_target(target: &PeerSession, findings: &mut Findings) -> Result<(), Error> {
    let query =
        "select pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('default_transaction_read_only')::bool,
                        pg_catalog.has_database_privilege(pg_catalog.current_database(), 'temp')";
    let row = target.client.query_one(query, &[]).await.map_err(|e| target.error(&e))?;
    if row.get(0) || row.get(1) {
        findings.add(Problem::new(SqlState::READ_ONLY, format!("peer \"{}\" is read-only", target.peer)));
    }
    if !row.get::<_, bool>(2) {
        findings.add(
            Problem::new(
                SqlState::INSUFFICIENT_PRIVILEGE,
                format!("no temporary tables can be made on peer \"{}\"", target.peer),
            )
            .hint("GRANT TEMPORARY ON DATABASE … TO the peer's role: changes are staged there."),
        );
    }
    Ok(())
}
