//! Power cuts while a file system is made, on a device that held nothing, garbage, or a file system before: what is
//! found is what was there, a file system, or nothing that mounts; never a file system that is damaged.

use std::rc::Rc;

use bdev::Bdev;
use bdev::sim::{CrashChoice, Image};
use blobfs::store::{OpenError, OpenOptions, Store, mkfs};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::crash::Explorer;
use crate::operation::Operation;
use crate::oracle::State;
use crate::promise::Promise;
use crate::sequences::{base, vocabulary};
use crate::workload::{Log, Workload};
use crate::world::{Geometry, World, new_reactor};

/// What a device held before.
fn before(geometry: &Geometry, rng: &mut SmallRng) -> Result<(Image, Option<State>), String> {
    match rng.random_range(0..4) {
        0 => Ok((Image::zeroed(geometry.device), None)),
        1 => {
            let mut image = Image::zeroed(geometry.device);
            let mut bytes = vec![0; 64 << 10];
            for at in (0..geometry.device).step_by(bytes.len()) {
                rng.fill_bytes(&mut bytes);
                image.write(at, &bytes);
            }
            Ok((image, None))
        }
        2 => base(geometry, rng.random()).map(|(image, state)| (image, Some(state))),
        // Journal blocks that a mount would replay.
        _ => {
            let (image, state) = base(geometry, rng.random())?;
            let disk = geometry.disk(image, 1);
            let mut workload = Workload { world: World::mount(&disk, geometry, 10)?, log: Log::new(state) };
            let words = vocabulary();
            for _ in 0..6 {
                workload.perform(&words[rng.random_range(0..words.len())])?;
            }
            workload.perform(&Operation::Syncfs)?;
            let image = disk.crash(CrashChoice::Nothing).snapshot();
            let mut state = workload.state().clone();
            crate::workload::forget_nameless(&mut state);
            Ok((image, Some(state)))
        }
    }
}

/// What a mount says of a device.
fn refusal(image: &Image, geometry: &Geometry) -> Option<OpenError> {
    let disk = geometry.disk(image.clone(), 1);
    let (bdev, reactor): (Rc<dyn Bdev>, _) = (disk, new_reactor(0));
    let inner = reactor.clone();
    let options = OpenOptions { readonly: true, ..OpenOptions::default() };
    reactor.block_on(async move { Store::open(bdev, inner, options).await }).err()
}

/// Whether a refusal says that there is no whole file system, and not that one is damaged.
fn says_that_nothing_is_there(error: &OpenError) -> bool {
    matches!(
        error,
        OpenError::NotAFileSystem | OpenError::BadSuperblock { .. } | OpenError::DamagedSuperblock { .. }
    )
}

/// Makes a file system and cuts the power at each point of it.
///
/// # Errors
/// The damage that was found.
pub(crate) fn check(explorer: &mut Explorer, seed: u64) -> Result<(), String> {
    let geometry = explorer.geometry;
    let mut rng = SmallRng::seed_from_u64(seed);
    let (image, old) = before(&geometry, &mut rng)?;
    let disk = geometry.disk(image, seed);
    disk.record();
    let options = geometry.mkfs_options(rng.random());
    let bdev: Rc<dyn Bdev> = disk.clone();
    let made = new_reactor(0).block_on(async move { mkfs(&bdev, &options).await });
    made.map_err(|error| format!("mkfs: {error}"))?;
    let mut history = disk.take_history();
    for point in 0..=history.last_point() {
        let undecided = history.cache_at(point).undecided();
        let mut choices = vec![CrashChoice::Nothing, CrashChoice::Everything];
        choices.extend((0..undecided.min(4)).map(|_| CrashChoice::Random { seed: rng.random() }));
        for choice in choices {
            let image = history.state_at(point, choice);
            let found = check_state(explorer, image, point == history.last_point(), old.as_ref());
            found.map_err(|problem| format!("mkfs cut at point {point}, {choice:?}: {problem}"))?;
        }
    }
    Ok(())
}

fn check_state(
    explorer: &mut Explorer,
    image: Image,
    finished: bool,
    old: Option<&State>,
) -> Result<(), String> {
    if let Some(error) = refusal(&image, &explorer.geometry) {
        return match !finished && says_that_nothing_is_there(&error) {
            true => Ok(()),
            false => Err(format!("refused: {error}")),
        };
    }
    match (explorer.check_empty(&image)?, old) {
        (true, _) => Ok(()),
        (false, Some(old)) if !finished => {
            let log = Log::new(old.clone());
            explorer.check(&Promise::at(&log, 0), image, 0.1)
        }
        _ => Err("it is not empty".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes of the new file system were written over those of the old one while its superblocks still stood: a
    /// power cut left a file system that mounted and was damaged.
    #[test]
    fn a_power_cut_while_a_file_system_is_made_leaves_no_damaged_one() {
        for (number, geometry) in Geometry::ALL.into_iter().enumerate() {
            for seed in 0..8 {
                let mut explorer = Explorer::new(geometry, seed);
                let checked = check(&mut explorer, seed);
                checked.unwrap_or_else(|problem| panic!("{}, {seed}: {problem}", Geometry::NAMES[number]));
            }
        }
    }
}
