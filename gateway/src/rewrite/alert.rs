//! The calls of statements about alerts.

use serde_json::{Value as Json, json};

use super::inspect::Found;
use super::sql::{Sql, array, options};
use crate::statement::{
    AlertChange, AlertChannel, AlertCondition, AlertOn, AlterAlert, CreateAlert, GivenOption, Statement, Value,
};

/// Writes `CALL peergate.create_alert(…` without its end.
pub(super) fn create(sql: &mut Sql, alert: &CreateAlert, found: &Found<'_>) {
    sql.push("CALL peergate.create_alert(");
    sql.name(&alert.name);
    on(sql, &alert.on);
    conditions(sql, &alert.conditions);
    found.argument(sql, "channels", false);
    options(sql, &alert.options);
    found.argument(sql, "secrets", false);
    sql.flag("if_not_exists", alert.if_not_exists);
    sql.flag("or_replace", alert.or_replace);
}

/// Writes the call of an ALTER ALERT without its end; `found` if it gives channels.
pub(super) fn alter(sql: &mut Sql, alert: &AlterAlert, found: Option<&Found<'_>>) {
    let procedure = if matches!(alert.change, AlertChange::RenameTo(_)) { "rename_alert" } else { "alter_alert" };
    sql.push(&format!("CALL peergate.{procedure}("));
    sql.name(&alert.name);
    match &alert.change {
        AlertChange::Define { on: subject, conditions: given, .. } => {
            if let Some(subject) = subject {
                on(sql, subject);
            }
            if !given.is_empty() {
                conditions(sql, given);
            }
            if let Some(found) = found {
                found.argument(sql, "channels", false);
                found.argument(sql, "secrets", false);
            }
        }
        AlertChange::Set(given) => options(sql, given),
        AlertChange::Reset(names) => {
            sql.push(", reset => ");
            array(sql, names);
        }
        AlertChange::Enable(enable) => sql.push(&format!(", enabled => {enable}")),
        AlertChange::RenameTo(name) => {
            sql.push(", ");
            sql.name(name);
        }
    }
    sql.flag("if_exists", alert.if_exists);
}

/// The numbers of the parameters that a statement about an alert names beside its channels' options.
pub(super) fn parameters(statement: &Statement) -> impl Iterator<Item = u16> {
    let (given, alert_options): (&[AlertCondition], &[GivenOption]) = match statement {
        Statement::CreateAlert(alert) => (&alert.conditions, &alert.options),
        Statement::AlterAlert(AlterAlert { change: AlertChange::Define { conditions, .. }, .. }) => (conditions, &[]),
        _ => (&[], &[]),
    };
    let of_conditions = given.iter().flat_map(|condition| std::iter::once(&condition.value).chain(&condition.hold));
    let values = of_conditions.chain(alert_options.iter().map(|option| &option.value));
    values.filter_map(|value| match value {
        Value::Parameter(n) => Some(*n),
        Value::Text(_) => None,
    })
}

fn on(sql: &mut Sql, on: &AlertOn) {
    sql.push(if on.is_peer { ", on_kind => 'peer', on_name => " } else { ", on_kind => 'mirror', on_name => " });
    match &on.name {
        Some(name) => sql.literal(name),
        None => sql.push("NULL"),
    }
}

/// Writes `, conditions => …`, as a constant when no parameter is among them.
fn conditions(sql: &mut Sql, conditions: &[AlertCondition]) {
    sql.push(", conditions => ");
    let text = |value: &Value| match value {
        Value::Text(text) => Some(json!(text)),
        Value::Parameter(_) => None,
    };
    let constant = |condition: &AlertCondition| {
        let mut document =
            json!({"metric": condition.metric, "op": condition.operator, "value": text(&condition.value)?});
        if let Some(hold) = &condition.hold {
            document["for"] = text(hold)?;
        }
        Some(document)
    };
    if let Some(constant) = conditions.iter().map(constant).collect::<Option<Vec<Json>>>() {
        return sql.json(&Json::Array(constant));
    }
    sql.push("pg_catalog.jsonb_build_array(");
    for (n, condition) in conditions.iter().enumerate() {
        sql.push(if n > 0 { ", " } else { "" });
        sql.push("pg_catalog.jsonb_build_object('metric', ");
        sql.literal(&condition.metric);
        sql.push(&format!(", 'op', '{}'", condition.operator));
        let values =
            std::iter::once(("value", &condition.value)).chain(condition.hold.as_ref().map(|hold| ("for", hold)));
        for (key, value) in values {
            sql.push(&format!(", '{key}', "));
            sql.anchor(format!("condition.{}.{key}", n + 1));
            sql.value(value);
            if matches!(value, Value::Text(_)) {
                sql.push("::pg_catalog.text");
            }
        }
        sql.push(")");
    }
    sql.push(")");
}

/// Reads what the catalog stores of an alert's conditions; `None` for a form that is not known.
pub(crate) fn conditions_from_json(document: &Json) -> Option<Vec<AlertCondition>> {
    let text = |value: &Json| value.as_str().map(|text| Value::Text(text.to_owned()));
    let condition = |document: &Json| {
        let operators = [">", ">=", "<", "<=", "=", "<>"];
        Some(AlertCondition {
            metric: document.get("metric")?.as_str()?.to_owned(),
            operator: operators.into_iter().find(|operator| document["op"] == *operator)?,
            value: text(document.get("value")?)?,
            hold: document.get("for").map_or(Some(None), |hold| text(hold).map(Some))?,
        })
    };
    document.as_array()?.iter().map(condition).collect()
}

/// Reads what the catalog stores of an alert's channels; `None` for a form that is not known.
pub(crate) fn channels_from_json(document: &Json) -> Option<Vec<AlertChannel>> {
    let channel = |document: &Json| {
        let option = |(name, value): (&String, &Json)| {
            Some(GivenOption { name: name.clone(), value: Value::Text(value.as_str()?.to_owned()) })
        };
        Some(AlertChannel {
            kind: document.get("channel")?.as_str()?.to_owned(),
            options: document.get("options")?.as_object()?.iter().map(option).collect::<Option<_>>()?,
        })
    };
    document.as_array()?.iter().map(channel).collect()
}
