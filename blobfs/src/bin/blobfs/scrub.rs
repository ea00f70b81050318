//! `blobfs scrub`.

use std::process::ExitCode;

use blobfs::check::{ScrubProgress, ScrubReport, Unreadable, scrub};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::check::{DAMAGE_LEFT, Described, cancelled};
use crate::cli::ScrubArgs;
use crate::failure::{Failure, Status};
use crate::image::Image;
use crate::interrupt::Interrupt;
use crate::progress;

/// Unreadable data with its text, as `--json` has it.
#[derive(Serialize)]
struct DescribedData<'a> {
    #[serde(flatten)]
    unreadable: &'a Unreadable,
    text: String,
}

/// Reads everything and prints what cannot be read or is wrong.
pub(crate) fn run(args: &ScrubArgs) -> Result<ExitCode, Failure> {
    let cannot = |failure: Failure| failure.with(Status::FsckOperational);
    let interrupt = Interrupt::install()
        .map_err(|error| cannot(Failure::new("signals", error, "check the limits of the process")))?;
    let image = Image::open_to_read(&args.image).map_err(cannot)?;
    let device = image.device.clone();
    let done = image.reactor.block_on(async move {
        let mut bars = Bars::new();
        let done = interrupt.before(scrub(&device, &mut |progress| bars.show(progress))).await;
        bars.current.finish_and_clear();
        done
    });
    let report = done.ok_or_else(|| cancelled(&args.image, "the scrub", "nothing was changed"))?;
    let report = report
        .map_err(|error| cannot(Failure::new(&args.image, error, "use an image that blobfs made, whole")))?;
    if args.json {
        print_json(&report);
    } else {
        print_text(&args.image, &report);
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { DAMAGE_LEFT.into() })
}

/// A bar for metadata, then one for data.
struct Bars {
    current: ProgressBar,
    of_data: bool,
}

impl Bars {
    fn new() -> Self {
        Self { current: progress::bar(progress::NODES), of_data: false }
    }

    fn show(&mut self, progress: ScrubProgress) {
        let (done, total) = match progress {
            ScrubProgress::Metadata(progress) => (progress.done, progress.total),
            ScrubProgress::Data { done, total } => {
                if !self.of_data {
                    self.current.finish_and_clear();
                    *self = Self { current: progress::bar(progress::BYTES), of_data: true };
                }
                (done, total)
            }
        };
        self.current.set_length(total);
        self.current.set_position(done);
    }
}

fn text(unreadable: &Unreadable) -> String {
    let Unreadable { inode, path, xattr, offset, len, block, error } = unreadable;
    let name = path.clone().unwrap_or_else(|| format!("inode {inode}"));
    let of = if *xattr { ", value of an extended attribute" } else { "" };
    format!("{name}{of}: bytes {offset}..{} at block {block}: {error}", offset + len)
}

fn print_json(report: &ScrubReport) {
    let describe = |unreadable| DescribedData { unreadable, text: text(unreadable) };
    let unreadable: Vec<_> = report.unreadable.iter().map(describe).collect();
    let report = serde_json::json!({
        "check": {
            "findings": Described::all(&report.check),
            "findings_left_out": report.check.findings_left_out,
            "complete": report.check.complete,
            "counts": report.check.counts,
        },
        "unreadable": unreadable,
        "unreadable_left_out": report.unreadable_left_out,
        "data_bytes": report.data_bytes,
    });
    println!("{report:#}");
}

fn print_text(image: &str, report: &ScrubReport) {
    report.check.findings.iter().for_each(|finding| println!("{finding}"));
    report.unreadable.iter().for_each(|unreadable| println!("{}", text(unreadable)));
    let findings = report.check.findings.len() as u64 + report.check.findings_left_out;
    let ranges = report.unreadable.len() as u64 + report.unreadable_left_out;
    let state = match report.is_clean() {
        true => "clean".to_owned(),
        false => format!("{findings} findings in metadata, {ranges} unreadable ranges of data"),
    };
    let part = if report.check.complete { "" } else { ", only part of it could be checked" };
    println!(
        "{image}: {state}{part}; {} nodes and {} bytes of data read",
        report.check.counts.nodes, report.data_bytes
    );
}
