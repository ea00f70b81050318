//! Power cuts: at every point of a recorded workload, with every kind of choice among the unflushed writes;
//! again during the recovery that follows; and work that goes on from what was recovered.

use std::collections::HashSet;
use std::time::Duration;

use bdev::sim::{CrashChoice, History, Image, SimDisk};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::campaign;
use crate::operation::{Generator, Operation, Profile};
use crate::oracle::State;
use crate::promise::Promise;
use crate::workload::{Log, Workload};
use crate::world::{Geometry, World, fsck};

/// Wall clock time between the mounts of a test, in seconds.
const BETWEEN_MOUNTS: u64 = 100_000;

/// How thoroughly the states of a recorded workload are looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Depth {
    /// Points of the history, at most.
    pub(crate) points: usize,
    /// Random choices among the unflushed writes at each point.
    pub(crate) choices: usize,
    /// Share of the states whose recovery is cut, too.
    pub(crate) again: f64,
}

/// Recovers states and compares them with what was promised.
pub(crate) struct Explorer {
    pub(crate) geometry: Geometry,
    /// A damaged superblock is no reason to refuse a mount: a write of it has failed.
    pub(crate) accept_older_superblock: bool,
    rng: SmallRng,
    /// States that were checked: what the disk held, and what was promised.
    seen: HashSet<(u64, usize, usize)>,
    /// Distinct states so far.
    pub(crate) states: u64,
    mounts: u64,
}

impl Explorer {
    pub(crate) fn new(geometry: Geometry, seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        Self { geometry, accept_older_superblock: false, rng, seen: HashSet::new(), states: 0, mounts: 0 }
    }

    /// Checks the states that power cuts during a recorded workload leave.
    ///
    /// # Errors
    /// The first broken promise, with what led to it.
    pub(crate) fn explore(&mut self, log: &Log, history: &mut History, depth: Depth) -> Result<(), String> {
        let last = history.last_point();
        let step = (last / depth.points).max(1);
        let first = if step > 1 { self.rng.random_range(0..step) } else { 0 };
        for point in (first..=last).step_by(step) {
            let promise = Promise::at(log, point);
            for choice in self.choices(history.cache_at(point).undecided(), depth.choices) {
                let image = history.state_at(point, choice);
                self.check(&promise, image, depth.again).map_err(|problem| {
                    format!("power cut at point {point} of {last}, {choice:?}: {problem}\n{}", story(log))
                })?;
            }
        }
        self.seen.clear();
        Ok(())
    }

    fn choices(&mut self, undecided: usize, random: usize) -> Vec<CrashChoice> {
        let mut choices = vec![CrashChoice::Nothing];
        if undecided > 0 {
            choices.push(CrashChoice::Everything);
            choices.extend((0..random).map(|_| match self.rng.random_range(0..8) {
                0 => CrashChoice::First(self.rng.random_range(0..undecided)),
                1 => CrashChoice::Only(self.rng.random_range(0..undecided)),
                2 => CrashChoice::Without(self.rng.random_range(0..undecided)),
                _ => CrashChoice::Random { seed: self.rng.random() },
            }));
        }
        choices
    }

    /// Recovers one state; with probability `again` the recovery is cut, too, and so on.
    ///
    /// # Errors
    /// The broken promise.
    pub(crate) fn check(&mut self, promise: &Promise<'_>, image: Image, again: f64) -> Result<(), String> {
        if !self.seen.insert((image.content_hash(), promise.first, promise.last)) {
            return Ok(());
        }
        self.states += 1;
        let disk = SimDisk::from_image(image, self.geometry.sector, self.states);
        if !self.accept_older_superblock {
            fsck(&disk).map_err(|problem| format!("before recovery, {problem}"))?;
        }
        disk.record();
        let world = self.mount(&disk)?;
        let found = world.walk(&[]).map_err(|error| format!("walk: {error}"))?;
        promise.verify(&found)?;
        let mut recovery = disk.take_history();
        let disk = world.unmount().map_err(|error| format!("unmount: {error}"))?;
        fsck(&disk).map_err(|problem| format!("after recovery, {problem}"))?;
        if self.rng.random_bool(again) {
            let point = self.rng.random_range(0..=recovery.last_point());
            let choice = CrashChoice::Random { seed: self.rng.random() };
            let image = recovery.state_at(point, choice);
            self.check(promise, image, again)
                .map_err(|problem| format!("recovery cut at point {point}, {choice:?}: {problem}"))?;
        }
        Ok(())
    }

