//! Looks at the query and at the target table before anything is written, and makes what the target lacks.

use std::sync::Arc;

use catalog::event::Event;
use catalog::mirror::query::{QueryMirror, QueryMode, WaitFor};
use pg::SqlState;
use pg::name::quote_ident;
use tokio_postgres::Statement;
use tokio_postgres::types::{Kind as TypeKind, Type};

use super::template::{Limit, Template};
use super::watermark::{Kind, Span};
use crate::error::{Error, Problem};
use crate::prepare::run_fenced;
use crate::schema::ddl::{self, Prerequisite};
use crate::schema::introspect::{target_tables, types};
use crate::schema::{TargetTable, Types, make};
use crate::session::PeerSession;
use crate::source::preflight::Findings;
use crate::state::MirrorState;
use crate::worker::Context;

/// A column of the query's result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type's oid on the source.
    pub type_oid: u32,
    /// Its type's modifier; -1 when there is none.
    pub modifier: i32,
}

/// What rounds need to know.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What was asked for.
    pub query: Arc<QueryMirror>,
    /// The query's text.
    pub template: Template,
    /// How it is limited to a partition.
    pub limit: Limit,
    /// Its columns.
    pub columns: Vec<Column>,
    /// Values travel in binary.
    pub binary: bool,
    /// The target table as SQL that means it alone.
    pub alone: String,
    /// The schemas of the target's types, as SQL.
    pub search_path: String,
}

impl Plan {
    /// Returns the columns as a list in SQL.
    pub fn column_list(&self) -> String {
        let names: Vec<String> = self.columns.iter().map(|c| quote_ident(&c.name)).collect();
        names.join(", ")
    }

    /// Returns whether these are still the query's columns.
    pub fn has_columns(&self, columns: &[Column]) -> bool {
        let look = |c: &Column| (c.name.clone(), c.type_oid);
        self.columns.iter().map(look).eq(columns.iter().map(look))
    }

    /// Returns the format of COPY in which values travel.
    pub fn format(&self) -> &'static str {
        if self.binary { "binary" } else { "text" }
    }

    /// Returns whether each round has all rows of the query.
    pub fn takes_all(&self) -> bool {
        self.query.mode == QueryMode::Overwrite || self.limit == Limit::Nothing
    }
}

/// Returns the columns of a query that was prepared.
pub fn columns_of(statement: &Statement) -> Vec<Column> {
    let column = |c: &tokio_postgres::Column| Column {
        name: c.name().to_owned(),
        type_oid: c.type_().oid(),
        modifier: c.type_modifier(),
    };
    statement.columns().iter().map(column).collect()
}

/// What the source says of the query.
struct Described {
    template: Template,
    limit: Limit,
    columns: Vec<Column>,
}

