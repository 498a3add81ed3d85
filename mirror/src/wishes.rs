//! Makes a mirror's tables what statements want them to be: takes tables in and out, and has them copied anew.

use catalog::mirror::{MirrorTable, SelectedTable, Selection, TableRow, Wishes};
use catalog::task::TaskKind;
use std::collections::BTreeSet;
use std::time::Duration;

use pg::TableName;

use crate::error::Error;
use crate::late::Main;
use crate::session::PeerSession;
use crate::sink::marks;
use crate::source::preflight::list_selected;
use crate::source::publication;
use crate::table_state::TableState;
use crate::worker::Context;

/// How often it is asked whether tables that are being copied are still wanted.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What has to change so that the mirror's tables are those that are wanted. Pure.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Tables that it lacks.
    pub added: Vec<SelectedTable>,
    /// Tables that it has and should not.
    pub removed: Vec<TableName>,
}

/// Compares the tables that are wanted with those that the mirror has.
pub fn difference(wanted: &[SelectedTable], known: &[MirrorTable]) -> Difference {
    let removed_state = TableState::Removed.as_str();
    let has = |table: &SelectedTable| {
        known.iter().any(|k| k.source == table.source && k.target == table.target && k.state != removed_state)
    };
    let is_wanted = |table: &MirrorTable| wanted.iter().any(|w| w.source == table.source && w.target == table.target);
    Difference {
        added: wanted.iter().filter(|table| !has(table)).cloned().collect(),
        removed: known
            .iter()
            .filter(|table| table.state != removed_state && !is_wanted(table))
            .map(|table| table.source.clone())
            .collect(),
    }
}

/// Takes up a RESYNC of the whole mirror, if one is wanted. Returns whether one is under way: what is durable then counts no more than
/// it says, and the target may be begun anew.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn take_resync(context: &Context) -> Result<bool, Error> {
    let id = context.mirror.id;
    let Some(Wishes { tasks, .. }) = context.catalog.wishes(id).await? else { return Err(Error::Stopped) };
    let whole = tasks.iter().filter(|t| t.kind == TaskKind::ResyncMirror && t.tables.is_none());
    let (taken, new): (Vec<_>, Vec<_>) = whole.partition(|t| t.taken);
    if !new.is_empty() {
        let ids: Vec<i64> = new.iter().map(|t| t.id).collect();
        context.catalog.take_resync_of_all(id, &ids).await?;
        fail_point!("resync taken up");
    }
    Ok(!taken.is_empty() || !new.is_empty())
}

/// Returns whether something is wanted that nobody has taken up, and that is not among the tasks `seen`, to which it is added.
pub async fn are_new(context: &Context, seen: &mut BTreeSet<i64>) -> bool {
    // What the catalog does not say now it says at the next attempt.
    let Ok(Some(wishes)) = context.catalog.wishes(context.mirror.id).await else { return false };
    let mut new = false;
    for task in wishes.tasks.iter().filter(|t| !t.taken) {
        new |= seen.insert(task.id);
    }
    new
}

