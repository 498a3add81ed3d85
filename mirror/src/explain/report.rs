//! What was found out, as values, as JSON for programs and as rows for people. Pure.

use catalog::rehearsal::{Change, Rehearsal};
use pg::TableName;
use serde_json::{Value, json};

use crate::error;

/// What a statement would make of a mirror.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The mirror.
    pub mirror: String,
    /// The peer it reads from.
    pub source: String,
    /// The peer it writes to.
    pub target: String,
    /// What else changes about the mirror.
    pub changes: Vec<Change>,
    /// What would be made besides target tables.
    pub objects: Vec<Object>,
    /// The tables that it would take, or take in addition.
    pub tables: Vec<Taken>,
    /// Tables that it would take no more.
    pub left_out: Vec<TableName>,
    /// What keeps it from working.
    pub problems: Vec<Problem>,
    /// How long all copies would take together; `None` if that could not be estimated.
    pub copy_seconds: Option<f64>,
}

/// Something that would be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// On which peer.
    pub peer: String,
    /// What.
    pub name: String,
}

/// A table that the mirror would take.
#[derive(Clone, Debug)]
pub struct Taken {
    /// On the source.
    pub source: TableName,
    /// On the target.
    pub target: TableName,
    /// What would be done with the target table.
    pub action: &'static str,
    /// Columns by which rows are found.
    pub key: Option<Vec<String>>,
    /// Rows that are taken, as the source estimates them; `None` if it was never analyzed.
    pub rows: Option<i64>,
    /// All rows of the source table, likewise.
    pub all_rows: Option<i64>,
    /// Bytes on the source.
    pub bytes: Option<i64>,
    /// How long one session would take to read it.
    pub copy_seconds: Option<f64>,
    /// What a person should know.
    pub warning: Option<String>,
}

/// Something that keeps the mirror from working.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind; `None` if it is no server's.
    pub sqlstate: Option<String>,
    /// What it is.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What mends it.
    pub hint: Option<String>,
}

impl Problem {
    /// One without more to say about it.
    pub fn error(message: String) -> Problem {
        Problem { sqlstate: None, message, detail: None, hint: None }
    }
}

impl From<&error::Problem> for Problem {
    fn from(problem: &error::Problem) -> Problem {
        Problem {
            sqlstate: Some(problem.sqlstate.to_string()),
            message: problem.message.clone(),
            detail: problem.detail.clone(),
            hint: problem.hint.clone(),
        }
    }
}

impl Object {
    /// Something that would be made on that peer.
    pub fn made(peer: &str, name: impl Into<String>) -> Object {
        Object { peer: peer.to_owned(), name: name.into() }
    }
}

impl Explanation {
    /// Begins with what is known without having looked at the peers.
    pub fn new(rehearsal: &Rehearsal) -> Explanation {
        Explanation {
            mirror: rehearsal.mirror.name.clone(),
            source: rehearsal.mirror.source_name.clone(),
            target: rehearsal.mirror.target_name.clone(),
            changes: rehearsal.changes.clone(),
            objects: Vec::new(),
            tables: Vec::new(),
            left_out: Vec::new(),
            problems: Vec::new(),
            copy_seconds: None,
        }
    }

    /// Estimates how long the copies take, at `rate` bytes a second for each of `workers` sessions.
    pub fn estimate(&mut self, rate: Option<f64>, workers: usize) {
        let Some(rate) = rate.filter(|rate| *rate > 0.0) else { return };
        for table in &mut self.tables {
            table.copy_seconds = table.bytes.map(|bytes| bytes as f64 / rate);
        }
        // No table is shorter for being copied beside others; parts of it are copied at once, too.
        self.copy_seconds = Some(self.bytes() as f64 / rate / workers.max(1) as f64);
    }

    fn bytes(&self) -> i64 {
        self.tables.iter().filter_map(|table| table.bytes).sum()
    }

    fn rows_total(&self) -> Option<i64> {
        self.tables.iter().map(|table| table.rows).sum()
    }

    /// Returns what `peergate.explain_mirror` takes: `plan` for programs, `rows` for people.
    pub fn to_json(&self) -> Value {
        json!({"plan": self.plan(), "rows": self.rows()})
    }

    fn plan(&self) -> Value {
        let table = |table: &Taken| {
            json!({"source": table.source.to_string(), "target": table.target.to_string(), "action": table.action,
                "key": table.key, "rows": table.rows, "bytes": table.bytes, "copy_seconds": table.copy_seconds,
                "warning": table.warning})
        };
        let problem = |problem: &Problem| json!({"sqlstate": problem.sqlstate, "message": problem.message, "detail": problem.detail, "hint": problem.hint});
        json!({
            "mirror": self.mirror, "source": self.source, "target": self.target,
            "changes": self.changes.iter().map(|c| json!({"what": c.what, "from": c.from, "to": c.to})).collect::<Vec<_>>(),
            "objects": self.objects.iter().map(|o| json!({"peer": o.peer, "name": o.name, "action": "create"})).collect::<Vec<_>>(),
            "tables": self.tables.iter().map(table).collect::<Vec<_>>(),
            "left_out": self.left_out.iter().map(TableName::to_string).collect::<Vec<_>>(),
            "problems": self.problems.iter().map(problem).collect::<Vec<_>>(),
            "total": {"tables": self.tables.len(), "rows": self.rows_total(), "bytes": self.bytes(), "copy_seconds": self.copy_seconds},
        })
    }

