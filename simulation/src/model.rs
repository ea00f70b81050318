//! Random operations, compared with the oracle after each one; remounts in between; a full device.

use bdev::sim::Image;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::operation::{Durability, Generator, NewKind, Operation, Profile, Target};
use crate::oracle::Body;
use crate::workload::Workload;
use crate::world::{Geometry, World};

/// Operations between two comparisons of the whole tree.
const COMPARE_EVERY: usize = 40;

/// How likely a remount is before an operation.
const REMOUNT: f64 = 0.01;

#[derive(Debug, Clone)]
enum Step {
    Perform(Operation),
    Compare,
    Remount,
}

/// A mounted file system on its way through a list of steps.
struct Run {
    geometry: Geometry,
    workload: Option<Workload>,
}

impl Run {
    fn new(geometry: Geometry) -> Result<Self, String> {
        let world = World::mount(&geometry.format(1), &geometry, 0)?;
        Ok(Self { geometry, workload: Some(Workload::new(world)?) })
    }

    fn workload(&mut self) -> &mut Workload {
        self.workload.as_mut().expect("gone only while it is mounted again")
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Perform(operation) => self.workload().perform(operation),
            Step::Compare => self.workload().compare(),
            Step::Remount => {
                let workload = self.workload.take().expect("gone only while it is mounted again");
                self.workload = Some(workload.remount(&self.geometry)?);
                Ok(())
            }
        }
    }
}

fn perform(geometry: Geometry, steps: &[Step]) -> Result<(), String> {
    let mut run = Run::new(geometry)?;
    steps.iter().try_for_each(|step| run.step(step))
}

/// Draws steps and performs them; gives what the device holds then, or the steps that ended in a failure.
fn draw(geometry: Geometry, profile: Profile, seed: u64, count: usize) -> Result<Image, (String, Vec<Step>)> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut steps = Vec::new();
    let mut run = Run::new(geometry).expect("a new file system");
    for number in 0..count {
        let state = run.workload().state().clone();
        let operation = Generator { rng: &mut rng, state: &state, profile }.draw();
        let remount = rng.random_bool(REMOUNT).then_some(Step::Remount);
        let compare = (number % COMPARE_EVERY == 0).then_some(Step::Compare);
        for step in [remount, Some(Step::Perform(operation)), compare].into_iter().flatten() {
            steps.push(step);
            if let Err(problem) = run.step(&steps[steps.len() - 1]) {
                return Err((problem, steps));
            }
        }
    }
    steps.extend([Step::Compare, Step::Remount]);
    match run.step(&Step::Compare).and_then(|()| run.step(&Step::Remount)) {
        Ok(()) => Ok(run.workload().world.disk.snapshot()),
        Err(problem) => Err((problem, steps)),
    }
}

/// Leaves out steps as long as those that stay fail, larger runs first.
fn shrink(geometry: Geometry, mut steps: Vec<Step>) -> Vec<Step> {
    let mut len = steps.len() / 2;
    while len > 0 {
        let mut at = 0;
        while at + len <= steps.len() {
            let fewer = [&steps[..at], &steps[at + len..]].concat();
            match perform(geometry, &fewer) {
                Ok(()) => at += len,
                Err(_) => steps = fewer,
            }
        }
        len /= 2;
    }
    steps
}

/// Performs random steps; a failure is reported with the shortest list that shows it.
fn check(geometry: Geometry, profile: Profile, seed: u64, count: usize) {
    if let Err((first, steps)) = draw(geometry, profile, seed, count) {
        let steps = shrink(geometry, steps);
        let problem = perform(geometry, &steps).expect_err("it did fail");
        let list: Vec<String> = steps.iter().map(|step| format!("{step:?}")).collect();
        panic!("seed {seed}, {geometry:?}: {first}; shorter: {problem}, after:\n{}", list.join("\n"));
    }
}

#[test]
fn a_seed_gives_the_same_device_in_every_run() {
    let bytes = || {
        let image = draw(Geometry::ALL[0], Profile::SMALL, 7, 2000).expect("agrees with the oracle");
        let mut bytes = vec![0; image.size() as usize];
        image.read(0, &mut bytes);
        bytes
    };
    assert!(bytes() == bytes());
}

#[test]
fn random_operations_in_a_small_tree_agree_with_the_oracle() {
    for seed in 0..30 {
        check(Geometry::ALL[seed as usize % 3], Profile::SMALL, seed, 800);
    }
}

/// Large files on a small device: it is full most of the time.
#[test]
fn random_operations_on_a_nearly_full_device_agree_with_the_oracle() {
    for seed in 100..130 {
        check(Geometry::ALL[seed as usize % 3], Profile::WIDE, seed, 600);
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
