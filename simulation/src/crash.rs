//! Power cuts: at every point of a recorded workload, with every kind of choice among the unflushed writes;
//! again during the recovery that follows; and work that goes on from what was recovered.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bdev::sim::{CrashChoice, History, Image, SimDisk};
use hashbrown::HashSet;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::operation::{Generator, Operation, Profile};
use crate::oracle::State;
use crate::promise::Promise;
use crate::workload::{Log, Workload};
use crate::world::{Geometry, World, fsck};

/// Wall clock time between the mounts of a test, in seconds.
const BETWEEN_MOUNTS: u64 = 100_000;

/// States of one history that are remembered with what was found in them.
const REMEMBERED_MAX: usize = 20_000;

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

/// The states that were checked, of all explorers that share it. A state is the content of a device after a
/// power cut; it counts once, however often and by whatever way it is reached.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    hashes: Mutex<HashSet<u64, foldhash::fast::RandomState>>,
    distinct: AtomicU64,
    mounts: AtomicU64,
}

impl Seen {
    fn add(&self, hash: u64) {
        self.mounts.fetch_add(1, Ordering::Relaxed);
        if self.hashes.lock().expect("nobody panics with it").insert(hash) {
            self.distinct.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Distinct states.
    pub(crate) fn distinct(&self) -> u64 {
        self.distinct.load(Ordering::Relaxed)
    }

    /// Recoveries, those of states that had been seen included: what was promised of them may differ.
    pub(crate) fn mounts(&self) -> u64 {
        self.mounts.load(Ordering::Relaxed)
    }
}

/// What was found in a state, and the promise that it was compared with last.
struct Recovered {
    found: State,
    promise: (usize, usize),
}

/// Recovers states and compares them with what was promised.
pub(crate) struct Explorer {
    pub(crate) geometry: Geometry,
    /// A damaged superblock is no reason to refuse a mount: a write of it has failed.
    pub(crate) accept_older_superblock: bool,
    rng: SmallRng,
    /// What was found in the states of this history.
    recovered: HashMap<u64, Recovered, foldhash::fast::RandomState>,
    seen: Arc<Seen>,
    mounts: u64,
}

impl Explorer {
    #[cfg(test)]
    pub(crate) fn new(geometry: Geometry, seed: u64) -> Self {
        Self::counting(geometry, seed, Arc::default())
    }

    /// An explorer that counts its states together with others.
    pub(crate) fn counting(geometry: Geometry, seed: u64, seen: Arc<Seen>) -> Self {
        Self {
            geometry,
            accept_older_superblock: false,
            rng: SmallRng::seed_from_u64(seed),
            recovered: HashMap::default(),
            seen,
            mounts: 0,
        }
    }

    /// Begins anew: what follows depends on the seed and on nothing that was before.
    pub(crate) fn restart(&mut self, seed: u64) {
        self.rng = SmallRng::seed_from_u64(seed);
        self.recovered.clear();
        self.mounts = 0;
    }

    /// Distinct states so far.
    #[cfg(test)]
    pub(crate) fn states(&self) -> u64 {
        self.seen.distinct()
    }

    /// Checks the states that power cuts during a recorded workload leave, from a point of it on.
    ///
    /// # Errors
    /// The first broken promise, with what led to it.
    pub(crate) fn explore_from(
        &mut self,
        log: &Log,
        history: &mut History,
        from: usize,
        depth: Depth,
    ) -> Result<(), String> {
        let last = history.last_point();
        let step = ((last - from.min(last)) / depth.points).max(1);
        let first = from + if step > 1 { self.rng.random_range(0..step) } else { 0 };
        for point in (first..=last).step_by(step) {
            let promise = Promise::at(log, point);
            for choice in self.choices(history.cache_at(point).undecided(), depth.choices) {
                let image = history.state_at(point, choice);
                self.check(&promise, image, depth.again).map_err(|problem| {
                    format!("power cut at point {point} of {last}, {choice:?}: {problem}\n{}", story(log))
                })?;
            }
        }
        self.recovered.clear();
        Ok(())
    }

    /// As [`Explorer::explore_from`], from the beginning.
    ///
    /// # Errors
    /// The first broken promise, with what led to it.
    pub(crate) fn explore(&mut self, log: &Log, history: &mut History, depth: Depth) -> Result<(), String> {
        self.explore_from(log, history, 0, depth)
    }

    fn choices(&mut self, undecided: usize, random: usize) -> Vec<CrashChoice> {
        let mut choices = vec![CrashChoice::Nothing];
        if undecided > 0 {
            choices.push(CrashChoice::Everything);
            // The more there is to choose from, the more choices.
            let random = random + (random * undecided / 4).min(8);
            choices.extend((0..random).map(|_| match self.rng.random_range(0..8) {
                0 => CrashChoice::First(self.rng.random_range(0..undecided)),
                1 => CrashChoice::Only(self.rng.random_range(0..undecided)),
                2 => CrashChoice::Without(self.rng.random_range(0..undecided)),
                3 => CrashChoice::TornAfter {
                    count: self.rng.random_range(0..undecided),
                    seed: self.rng.random(),
                },
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
        let hash = image.content_hash();
        if let Some(known) = self.recovered.get_mut(&hash) {
            if known.promise == promise.of {
                return Ok(());
            }
            known.promise = promise.of;
            return promise.verify(&known.found).map(drop);
        }
        self.seen.add(hash);
        let disk = self.geometry.disk(image, hash);
        if !self.accept_older_superblock {
            fsck(&disk).map_err(|problem| format!("before recovery, {problem}"))?;
        }
        let cut_again = self.rng.random_bool(again);
        if cut_again {
            disk.record();
        }
        let world = self.mount(&disk)?;
        let found = world.walk(&[]).map_err(|error| format!("walk: {error}"))?;
        promise.verify(&found)?;
        let recovery = cut_again.then(|| disk.take_history());
        unmount(&world)?;
        if self.recovered.len() < REMEMBERED_MAX {
            self.recovered.insert(hash, Recovered { found, promise: promise.of });
        }
        let Some(mut recovery) = recovery else { return Ok(()) };
        let point = self.rng.random_range(0..=recovery.last_point());
        let choice = CrashChoice::Random { seed: self.rng.random() };
        let image = recovery.state_at(point, choice);
        self.check(promise, image, again)
            .map_err(|problem| format!("recovery cut at point {point}, {choice:?}: {problem}"))
    }

    /// Recovers a state and says whether its file system is sound and empty; another one is not looked at.
    ///
    /// # Errors
    /// What is wrong.
    pub(crate) fn check_empty(&mut self, image: &Image) -> Result<bool, String> {
        let hash = image.content_hash();
        let disk = self.geometry.disk(image.clone(), hash);
        let world = self.mount(&disk)?;
        let found = world.walk(&[]).map_err(|error| format!("walk: {error}"))?;
        if found.nodes.len() > 1 {
            return Ok(false);
        }
        self.seen.add(hash);
        unmount(&world)?;
        Ok(true)
    }

    fn mount(&mut self, disk: &Rc<SimDisk>) -> Result<World, String> {
        self.mounts += 1;
        let seconds = self.mounts * BETWEEN_MOUNTS;
        match self.accept_older_superblock {
            true => World::mount_older(disk, &self.geometry, seconds),
            false => World::mount(disk, &self.geometry, seconds),
        }
    }

    /// A random workload, cut at random points; then another one on what was recovered from one of them, and
    /// so on.
    ///
    /// # Errors
    /// The first broken promise, with what led to it.
    pub(crate) fn campaign(&mut self, rounds: usize, operations: usize, depth: Depth) -> Result<(), String> {
        let profile = Profile::ALL[self.rng.random_range(0..Profile::ALL.len())];
        let mut disk = self.geometry.format(self.rng.random());
        for round in 0..rounds {
            disk = self
                .cut_and_go_on(&disk, profile, operations, depth)
                .map_err(|problem| format!("round {round}: {problem}"))?;
        }
        Ok(())
    }

    /// The process dies at a random point while the power stays on; the power is cut while the next one recovers what
    /// the disk shows, which need not be durable, or after that.
    fn kill(&mut self, log: &Log, history: &mut History) -> Result<(), String> {
        const CUTS: usize = 6;
        let point = self.rng.random_range(0..=history.last_point());
        let mut promise = Promise::at(log, point);
        let first = promise.first;
        let cache = history.cache_at(point).after_the_host();
        // Looking changes times of access: on a disk of its own.
        let seed = self.rng.random();
        let disk = SimDisk::from_cache(cache.clone(), self.geometry.sector, seed);
        let found = self.mount(&disk)?.walk(&[]).map_err(|error| format!("walk: {error}"))?;
        let shown =
            promise.verify(&found).map_err(|problem| format!("killed at point {point}: {problem}"))?;
        let disk = SimDisk::from_cache(cache, self.geometry.sector, seed);
        disk.record();
        let world = self.mount(&disk)?;
        let mounted = disk.position();
        world.settle();
        let mut recovery = disk.take_history();
        for _ in 0..CUTS {
            let at = self.rng.random_range(0..=recovery.last_point());
            let choice = CrashChoice::Random { seed: self.rng.random() };
            // What a mount has shown stays.
            promise.first = if at >= mounted { shown } else { first };
            let image = recovery.state_at(at, choice);
            self.recovered.clear();
            self.check(&promise, image, 0.2).map_err(|problem| {
                format!("killed at point {point}, power cut at {at} of the recovery, {choice:?}: {problem}")
            })?;
        }
        Ok(())
    }

    /// One round: the disk that the next one finds.
    fn cut_and_go_on(
        &mut self,
        disk: &Rc<SimDisk>,
        profile: Profile,
        operations: usize,
        depth: Depth,
    ) -> Result<Rc<SimDisk>, String> {
        let world = self.mount(disk)?;
        let (log, mut history) = self.record(world, profile, operations)?;
        self.explore(&log, &mut history, depth)?;
        self.kill(&log, &mut history).map_err(|problem| format!("{problem}\n{}", story(&log)))?;
        let point = self.rng.random_range(0..=history.last_point());
        let choice = CrashChoice::Random { seed: self.rng.random() };
        let image = history.state_at(point, choice);
        // The next round takes what it finds for granted.
        self.check(&Promise::at(&log, point), image.clone(), 0.0).map_err(|problem| {
            format!("power cut at point {point}, {choice:?}: {problem}\n{}", story(&log))
        })?;
        self.recovered.clear();
        Ok(self.geometry.disk(image, self.rng.random()))
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
            disk.set_latency(&world.reactor, LATENCY);
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

/// What a device with latency takes for an operation: they end out of order.
const LATENCY: std::ops::Range<Duration> = Duration::from_micros(10)..Duration::from_millis(2);

/// Unmounts and checks everything: structures, and that what the file system believed of its space is so.
fn unmount(world: &World) -> Result<(), String> {
    let disk = world.unmount().map_err(|error| format!("unmount: {error}"))?;
    let counts = fsck(&disk).map_err(|problem| format!("after recovery, {problem}"))?;
    world.same_space(&counts)
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
    latency: bool,
) -> Result<(Log, History), String> {
    let disk = geometry.disk(base.0.clone(), 1);
    let world = World::mount(&disk, geometry, BETWEEN_MOUNTS)?;
    if latency {
        disk.set_latency(&world.reactor, LATENCY);
    }
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

#[cfg(test)]
mod tests {
    use bdev::sim::OpKind;

    use super::*;
    use crate::operation::NewKind;

    #[test]
    fn random_workloads_keep_their_promises_over_power_cuts() {
        let depth = Depth { points: 60, choices: 3, again: 0.15 };
        for seed in 1..=12 {
            let mut explorer = Explorer::new(Geometry::ALL[seed as usize % Geometry::ALL.len()], seed);
            let result = explorer.campaign(3, 60, depth);
            result.unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        }
    }

    /// How often a write to the journal lies before the one before it.
    fn wraps(world: &World) -> usize {
        let superblock = world.store.superblock();
        let block = u64::from(superblock.block_size);
        let journal =
            superblock.journal_start * block..(superblock.journal_start + superblock.journal_blocks) * block;
        let asked = world.disk.take_trace();
        let writes = asked.iter().filter(|asked| asked.kind == OpKind::Write);
        let places: Vec<u64> =
            writes.map(|asked| asked.range.start).filter(|start| journal.contains(start)).collect();
        places.windows(2).filter(|pair| pair[1] < pair[0]).count()
    }

    #[test]
    fn power_cuts_around_the_end_of_the_journal_and_the_checkpoints_that_empty_it() {
        let geometry = Geometry::TINY;
        let mut workload = Workload::new(World::mount(&geometry.format(1), &geometry, 10).unwrap()).unwrap();
        workload.world.disk.record();
        workload.world.disk.trace();
        for number in 0..60 {
            // Four names are made, and those of two rounds ago go: the tree stays small, the journal fills.
            for name in 0..4 {
                let path = format!("{number}-{name}-{}", "long".repeat(40));
                workload.perform(&Operation::Create { path, kind: NewKind::File, mode: 0o600 }).unwrap();
                let path = format!("{}-{name}-{}", number - 2, "long".repeat(40));
                workload.perform(&Operation::Unlink { path, hold: false }).unwrap();
            }
            workload.perform(&Operation::Syncfs).unwrap();
        }
        let wraps = wraps(&workload.world);
        assert!(wraps > 1, "the journal began {wraps} times anew");
        let mut history = workload.world.disk.take_history();
        workload.world.settle();
        let mut explorer = Explorer::new(geometry, 7);
        let depth = Depth { points: 400, choices: 3, again: 0.1 };
        explorer.explore(&workload.log, &mut history, depth).unwrap();
        assert!(explorer.states() > 200, "{} states", explorer.states());
    }

    #[test]
    fn a_seed_gives_the_same_states_in_every_run() {
        let states = || {
            let mut explorer = Explorer::new(Geometry::TINY, 5);
            explorer.campaign(2, 40, Depth { points: 30, choices: 3, again: 0.3 }).unwrap();
            let mut hashes: Vec<u64> = explorer.seen.hashes.lock().unwrap().iter().copied().collect();
            hashes.sort_unstable();
            hashes
        };
        let first = states();
        assert!(first.len() > 50);
        assert_eq!(first, states());
    }
}