    fn mount(&mut self, disk: &std::rc::Rc<SimDisk>) -> Result<World, String> {
        self.mounts += 1;
        let seconds = self.mounts * BETWEEN_MOUNTS;
        match self.accept_older_superblock {
            true => World::mount_older(disk, &self.geometry, seconds),
            false => World::mount(disk, &self.geometry, seconds),
        }
    }

    /// A random workload, cut at random points; then another one on what was recovered from one of them.
    ///
    /// # Errors
    /// The first broken promise, with what led to it.
    pub(crate) fn campaign(&mut self, rounds: usize, operations: usize, depth: Depth) -> Result<(), String> {
        let profile = if self.rng.random() { Profile::SMALL } else { Profile::WIDE };
        let mut disk = self.geometry.format(self.rng.random());
        for round in 0..rounds {
            let world = self.mount(&disk)?;
            let workload = self.record(world, profile, operations);
            let (log, mut history) = workload.map_err(|problem| format!("round {round}: {problem}"))?;
            self.explore(&log, &mut history, depth).map_err(|problem| format!("round {round}: {problem}"))?;
            let point = self.rng.random_range(0..=history.last_point());
            let choice = CrashChoice::Random { seed: self.rng.random() };
            let image = history.state_at(point, choice);
            disk = SimDisk::from_image(image, self.geometry.sector, self.rng.random());
        }
        Ok(())
    }

    /// Performs random operations and records what the disk does.
    fn record(
        &mut self,
        world: World,
        profile: Profile,
        operations: usize,
    ) -> Result<(Log, History), String> {
        let disk = world.disk.clone();
        if self.rng.random() {
            disk.set_latency(&world.reactor, Duration::from_micros(10)..Duration::from_millis(2));
        }
        let mut workload = Workload::new(world)?;
        disk.record();
        for _ in 0..operations {
            let operation = Generator { rng: &mut self.rng, state: workload.state(), profile }.draw();
            workload.perform(&operation).map_err(|problem| format!("{problem}\n{}", story(&workload.log)))?;
        }
        let history = disk.take_history();
        workload.compare().map_err(|problem| format!("{problem}\n{}", story(&workload.log)))?;
        // Nothing may go on behind the test's back.
        workload.world.settle();
        Ok((workload.log, history))
    }
}

/// Performs a sequence of operations on a prepared image; the disk's history goes to the end of the last one,
/// or with `unmount` to the end of the unmount.
///
/// # Errors
/// How the file system differs from the oracle.
pub(crate) fn record_sequence(
    geometry: &Geometry,
    base: &(Image, State),
    operations: &[Operation],
    unmount: bool,
) -> Result<(Log, History), String> {
    let disk = SimDisk::from_image(base.0.clone(), geometry.sector, 1);
    let world = World::mount(&disk, geometry, BETWEEN_MOUNTS)?;
    let mut workload = Workload { world, log: Log::new(base.1.clone()) };
    disk.record();
    for operation in operations {
        workload.perform(operation)?;
    }
    let Workload { world, log } = workload;
    match unmount {
        true => drop(world.unmount().map_err(|error| format!("unmount: {error}"))?),
        false => world.settle(),
    }
    Ok((log, disk.take_history()))
}

/// What was done, one operation a line, with the number of the state behind it.
fn story(log: &Log) -> String {
    let line =
        |(number, operation)| format!("  {} {operation} (from point {})", number + 1, log.begun[number]);
    log.operations.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn random_workloads_keep_their_promises_over_power_cuts() {
    let depth = Depth { points: 60, choices: 3, again: 0.15 };
    for seed in campaign::numbers(1..=12) {
        let mut explorer = Explorer::new(Geometry::ALL[seed as usize % 3], seed);
        let result = explorer.campaign(3, 60, depth);
        result.unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
}