/// Returns when one of these tables is no longer to be part of the mirror.
pub async fn are_unwanted(context: &Context, tables: &[TableName]) {
    loop {
        // What the catalog does not say now it says the next time.
        if let Ok(Some(wishes)) = context.catalog.wishes(context.mirror.id).await
            && tables.iter().any(|table| !wishes.selection.takes(table))
        {
            return;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Makes the mirror's tables those that are wanted, and takes up what is wanted of them. Those that need a copy are late from then on.
/// `main` is told, if it runs. Returns whether there is a task that is not done.
///
/// # Errors
/// [`Error`] as the peers' SQLSTATE says, or if the catalog cannot be reached.
pub async fn obey(context: &Context, main: Option<&Main>) -> Result<bool, Error> {
    let (catalog, mirror) = (&context.catalog, &context.mirror);
    let Some(Wishes { selection, tasks }) = catalog.wishes(mirror.id).await? else { return Err(Error::Stopped) };
    let open: Vec<_> =
        tasks.iter().filter(|t| !t.taken && (t.kind == TaskKind::AlterMirror || t.tables.is_some())).collect();
    let listed = !matches!(selection, Selection::Tables(_));
    let refresh = open.iter().any(|t| t.kind == TaskKind::AlterMirror);
    if open.is_empty() && listed {
        return Ok(!tasks.is_empty());
    }
    let known = catalog.mirror_tables(mirror.id).await?;
    let mut sessions = None;
    let difference = match &selection {
        Selection::Tables(wanted) => difference(wanted, &known),
        _ if !refresh => Difference::default(),
        _ => {
            let (source, _) = open_once(context, &mut sessions).await?;
            listed_difference(source, &selection, &known).await?
        }
    };
    if !difference.removed.is_empty() {
        let (source, target) = open_once(context, &mut sessions).await?;
        leave_out(context, target, main, &difference.removed).await?;
        for table in &difference.removed {
            publication::remove(source, &mirror.object_name, table).await?;
        }
        catalog.set_tables_from(mirror.id, &difference.removed, None).await?;
        catalog.set_table_states(mirror.id, &difference.removed, TableState::Removed.as_str()).await?;
        fail_point!("tables removed");
    }
    add(context, &difference.added).await?;
    let ids = |kind: TaskKind| open.iter().filter(|t| t.kind == kind).map(|t| t.id).collect::<Vec<i64>>();
    catalog.take_tasks(&ids(TaskKind::AlterMirror)).await?;
    let anew: Vec<TableName> = open
        .iter()
        .filter(|t| t.kind == TaskKind::ResyncMirror)
        .flat_map(|t| t.tables.iter().flatten().cloned())
        .collect();
    if !anew.is_empty() {
        let (_, target) = open_once(context, &mut sessions).await?;
        leave_out(context, target, main, &anew).await?;
        fail_point!("tables to resync left out");
        catalog.take_resync_of_tables(mirror.id, &anew, &ids(TaskKind::ResyncMirror)).await?;
        fail_point!("resync of tables taken up");
    }
    Ok(!tasks.is_empty())
}

/// Compares what a selection that lists no tables takes on the source now with the tables that the mirror has. Those that were renamed are
/// neither new nor gone: the stream will tell.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn listed_difference(
    source: &PeerSession,
    selection: &Selection,
    known: &[MirrorTable],
) -> Result<Difference, Error> {
    let mut difference = difference(&list_selected(source, selection).await?, known);
    let query = "
        select c.oid, n.nspname::text, c.relname::text
        from unnest($1::text[], $2::text[]) t (schema_name, table_name)
        join pg_catalog.pg_namespace n on n.nspname = t.schema_name
        join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.table_name";
    let (schemas, names): (Vec<&str>, Vec<&str>) =
        difference.added.iter().map(|t| (t.source.schema.as_str(), t.source.name.as_str())).unzip();
    let rows = source.client.query(query, &[&schemas, &names]).await.map_err(|e| source.error(&e))?;
    for row in &rows {
        let (oid, name): (u32, TableName) = (row.get(0), TableName { schema: row.get(1), name: row.get(2) });
        let is_ours = |t: &&MirrorTable| t.source_oid == Some(oid) && t.state != TableState::Removed.as_str();
        if let Some(ours) = known.iter().find(is_ours).filter(|ours| ours.source != name) {
            difference.added.retain(|t| t.source != name);
            difference.removed.retain(|t| *t != ours.source);
        }
    }
    Ok(difference)
}

/// Adds tables to the mirror, which are late then.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn add(context: &Context, tables: &[SelectedTable]) -> Result<(), Error> {
    if tables.is_empty() {
        return Ok(());
    }
    let row = |t: &SelectedTable| TableRow {
        source: t.source.clone(),
        target: t.target.clone(),
        key_columns: None,
        warning: None,
        source_oid: None,
    };
    let (catalog, id) = (&context.catalog, context.mirror.id);
    catalog.set_tables(id, &tables.iter().map(row).collect::<Vec<_>>()).await?;
    let names: Vec<TableName> = tables.iter().map(|t| t.source.clone()).collect();
    catalog.set_table_states(id, &names, TableState::Pending.as_str()).await?;
    fail_point!("tables added");
    Ok(())
}

/// Takes the tables out of the main stream: first on the target, so that no later attempt takes them for complete.
async fn leave_out(
    context: &Context,
    target: &PeerSession,
    main: Option<&Main>,
    tables: &[TableName],
) -> Result<(), Error> {
    marks::clear(target, &context.mirror.object_name, context.lane, context.epoch, tables).await?;
    let Some(main) = main else { return Ok(()) };
    main.ignore(tables.to_vec()).await?;
    main.expected.lock().await.plans.retain(|plan| !tables.contains(&plan.source.name));
    Ok(())
}

/// Opens sessions on both peers when they are first needed.
async fn open_once<'a>(
    context: &Context,
    sessions: &'a mut Option<(PeerSession, PeerSession)>,
) -> Result<(&'a PeerSession, &'a PeerSession), Error> {
    let mirror = &context.mirror;
    if sessions.is_none() {
        let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
        let target = PeerSession::open(&mirror.target_name, &mirror.target).await?;
        *sessions = Some((source, target));
    }
    let (source, target) = sessions.as_ref().expect("opened above");
    Ok((source, target))
}

#[cfg(test)]
mod tests {
    use catalog::mirror::ColumnChoice;

    use super::*;

    fn wanted(name: &str, target: &str) -> SelectedTable {
        let table = |name: &str| TableName::new("public", name);
        SelectedTable { source: table(name), target: table(target), columns: ColumnChoice::default(), condition: None }
    }

    fn known(name: &str, state: TableState) -> MirrorTable {
        let table = TableName::new("public", name);
        MirrorTable {
            source: table.clone(),
            target: table,
            state: state.as_str().to_owned(),
            created: None,
            replaces: false,
            source_oid: None,
        }
    }

    #[test]
    fn tables_come_and_go_and_come_back() {
        let has = [known("a", TableState::Live), known("b", TableState::Blocked), known("c", TableState::Removed)];
        let same = difference(&[wanted("a", "a"), wanted("b", "b")], &has);
        assert_eq!(same, Difference::default());
        let other = difference(&[wanted("c", "c"), wanted("d", "d")], &has);
        assert_eq!(other.added, [wanted("c", "c"), wanted("d", "d")]);
        assert_eq!(other.removed, [TableName::new("public", "a"), TableName::new("public", "b")]);
    }

    #[test]
    fn a_table_that_is_to_go_elsewhere_is_added_anew() {
        let moved = difference(&[wanted("a", "z")], &[known("a", TableState::Live)]);
        assert_eq!((moved.added.len(), moved.removed.len()), (1, 1));
    }
}
