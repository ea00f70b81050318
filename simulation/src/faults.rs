//! Devices that fail: an error at each operation in turn, or a device that dies. The file system says so, and
//! either goes on or turns read-only; after the next mount everything is there that was promised.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use bdev::sim::{CrashChoice, Effect, Fault, Image, OpKind, SimDisk};
use blobfs::FsError;
use blobfs::units::InodeId;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::crash::{Explorer, Seen};
use crate::operation::{Generator, Operation, Profile};
use crate::oracle::{Content, Node, State, Step};
use crate::promise::{Promise, cut};
use crate::sequences::base;
use crate::workload::{Log, Workload};
use crate::world::{Geometry, World, fsck};

/// What a run on a failing device came to.
struct Run {
    log: Log,
    disk: Rc<SimDisk>,
    /// Errors that were reported.
    errors: Vec<FsError>,
}

impl Run {
    /// Mounts a prepared image, injects `fault`, and does what there is to do, whatever fails.
    fn new(
        geometry: &Geometry,
        (image, state): (Image, State),
        fault: Fault,
        operations: impl IntoIterator<Item = impl FnOnce(&State) -> Operation>,
    ) -> Result<Self, String> {
        let disk = geometry.disk(image, 1);
        let world = World::mount(&disk, geometry, 10)?;
        disk.set_clock(&world.reactor);
        let mut workload = Workload { world, log: Log::new(state) };
        disk.record();
        disk.inject(fault);
        let mut errors = Vec::new();
        for operation in operations {
            let operation = operation(workload.state());
            let outcome =
                workload.attempt(&operation).map_err(|problem| format!("{operation}: {problem}"))?;
            match outcome {
                Ok(()) | Err(FsError::NoSpace) => {}
                Err(error @ (FsError::Device(_) | FsError::ReadOnly)) => errors.push(error),
                Err(error) => return Err(format!("{operation}: unexpectedly {error:?}")),
            }
        }
        let readonly = workload.world.store.check_writable().is_err();
        let Workload { world, log } = workload;
        if let Err(error) = world.unmount() {
            errors.push(error);
        } else if readonly {
            return Err("a read-only file system claims that everything is durable".to_owned());
        }
        Ok(Self { log, disk, errors })
    }

    /// Mounts what is left, and what a power cut leaves of that.
    fn check(self, geometry: &Geometry, seen: Arc<Seen>) -> Result<(), String> {
        let Self { log, disk, errors } = self;
        disk.clear_faults();
        let promise = Promise::at(&log, disk.position());
        if errors.is_empty() {
            // Nobody was told of anything: nothing may be lost.
            let world = World::mount(&disk, geometry, 1_000)?;
            let mut workload = Workload { world, log };
            let state = workload.log.states.last_mut().expect("the first state");
            crate::workload::forget_nameless(state);
            return workload.compare().map_err(|problem| format!("nothing was reported, but {problem}"));
        }
        let mut explorer = Explorer::counting(*geometry, 3, seen);
        // The failed write may have hit a superblock; then an administrator has to agree.
        explorer.accept_older_superblock = true;
        explorer.check(&promise, disk.snapshot(), 0.0)?;
        for seed in 0..2 {
            explorer.check(&promise, disk.crash(CrashChoice::Random { seed }).snapshot(), 0.5)?;
        }
        Ok(())
    }
}

/// A random workload that meets a random fault.
///
/// # Errors
/// The broken promise.
pub(crate) fn random(geometry: Geometry, seed: u64, seen: Arc<Seen>) -> Result<(), String> {
    const OPERATIONS: usize = 40;
    let mut rng = SmallRng::seed_from_u64(seed);
    let fault = random_fault(&mut rng);
    let profile = Profile::ALL[rng.random_range(0..Profile::ALL.len())];
    let base = base(&geometry, rng.random())?;
    let operations = (0..OPERATIONS).map(|_| {
        let mut rng = SmallRng::from_rng(&mut rng);
        move |state: &State| Generator { rng: &mut rng, state, profile }.draw()
    });
    let run = Run::new(&geometry, base, fault, operations);
    run.and_then(|run| run.check(&geometry, seen)).map_err(|problem| format!("{fault:?}: {problem}"))
}

