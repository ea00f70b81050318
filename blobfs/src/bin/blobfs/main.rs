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

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use failure::{Failure, Status};

fn main() -> ExitCode {
    let result = match Cli::try_parse_from(arguments()) {
        Ok(cli) => run(cli.command),
        Err(error) => explain(&error),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("{failure}");
        failure.exit_code()
    })
}

/// The command line. Under the name `fsck.blobfs`, by which fsck(8) looks for it, the program is `blobfs fsck`.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.first().is_some_and(|name| Path::new(name).file_name() == Some("fsck.blobfs".as_ref())) {
        arguments.insert(1, "fsck".into());
    }
    arguments
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
    let is_check = arguments().get(1).is_some_and(|command| command == "fsck" || command == "scrub");
    let status = if is_check { Status::FsckUsage } else { Status::Usage };
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Err(Failure::new("command line", "no command was given", "see 'blobfs --help'").with(status));
    }
    // clap's first paragraph says what is wrong; usage and tips follow.
    let text = error.render().to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let why = paragraph.trim_start_matches("error: ");
    Err(Failure::new("command line", why, "see 'blobfs --help'").with(status))
}
