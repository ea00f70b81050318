//! Developer commands: `cargo xtask demo | test | crash | fuzz | bench | install`.
//!
//! | module | does |
//! |---|---|
//! | `setup` | installs, downloads and builds what a guest is made of; quick when all of it is there |
//! | `build` | release builds of the programs, and where cargo put them |
//! | `demo` | the tour of the README |
//! | `test` | every test, with a summary |
//! | `crash` | power cuts on a simulated disk, for as long as one likes |
//! | `fuzz` | the fuzz targets, for as long as one likes |
//! | `bench` | the benchmark tables |
//! | `install` | copies the programs below a prefix |
//! | `terminal` | raw mode for the shell at the end of the tour |

mod bench;
mod build;
mod crash;
mod demo;
mod fuzz;
mod install;
mod setup;
mod terminal;
mod test;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Developer commands of vhostfs.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a Linux guest on a new image, show a tour of the file system in it, then give a shell there.
    Demo {
        /// No shell: power off after the tour, boot a second guest on the same image, verify every checksum again,
        /// take the tour again there, check the image.
        #[arg(long)]
        check: bool,
    },
    /// Install what is missing and run every test; the last line counts them.
    Test(test::Options),
    /// Cut the power of a simulated disk again and again, during random work and every sequence of two operations, let it
    /// fail, and check what is left. A failure prints the command that repeats it; --help tells the options.
    Crash(crash::Options),
    /// Install what is missing and run the fuzz targets: hostile images, FUSE requests, descriptor chains and vhost-user
    /// messages. A finding is shown with the command that replays it.
    Fuzz(fuzz::Options),
    /// Install what is missing and measure vhostfs beside virtiofsd; -- --help tells the options.
    Bench {
        /// Passed on to the benchmark program, like everything after it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build the programs for release and install them.
    Install {
        /// Programs go to PREFIX/bin.
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
    },
}

fn main() -> ExitCode {
    // True: everything asked for succeeded. False: the command has already said what did not.
    let result = match Arguments::parse().command {
        Command::Demo { check } => demo::run(check).map(|()| true),
        Command::Test(options) => test::run(&options),
        Command::Crash(options) => crash::run(&options).map(|()| true),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Bench { arguments } => bench::run(&arguments).map(|()| true),
        Command::Install { prefix } => install::run(&prefix).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
