//! The checker: reads what a device holds and reports what contradicts the format. Writes nothing.

use std::rc::Rc;

use bdev::Bdev;

use crate::store::{self, OpenError, OpenOptions};

/// Something wrong in what a device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong and where.
    pub text: String,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Everything that is wrong; empty for a sound file system.
    pub findings: Vec<Finding>,
    /// Journal blocks that a mount would replay.
    pub journal_blocks: u64,
}

/// Checks a file system.
///
/// # Errors
/// When the device holds no file system that this code can check.
pub async fn check(bdev: &Rc<dyn Bdev>) -> Result<Report, OpenError> {
    let options = OpenOptions { readonly: true, ..OpenOptions::default() };
    match store::load(bdev, &options).await {
        Ok(image) => Ok(Report { findings: Vec::new(), journal_blocks: image.replayed.blocks }),
        Err(
            error @ (OpenError::NotAFileSystem
            | OpenError::Incompatible { .. }
            | OpenError::ReadOnlyFeatures { .. }
            | OpenError::Truncated { .. }
            | OpenError::BlockSize { .. }),
        ) => Err(error),
        Err(error) => Ok(Report { findings: vec![Finding { text: error.to_string() }], journal_blocks: 0 }),
    }
}
