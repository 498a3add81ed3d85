//! What follows from what: each rule by itself, and all of them on random histories.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn condition(metric: Metric, comparison: Comparison, value: &str, hold: u64) -> Condition {
    let text = format!("{} {comparison:?} {value} {hold}", metric.as_str());
    Condition { metric, comparison, value: value.to_owned(), hold: Duration::from_secs(hold), text }
}

fn lag(limit: &str, hold: u64) -> Condition {
    condition(Metric::LagSeconds, Comparison::Greater, limit, hold)
}

fn alert(conditions: Vec<Condition>, repeat: u64) -> Alert {
    let repeat = Some(Duration::from_secs(repeat)).filter(|repeat| !repeat.is_zero());
    Alert { id: 1, kind: "mirror".to_owned(), conditions, repeat }
}

fn sample(lag_seconds: Option<f64>) -> Sample {
    Sample { subject_id: 1, subject: "m".to_owned(), lag_seconds, ..Sample::default() }
}

/// Goes through a history of (time, lag) and returns the events as (time, kind).
fn told(alert: &Alert, history: &[(f64, Option<f64>)]) -> Vec<(f64, EventKind)> {
    let mut standing = None;
    let mut told = Vec::new();
    for (now, lag) in history {
        let (next, event) = evaluate(alert, standing.as_ref(), &sample(*lag), *now);
        standing = next;
        told.extend(event.map(|event| (*now, event.kind)));
    }
    told
}

use EventKind::{Fired, Recovered, Repeated};

#[test]
fn without_a_hold_it_fires_at_once_and_recovers_at_once() {
    let history = [(0.0, Some(1.0)), (1.0, Some(11.0)), (2.0, Some(12.0)), (3.0, Some(10.0)), (4.0, Some(1.0))];
    assert_eq!(told(&alert(vec![lag("10", 0)], 0), &history), [(1.0, Fired), (3.0, Recovered)]);
}

#[test]
fn with_a_hold_it_fires_only_when_nothing_came_between() {
    let alert = alert(vec![lag("10", 5)], 0);
    let broken = [(0.0, Some(11.0)), (4.0, Some(11.0)), (5.0, Some(1.0)), (6.0, Some(11.0)), (10.0, Some(11.0))];
    assert_eq!(told(&alert, &broken), []);
    let whole = [(0.0, Some(11.0)), (4.9, Some(11.0)), (5.0, Some(11.0)), (6.0, Some(11.0)), (7.0, Some(1.0))];
    assert_eq!(told(&alert, &whole), [(5.0, Fired), (7.0, Recovered)]);
}

#[test]
fn it_is_told_again_at_intervals_while_it_lasts() {
    let history: Vec<_> =
        (0..=9).map(|second| (f64::from(second), Some(if second < 9 { 11.0 } else { 0.0 }))).collect();
    let expected = [(0.0, Fired), (3.0, Repeated), (6.0, Repeated), (9.0, Recovered)];
    assert_eq!(told(&alert(vec![lag("10", 0)], 3), &history), expected);
}

#[test]
fn a_figure_that_is_not_known_decides_nothing() {
    let alert = alert(vec![lag("10", 2)], 0);
    assert_eq!(told(&alert, &[(0.0, None), (9.0, None)]), []);
    let pending = [(0.0, Some(11.0)), (1.0, None), (2.0, None)];
    assert_eq!(told(&alert, &pending), [(2.0, Fired)], "what held goes on holding");
    let firing = [(0.0, Some(11.0)), (2.0, Some(11.0)), (3.0, None), (99.0, None), (100.0, Some(1.0))];
    assert_eq!(told(&alert, &firing), [(2.0, Fired), (100.0, Recovered)]);
}

