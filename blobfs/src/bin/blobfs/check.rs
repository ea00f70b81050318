//! `blobfs fsck`.

use std::process::ExitCode;

use blobfs::check::{Report, check};

use crate::cli::FsckArgs;
use crate::failure::{Failure, Status};
use crate::image::Image;

/// Exit status when damage was found and is still there.
const DAMAGE_LEFT: u8 = 4;

/// Checks a file system and prints what is wrong with it.
pub(crate) fn run(args: &FsckArgs) -> Result<ExitCode, Failure> {
    let report = check_image(args).map_err(|failure| failure.with(Status::FsckOperational))?;
    if args.json {
        let findings: Vec<_> = report.findings.iter().map(|finding| &finding.text).collect();
        println!("{}", serde_json::json!({ "findings": findings }));
    } else {
        for finding in &report.findings {
            println!("{}", finding.text);
        }
        match report.findings.len() {
            0 => println!("{}: clean", args.image),
            count => println!("{}: {count} findings", args.image),
        }
    }
    Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { DAMAGE_LEFT.into() })
}

fn check_image(args: &FsckArgs) -> Result<Report, Failure> {
    let image = Image::open_to_read(&args.image)?;
    let device = image.device.clone();
    let checked = image.reactor.block_on(async move { check(&device).await });
    checked.map_err(|error| Failure::new(&args.image, error, "use an image that blobfs made, whole"))
}
