//! Random operations, compared with the oracle after each one; remounts in between; a full device. The caches are
//! small (`Geometry`), so that pages are evicted and written back between operations.

use bdev::sim::Image;
use proptest::collection;
use proptest::prelude::any;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::operation::{Durability, Generator, NewKind, Operation, Profile, Target};
use crate::oracle::{Body, State};
use crate::workload::Workload;
use crate::world::{Geometry, World};

/// What a test's run goes through.
#[derive(Debug, Clone, Copy)]
struct Script {
    geometry: Geometry,
    profile: Profile,
    /// Operations between two comparisons of the whole tree. A comparison reads everything, which leaves other pages
    /// in the cache and other times of access: both ways of going on are worth a test.
    compare_every: usize,
}

/// One step, drawn from a number and the state that it meets: a list of numbers is a run, and a part of the list is
/// a shorter run, down to which a failure is shrunk.
#[derive(Debug, Clone)]
enum Step {
    Perform(Operation),
    Remount,
}

impl Step {
    fn draw(number: u64, state: &State, profile: Profile) -> Self {
        /// How likely a remount is.
        const REMOUNT: f64 = 0.01;
        let mut rng = SmallRng::seed_from_u64(number);
        match rng.random_bool(REMOUNT) {
            true => Self::Remount,
            false => Self::Perform(Generator { rng: &mut rng, state, profile }.draw()),
        }
    }
}

/// A mounted file system on its way through a list of steps.
struct Run {
    script: Script,
    workload: Workload,
    steps: Vec<Step>,
}

impl Run {
    fn new(script: Script) -> Result<Self, String> {
        let world = World::mount(&script.geometry.format(1), &script.geometry, 0)?;
        Ok(Self { script, workload: Workload::new(world)?, steps: Vec::new() })
    }

    fn step(mut self, number: u64) -> Result<Self, String> {
        let step = Step::draw(number, self.workload.state(), self.script.profile);
        self.steps.push(step.clone());
        let result = match step {
            Step::Perform(operation) => self.workload.perform(&operation).and_then(|()| {
                // What is at rest can be counted.
                let at_rest = operation == Operation::Syncfs;
                if at_rest { self.workload.compare_space() } else { Ok(()) }
            }),
            Step::Remount => match self.workload.remount(&self.script.geometry) {
                Ok(workload) => {
                    self.workload = workload;
                    Ok(())
                }
                Err(problem) => return Err(Self::tell(&self.steps, &problem)),
            },
        };
        let compared = result.and_then(|()| match self.steps.len() % self.script.compare_every {
            0 => self.workload.compare(),
            _ => Ok(()),
        });
        match compared {
            Ok(()) => Ok(self),
            Err(problem) => Err(Self::tell(&self.steps, &problem)),
        }
    }

    fn tell(steps: &[Step], problem: &str) -> String {
        let list: Vec<String> = steps.iter().map(|step| format!("{step:?}")).collect();
        format!("{problem}, after:\n{}", list.join("\n"))
    }

    fn end(mut self) -> Result<Image, String> {
        self.workload.compare()?;
        let workload = self.workload.remount(&self.script.geometry)?;
        Ok(workload.world.disk.snapshot())
    }
}

fn perform(script: Script, numbers: &[u64]) -> Result<Image, String> {
    let run = numbers.iter().try_fold(Run::new(script)?, |run, number| run.step(*number));
    run.and_then(Run::end)
}

/// Random lists of steps, always the same ones; a failure is reported with the shortest list that shows it.
fn check(script: Script, cases: u32, steps: usize) {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let lists = collection::vec(any::<u64>(), steps / 2..steps);
    let result =
        runner.run(&lists, |numbers| perform(script, &numbers).map(drop).map_err(TestCaseError::fail));
    result.unwrap_or_else(|problem| panic!("{script:?}: {problem}"));
}

#[test]
fn a_seed_gives_the_same_device_in_every_run() {
    let script = Script { geometry: Geometry::TINY, profile: Profile::SMALL, compare_every: 40 };
    let bytes = || {
        let numbers: Vec<u64> = (0..2000).collect();
        let image = perform(script, &numbers).expect("agrees with the oracle");
        let mut bytes = vec![0; image.size() as usize];
        image.read(0, &mut bytes);
        bytes
    };
    assert!(bytes() == bytes());
}

#[test]
fn random_operations_agree_with_the_oracle_after_each_one() {
    for geometry in Geometry::ALL {
        check(Script { geometry, profile: Profile::SMALL, compare_every: 1 }, 8, 500);
    }
}

#[test]
fn random_operations_that_nobody_looks_at_agree_with_the_oracle_later() {
    for geometry in Geometry::ALL {
        check(Script { geometry, profile: Profile::SMALL, compare_every: 40 }, 10, 1200);
    }
}

/// Large files on a small device: it is full most of the time.
#[test]
fn random_operations_on_a_nearly_full_device_agree_with_the_oracle() {
    for geometry in Geometry::ALL {
        for (profile, compare_every) in [(Profile::WIDE, 40), (Profile::FULL, 1)] {
            check(Script { geometry, profile, compare_every }, 5, 800);
        }
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
            workload.perform(&Operation::Write {
                target,
                offset,
                len,
                tag,
                append: false,
                durability,
                from_cache: false,
            })?;
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
