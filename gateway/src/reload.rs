//! Reading the configuration again while the process runs: all of it is checked before any of it is put in force.

use std::sync::{Mutex, OnceLock, PoisonError};

use tracing_subscriber::EnvFilter;

use crate::config::{Config, ConfigError, RawConfig, Setting};
use crate::error::Error;
use crate::server::{Control, ServerOptions};

/// Looks up an environment variable.
type Variable = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// Replaces the log's filter.
type SetLog = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

/// What was typed when the process began, what holds now, and where changes have to go.
pub struct Reloader {
    typed: RawConfig,
    variable: Variable,
    set_log: SetLog,
    control: OnceLock<Control>,
    current: Mutex<Config>,
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Settings that have a new value now.
    pub changed: Vec<&'static str>,
    /// Settings that the file wants to be different, but that only a restart can change.
    pub waiting: Vec<&'static str>,
}

/// Why all stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The log's filter cannot be used.
    #[error("invalid log filter {0:?}: {1}")]
    Log(String, String),
    /// Certificates or keys cannot be used.
    #[error(transparent)]
    Server(#[from] Error),
}

impl Reloader {
    /// Remembers what was typed, and the configuration that came of it.
    pub fn new(
        typed: RawConfig,
        current: Config,
        variable: impl Fn(&str) -> Option<String> + Send + Sync + 'static,
        set_log: impl Fn(EnvFilter) -> Result<(), String> + Send + Sync + 'static,
    ) -> Reloader {
        let (variable, set_log) = (Box::new(variable), Box::new(set_log));
        Reloader { typed, variable, set_log, control: OnceLock::new(), current: Mutex::new(current) }
    }

    /// Says which server gets the changes. Without one only the log does.
    pub fn steer(&self, control: Control) {
        let _ = self.control.set(control);
    }

    /// Returns what holds now.
    pub fn settings(&self) -> Vec<Setting> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).settings()
    }

    /// Reads file, certificates and keys again and puts in force what can be changed. Sessions that have begun are not touched.
    /// It reads files, so it does not belong on a thread that serves sessions.
    ///
    /// # Errors
    /// [`ReloadError`]; then nothing has changed.
    pub fn reload(&self) -> Result<Reloaded, ReloadError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.typed.clone().resolve(&self.variable)?;
        let merged = current.with_changes_of(&wanted);
        let filter = log_filter(&merged.log)?;
        let prepared = match self.control.get() {
            Some(control) => {
                // Called where blocking is allowed: it reads files too.
                let options = ServerOptions::from_config(&merged);
                Some((control, tokio::runtime::Handle::current().block_on(control.prepare(&options))?))
            }
            None => None,
        };
        (self.set_log)(filter).map_err(|reason| ReloadError::Log(merged.log.clone(), reason))?;
        if let Some((control, prepared)) = prepared {
            control.apply(prepared);
        }
        let done = Reloaded { changed: current.differences(&merged), waiting: merged.differences(&wanted) };
        *current = merged;
        Ok(done)
    }
}

/// Reads a log filter.
///
/// # Errors
/// [`ReloadError::Log`].
pub fn log_filter(text: &str) -> Result<EnvFilter, ReloadError> {
    EnvFilter::try_new(text).map_err(|error| ReloadError::Log(text.to_owned(), error.to_string()))
}

impl Reloaded {
    /// Writes it to the log.
    pub fn log(&self) {
        tracing::info!(changed = self.changed.join(", "), "configuration, certificates and keys were read again");
        if !self.waiting.is_empty() {
            tracing::warn!(settings = self.waiting.join(", "), "some settings change only with a restart");
        }
    }
}
