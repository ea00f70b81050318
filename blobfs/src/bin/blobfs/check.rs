//! `blobfs fsck`.

use std::process::ExitCode;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use bdev::Bdev;
use blobfs::check::{
    Consent, Finding, Progress, RepairOptions, RepairReport, Repaired, Report, check_with, repair,
};
use blobfs::ondisk::Timestamp;
use blobfs::store::OpenError;
use serde::Serialize;

use crate::cli::FsckArgs;
use crate::failure::{Failure, Status};
use crate::image::Image;
use crate::interrupt::Interrupt;
use crate::progress;

/// Exit bit when damage was repaired.
const REPAIRED: u8 = 1;

/// Exit bit when damage was found and is still there.
pub(crate) const DAMAGE_LEFT: u8 = 4;

/// A finding with its text, as `--json` has it.
#[derive(Serialize)]
pub(crate) struct Described<'a> {
    #[serde(flatten)]
    finding: &'a Finding,
    text: String,
    repaired: bool,
    /// What was done about it.
    action: Option<&'static str>,
}

impl<'a> Described<'a> {
    fn new(finding: &'a Finding, action: Option<&'static str>) -> Self {
        Self { finding, text: finding.to_string(), repaired: action.is_some(), action }
    }

    /// Findings of a check.
    pub(crate) fn all(report: &'a Report) -> Vec<Self> {
        report.findings.iter().map(|finding| Self::new(finding, None)).collect()
    }
}

/// Checks a file system, or repairs it, and prints what is wrong with it.
pub(crate) fn run(args: &FsckArgs) -> Result<ExitCode, Failure> {
    let consent = match (args.repair, args.preen) {
        (true, _) => Consent::Everything,
        (_, true) => Consent::NothingLost,
        _ => return run_check(args),
    };
    let cancel = ("the repair", "nothing that counts was changed, it can be done again");
    let done = work(&args.image, cancel, Image::open_to_change, async move |device, show| {
        repair(device, RepairOptions { consent, now: now() }, show).await
    });
    let report = done?;
    if args.json {
        print_repair_json(&report);
    } else {
        print_repair(&args.image, &report);
    }
    let left = if report.after.is_clean() { 0 } else { DAMAGE_LEFT };
    Ok((if report.changed { REPAIRED } else { 0 } | left).into())
}

fn run_check(args: &FsckArgs) -> Result<ExitCode, Failure> {
    let cancel = ("the check", "nothing was changed");
    let done =
        work(&args.image, cancel, Image::open_to_read, async |device, show| check_with(device, show).await);
    let report = done?;
    if args.json {
        print_check_json(&report);
    } else {
        report.findings.iter().for_each(|finding| println!("{finding}"));
        print_summary(&args.image, &report);
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { DAMAGE_LEFT.into() })
}

/// Does work on an image until a signal comes; `cancel` says what that means.
fn work<T: 'static>(
    image: &str,
    cancel: (&str, &str),
    open: impl FnOnce(&str) -> Result<Image, Failure>,
    run: impl AsyncFnOnce(&Rc<dyn Bdev>, &mut dyn FnMut(Progress)) -> Result<T, OpenError> + 'static,
) -> Result<T, Failure> {
    let cannot = |failure: Failure| failure.with(Status::FsckOperational);
    let interrupt = Interrupt::install()
        .map_err(|error| cannot(Failure::new("signals", error, "check the limits of the process")))?;
    let opened = open(image).map_err(cannot)?;
    let device = opened.device.clone();
    let done = opened.reactor.block_on(async move {
        let bar = progress::bar(progress::NODES);
        let mut show = |progress: Progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        };
        let done = interrupt.before(run(&device, &mut show)).await;
        bar.finish_and_clear();
        done
    });
    match done {
        None => Err(cancelled(image, cancel.0, cancel.1)),
        Some(Ok(done)) => Ok(done),
        Some(Err(error)) => Err(cannot(Failure::new(image, error, "use an image that blobfs made, whole"))),
    }
}

/// A signal ended the work.
pub(crate) fn cancelled(image: &str, what: &str, state: &str) -> Failure {
    Failure::new(image, format!("{what} was cancelled by a signal"), state).with(Status::FsckCancelled)
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs().try_into().unwrap_or(i64::MAX), nanoseconds: since.subsec_nanos() }
}

fn print_check_json(report: &Report) {
    let left = report.findings.len() as u64 + report.findings_left_out;
    let report = serde_json::json!({
        "findings": Described::all(report),
        "findings_left_out": report.findings_left_out,
        "complete": report.complete,
        "changed": false,
        "refused": null,
        "left": left,
        "counts": report.counts,
    });
    println!("{report:#}");
}

fn print_repair_json(report: &RepairReport) {
    let after = &report.after;
    let describe =
        |repaired: &Repaired| serde_json::json!(Described::new(&repaired.finding, repaired.action));
    let findings: Vec<_> = report.findings.iter().map(describe).collect();
    let report = serde_json::json!({
        "findings": findings,
        "findings_left_out": report.findings_left_out,
        "complete": after.complete,
        "changed": report.changed,
        "refused": report.refused,
        "left": after.findings.len() as u64 + after.findings_left_out,
        "counts": after.counts,
    });
    println!("{report:#}");
}

fn print_repair(image: &str, report: &RepairReport) {
    for repaired in &report.findings {
        match repaired.action {
            Some(action) => println!("{}: repaired: {action}", repaired.finding),
            None => println!("{}", repaired.finding),
        }
    }
    if report.findings_left_out > 0 {
        println!("{image}: {} more findings", report.findings_left_out);
    }
    if let Some(reason) = report.refused {
        println!("{image}: not repaired: {reason}");
    }
    print_summary(image, &report.after);
}

fn print_summary(image: &str, report: &Report) {
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
