//! The binary `peergate`: reads what was asked for and does it. What is more than that is in `serve.rs` and the library.

mod serve;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use gateway::config::{Arguments, Command, RawConfig};
use gateway::{config::Config, demo, healthcheck};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
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
            let config = configure(raw)?;
            runtime()?.block_on(serve::serve(config))
        }
        Command::RotateKey(raw) => {
            let config = configure(raw)?;
            runtime()?.block_on(serve::rotate_key(config))
        }
        Command::Demo(arguments) => Ok(runtime()?.block_on(demo::run(arguments))?),
        Command::Healthcheck(raw) => {
            let config = raw.resolve(|name| std::env::var(name).ok())?;
            // A process that only runs the engine listens on nothing; that it runs at all is for its starter to see.
            if config.role.runs_gateway() { Ok(healthcheck::check(config.listen)?) } else { Ok(()) }
        }
    }
}

/// Reads the configuration and starts logging, to stderr: stdout is for the ready line.
fn configure(raw: RawConfig) -> anyhow::Result<Config> {
    let config = raw.resolve(|name| std::env::var(name).ok())?;
    let filter = EnvFilter::try_new(&config.log).with_context(|| format!("invalid log filter {:?}", config.log))?;
    let colour = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
    Ok(config)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}