/// A random workload on a device that says nothing of a fault: a write is lost, goes elsewhere, or stays in the cache
/// behind flushes. Nothing can be promised then but that every call comes to its end, and that nothing panics: here,
/// at a check and a mount of what is left, and of what a power cut leaves of that. Where blocks have checksums, also that
/// no file ever shows what it never held.
pub(crate) fn silent(geometry: Geometry, seed: u64) -> Result<(), String> {
    silent_as(geometry, geometry.sums, seed)
}

/// The same; `judge`: whether what files show is compared.
fn silent_as(geometry: Geometry, judge: bool, seed: u64) -> Result<(), String> {
    const OPERATIONS: usize = 40;
    let mut rng = SmallRng::seed_from_u64(seed);
    let kinds = [OpKind::Write, OpKind::Write, OpKind::Read, OpKind::Flush];
    let flushes = rng.random_range(1..20);
    let effects = [Effect::Lost, Effect::Misdirected, Effect::Delayed { flushes }];
    let kind = kinds[rng.random_range(0..kinds.len())];
    let effect = effects[rng.random_range(0..effects.len())];
    let (image, state) = base(&geometry, rng.random())?;
    let disk = geometry.disk(image, seed);
    let world = World::mount(&disk, &geometry, 10)?;
    disk.inject(Fault::nth(kind, rng.random_range(0..40), effect));
    let mut workload = Workload { world, log: Log::new(state) };
    for _ in 0..OPERATIONS {
        let profile = Profile::SMALL;
        let operation = Generator { rng: &mut rng, state: workload.state(), profile }.draw();
        // What differs from the oracle may be the device's doing.
        if workload.attempt(&operation).is_err() {
            let mut state = workload.state().clone();
            // It may have been done as a whole, in part or not.
            let step = Step { number: 0, now: workload.world.now(), made: None, written: None };
            if state.apply(&operation, &step).is_ok() {
                workload.log.states.push(state);
            }
            break;
        }
    }
    show_nothing_wrong(judge, &geometry, &workload.world, &workload.log)?;
    let cut = disk.crash(CrashChoice::Random { seed: rng.random() });
    drop(workload.world.unmount());
    let Workload { world, log } = workload;
    drop(world);
    for disk in [disk, cut] {
        disk.clear_faults();
        drop(fsck(&disk));
        if let Ok(world) = World::mount_older(&disk, &geometry, 1_000) {
            drop(world.walk(&[]));
            show_nothing_wrong(judge, &geometry, &world, &log)?;
            drop(world.unmount());
        }
    }
    Ok(())
}

/// Compares what can be read of the files, through the cache and past it, with all that they ever held: a block
/// cannot be read, or each of its sectors holds what it held at some time, the end of which may have been cut off.
fn show_nothing_wrong(judge: bool, geometry: &Geometry, world: &World, log: &Log) -> Result<(), String> {
    if !judge {
        return Ok(());
    }
    let ids: BTreeSet<InodeId> = log.states.iter().flat_map(|state| state.nodes.keys().copied()).collect();
    for id in ids {
        for direct in [false, true] {
            let Ok(found) = world.readable(id, geometry.block, direct) else { continue };
            held_at_some_time(id, &found, log)?;
        }
    }
    Ok(())
}

fn held_at_some_time(id: InodeId, found: &Content, log: &Log) -> Result<(), String> {
    let mut versions: Vec<&Rc<Node>> = log.states.iter().filter_map(|state| state.nodes.get(&id)).collect();
    versions.dedup_by(|a, b| Rc::ptr_eq(a, b));
    let Some(last) = versions.last().filter(|node| node.content().is_some()) else { return Ok(()) };
    let mut ends: Vec<u64> = last.changes.truncations.iter().map(|(_, size)| *size).collect();
    ends.push(u64::MAX);
    let contents: Vec<&Content> = versions.iter().filter_map(|node| node.content()).collect();
    let held = |number: u64| {
        contents.iter().any(|content| {
            let sector = content.sector(number);
            ends.iter().any(|end| cut(sector, number, (*end).min(found.size)) == *found.sector(number))
        })
    };
    match found.stored().find(|number| !held(*number)) {
        Some(number) => Err(format!("inode {id} shows in sector {number} what it never held")),
        None => Ok(()),
    }
}

