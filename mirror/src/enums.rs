//! Gives the target's enums the labels that the source's have. What changes a type is not in the stream: this is done when streaming
//! begins, and streaming begins anew when a label is refused.

use catalog::event::Event;
use catalog::mirror::Ddl;
use pg::name::quote_literal;

use crate::error::Error;
use crate::session::PeerSession;
use crate::worker::Context;

/// The labels of an enum, in order. Its name is SQL, and the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Labels {
    name: String,
    labels: Vec<String>,
}

/// Adds the labels that the target's enums lack, for those enums that these columns' types are, or are made of.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn follow(context: &Context, source: &PeerSession, target: &PeerSession, types: &[u32]) -> Result<(), Error> {
    if context.mirror.options.ddl != Ddl::Apply {
        return Ok(());
    }
    for of_source in labels_of(source, types).await? {
        let query = "select array(select e.enumlabel::text from pg_catalog.pg_enum e
                                  where e.enumtypid = pg_catalog.to_regtype($1) order by e.enumsortorder)";
        let row = target.client.query_one(query, &[&of_source.name]).await.map_err(|e| target.error(&e))?;
        let of_target: Vec<String> = row.get(0);
        // No enum of that name: the column has another type there, as somebody wanted it.
        if of_target.is_empty() {
            continue;
        }
        for statement in missing_labels(&of_source, &of_target) {
            target.run(&statement).await?;
            context.event(&Event::info("schema", format!("as on the source: {statement}"))).await?;
        }
    }
    Ok(())
}

async fn labels_of(source: &PeerSession, types: &[u32]) -> Result<Vec<Labels>, Error> {
    let query = "
        select pg_catalog.format_type(t.oid, null), array(select e.enumlabel::text from pg_catalog.pg_enum e where e.enumtypid = t.oid order by e.enumsortorder)
        from pg_catalog.pg_type t
        where t.typtype = 'e'
          and exists (select from pg_catalog.pg_type c where c.oid = any ($1) and t.oid in (c.oid, c.typelem, c.typbasetype))
        order by 1";
    let rows = source.client.query(query, &[&types]).await.map_err(|e| source.error(&e))?;
    Ok(rows.iter().map(|row| Labels { name: row.get(0), labels: row.get(1) }).collect())
}

/// Works out the statements that add the labels which the target lacks, each after the one that it follows on the source. A label that
/// only the target has is left there; if it is one that was renamed, rows that are there have the old one, as nothing tells of that.
fn missing_labels(of_source: &Labels, of_target: &[String]) -> Vec<String> {
    let mut statements = Vec::new();
    for (n, label) in of_source.labels.iter().enumerate() {
        if of_target.contains(label) {
            continue;
        }
        let place = match n.checked_sub(1) {
            Some(before) => format!(" after {}", quote_literal(&of_source.labels[before]).trim()),
            None => format!(" before {}", quote_literal(&of_target[0]).trim()),
        };
        let label = quote_literal(label);
        statements.push(format!("alter type {} add value if not exists {}{place}", of_source.name, label.trim()));
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_added_where_they_are_on_the_source() {
        let of = |labels: &[&str]| labels.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
        let source = Labels { name: "public.mood".into(), labels: of(&["first", "sad", "so 'so'", "ok"]) };
        assert_eq!(
            missing_labels(&source, &of(&["sad", "ok", "gone"])),
            [
                "alter type public.mood add value if not exists 'first' before 'sad'",
                "alter type public.mood add value if not exists 'so ''so''' after 'sad'",
            ]
        );
        assert!(missing_labels(&source, &source.labels).is_empty());
    }
}
