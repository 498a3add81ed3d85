//! What follows from a look at an alert. Pure: from what was known, what is seen and the time to what is known from then on, and told.
//!
//! A condition begins to hold when it is first seen to be true, and has to hold without a break for as long as its FOR says before the alert
//! fires. The alert recovers as soon as no condition has held for that long. A figure that is not known decides nothing: what held before
//! goes on holding, and what did not does not begin to.

use std::collections::BTreeMap;

use catalog::alert::{
    Alert, Comparison, Condition, Decision, Event, EventKind, Firing, Look, Metric, Sample, Standing,
};

/// How much of a mirror's or peer's own error a message quotes, in characters.
const ERROR_CHARS_MAX: usize = 500;

/// Decides about all that an alert watches, and has watched. What stays as it was is left out.
pub fn decide(look: &Look) -> Vec<Decision> {
    let mut decisions = Vec::new();
    for sample in &look.samples {
        let before = look.standings.iter().find(|standing| standing.subject_id == sample.subject_id);
        let (standing, event) = evaluate(&look.alert, before, sample, look.now);
        if standing.as_ref() != before {
            decisions.push(Decision {
                subject_id: sample.subject_id,
                subject: sample.subject.clone(),
                standing,
                event,
            });
        }
    }
    let is_gone = |standing: &&Standing| look.samples.iter().all(|sample| sample.subject_id != standing.subject_id);
    for gone in look.standings.iter().filter(is_gone) {
        decisions.push(Decision {
            subject_id: gone.subject_id,
            subject: gone.subject.clone(),
            standing: None,
            event: gone.firing.as_ref().map(|firing| Event {
                kind: EventKind::Recovered,
                condition: firing.condition.clone(),
                value: None,
                message: format!("{} \"{}\" is not watched any more", look.alert.kind, gone.subject),
            }),
        });
    }
    decisions
}

/// Decides about one mirror or peer: what is known of it from now on, and what there is to tell.
pub fn evaluate(
    alert: &Alert,
    before: Option<&Standing>,
    sample: &Sample,
    now: f64,
) -> (Option<Standing>, Option<Event>) {
    let was_firing = before.and_then(|standing| standing.firing.as_ref());
    // The alert was changed while it fired. What is true of it now is taken to have been so since then: it goes on, and does not fire anew.
    let changed = was_firing.filter(|firing| alert.conditions.iter().all(|c| c.text != firing.condition));
    let mut since = BTreeMap::new();
    for condition in &alert.conditions {
        let held = before.and_then(|standing| standing.since.get(&condition.text)).map(|since| since.min(now));
        let holds = match is_true(condition, sample) {
            Some(true) => Some(held.or(changed.map(|firing| firing.since.min(now))).unwrap_or(now)),
            Some(false) => None,
            None => held,
        };
        if let Some(begin) = holds {
            since.insert(condition.text.clone(), begin);
        }
    }
    let has_held = |condition: &&Condition| {
        since.get(&condition.text).is_some_and(|begin| now - begin >= condition.hold.as_secs_f64())
    };
    let cause = alert.conditions.iter().find(has_held);
    let (firing, event) = match (was_firing, cause) {
        (None, None) => (None, None),
        (None, Some(condition)) => {
            let firing = Firing { since: now, told_at: now, condition: condition.text.clone() };
            (Some(firing), Some(event(EventKind::Fired, alert, condition, sample)))
        }
        (Some(firing), Some(condition)) => {
            let told_at = firing.told_at.min(now);
            let is_due = alert.repeat.is_some_and(|repeat| now - told_at >= repeat.as_secs_f64());
            let told_at = if is_due { now } else { told_at };
            let event = is_due.then(|| event(EventKind::Repeated, alert, condition, sample));
            (Some(Firing { since: firing.since, told_at, condition: condition.text.clone() }), event)
        }
        (Some(firing), None) => (None, Some(recovery(alert, firing, sample, now))),
    };
    let is_nothing = since.is_empty() && firing.is_none();
    let standing = Standing { subject_id: sample.subject_id, subject: sample.subject.clone(), since, firing };
    ((!is_nothing).then_some(standing), event)
}

/// Whether a condition is true; `None` if the figure is not known.
fn is_true(condition: &Condition, sample: &Sample) -> Option<bool> {
    if condition.metric == Metric::State {
        let is_equal = *sample.state.as_ref()? == condition.value;
        return Some(is_equal == (condition.comparison == Comparison::Equal));
    }
    let (figure, value) = (figure(condition.metric, sample)?, condition.value.parse::<f64>().ok()?);
    Some(match condition.comparison {
        Comparison::Greater => figure > value,
        Comparison::GreaterOrEqual => figure >= value,
        Comparison::Less => figure < value,
        Comparison::LessOrEqual => figure <= value,
        Comparison::Equal => figure == value,
        Comparison::NotEqual => figure != value,
    })
}

fn figure(metric: Metric, sample: &Sample) -> Option<f64> {
    match metric {
        Metric::LagBytes => sample.lag_bytes,
        Metric::LagSeconds => sample.lag_seconds,
        Metric::SlotWalBytes => sample.slot_wal_bytes,
        Metric::Errors => sample.errors,
        Metric::Conflicts => sample.conflicts,
        Metric::UnreachableSeconds => sample.unreachable_seconds,
        Metric::State => None,
    }
}

/// A figure as people read it: seconds with one place, all else whole.
fn shown(metric: Metric, sample: &Sample) -> Option<String> {
    match metric {
        Metric::State => sample.state.clone(),
        Metric::LagSeconds | Metric::UnreachableSeconds => figure(metric, sample).map(|n| format!("{n:.1}")),
        _ => figure(metric, sample).map(|n| format!("{n:.0}")),
    }
}

fn event(kind: EventKind, alert: &Alert, condition: &Condition, sample: &Sample) -> Event {
    let value = shown(condition.metric, sample);
    let metric = condition.metric.as_str();
    let mut message = format!("{} \"{}\": {metric} ", alert.kind, sample.subject);
    message.push_str(&value.as_deref().map_or("is not known now".to_owned(), |value| format!("is {value}")));
    if kind == EventKind::Repeated {
        message.push_str(" still");
    }
    message.push_str(&format!(" ({})", condition.text));
    if let Some(error) = &sample.error {
        message.push_str(": ");
        message.extend(error.chars().take(ERROR_CHARS_MAX));
    }
    Event { kind, condition: condition.text.clone(), value, message }
}

fn recovery(alert: &Alert, firing: &Firing, sample: &Sample, now: f64) -> Event {
    let condition = alert.conditions.iter().find(|condition| condition.text == firing.condition);
    let value = condition.and_then(|condition| shown(condition.metric, sample));
    let seconds = (now - firing.since).max(0.0);
    let message =
        format!("{} \"{}\" has recovered after {seconds:.0} s from {}", alert.kind, sample.subject, firing.condition);
    Event { kind: EventKind::Recovered, condition: firing.condition.clone(), value, message }
}

#[cfg(test)]
mod tests;
