//! The binary `peergate`: reads what was asked for and does it. What is more than that is in `serve.rs` and the library.

mod serve;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use gateway::config::{Arguments, Command, RawConfig};
use gateway::reload::{Reloader, log_filter};
use gateway::{config::Config, demo, healthcheck};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    give_memory_back();
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peergate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(raw) => {
            let (config, set_log) = configure(raw.clone())?;
            let reloader = Reloader::new(raw, config.clone(), variable, set_log);
            runtime()?.block_on(serve::serve(config, reloader))
        }
        Command::RotateKey(raw) => {
            let (config, _) = configure(raw)?;
            runtime()?.block_on(serve::rotate_key(config))
        }
        Command::Dump(raw) => {
            let (config, _) = configure(raw)?;
            runtime()?.block_on(serve::dump(config))
        }
        Command::Demo(arguments) => Ok(runtime()?.block_on(demo::run(arguments))?),
        Command::Healthcheck(raw) => {
            let config = raw.resolve(variable)?;
            // A process that only runs the engine listens on nothing; that it runs at all is for its starter to see.
            if config.role.runs_gateway() { Ok(healthcheck::check(config.listen)?) } else { Ok(()) }
        }
    }
}

/// Has large pieces of memory go back to the system when they are freed. Left alone, the allocator raises the size from which it does
/// that to whatever was freed last, and keeps tens of megabytes for each thread that once held a large statement.
fn give_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it only sets the allocator's numbers, and no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 16 << 20);
    }
}

/// Reads the configuration and starts logging, to stderr: stdout is for the ready line. Also returns what changes the log's filter.
fn configure(raw: RawConfig) -> anyhow::Result<(Config, impl Fn(EnvFilter) -> Result<(), String>)> {
    let config = raw.resolve(variable)?;
    let filter = log_filter(&config.log)?;
    let colour = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour);
    let log = log.with_filter_reloading();
    let handle = log.reload_handle();
    log.init();
    Ok((config, move |filter| handle.reload(filter).map_err(|error| error.to_string())))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}