#[test]
fn any_condition_is_enough_each_with_its_own_hold() {
    let errors = condition(Metric::Errors, Comparison::GreaterOrEqual, "1", 0);
    let alert = alert(vec![lag("10", 5), errors.clone()], 0);
    let now = Sample { errors: Some(1.0), error: Some("out of paper".to_owned()), ..sample(Some(11.0)) };
    let (standing, event) = evaluate(&alert, None, &now, 0.0);
    let event = event.unwrap();
    assert_eq!((event.kind, event.condition.as_str()), (Fired, errors.text.as_str()));
    assert_eq!(event.message, format!("mirror \"m\": errors is 1 ({}): out of paper", errors.text));
    // The other one has held by then: it goes on.
    let later = Sample { errors: Some(0.0), ..sample(Some(11.0)) };
    let (standing, event) = evaluate(&alert, standing.as_ref(), &later, 5.0);
    assert_eq!((event, standing.unwrap().firing.unwrap().condition), (None, alert.conditions[0].text.clone()));
}

#[test]
fn comparisons_are_what_they_say() {
    for (comparison, below, same, above) in [
        (Comparison::Greater, false, false, true),
        (Comparison::GreaterOrEqual, false, true, true),
        (Comparison::Less, true, false, false),
        (Comparison::LessOrEqual, true, true, false),
        (Comparison::Equal, false, true, false),
        (Comparison::NotEqual, true, false, true),
    ] {
        let condition = condition(Metric::LagSeconds, comparison, "10", 0);
        let truth = [9.0, 10.0, 11.0].map(|lag| is_true(&condition, &sample(Some(lag))));
        assert_eq!(truth, [below, same, above].map(Some), "{comparison:?}");
        assert_eq!(is_true(&condition, &sample(None)), None);
    }
    let state = |comparison| condition(Metric::State, comparison, "blocked", 0);
    let blocked = Sample { state: Some("blocked".to_owned()), ..sample(None) };
    let running = Sample { state: Some("running".to_owned()), ..sample(None) };
    assert_eq!(is_true(&state(Comparison::Equal), &blocked), Some(true));
    assert_eq!(is_true(&state(Comparison::Equal), &running), Some(false));
    assert_eq!(is_true(&state(Comparison::NotEqual), &running), Some(true));
    assert_eq!(is_true(&state(Comparison::Equal), &sample(None)), None);
}

#[test]
fn each_metric_is_its_own_figure() {
    let full = Sample {
        lag_bytes: Some(1.0),
        lag_seconds: Some(2.0),
        slot_wal_bytes: Some(3.0),
        errors: Some(4.0),
        conflicts: Some(5.0),
        unreachable_seconds: Some(6.0),
        state: Some("running".to_owned()),
        ..sample(None)
    };
    use Metric::*;
    let metrics = [LagBytes, LagSeconds, SlotWalBytes, Errors, Conflicts, UnreachableSeconds, State];
    let texts = metrics.map(|metric| shown(metric, &full).unwrap());
    assert_eq!(texts, ["1", "2.0", "3", "4", "5", "6.0", "running"]);
}

#[test]
fn a_changed_alert_goes_on_if_what_it_says_now_is_true_too() {
    let old = alert(vec![lag("10", 0)], 0);
    let (standing, _) = evaluate(&old, None, &sample(Some(30.0)), 0.0);
    let raised = alert(vec![lag("20", 60)], 0);
    let (standing, event) = evaluate(&raised, standing.as_ref(), &sample(Some(30.0)), 61.0);
    assert_eq!(event, None, "it fires already");
    assert!(standing.as_ref().unwrap().firing.is_some());
    let out_of_reach = alert(vec![lag("40", 0)], 0);
    let (standing, event) = evaluate(&out_of_reach, standing.as_ref(), &sample(Some(30.0)), 62.0);
    assert_eq!((event.unwrap().kind, standing), (Recovered, None));
}

#[test]
fn a_clock_that_is_set_back_makes_nothing_wait_for_it() {
    let held_back = alert(vec![lag("10", 5)], 10);
    let history = [(1000.0, Some(11.0)), (0.0, Some(11.0)), (5.0, Some(11.0)), (15.0, Some(11.0)), (16.0, Some(0.0))];
    assert_eq!(told(&held_back, &history), [(5.0, Fired), (15.0, Repeated), (16.0, Recovered)]);
}

