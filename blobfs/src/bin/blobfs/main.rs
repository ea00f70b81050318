//! `blobfs`: the tool that makes, shows and checks images. See [`cli`] for the command line.

mod check;
mod cli;
mod failure;
mod image;
mod info;
mod interrupt;
mod mkfs;
mod progress;
mod scrub;
mod signature;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use failure::{Failure, Status};

fn main() -> ExitCode {
    let result = match Cli::try_parse() {
        Ok(cli) => run(cli.command),
        Err(error) => explain(&error),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("{failure}");
        failure.exit_code()
    })
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Mkfs(args) => mkfs::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Fsck(args) => check::run(&args),
        Command::Scrub(args) => scrub::run(&args),
    }
}

/// Prints the text that was asked for, or says in one line what is wrong with the command line.
fn explain(error: &clap::Error) -> Result<ExitCode, Failure> {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(Failure::new("standard output", error, "nothing was done")),
        };
    }
    let status = match std::env::args().nth(1).as_deref() {
        Some("fsck" | "scrub") => Status::FsckUsage,
        _ => Status::Usage,
    };
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Err(Failure::new("command line", "no command was given", "see 'blobfs --help'").with(status));
    }
    // clap's first paragraph says what is wrong; usage and tips follow.
    let text = error.render().to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let why = paragraph.trim_start_matches("error: ");
    Err(Failure::new("command line", why, "see 'blobfs --help'").with(status))
}
