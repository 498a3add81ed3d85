//! What is done about a change of schema: what the option `ddl` says. Pure.

use catalog::event::Event;
use catalog::mirror::Ddl;
use pg::{Lsn, SqlState};

use super::change::{Alteration, Kind, Statement};
use super::{TablePlan, TargetTable};
use crate::error::{Error, Problem};

/// What is to be done on the target, and what the table is from then on.
#[derive(Debug)]
pub struct Followed {
    /// What to do.
    pub statements: Vec<Statement>,
    /// The table as the mirror knows it from then on.
    pub plan: TablePlan,
    /// The target's table from then on.
    pub target: TargetTable,
    /// What a person should know.
    pub events: Vec<Event>,
}

/// Decides what becomes of an alteration of `target` that is due at `place`.
///
/// # Errors
/// [`Error::Blocked`] if `ddl = block` and the target does not have the columns already.
pub fn follow(ddl: Ddl, altered: Alteration, target: &TargetTable, place: Lsn) -> Result<Followed, Error> {
    let Alteration { mut statements, mut plan, target: then } = altered;
    if statements.is_empty() {
        return Ok(Followed { statements, plan, target: then, events: Vec::new() });
    }
    let told = statements.iter().map(|s| s.sql.as_str()).collect::<Vec<_>>().join("; ");
    let name = plan.source.name.clone();
    let left = |what: &str| {
        Event::warning("schema", format!("table \"{name}\" was altered on the source, and the target was not"))
            .detail(format!("{what} With ddl = apply it would have been: {told}."))
            .at(place)
    };
    let event = match ddl {
        Ddl::Apply => {
            let event =
                Event::info("schema", format!("table \"{name}\" was altered as on the source: {told}")).at(place);
            return Ok(Followed { statements, plan, target: then, events: vec![event] });
        }
        Ddl::Ignore => {
            statements.clear();
            left("Columns that the target lacks are left out.")
        }
        Ddl::Block if has_same_columns(&then, target) => {
            statements.retain(|s| s.kind == Kind::Rows);
            left("The columns of the two are alike.")
        }
        Ddl::Block => {
            let message = format!("table \"{name}\" was altered on the source, and ddl = block");
            let problem = Problem::new(SqlState::WRONG_STATE, message)
                .detail(format!("Nothing after this was applied. To follow it, the target needs: {told}."))
                .hint("Give the target the same columns, then RESUME MIRROR.");
            return Err(Error::Blocked(problem.at(place)));
        }
    };
    plan.target_name = target.name.clone();
    let mut target = target.clone();
    target.set_key(plan.key());
    Ok(Followed { statements, plan, target, events: vec![event] })
}

fn has_same_columns(a: &TargetTable, b: &TargetTable) -> bool {
    let is_in = |c: &super::TargetColumn, other: &TargetTable| {
        other.columns.iter().any(|o| (&o.name, &o.type_sql) == (&c.name, &c.type_sql))
    };
    a.columns.iter().all(|c| is_in(c, b)) && b.columns.iter().all(|c| is_in(c, a))
}
