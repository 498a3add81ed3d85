//! What was done, for whoever has to understand a failure.

use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Lines with times, of one life. Clones write to the same.
#[derive(Clone)]
pub(crate) struct Journal(Arc<Mutex<(Instant, Vec<String>)>>);

impl Journal {
    pub(crate) fn new() -> Journal {
        Journal(Arc::new(Mutex::new((Instant::now(), Vec::new()))))
    }

    /// Forgets the life before.
    pub(crate) fn begin(&self, seed: u64) {
        *self.0.lock().unwrap() = (Instant::now(), vec![format!("seed {seed}")]);
    }

    pub(crate) fn note(&self, what: impl Into<String>) {
        let mut inner = self.0.lock().unwrap();
        let at = inner.0.elapsed().as_millis();
        inner.1.push(format!("{at:>6} ms  {}", what.into()));
    }

    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap().1.join("\n")
    }
}
