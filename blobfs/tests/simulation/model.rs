//! Random operations, compared with the oracle after each one; remounts in between; a full device.

use std::fmt;
use std::ops::Range;

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::operation::{Durability, Generator, NewKind, Operation, Profile, Target};
use crate::oracle::Body;
use crate::workload::Workload;
use crate::world::{Geometry, World};

/// Operations between two comparisons of the whole tree.
const COMPARE_EVERY: usize = 40;

/// The seed of each operation, and whether a remount comes before it.
#[derive(Clone)]
struct Draws(Vec<(u64, bool)>);

impl fmt::Debug for Draws {
    /// In one line: what was done is in the message of the failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Draws(vec!{:?})", self.0)
    }
}

fn draws(count: Range<usize>) -> impl Strategy<Value = Draws> {
    prop::collection::vec((any::<u64>(), prop::bool::weighted(0.01)), count).prop_map(Draws)
}

fn run(geometry: &Geometry, profile: Profile, draws: &Draws) -> Result<(), String> {
    let mut done = String::new();
    perform(geometry, profile, draws, &mut done).map_err(|problem| format!("{problem}, after:\n{done}"))
}

fn perform(geometry: &Geometry, profile: Profile, draws: &Draws, done: &mut String) -> Result<(), String> {
    let world = World::mount(&geometry.format(1), geometry, 0)?;
    let mut workload = Workload::new(world)?;
    for (number, (seed, remount)) in draws.0.iter().enumerate() {
        if *remount {
            *done += "remount\n";
            workload = workload.remount(geometry)?;
        }
        let mut rng = SmallRng::seed_from_u64(*seed);
        let operation = Generator { rng: &mut rng, state: workload.state(), profile }.draw();
        *done += &format!("{operation}\n");
        workload.perform(&operation)?;
        if number % COMPARE_EVERY == 0 {
            workload.compare()?;
        }
    }
    workload.compare()?;
    workload.remount(geometry).map(drop)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_in_a_small_tree_agree_with_the_oracle(draws in draws(400..1200), kind in 0..3_usize) {
        run(&Geometry::ALL[kind], Profile::SMALL, &draws).map_err(TestCaseError::fail)?;
    }

    /// Large files on a small device: it is full most of the time.
    #[test]
    fn random_operations_on_a_nearly_full_device_agree_with_the_oracle(draws in draws(400..800), kind in 0..3_usize) {
        run(&Geometry::ALL[kind], Profile::WIDE, &draws).map_err(TestCaseError::fail)?;
    }
}

/// Fills the device with data and names until nothing fits, then empties it.
fn fill_and_empty(geometry: &Geometry) -> Result<(), String> {
    let world = World::mount(&geometry.format(2), geometry, 0)?;
    let mut workload = Workload::new(world)?;
    let before = workload.world.available();
    let mut rng = SmallRng::seed_from_u64(5);
    let mut refused = 0;
    for number in 0.. {
        let path = format!("{number}-{}", "x".repeat(number % 200));
        let kind = if number % 5 == 0 { NewKind::Directory } else { NewKind::File };
        workload.perform(&Operation::Create { path: path.clone(), kind, mode: 0o700 })?;
        let exists = workload.state().resolve(&path).is_ok();
        if exists && kind == NewKind::File {
            let len = if refused == 0 { rng.random_range(1..60_000) } else { 200 };
            let offset = if number % 3 == 0 { 70_000 } else { 0 };
            let target = Target::Path(path);
            let durability = if number % 7 == 0 { Durability::Full } else { Durability::None };
            let tag = number as u64 + 1;
            workload.perform(&Operation::Write { target, offset, len, tag, append: false, durability })?;
        }
        refused += usize::from(!exists);
        if refused > 3 {
            break;
        }
    }
    workload.compare()?;
    workload = workload.remount(geometry)?;
    for (number, path) in workload.state().paths(|_| true).into_iter().enumerate().skip(1) {
        let directory = matches!(
            workload.state().resolve(&path).map(|id| &workload.state().node(id).body),
            Ok(Body::Directory { .. })
        );
        workload.perform(&match directory {
            true => Operation::Rmdir { path },
            false => Operation::Unlink { path, hold: false },
        })?;
        if number % 100 == 0 {
            workload.compare()?;
        }
    }
    workload.perform(&Operation::Syncfs)?;
    workload.world.settle();
    workload.compare()?;
    let after = workload.world.available();
    if after < before / 2 {
        return Err(format!("{before} bytes were free, {after} are after everything was deleted"));
    }
    workload.remount(geometry).map(drop)
}

#[test]
fn a_full_device_can_be_emptied() {
    for geometry in &Geometry::ALL {
        fill_and_empty(geometry).unwrap_or_else(|problem| panic!("{geometry:?}: {problem}"));
    }
}
