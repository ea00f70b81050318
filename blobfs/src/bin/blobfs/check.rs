//! `blobfs fsck`.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use blobfs::check::{Finding, Progress, Report, check_with};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::cli::FsckArgs;
use crate::failure::{Failure, Status};
use crate::image::Image;
use crate::interrupt::Interrupt;

/// Exit status when damage was found and is still there.
const DAMAGE_LEFT: u8 = 4;

/// A finding with its text, as `--json` has it.
#[derive(Serialize)]
struct Described<'a> {
    #[serde(flatten)]
    finding: &'a Finding,
    text: String,
}

/// Checks a file system and prints what is wrong with it.
pub(crate) fn run(args: &FsckArgs) -> Result<ExitCode, Failure> {
    let cannot = |failure: Failure| failure.with(Status::FsckOperational);
    let interrupt = Interrupt::install()
        .map_err(|error| cannot(Failure::new("signals", error, "check the limits of the process")))?;
    let Some(report) = check_image(args, interrupt).map_err(cannot)? else {
        let failure = Failure::new(&args.image, "the check was cancelled by a signal", "nothing was changed");
        return Err(failure.with(Status::FsckCancelled));
    };
    if args.json {
        print_json(&report);
    } else {
        print_text(&args.image, &report);
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { DAMAGE_LEFT.into() })
}

/// The report; `None` when a signal came first.
fn check_image(args: &FsckArgs, interrupt: Interrupt) -> Result<Option<Report>, Failure> {
    let image = Image::open_to_read(&args.image)?;
    let device = image.device.clone();
    let bar = progress_bar();
    let checked = image.reactor.block_on(async move {
        let mut show = |progress: Progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        };
        let result = interrupt.before(check_with(&device, &mut show)).await;
        bar.finish_and_clear();
        result.transpose()
    });
    checked.map_err(|error| Failure::new(&args.image, error, "use an image that blobfs made, whole"))
}

/// A bar on a terminal, shown only when the check takes a while.
fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} nodes, {eta} left");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn print_json(report: &Report) {
    let describe = |finding| Described { finding, text: finding.to_string() };
    let findings: Vec<_> = report.findings.iter().map(describe).collect();
    let report = serde_json::json!({
        "findings": findings,
        "findings_left_out": report.findings_left_out,
        "complete": report.complete,
        "counts": report.counts,
    });
    println!("{report:#}");
}

fn print_text(image: &str, report: &Report) {
    for finding in &report.findings {
        println!("{finding}");
    }
    let counts = &report.counts;
    let found = match report.findings.len() as u64 + report.findings_left_out {
        0 => "clean".to_owned(),
        1 => "1 finding".to_owned(),
        count => format!("{count} findings"),
    };
    let part = if report.complete { "" } else { ", only part of it could be checked" };
    println!(
        "{image}: {found}{part}; {} directories, {} files, {} other inodes, {} orphans, {} free blocks",
        counts.directories,
        counts.files,
        counts.symlinks + counts.special_files,
        counts.orphans,
        counts.free_blocks
    );
    if counts.journal_blocks > 0 {
        println!(
            "{image}: not closed; a mount replays {} transactions in {} journal blocks",
            counts.journal_transactions, counts.journal_blocks
        );
    }
}
