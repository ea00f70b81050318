//! `vhostfs`: the daemon. See [`config`] for the command line and [`serve`] for what it does.

mod config;
mod failure;
mod filesystem;
mod serve;
mod socket;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use config::{Cli, Command};
use failure::Failure;

/// What QEMU's vhost-user specification asks of a backend program: its type and optional features.
fn print_capabilities() {
    println!("{}", serde_json::json!({ "type": "fs", "features": [] }));
}

fn main() -> ExitCode {
    match parse().and_then(run) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}

/// What the command line asks for; `None` when it asked only for text that was printed.
fn parse() -> Result<Option<Cli>, Failure> {
    let error = match Cli::try_parse() {
        Ok(cli) => return Ok(Some(cli)),
        Err(error) => error,
    };
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return error
            .print()
            .map(|()| None)
            .map_err(|error| Failure::new("standard output", error, "nothing was done"));
    }
    // clap's first paragraph says what is wrong; usage and tips follow.
    let text = error.render().to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    Err(Failure::usage("command line", paragraph.trim_start_matches("error: ")))
}

fn run(cli: Option<Cli>) -> Result<ExitCode, Failure> {
    let Some(cli) = cli else { return Ok(ExitCode::SUCCESS) };
    match cli.command {
        _ if cli.print_capabilities => print_capabilities(),
        Some(Command::Serve(args)) if args.print_capabilities => print_capabilities(),
        Some(Command::Serve(args)) => serve::serve(&args)?,
        None => return Err(Failure::usage("command line", "no command was given")),
    }
    Ok(ExitCode::SUCCESS)
}