fn random_fault(rng: &mut SmallRng) -> Fault {
    let effects = [
        Effect::Error { errno: libc::EIO },
        Effect::Error { errno: libc::ENOSPC },
        Effect::Timeout { after: std::time::Duration::from_secs(30) },
        Effect::Short,
    ];
    let effect = effects[rng.random_range(0..effects.len())];
    let nth = rng.random_range(0..80);
    match rng.random_range(0..10) {
        0 => Fault::dead_from(nth),
        1 => Fault { count: rng.random_range(2..5), ..Fault::nth(OpKind::Write, nth, effect) },
        2 | 3 => Fault::nth(OpKind::Read, nth / 4, effect),
        4..=6 => Fault::nth(OpKind::Flush, nth / 2, effect),
        _ => Fault::nth(OpKind::Write, nth, effect),
    }
}

#[cfg(test)]
mod tests {
    use blobfs::fs::RenameMode;

    use super::*;
    use crate::operation::{Durability, NewKind, Target};
    use crate::sequences::{every_kind, prepared};

    type Prepared = ((Image, State), Vec<Operation>);

    /// Every kind of operation on a small tree, which is in memory soon: a workload of writes. Then synced writes that
    /// are too large for the journal: a workload of flushes.
    fn writing(geometry: &Geometry) -> Prepared {
        const SYNCED: u64 = 24;
        let synced = |number: u64| Operation::Write {
            target: Target::Path("large".to_owned()),
            offset: number % 3 * 512,
            len: 20_000,
            tag: 101 + 2 * number,
            append: false,
            durability: Durability::Data,
            from_cache: false,
        };
        let mut operations = every_kind();
        operations.push(Operation::Create { path: "large".to_owned(), kind: NewKind::File, mode: 0o600 });
        operations.extend((0..SYNCED).map(synced));
        (base(geometry, 1).unwrap(), operations)
    }

    /// Operations on a tree of which a mount has read nothing but the root: a workload of reads. Each touches a part
    /// that none before did; writes change a part of a block.
    fn reading(geometry: &Geometry) -> Prepared {
        const FILES: usize = 150;
        let path = |number: usize| format!("{number:0>60}");
        let target = |number| Target::Path(path(number));
        let write = |number: usize, offset, len| Operation::Write {
            target: target(number),
            offset,
            len,
            tag: 1 + 2 * number as u64,
            append: false,
            durability: Durability::None,
            from_cache: false,
        };
        let mut made = Vec::new();
        for number in 0..FILES {
            made.push(Operation::Create { path: path(number), kind: NewKind::File, mode: 0o600 });
            made.push(write(number, 0, 700 + number));
        }
        let mut operations = Vec::new();
        for number in (0..FILES - 6).step_by(6) {
            operations.push(write(number, 100, 50));
            operations.push(Operation::Chmod { target: target(number + 1), mode: 0o640 });
            let (from, to) = (path(number + 2), path(number + 3));
            operations.push(Operation::Rename { from, to, mode: RenameMode::Replace, whiteout: false });
            operations.push(Operation::Truncate { target: target(number + 4), size: 333 });
            operations.push(Operation::Unlink { path: path(number + 5), hold: false });
            operations.push(Operation::Fsync { target: target(number), data_only: false });
        }
        (prepared(geometry, 1, made).unwrap(), operations)
    }

    fn check((base, operations): &Prepared, geometry: &Geometry, fault: Fault) -> bool {
        let operations = operations.iter().map(|operation| |_: &State| operation.clone());
        let run = Run::new(geometry, base.clone(), fault, operations);
        let run = run.unwrap_or_else(|problem| panic!("{fault:?}: {problem}"));
        let reported = !run.errors.is_empty();
        run.check(geometry, Arc::default()).unwrap_or_else(|problem| panic!("{fault:?}: {problem}"));
        reported
    }

