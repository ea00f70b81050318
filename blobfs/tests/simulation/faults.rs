//! Devices that fail: an error at each operation in turn, a device that dies, and space that runs out at each
//! step. The file system says so, and either goes on or turns read-only; after the next mount everything is
//! there that was promised.

use std::rc::Rc;

use bdev::sim::{CrashChoice, Effect, Fault, OpKind, SimDisk};
use blobfs::FsError;

use crate::crash::Explorer;
use crate::operation::{Durability, NewKind, Operation, Target};
use crate::promise::Promise;
use crate::sequences::{base, vocabulary};
use crate::workload::{Log, Workload};
use crate::world::{Geometry, World};

/// Every kind of operation, with syncs and time for write-back in between.
fn workload() -> Vec<Operation> {
    let mut operations = Vec::new();
    for (number, operation) in vocabulary().into_iter().enumerate() {
        operations.push(operation);
        match number % 5 {
            1 => operations.push(Operation::Fsync { target: Target::Path(String::new()), data_only: false }),
            3 => operations.push(Operation::Syncfs),
            4 => operations.push(Operation::Sleep { seconds: 40 }),
            _ => {}
        }
    }
    operations
}

/// What a run on a failing device came to.
struct Run {
    log: Log,
    disk: Rc<SimDisk>,
    /// Errors that were reported.
    errors: Vec<FsError>,
}

impl Run {
    /// Mounts a prepared image, injects `fault`, and does what there is to do, whatever fails.
    fn new(geometry: &Geometry, fault: Fault) -> Result<Self, String> {
        let (image, state) = base(geometry)?;
        let disk = SimDisk::from_image(image, geometry.sector, 1);
        let world = World::mount(&disk, geometry, 10)?;
        let mut workload = Workload { world, log: Log::new(state) };
        disk.record();
        disk.inject(fault);
        let mut errors = Vec::new();
        for operation in self::workload() {
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
    fn check(self, geometry: &Geometry) -> Result<(), String> {
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
        let mut explorer = Explorer::new(*geometry, 3);
        // The failed write may have hit a superblock; then an administrator has to agree.
        explorer.accept_older_superblock = true;
        explorer.check(&promise, disk.snapshot(), 0.0)?;
        for seed in 0..2 {
            explorer.check(&promise, disk.crash(CrashChoice::Random { seed }).snapshot(), 0.5)?;
        }
        Ok(())
    }
}

fn check(geometry: &Geometry, fault: Fault) -> bool {
    let run = Run::new(geometry, fault).unwrap_or_else(|problem| panic!("{fault:?}: {problem}"));
    let reported = !run.errors.is_empty();
    run.check(geometry).unwrap_or_else(|problem| panic!("{fault:?}: {problem}"));
    reported
}

/// Lets each operation of a kind fail in turn, until none is left; gives the number of reported failures.
fn fail_each(kind: OpKind, effect: Effect) -> u64 {
    /// After so many faults in a row that meet nothing there are no more operations.
    const UNNOTICED_MAX: u64 = 40;
    let (mut reported, mut unnoticed) = (0, 0);
    for nth in 0.. {
        match check(&Geometry::TINY, Fault::nth(kind, nth, effect)) {
            true => (reported, unnoticed) = (reported + 1, 0),
            false => unnoticed += 1,
        }
        if unnoticed == UNNOTICED_MAX {
            break;
        }
    }
    reported
}

#[test]
fn an_error_of_any_write_is_reported_and_loses_nothing_promised() {
    assert!(fail_each(OpKind::Write, Effect::Error { errno: 5 }) > 20);
}

#[test]
fn a_short_write_is_reported_and_loses_nothing_promised() {
    assert!(fail_each(OpKind::Write, Effect::Short) > 20);
}

#[test]
fn an_error_of_any_flush_is_reported_and_loses_nothing_promised() {
    assert!(fail_each(OpKind::Flush, Effect::Error { errno: 110 }) > 20);
}

#[test]
fn an_error_of_any_read_is_reported_and_loses_nothing_promised() {
    fail_each(OpKind::Read, Effect::Error { errno: 5 });
}

#[test]
fn a_device_that_dies_loses_nothing_promised() {
    for nth in (0..200).step_by(3) {
        check(&Geometry::TINY, Fault::dead_from(nth));
    }
}

#[test]
fn an_error_while_mounting_is_reported_and_the_next_mount_works() {
    let geometry = Geometry::TINY;
    for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
        for nth in 0..30 {
            let (image, state) = base(&geometry).unwrap();
            let disk = SimDisk::from_image(image, geometry.sector, 1);
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

/// Fills the device until so many bytes are left, then does every kind of operation.
fn short_of_space(geometry: &Geometry, left: u64) -> Result<(), String> {
    let (image, state) = base(geometry)?;
    let disk = SimDisk::from_image(image, geometry.sector, 1);
    let mut workload = Workload { world: World::mount(&disk, geometry, 10)?, log: Log::new(state) };
    let path = "ballast".to_owned();
    workload.perform(&Operation::Create { path: path.clone(), kind: NewKind::File, mode: 0o600 })?;
    while workload.world.available() > left {
        let before = workload.world.available();
        workload.perform(&Operation::Write {
            target: Target::Path(path.clone()),
            offset: 0,
            len: ((before - left) as usize).clamp(geometry.block as usize, 32 << 10),
            tag: 99,
            append: true,
            durability: Durability::Full,
        })?;
        if workload.world.available() >= before {
            break;
        }
    }
    for operation in self::workload() {
        workload.perform(&operation)?;
    }
    workload.compare()?;
    workload.remount(geometry).map(drop)
}

#[test]
fn operations_on_a_device_short_of_space_agree_with_the_oracle() {
    for geometry in &Geometry::ALL {
        for left in (0..48).map(|blocks| blocks * u64::from(geometry.block)) {
            let result = short_of_space(geometry, left);
            result.unwrap_or_else(|problem| panic!("{geometry:?}, {left} bytes left: {problem}"));
        }
    }
}
