//! Damaged images: a sound one, changed by edits, with every checksum made right again, so that the damage gets past
//! them.
//!
//! The checker and a mount read the same image, and must agree: what the checker finds sound is mounted, read as a
//! whole, changed and unmounted without an error that speaks of damage, and is sound again afterwards. A repair that was
//! carried out leaves a sound image. Of a damaged one nothing is asked but that nobody panics, waits for ever or takes
//! much memory.

mod base;
mod damage;
mod seal;
mod visit;

use std::rc::Rc;

use arbitrary::Arbitrary;
use bdev::Bdev;
use blobfs::FsError;
use blobfs::check::{Consent, RepairOptions, Report, repair, scrub};
use blobfs::ondisk::Timestamp;
use blobfs::store::OpenError;
use reactor::Reactor;

use crate::disk::{device_of, fsck, mount, new_reactor, wind_down};
use damage::Edit;

/// What an execution does.
#[derive(Debug, Arbitrary)]
pub struct Input {
    /// Which sound image to begin with.
    base: u8,
    /// What is changed in it.
    edits: Vec<Edit>,
    /// Mount without writing.
    readonly: bool,
    /// Repair first what is damaged.
    repair: bool,
}

/// Runs the target.
///
/// # Panics
/// When something is wrong.
pub fn run(input: Input) {
    let mut bytes = base::image(input.base);
    damage::apply(&mut bytes, &input.edits);
    let device = device_of(&bytes);
    let before = fsck(&device, &new_reactor());
    let mut is_sound = before.as_ref().is_ok_and(Report::is_clean);
    if input.repair && !is_sound {
        is_sound = repair_image(&device);
    }
    // What blocks of data hold is not the checker's business; where they have checksums, it is that of a scrub.
    let is_whole = scrub_image(&device, is_sound);
    let used = use_image(&device, input.readonly);
    if let Err(error) = &used
        && speaks_of_damage(error)
    {
        assert!(!is_whole, "the scrub found nothing, but: {error}");
    }
    if is_sound {
        let after = fsck(&device, &new_reactor()).expect("a sound image can be checked");
        assert!(after.is_clean(), "was sound before it was used: {:?}", after.findings);
    }
}

/// Reads all data of an image; whether all is as the checksums say. Of a damaged one nothing is asked, as above.
fn scrub_image(device: &Rc<dyn Bdev>, is_sound: bool) -> bool {
    let device = device.clone();
    let report = new_reactor().block_on(async move { scrub(&device, &mut |_| ()).await });
    if !is_sound {
        return false;
    }
    let report = report.expect("a sound image can be scrubbed");
    assert!(report.check.is_clean(), "the checker found nothing, but the scrub: {:?}", report.check.findings);
    report.is_clean()
}

/// Repairs an image, whatever is lost. Returns whether it is sound now.
fn repair_image(device: &Rc<dyn Bdev>) -> bool {
    let now = Timestamp { seconds: 2_000_000, nanoseconds: 0 };
    let options = RepairOptions { consent: Consent::Everything, now };
    let repaired = device.clone();
    let result = new_reactor().block_on(async move { repair(&repaired, options, &mut |_| ()).await });
    let Ok(report) = result else { return false };
    if report.refused.is_some() {
        return false;
    }
    let after = fsck(device, &new_reactor()).expect("a repaired image can be checked");
    assert!(after.is_clean(), "after a repair: {:?}", after.findings);
    true
}

/// Mounts, reads everything, changes something, unmounts.
fn use_image(device: &Rc<dyn Bdev>, readonly: bool) -> Result<(), OpenError> {
    let reactor: Rc<Reactor> = new_reactor();
    let (device, inner) = (device.clone(), reactor.clone());
    let result = reactor.block_on(async move {
        let fs = mount(&device, &inner, readonly).await?;
        let seen = visit::read_everything(&fs).await?;
        if !readonly {
            visit::change_something(&fs, &seen).await?;
        }
        fs.unmount().await?;
        Ok(())
    });
    wind_down(&reactor);
    result
}

/// Whether an error may not come from a sound image. A full device is none.
fn speaks_of_damage(error: &OpenError) -> bool {
    !matches!(
        error,
        OpenError::Failed(
            FsError::NoSpace | FsError::ReadOnly | FsError::TooManyLinks | FsError::OutOfMemory
        ) | OpenError::ReadOnlyFeatures { .. }
            | OpenError::BlockSize { .. }
    )
}