/// Looks at both sides, and makes the target table if it is missing and wanted.
///
/// # Errors
/// [`Error::Blocked`] with what keeps the mirror from working, all at once where one does not hide another.
pub async fn run(
    context: &Context,
    query: &Arc<QueryMirror>,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<Plan, Error> {
    context.set_state(MirrorState::Preflight).await?;
    let Described { template, limit, columns } = describe(query, source).await?;
    // Names of types are to be whole.
    source.run("set search_path = ''").await?;
    let oids: Vec<u32> = columns.iter().map(|c| c.type_oid).collect();
    let known = types(&source.client, &oids, source.version).await.map_err(|e| source.error(&e))?;
    let found = match find_target(query, target).await? {
        Some(found) => found,
        None => {
            check_creation(query, &columns)?;
            create_target(context, query, source, target, &columns).await?;
            find_target(query, target).await?.ok_or_else(|| {
                let message = format!("target table \"{}\" was dropped when it had just been made", query.target);
                Error::Transient(Problem::new(SqlState::UNDEFINED_TABLE, message))
            })?
        }
    };
    source.run("reset search_path").await?;
    check_target(query, &columns, &found)?;
    let schemas: Vec<String> = found.type_schemas.iter().map(|s| quote_ident(s)).collect();
    Ok(Plan {
        query: query.clone(),
        binary: is_binary(&columns, &known, &found),
        template,
        limit,
        columns,
        alone: found.alone(),
        search_path: if schemas.is_empty() { "''".to_owned() } else { schemas.join(", ") },
    })
}

/// Checks that the mirror could work, and makes nothing. Returns whether it would make the target table.
///
/// # Errors
/// [`Error::Blocked`] with what keeps the mirror from working.
pub async fn try_out(query: &QueryMirror, source: &PeerSession, target: &PeerSession) -> Result<bool, Error> {
    let columns = describe(query, source).await?.columns;
    match find_target(query, target).await? {
        Some(found) => check_target(query, &columns, &found).map(|()| false),
        None => check_creation(query, &columns).map(|()| true),
    }
}

async fn describe(query: &QueryMirror, source: &PeerSession) -> Result<Described, Error> {
    let template = Template::parse(&query.query);
    let limit = find_limit(query, &template, source).await?;
    check_standby(query, &limit, source).await?;
    let statement = source.client.prepare(&template.whole(&limit)).await.map_err(|e| of_query(source.error(&e)))?;
    let limited = template.limited(&limit, &Span::default(), false);
    if let Err(error) = source.client.prepare(&limited).await {
        return Err(cannot_be_limited(&limit, source.error(&error)));
    }
    let columns = columns_of(&statement);
    check_names(&columns)?;
    Ok(Described { template, limit, columns })
}

/// Says of an error that it is the query's.
fn of_query(error: Error) -> Error {
    match error {
        Error::Blocked(problem) => Error::Blocked(Problem {
            hint: problem.hint.clone().or_else(|| Some("It is what the source says of the mirror's query.".to_owned())),
            ..problem
        }),
        other => other,
    }
}

/// Works out how the query is limited to a partition.
async fn find_limit(query: &QueryMirror, template: &Template, source: &PeerSession) -> Result<Limit, Error> {
    let blocked =
        |sqlstate, message: String, hint: &str| Err(Error::Blocked(Problem::new(sqlstate, message).hint(hint)));
    let Some(column) = &query.watermark_column else { return Ok(Limit::Nothing) };
    if column == "xmin" {
        return match template.has_placeholders() {
            true => Ok(Limit::Placeholders(Kind::Xmin)),
            false if template.may_combine() => blocked(
                SqlState::FEATURE_NOT_SUPPORTED,
                "a query with UNION, INTERSECT or EXCEPT cannot be limited by xmin from outside".to_owned(),
                "Write xmin::text::bigint BETWEEN {{.start}} AND {{.end}} where it belongs.",
            ),
            false => Ok(Limit::Xmin),
        };
    }
    let look = match &query.watermark_table {
        Some(table) => format!("select {} from {}", quote_ident(column), table.quoted()),
        None => format!("select q.{} from ({}\n) q", quote_ident(column), template.whole(&Limit::Nothing)),
    };
    let statement = source.client.prepare(&look).await.map_err(|e| of_query(source.error(&e)))?;
    let found = statement.columns().first().map(|c| c.type_().clone()).unwrap_or(Type::TEXT);
    let Some(kind) = Kind::of(base(&found)) else {
        return blocked(
            SqlState::FEATURE_NOT_SUPPORTED,
            format!("column \"{column}\" of type {} cannot be a watermark", found.name()),
            "A watermark is a smallint, integer, bigint, date, timestamp or timestamptz, or xmin.",
        );
    };
    Ok(if template.has_placeholders() { Limit::Placeholders(kind) } else { Limit::Column(column.clone(), kind) })
}

/// A domain is what its base is.
fn base(column: &Type) -> &Type {
    match column.kind() {
        TypeKind::Domain(inner) => base(inner),
        _ => column,
    }
}

/// What the standby's primary has open cannot be seen there, but what has a number.
async fn check_standby(query: &QueryMirror, limit: &Limit, source: &PeerSession) -> Result<(), Error> {
    let waits = matches!(limit, Limit::Column(_, kind) | Limit::Placeholders(kind) if *kind != Kind::Xmin);
    if !waits || query.mode == QueryMode::Overwrite || query.wait_for != WaitFor::All {
        return Ok(());
    }
    let query = "select pg_catalog.pg_is_in_recovery()";
    if !source.done(source.client.query_one(query, &[])).await?.get::<_, bool>(0) {
        return Ok(());
    }
    let message = format!(
        "peer \"{}\" is a standby, which does not know the transactions that are open on its primary",
        source.peer
    );
    Err(Error::Blocked(
        Problem::new(SqlState::WRONG_STATE, message)
            .detail("A row with a lower watermark could be committed after it was looked for.")
            .hint("Use watermark_column = xmin, wait_for_transactions = writers if watermarks are made when a transaction writes, or the primary."),
    ))
}

fn cannot_be_limited(limit: &Limit, error: Error) -> Error {
    match (limit, error) {
        (Limit::Xmin, Error::Blocked(problem)) => Error::Blocked(
            Problem::new(
                problem.sqlstate,
                format!("the query cannot be limited by xmin from outside: {}", problem.message),
            )
            .detail("It was continued with WHERE, and a condition on xmin.")
            .hint("Write xmin::text::bigint BETWEEN {{.start}} AND {{.end}} where it belongs in the query."),
        ),
        (_, error) => of_query(error),
    }
}

fn check_names(columns: &[Column]) -> Result<(), Error> {
    if columns.is_empty() {
        return Err(Error::Blocked(Problem::new(SqlState::INVALID_PARAMETER_VALUE, "the query gives no columns")));
    }
    for (n, column) in columns.iter().enumerate() {
        if columns[..n].iter().any(|c| c.name == column.name) {
            let message = format!("the query gives two columns \"{}\"", column.name);
            return Err(Error::Blocked(
                Problem::new(SqlState::from_text("42701").unwrap_or(SqlState::INVALID_PARAMETER_VALUE), message)
                    .hint("Name each as a column of the target table, with AS."),
            ));
        }
    }
    Ok(())
}

async fn find_target(query: &QueryMirror, target: &PeerSession) -> Result<Option<TargetTable>, Error> {
    let mut found =
        target_tables(&target.client, &[&query.target], target.version).await.map_err(|e| target.error(&e))?;
    Ok(found.remove(&query.target))
}

/// Makes the table with the query's columns, and what their types need.
async fn create_target(
    context: &Context,
    query: &QueryMirror,
    source: &PeerSession,
    target: &PeerSession,
    columns: &[Column],
) -> Result<(), Error> {
    context.set_state(MirrorState::Schema).await?;
    let oids: Vec<u32> = columns.iter().map(|c| c.type_oid).collect();
    for prerequisite in ddl::prerequisites_of_types(&source.client, &oids).await.map_err(|e| source.error(&e))? {
        if make::prerequisite(target, &prerequisite).await?
            && let Prerequisite::Extension(name, _) = &prerequisite
        {
            context.event(&Event::info("schema", format!("extension \"{name}\" created on the target"))).await?;
        }
    }
    let modifiers: Vec<i32> = columns.iter().map(|c| c.modifier).collect();
    let names = "select pg_catalog.format_type(t.oid, t.modifier) from unnest($1::oid[], $2::int4[]) with ordinality t (oid, modifier, n) order by t.n";
    let named = source.done(source.client.query(names, &[&oids, &modifiers])).await?;
    let mut defined: Vec<String> = columns
        .iter()
        .zip(&named)
        .map(|(c, row)| format!("{} {}", quote_ident(&c.name), row.get::<_, &str>(0)))
        .collect();
    if !query.key_columns.is_empty() {
        let keys: Vec<String> = query.key_columns.iter().map(|k| quote_ident(k)).collect();
        defined.push(format!("primary key ({})", keys.join(", ")));
    }
    make::schema(target, &query.target.schema).await?;
    run_fenced(context, target, &format!("create table {} ({})", query.target.quoted(), defined.join(", "))).await?;
    fail_point!("query target made");
    context.event(&Event::info("schema", format!("table \"{}\" created on the target", query.target))).await
}

fn key_is_missing(query: &QueryMirror, key: &str) -> Problem {
    Problem::new(SqlState::UNDEFINED_COLUMN, format!("the query lacks key column \"{key}\""))
        .detail(format!("Rows of target table \"{}\" are to be found by it.", query.target))
        .hint("Add it to the query's columns, or choose other key_columns.")
}

/// Checks that a target table that is missing can be made.
fn check_creation(query: &QueryMirror, columns: &[Column]) -> Result<(), Error> {
    let mut findings = Findings::default();
    if !query.create_table {
        findings.add(
            Problem::new(SqlState::UNDEFINED_TABLE, format!("target table \"{}\" does not exist", query.target))
                .hint("Create it, or use create_table = true."),
        );
    }
    for key in query.key_columns.iter().filter(|key| !columns.iter().any(|c| c.name == **key)) {
        findings.add(key_is_missing(query, key));
    }
    findings.into_result()
}

/// Checks that the target can take the query's rows.
fn check_target(query: &QueryMirror, columns: &[Column], target: &TargetTable) -> Result<(), Error> {
    let name = &target.name;
    let mut findings = Findings::default();
    for column in columns {
        match target.columns.iter().find(|c| c.name == column.name) {
            None => findings.add(
                Problem::new(
                    SqlState::UNDEFINED_COLUMN,
                    format!("target table \"{name}\" lacks column \"{}\"", column.name),
                )
                .hint("Add the column, or take it out of the query."),
            ),
            Some(of_target) if of_target.generated => findings.add(
                Problem::new(
                    SqlState::from_text("428C9").unwrap_or(SqlState::INVALID_PARAMETER_VALUE),
                    format!("column \"{}\" of target table \"{name}\" is generated and takes no values", column.name),
                )
                .hint("Take it out of the query."),
            ),
            Some(_) => {}
        }
    }
    for column in target.columns.iter().filter(|c| c.required && !columns.iter().any(|q| q.name == c.name)) {
        let message =
            format!("column \"{}\" of target table \"{name}\" must have a value and the query has none", column.name);
        findings.add(
            Problem::new(SqlState::from_text("23502").unwrap_or(SqlState::INVALID_PARAMETER_VALUE), message)
                .hint("Give the column a default, allow NULL, or add it to the query."),
        );
    }
    for key in query.key_columns.iter().filter(|key| !columns.iter().any(|c| c.name == **key)) {
        findings.add(key_is_missing(query, key));
    }
    if !query.key_columns.is_empty() && !target.has_key(&query.key_columns) {
        let keys = query.key_columns.join(", ");
        findings.add(
            Problem::new(SqlState::WRONG_STATE, format!("target table \"{name}\" has no unique index on ({keys})"))
                .detail("Rows are found by these columns, the mirror's key_columns.")
                .hint("Create a unique index on these columns on the target."),
        );
    }
    findings.into_result()
}

fn is_binary(columns: &[Column], types: &Types, target: &TargetTable) -> bool {
    columns.iter().all(|column| {
        let of_source = types.get(&column.type_oid).filter(|t| t.sends).and_then(|t| t.wire.as_ref());
        let of_target = target.columns.iter().find(|c| c.name == column.name).and_then(|c| c.wire.as_ref());
        of_source.is_some() && of_source == of_target
    })
}

/// Says of a watermark that some rows may not be found by it.
///
/// # Errors
/// [`Error`] as the source's SQLSTATE says.
pub async fn warn_of_watermark(context: &Context, query: &QueryMirror, source: &PeerSession) -> Result<(), Error> {
    let (Some(column), Some(table)) = (&query.watermark_column, &query.watermark_table) else { return Ok(()) };
    if column == "xmin" || query.mode == QueryMode::Overwrite {
        return Ok(());
    }
    let look = "
        select not a.attnotnull from pg_catalog.pg_attribute a
        where a.attrelid = pg_catalog.to_regclass($1) and a.attname = $2 and not a.attisdropped";
    let row = source.done(source.client.query_opt(look, &[&table.quoted(), column])).await?;
    if row.is_some_and(|row| row.get(0)) {
        let event = Event::warning("schema", format!("column \"{column}\" of table \"{table}\" may be NULL"));
        let event = event.detail("Rows whose watermark is NULL are not taken.").hint("Declare the column NOT NULL.");
        context.event(&event).await?;
    }
    // A sequence of which sessions take several numbers at once gives them out of order.
    let look = "
        select s.seqcache from pg_catalog.pg_depend d join pg_catalog.pg_sequence s on s.seqrelid = d.objid
        join pg_catalog.pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
        where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.refobjid = pg_catalog.to_regclass($1) and a.attname = $2
          and s.seqcache > 1";
    if let Some(row) = source.done(source.client.query_opt(look, &[&table.quoted(), column])).await? {
        let cache: i64 = row.get(0);
        let event = Event::warning(
            "schema",
            format!(
                "the sequence of column \"{column}\" of table \"{table}\" gives each session {cache} numbers at once"
            ),
        );
        let event = event
            .detail("A session may commit a row with a lower number than one that was read already: such a row is not taken.")
            .hint("ALTER SEQUENCE … CACHE 1, or use watermark_column = xmin.");
        context.event(&event).await?;
    }
    Ok(())
}
