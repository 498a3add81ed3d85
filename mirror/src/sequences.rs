//! Keeps the target's sequences at or ahead of the source's, so that whoever goes over to the target is not given a value twice.
//!
//! Sequences are not in the stream. They are looked at every few seconds, and before a statement that waits for the mirror is told where
//! to wait for: when WAIT FOR MIRROR is done, the target's are where the source's were when it began.

use catalog::event::Event;
use pg::TableName;

use crate::error::Error;
use crate::schema::TablePlan;
use crate::session::PeerSession;
use crate::worker::Context;

/// The sequences that columns take their values from: by a default, or as identity.
const OF_COLUMNS: &str = "
    select a.adrelid as relation, a.adnum as number, d.refobjid as sequence
    from pg_catalog.pg_attrdef a
    join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_attrdef'::regclass and d.objid = a.oid
                               and d.refclassid = 'pg_catalog.pg_class'::regclass
    union
    select d.refobjid, d.refobjsubid::int2, d.objid
    from pg_catalog.pg_depend d
    where d.classid = 'pg_catalog.pg_class'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass and d.deptype = 'i'";

/// The sequences of a mirror's tables.
#[derive(Default)]
pub struct Sequences {
    tables: Vec<(u32, TableName)>,
    target: Option<PeerSession>,
    warned: bool,
}

impl Sequences {
    /// Keeps those of these tables from now on.
    pub fn keep(&mut self, tables: &[TablePlan]) {
        self.tables = tables.iter().map(|plan| (plan.source.oid, plan.target_name.clone())).collect();
    }

    /// Moves the target's sequences to where the source's are, those that are behind. What the target refuses is told once.
    ///
    /// # Errors
    /// [`Error::Transient`] if one of the two cannot be reached.
    pub async fn keep_up(&mut self, context: &Context, source: &PeerSession) -> Result<(), Error> {
        if !context.mirror.options.copy_sequences || self.tables.is_empty() {
            return Ok(());
        }
        let values = self.values(source).await?;
        if values.is_empty() {
            return Ok(());
        }
        let target = match self.target.take() {
            Some(target) => target,
            None => PeerSession::open(&context.mirror.target_name, &context.mirror.target).await?,
        };
        let moved = advance(&target, &values).await;
        self.target = Some(target);
        match moved {
            Err(Error::Blocked(problem)) if !self.warned => {
                self.warned = true;
                let event = Event::warning("schema", "sequences of the target do not follow the source's");
                context.event(&event.detail(format!("{}.", problem.message))).await
            }
            Ok(()) | Err(Error::Blocked(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The last values that the source's sequences gave, with the target's columns that they are for. One that has given none is not
    /// among them.
    async fn values(&self, source: &PeerSession) -> Result<Vec<(TableName, String, i64)>, Error> {
        let query = format!(
            "with used as ({OF_COLUMNS})
             select u.relation, a.attname::text, pg_catalog.pg_sequence_last_value(s.seqrelid::regclass)
             from used u
             join pg_catalog.pg_sequence s on s.seqrelid = u.sequence
             join pg_catalog.pg_attribute a on a.attrelid = u.relation and a.attnum = u.number
             where u.relation = any ($1) and pg_catalog.has_sequence_privilege(s.seqrelid, 'select, usage')"
        );
        let oids: Vec<u32> = self.tables.iter().map(|(oid, _)| *oid).collect();
        let rows = source.client.query(&query, &[&oids]).await.map_err(|e| source.error(&e))?;
        let value = |row: &tokio_postgres::Row| {
            let (oid, last): (u32, Option<i64>) = (row.get(0), row.get(2));
            let (_, target) = self.tables.iter().find(|(table, _)| *table == oid)?;
            Some((target.clone(), row.get(1), last?))
        };
        Ok(rows.iter().filter_map(value).collect())
    }
}

async fn advance(target: &PeerSession, values: &[(TableName, String, i64)]) -> Result<(), Error> {
    let statement = format!(
        "with used as ({OF_COLUMNS})
         select pg_catalog.setval(s.seqrelid::regclass, w.value)
         from unnest($1::text[], $2::text[], $3::text[], $4::int8[]) as w (schema_name, table_name, column_name, value)
         join pg_catalog.pg_namespace n on n.nspname = w.schema_name
         join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.table_name
         join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = w.column_name
         join used u on u.relation = c.oid and u.number = a.attnum
         join pg_catalog.pg_sequence s on s.seqrelid = u.sequence
         cross join lateral (select pg_catalog.pg_sequence_last_value(s.seqrelid::regclass) as value) l
         where w.value between s.seqmin and s.seqmax
           and (l.value is null or case when s.seqincrement > 0 then l.value < w.value else l.value > w.value end)"
    );
    let part = |n: fn(&(TableName, String, i64)) -> &str| values.iter().map(n).collect::<Vec<&str>>();
    let (schemas, tables) = (part(|v| v.0.schema.as_str()), part(|v| v.0.name.as_str()));
    let (columns, last): (Vec<&str>, Vec<i64>) = (part(|v| v.1.as_str()), values.iter().map(|v| v.2).collect());
    target.client.query(&statement, &[&schemas, &tables, &columns, &last]).await.map_err(|e| target.error(&e))?;
    Ok(())
}