    fn rows(&self) -> Vec<Value> {
        let row = |kind: &str,
                   peer: Option<&str>,
                   object: &str,
                   action: Option<&str>,
                   detail: Option<String>,
                   hint: Option<&str>| {
            json!({"kind": kind, "peer": peer, "object": object, "action": action, "detail": detail, "hint": hint})
        };
        let mut rows = Vec::new();
        for change in &self.changes {
            let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
            let detail = format!("from {} to {}", value(&change.from), value(&change.to));
            let kind = if change.what == "name" { "name" } else { "option" };
            rows.push(row(kind, None, &change.what, Some("change"), Some(detail), None));
        }
        for object in &self.objects {
            rows.push(row("object", Some(&object.peer), &object.name, Some("create"), None, None));
        }
        for table in &self.tables {
            let mut facts = vec![format!("from {}", table.source)];
            facts.push(
                table.key.as_ref().map_or_else(|| "no key".to_owned(), |key| format!("key ({})", key.join(", "))),
            );
            facts.push(
                table.rows.map_or_else(|| "number of rows not known".to_owned(), |rows| format!("about {rows} rows")),
            );
            facts.extend(table.bytes.map(size));
            facts.extend(table.copy_seconds.map(duration));
            rows.push(row(
                "table",
                Some(&self.target),
                &table.target.to_string(),
                Some(table.action),
                Some(facts.join(", ")),
                None,
            ));
        }
        for table in &self.left_out {
            let detail = "its target table stays as it is".to_owned();
            rows.push(row("table", Some(&self.source), &table.to_string(), Some("leave out"), Some(detail), None));
        }
        for table in &self.tables {
            if let Some(warning) = &table.warning {
                rows.push(row(
                    "warning",
                    Some(&self.source),
                    &table.source.to_string(),
                    None,
                    Some(warning.clone()),
                    None,
                ));
            }
        }
        for problem in &self.problems {
            let detail = match &problem.detail {
                Some(detail) => format!("{}. {detail}", problem.message),
                None => problem.message.clone(),
            };
            let kind = problem.sqlstate.as_deref().unwrap_or("");
            rows.push(row("error", None, kind, None, Some(detail), problem.hint.as_deref()));
        }
        let mut facts = Vec::new();
        if !self.tables.is_empty() {
            facts.push(match self.tables.len() {
                1 => "1 table".to_owned(),
                n => format!("{n} tables"),
            });
            facts.push(size(self.bytes()));
            facts.extend(self.copy_seconds.map(duration));
        }
        facts.push(match self.problems.len() {
            0 => "nothing is in the way".to_owned(),
            1 => "1 problem".to_owned(),
            n => format!("{n} problems"),
        });
        rows.push(row("total", None, &self.mirror, None, Some(facts.join(", ")), None));
        rows
    }
}

/// A size as people read it, in the units of pg_size_pretty.
fn size(bytes: i64) -> String {
    let mut amount = bytes as f64;
    let mut unit = "bytes";
    for next in ["kB", "MB", "GB", "TB"] {
        if amount < 10_240.0 {
            break;
        }
        amount /= 1024.0;
        unit = next;
    }
    format!("{amount:.0} {unit}")
}

/// A time as people read it.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => "less than 1 s to read".to_owned(),
        s if s < 120.0 => format!("about {s:.0} s to read"),
        s if s < 7200.0 => format!("about {:.0} min to read", s / 60.0),
        s => format!("about {:.0} h to read", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(bytes: i64) -> Taken {
        let name = |schema: &str| TableName::new(schema, "t");
        Taken {
            source: name("public"),
            target: name("crm"),
            action: "create and copy",
            key: Some(vec!["id".to_owned()]),
            rows: Some(bytes / 100),
            all_rows: Some(bytes / 100),
            bytes: Some(bytes),
            copy_seconds: None,
            warning: None,
        }
    }

    fn explanation(tables: Vec<Taken>) -> Explanation {
        Explanation {
            mirror: "m".to_owned(),
            source: "shop".to_owned(),
            target: "dwh".to_owned(),
            changes: Vec::new(),
            objects: vec![Object::made("shop", "publication")],
            tables,
            left_out: Vec::new(),
            problems: Vec::new(),
            copy_seconds: None,
        }
    }

    #[test]
    fn times_are_those_of_all_sessions_together() {
        let mut explained = explanation(vec![taken(8_000_000), taken(2_000_000)]);
        explained.estimate(Some(1e6), 4);
        let seconds: Vec<_> = explained.tables.iter().map(|t| t.copy_seconds.unwrap()).collect();
        assert_eq!((seconds, explained.copy_seconds), (vec![8.0, 2.0], Some(2.5)));
        explained.estimate(Some(0.0), 4);
        assert_eq!(explained.copy_seconds, Some(2.5));
    }

    #[test]
    fn rows_say_it_in_words_and_the_plan_in_numbers() {
        let mut explained = explanation(vec![taken(8_000_000)]);
        explained.problems.push(Problem::error("peer \"dwh\" is read-only".to_owned()));
        let found = explained.to_json();
        let details: Vec<_> =
            found["rows"].as_array().unwrap().iter().map(|row| row["detail"].as_str().unwrap_or("")).collect();
        assert_eq!(
            details,
            [
                "",
                "from public.t, key (id), about 80000 rows, 7812 kB",
                "peer \"dwh\" is read-only",
                "1 table, 7812 kB, 1 problem"
            ]
        );
        assert_eq!(found["plan"]["total"]["bytes"], 8_000_000);
        assert_eq!(found["plan"]["tables"][0]["key"][0], "id");
    }

    #[test]
    fn amounts_have_the_unit_that_people_read() {
        assert_eq!((size(8192), size(20_480), size(10 << 30)), ("8192 bytes".into(), "20 kB".into(), "10 GB".into()));
        assert_eq!(
            (duration(0.2), duration(90.0), duration(3600.0)),
            ("less than 1 s to read".into(), "about 90 s to read".into(), "about 60 min to read".into())
        );
    }
}