#[test]
fn what_is_not_watched_any_more_is_told_if_it_fired() {
    let alert = alert(vec![lag("10", 0)], 0);
    let (standing, _) = evaluate(&alert, None, &sample(Some(11.0)), 0.0);
    let pending = Standing { subject_id: 2, subject: "p".to_owned(), firing: None, ..standing.clone().unwrap() };
    let look = Look { alert, standings: vec![standing.unwrap(), pending], samples: Vec::new(), now: 1.0 };
    let decisions = decide(&look);
    assert!(decisions.iter().all(|d| d.standing.is_none()));
    let events: Vec<_> = decisions.iter().map(|d| d.event.as_ref().map(|e| (e.kind, e.message.as_str()))).collect();
    assert_eq!(events, [Some((Recovered, "mirror \"m\" is not watched any more")), None]);
}

#[test]
fn nothing_is_written_of_what_stays_as_it_was() {
    let alert = alert(vec![lag("10", 0)], 0);
    let (standing, _) = evaluate(&alert, None, &sample(Some(11.0)), 0.0);
    let quiet = Sample { subject_id: 2, subject: "q".to_owned(), ..sample(Some(0.0)) };
    let look = Look { alert, standings: vec![standing.unwrap()], samples: vec![sample(Some(12.0)), quiet], now: 1.0 };
    assert_eq!(decide(&look), []);
}

#[test]
fn an_error_is_quoted_up_to_a_length() {
    let now = Sample { error: Some("é".repeat(10_000)), ..sample(Some(11.0)) };
    let (_, event) = evaluate(&alert(vec![lag("10", 0)], 0), None, &now, 0.0);
    assert!(event.unwrap().message.chars().count() < ERROR_CHARS_MAX + 200);
}

/// What should be told of a whole history, said in another way: by looking back over it at each moment.
fn expected(limit: f64, hold: f64, repeat: f64, history: &[(f64, Option<f64>)]) -> Vec<(f64, EventKind)> {
    let mut out = Vec::new();
    let mut told_at: Option<f64> = None;
    for n in 0..history.len() {
        // The last time that it was not true: all that came after it held.
        let begun =
            history[..=n].iter().rposition(|(_, lag)| lag.is_some_and(|lag| lag <= limit)).map_or(0, |at| at + 1);
        let first = history[begun..=n].iter().find(|(_, lag)| lag.is_some());
        let now = history[n].0;
        let fires = first.is_some_and(|(since, _)| now - since >= hold);
        match (fires, told_at) {
            (true, None) => {
                told_at = Some(now);
                out.push((now, Fired));
            }
            (true, Some(at)) if repeat > 0.0 && now - at >= repeat => {
                told_at = Some(now);
                out.push((now, Repeated));
            }
            (false, Some(_)) => {
                told_at = None;
                out.push((now, Recovered));
            }
            _ => {}
        }
    }
    out
}

proptest! {
    #[test]
    fn random_histories_are_told_as_looking_back_says(
        steps in prop::collection::vec((1_u32..5, prop::option::weighted(0.9, 8_u32..13)), 0..60),
        hold in 0_u64..8,
        repeat in 0_u64..8,
    ) {
        let mut now = 0.0;
        let history: Vec<(f64, Option<f64>)> = steps.into_iter().map(|(pause, lag)| {
            now += f64::from(pause);
            (now, lag.map(f64::from))
        }).collect();
        let alert = alert(vec![lag("10", hold)], repeat);
        let told = told(&alert, &history);
        prop_assert_eq!(&told, &expected(10.0, hold as f64, repeat as f64, &history));
        // Whatever happens, it fires, repeats, and recovers in this order.
        let mut firing = false;
        for (_, kind) in told {
            prop_assert_eq!(kind != Fired, firing);
            firing = kind != Recovered;
        }
    }
}