    /// Lets each operation of a kind fail in turn, until none is left; gives the number of reported failures.
    fn fail_each(
        geometry: &Geometry,
        workload: fn(&Geometry) -> Prepared,
        kind: OpKind,
        effect: Effect,
    ) -> u64 {
        /// After so many faults in a row that meet nothing there are no more operations.
        const UNNOTICED_MAX: u64 = 40;
        let workload = workload(geometry);
        let (mut reported, mut unnoticed) = (0, 0);
        for nth in 0.. {
            match check(&workload, geometry, Fault::nth(kind, nth, effect)) {
                true => (reported, unnoticed) = (reported + 1, 0),
                false => unnoticed += 1,
            }
            if unnoticed == UNNOTICED_MAX {
                break;
            }
        }
        reported
    }

    const LATE: Effect = Effect::Timeout { after: std::time::Duration::from_secs(30) };

    /// The same without and with checksums of data.
    fn each_is_reported(workload: fn(&Geometry) -> Prepared, kind: OpKind, effect: Effect) {
        for geometry in [Geometry::TINY, Geometry::TINY_SUMS] {
            let reported = fail_each(&geometry, workload, kind, effect);
            assert!(reported > 20, "{reported} failures were reported");
        }
    }

    #[test]
    fn an_error_of_any_write_is_reported_and_loses_nothing_promised() {
        each_is_reported(writing, OpKind::Write, Effect::Error { errno: 5 });
    }

    #[test]
    fn a_short_write_is_reported_and_loses_nothing_promised() {
        each_is_reported(writing, OpKind::Write, Effect::Short);
    }

    #[test]
    fn a_device_that_lies_leads_to_no_panic_and_no_hang() {
        for seed in 0..200 {
            silent(Geometry::ALL[seed as usize % Geometry::ALL.len()], seed).unwrap();
        }
    }

    #[test]
    fn a_device_that_lies_never_has_wrong_bytes_shown_where_blocks_have_checksums() {
        for seed in 0..300 {
            let geometry = [Geometry::TINY_SUMS, Geometry::PAGE_SUMS][seed as usize % 2];
            silent(geometry, seed).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        }
    }

    /// What the test above counts on: without checksums such a device does show wrong bytes.
    #[test]
    fn a_device_that_lies_has_wrong_bytes_shown_where_blocks_have_none() {
        let wrong = (0..300).filter(|seed| silent_as(Geometry::TINY, true, *seed).is_err()).count();
        assert!(wrong > 0);
    }

    #[test]
    fn a_write_that_times_out_is_reported_and_loses_nothing_promised() {
        each_is_reported(writing, OpKind::Write, LATE);
    }

    #[test]
    fn a_flush_that_times_out_is_reported_and_loses_nothing_promised() {
        each_is_reported(writing, OpKind::Flush, LATE);
    }

    #[test]
    fn a_short_read_is_reported_and_loses_nothing_promised() {
        each_is_reported(reading, OpKind::Read, Effect::Short);
    }

    #[test]
    fn an_error_of_any_flush_is_reported_and_loses_nothing_promised() {
        each_is_reported(writing, OpKind::Flush, Effect::Error { errno: 110 });
    }

    #[test]
    fn an_error_of_any_read_is_reported_and_loses_nothing_promised() {
        each_is_reported(reading, OpKind::Read, Effect::Error { errno: 5 });
    }

    #[test]
    fn a_device_that_dies_loses_nothing_promised() {
        for geometry in [Geometry::TINY, Geometry::TINY_SUMS] {
            let workloads = [writing(&geometry), reading(&geometry)];
            for nth in (0..200).step_by(3) {
                for workload in &workloads {
                    check(workload, &geometry, Fault::dead_from(nth));
                }
            }
        }
    }

    #[test]
    fn an_error_while_mounting_is_reported_and_the_next_mount_works() {
        let geometry = Geometry::TINY;
        for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
            for nth in 0..30 {
                let (image, state) = base(&geometry, 1).unwrap();
                let disk = geometry.disk(image, 1);
                disk.inject(Fault::nth(kind, nth, Effect::Error { errno: 5 }));
                drop(World::mount(&disk, &geometry, 10));
                disk.clear_faults();
                let log = Log::new(state);
                let mut explorer = Explorer::new(geometry, 3);
                explorer.accept_older_superblock = true;
                let checked = explorer.check(&Promise::at(&log, 0), disk.snapshot(), 0.0);
                checked.unwrap_or_else(|problem| panic!("{kind:?} {nth}: {problem}"));
            }
        }
    }
}
