//! Named points at which tests make the engine fail, stand still, or end its process. In release builds there are none.
//!
//! `fail_point!` stands at every edge of the state machines: between two things that are not done in one transaction. What must hold is
//! that the next attempt, in this process or another, goes on from there. `tests/failpoints.rs` finds the points in the source and walks
//! through all of them; a new one needs nothing but its line.

use std::collections::{HashMap, VecDeque};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use pg::SqlState;
use tokio::sync::Notify;

use crate::error::{Error, Problem};

/// A point with a name of its own, in an async function that returns [`Error`].
macro_rules! fail_point {
    ($name:literal) => {
        $crate::failpoint::reach($name).await?;
    };
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The step fails as if a connection had broken.
    Fail,
    /// The task goes no further, and holds what it holds; the test ends it.
    Hang,
    /// The process ends as by `kill -9`: nothing is flushed, rolled back or said.
    Kill,
}

/// What is to happen, by point: the fault, and how often the point is passed before.
type Armed = HashMap<String, (Fault, u32)>;

#[derive(Default)]
struct Points {
    armed: Armed,
    /// In the order in which they were first reached.
    reached: Vec<&'static str>,
    fired: VecDeque<(&'static str, Fault)>,
}

static POINTS: LazyLock<Mutex<Points>> = LazyLock::new(|| {
    let armed = std::env::var("PEERGATE_FAIL_POINTS").map(|text| parse(&text)).unwrap_or_default();
    Mutex::new(Points { armed, ..Points::default() })
});

/// Told when a point has fired.
static FIRED: Notify = Notify::const_new();

fn points() -> MutexGuard<'static, Points> {
    POINTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads what `PEERGATE_FAIL_POINTS` says: `point=fault`, or `point=fault:n` for after n times, separated by semicolons.
fn parse(text: &str) -> Armed {
    let fault = |word: &str| match word {
        "fail" => Some(Fault::Fail),
        "hang" => Some(Fault::Hang),
        "kill" => Some(Fault::Kill),
        _ => None,
    };
    let one = |part: &str| {
        let (point, what) = part.split_once('=')?;
        let (word, passes) = what.split_once(':').unwrap_or((what, "0"));
        Some((point.trim().to_owned(), (fault(word)?, passes.parse().ok()?)))
    };
    text.split(';').filter_map(one).collect()
}

/// Lets something happen, once, when the point has been passed so many times. For the whole process: other tests of it see it too.
pub fn arm(point: &str, fault: Fault, passes: u32) {
    points().armed.insert(point.to_owned(), (fault, passes));
}

/// Returns the points that are armed and have not fired.
pub fn armed() -> Vec<String> {
    points().armed.keys().cloned().collect()
}

/// Waits until an armed point has fired, and returns which, and how. One waits at a time.
pub async fn fired() -> (&'static str, Fault) {
    loop {
        let told = FIRED.notified();
        if let Some(fired) = points().fired.pop_front() {
            return fired;
        }
        told.await;
    }
}

/// Returns the points that were reached since the process began, in the order of the first time.
pub fn reached() -> Vec<&'static str> {
    points().reached.clone()
}

/// Passes a point; see `fail_point!`.
///
/// # Errors
/// [`Error::Transient`] if it is armed with [`Fault::Fail`].
pub async fn reach(point: &'static str) -> Result<(), Error> {
    match note(point) {
        None => Ok(()),
        Some(Fault::Kill) => std::process::abort(),
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Fail) => {
            Err(Error::Transient(Problem::new(SqlState::CONNECTION_EXCEPTION, format!("failure at \"{point}\""))))
        }
    }
}

/// Notes that a point is passed, and takes out what is to happen now.
fn note(point: &'static str) -> Option<Fault> {
    let mut points = points();
    if !points.reached.contains(&point) {
        points.reached.push(point);
    }
    let (fault, passes) = points.armed.get_mut(point)?;
    if *passes > 0 {
        *passes -= 1;
        return None;
    }
    let fault = *fault;
    points.armed.remove(point);
    points.fired.push_back((point, fault));
    drop(points);
    FIRED.notify_one();
    Some(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_from_the_environment() {
        let armed = parse("slot made=kill; batch written = fail;copy recorded=hang:3;x=kill:y");
        assert_eq!(armed.get("slot made"), Some(&(Fault::Kill, 0)));
        assert_eq!(armed.get("copy recorded"), Some(&(Fault::Hang, 3)));
        assert_eq!(armed.len(), 2);
    }

    #[tokio::test]
    async fn a_point_fires_once_when_it_was_passed_often_enough() {
        arm("here", Fault::Fail, 1);
        assert!(reach("here").await.is_ok());
        assert!(reach("here").await.is_err());
        assert_eq!(fired().await, ("here", Fault::Fail));
        assert!(reach("here").await.is_ok());
    }
}
