//! The campaign: tasks one after the other on every core, until the time is over or a promise is broken.
//!
//! A [`Task`] depends on its name and on the campaign's seed alone, so that both repeat a failure. Workers are
//! threads that share nothing but the number of the next task and the set of the states that were seen.

use std::collections::HashMap;
use std::fmt;
use std::io::IsTerminal as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::crash::{Depth, Explorer, Seen};
use crate::sequences::Sequences;
use crate::world::Geometry;
use crate::{faults, making};

/// A task that takes longer than this hangs. The slowest took 20 s on a machine with four times as much to do as it
/// has cores.
const HANG: Duration = Duration::from_secs(300);

/// How often the progress is shown: a bar moves, a log grows slowly.
const BAR_EVERY: Duration = Duration::from_millis(200);
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Options of `cargo xtask crash`.
#[derive(Debug, clap::Parser)]
#[command(name = "cargo xtask crash", bin_name = "cargo xtask crash")]
pub(crate) struct Options {
    /// How long to go on.
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// What everything is drawn from; every seed gives other states.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Threads; one for each core when not given.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Perform this task only, such as pair:tiny:123. A failure prints the one that repeats it.
    #[arg(long, value_name = "TASK")]
    task: Option<Task>,
    /// Print the totals as one line of JSON.
    #[arg(long)]
    json: bool,
    /// The commit that is tested, for the totals.
    #[arg(long, value_name = "COMMIT", default_value = "unknown", hide = true)]
    commit: String,
}

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Single,
    Pair,
    Triple,
    Workload,
    Mkfs,
    Fault,
    Silent,
}

impl Kind {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Single, "single"),
        (Self::Pair, "pair"),
        (Self::Triple, "triple"),
        (Self::Workload, "workload"),
        (Self::Mkfs, "mkfs"),
        (Self::Fault, "fault"),
        (Self::Silent, "silent"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

/// A piece of work that can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Task {
    kind: Kind,
    /// Index into [`Geometry::ALL`].
    geometry: usize,
    number: u64,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.kind.name(), Geometry::NAMES[self.geometry], self.number)
    }
}

impl FromStr for Task {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut parts = text.split(':');
        let mut part = || parts.next().context("a task is KIND:GEOMETRY:NUMBER");
        let (kind, geometry, number) = (part()?, part()?, part()?);
        let (kind, _) = Kind::ALL.into_iter().find(|(_, name)| *name == kind).context("no such kind")?;
        let geometry =
            Geometry::NAMES.iter().position(|name| *name == geometry).context("no such geometry")?;
        Ok(Self { kind, geometry, number: number.parse()? })
    }
}

/// Which tasks there are, in order.
struct Plan {
    seed: u64,
    /// The singles of every geometry come first.
    singles: u64,
    pairs: u64,
}

impl Plan {
    fn new(seed: u64) -> Self {
        Self { seed, singles: Sequences::singles(), pairs: Sequences::pairs() }
    }

    /// The task that comes at place `place`.
    fn task(&self, place: u64) -> Task {
        /// Pairs, which are many, alternate with everything else; among that are pairs where blocks have checksums.
        const OTHERS: [Kind; 9] = [
            Kind::Workload,
            Kind::Triple,
            Kind::Workload,
            Kind::Fault,
            Kind::Workload,
            Kind::Triple,
            Kind::Silent,
            Kind::Mkfs,
            Kind::Pair,
        ];
        let geometries = Geometry::ALL.len() as u64;
        if place < self.singles * geometries {
            let geometry = (place % geometries) as usize;
            return Task { kind: Kind::Single, geometry, number: place / geometries };
        }
        let place = place - self.singles * geometries;
        if place.is_multiple_of(2) {
            let number = place / 2;
            // The tiny geometry first, all of it; then the others. Spread, so that a short run sees all kinds.
            let geometry = (number / self.pairs % geometries) as usize;
            return Task { kind: Kind::Pair, geometry, number: self.spread(number) };
        }
        let other = place / 2;
        let kind = OTHERS[(other % OTHERS.len() as u64) as usize];
        let mut rng = SmallRng::seed_from_u64(self.seed ^ other << 20);
        let number = rng.random::<u64>() >> 16;
        let mut geometry = rng.random_range(0..Geometry::ALL.len());
        while kind == Kind::Pair && !Geometry::ALL[geometry].sums {
            geometry = rng.random_range(0..Geometry::ALL.len());
        }
        Task { kind, geometry, number }
    }

    /// A permutation of the pairs that depends on the seed.
    fn spread(&self, number: u64) -> u64 {
        /// A prime larger than the number of pairs, so that it has no common divisor with it.
        const STRIDE: u64 = 15_485_863;
        (number % self.pairs * STRIDE + self.seed.wrapping_mul(7919) % self.pairs) % self.pairs
    }

    /// How many of the pairs of the first geometry the first `places` tasks hold.
    fn pairs_begun(&self, places: u64) -> u64 {
        places.saturating_sub(self.singles * Geometry::ALL.len() as u64).div_ceil(2).min(self.pairs)
    }
}

/// A thread's own state.
struct Worker {
    seed: u64,
    seen: Arc<Seen>,
    sequences: HashMap<usize, Sequences>,
}

impl Worker {
    fn run(&mut self, task: Task) -> Result<(), String> {
        let geometry = Geometry::ALL[task.geometry];
        let explorer = || Explorer::counting(geometry, task.number, self.seen.clone());
        match task.kind {
            Kind::Single => self.sequences(task.geometry)?.single(task.number),
            Kind::Pair => self.sequences(task.geometry)?.pair(task.number),
            Kind::Triple => self.sequences(task.geometry)?.triple(task.number),
            Kind::Workload => explorer().campaign(6, 60, Depth { points: 120, choices: 4, again: 0.15 }),
            Kind::Mkfs => making::check(&mut explorer(), task.number),
            Kind::Fault => faults::random(geometry, task.number, self.seen.clone()),
            Kind::Silent => faults::silent(geometry, task.number),
        }
    }

    fn sequences(&mut self, geometry: usize) -> Result<&mut Sequences, String> {
        if !self.sequences.contains_key(&geometry) {
            let depth = Depth { points: usize::MAX, choices: 3, again: 0.05 };
            let made = Sequences::new(Geometry::ALL[geometry], self.seed, depth, self.seen.clone())?;
            self.sequences.insert(geometry, made);
        }
        Ok(self.sequences.get_mut(&geometry).expect("it was just made"))
    }
}

/// What workers and the thread that shows the progress share.
struct Shared {
    plan: Plan,
    seen: Arc<Seen>,
    next: AtomicU64,
    stop: Arc<AtomicBool>,
    /// What each worker does, and since when.
    at_work: Vec<Mutex<Option<(Task, Instant)>>>,
    done: Mutex<HashMap<Kind, u64>>,
    broken: Mutex<Option<(Task, String)>>,
}

impl Shared {
    fn work(&self, number: usize) {
        let mut worker = Worker { seed: self.plan.seed, seen: self.seen.clone(), sequences: HashMap::new() };
        while !self.stop.load(Ordering::Relaxed) {
            let task = self.plan.task(self.next.fetch_add(1, Ordering::Relaxed));
            *self.at_work[number].lock().expect("no panic") = Some((task, Instant::now()));
            if let Err(problem) = attempt(&mut worker, task) {
                self.report(task, problem);
            }
            *self.done.lock().expect("no panic").entry(task.kind).or_default() += 1;
        }
        *self.at_work[number].lock().expect("no panic") = None;
    }

    /// The first broken promise ends the campaign.
    fn report(&self, task: Task, problem: String) {
        self.broken.lock().expect("no panic").get_or_insert((task, problem));
        self.stop.store(true, Ordering::Relaxed);
    }

    /// A task that does not come to its end is a broken promise.
    fn look_for_hangs(&self) -> bool {
        for place in &self.at_work {
            if let Some((task, since)) = *place.lock().expect("no panic")
                && since.elapsed() > HANG
            {
                self.report(task, format!("hangs for more than {} s", HANG.as_secs()));
                return true;
            }
        }
        false
    }

    fn what(&self) -> String {
        let tasks = self.at_work.iter().filter_map(|place| *place.lock().expect("no panic"));
        tasks.map(|(task, _)| task.to_string()).collect::<Vec<_>>().join(" ")
    }
}

/// Performs a task; a panic is a broken promise, too.
fn attempt(worker: &mut Worker, task: Task) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| worker.run(task))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(format!("panic: {text}"))
    })
}

/// What a campaign came to.
#[derive(Debug, Serialize)]
struct Totals {
    commit: String,
    seed: u64,
    jobs: usize,
    seconds: u64,
    /// Distinct states that were mounted, checked by fsck and compared with the oracle.
    states: u64,
    /// Recoveries, those of states that had been seen before included.
    recoveries: u64,
    states_per_second: u64,
    tasks: Vec<(Kind, u64)>,
    /// Pairs of operations in the tiny geometry: begun, and how many there are.
    pairs: (u64, u64),
    violation: Option<String>,
}

/// Runs the campaign. False after a broken promise, which was printed.
///
/// # Errors
/// When signals cannot be caught.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    match options.task {
        Some(task) => Ok(repeat(options.seed, task)),
        None => explore(options),
    }
}

/// Performs one task again.
fn repeat(seed: u64, task: Task) -> bool {
    let mut worker = Worker { seed, seen: Arc::default(), sequences: HashMap::new() };
    match attempt(&mut worker, task) {
        Ok(()) => {
            println!("{task} with seed {seed}: {} states, no promise broken", worker.seen.distinct());
            true
        }
        Err(problem) => {
            println!("{task} with seed {seed}: {problem}");
            false
        }
    }
}

fn explore(options: &Options) -> anyhow::Result<bool> {
    let jobs = match options.jobs {
        Some(jobs) => jobs.max(1),
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("catch signals")?;
    }
    let shared = Arc::new(Shared {
        plan: Plan::new(options.seed),
        seen: Arc::default(),
        next: AtomicU64::new(0),
        stop,
        at_work: (0..jobs).map(|_| Mutex::new(None)).collect(),
        done: Mutex::default(),
        broken: Mutex::default(),
    });
    let began = Instant::now();
    let workers: Vec<_> = (0..jobs)
        .map(|number| {
            let shared = shared.clone();
            thread::spawn(move || shared.work(number))
        })
        .collect();
    let ended = watch(&shared, began, Duration::from_secs(options.seconds));
    if ended {
        for worker in workers {
            // A task that panics was caught; what else could be said is in `broken`.
            let _ = worker.join();
        }
    }
    Ok(finish(options, &shared, jobs, began.elapsed()))
}

/// Shows the progress until the time is over or a worker has stopped all. False if a worker hangs.
fn watch(shared: &Shared, began: Instant, time: Duration) -> bool {
    let bar = ProgressBar::new(time.as_secs());
    let template = "{bar:30} {elapsed_precise} of {len} s  {msg}";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
    let terminal = std::io::stderr().is_terminal();
    let mut logged = began;
    while began.elapsed() < time && !shared.stop.load(Ordering::Relaxed) {
        thread::sleep(BAR_EVERY);
        let line = progress(shared, began.elapsed());
        bar.set_position(began.elapsed().as_secs());
        bar.set_message(line.clone());
        if !terminal && logged.elapsed() >= LOG_EVERY {
            logged = Instant::now();
            eprintln!("{:>6} s  {line}", began.elapsed().as_secs());
        }
        if shared.look_for_hangs() {
            bar.abandon();
            return false;
        }
    }
    shared.stop.store(true, Ordering::Relaxed);
    bar.finish_and_clear();
    true
}

fn rate(states: u64, time: Duration) -> u64 {
    (states as f64 / time.as_secs_f64().max(0.001)) as u64
}

fn progress(shared: &Shared, elapsed: Duration) -> String {
    let states = shared.seen.distinct();
    format!("{states} states, {} a second; {}", rate(states, elapsed), shared.what())
}

/// Prints the totals, and what was broken.
fn finish(options: &Options, shared: &Shared, jobs: usize, time: Duration) -> bool {
    let broken = shared.broken.lock().expect("no panic").take();
    let mut tasks: Vec<_> = shared.done.lock().expect("no panic").clone().into_iter().collect();
    tasks.sort_unstable();
    let totals = Totals {
        commit: options.commit.clone(),
        seed: options.seed,
        jobs,
        seconds: time.as_secs(),
        states: shared.seen.distinct(),
        recoveries: shared.seen.mounts(),
        states_per_second: rate(shared.seen.distinct(), time),
        tasks,
        pairs: (shared.plan.pairs_begun(shared.next.load(Ordering::Relaxed)), shared.plan.pairs),
        violation: broken.as_ref().map(|(task, _)| task.to_string()),
    };
    match options.json {
        true => println!("{}", serde_json::to_string(&totals).expect("numbers and text")),
        false => print(&totals),
    }
    let Some((task, problem)) = broken else { return true };
    eprintln!("\na promise is broken: {problem}\n\nto repeat it:");
    eprintln!("  cargo xtask crash --seed {} --task {task}", options.seed);
    false
}

fn print(totals: &Totals) {
    let tasks: Vec<_> = totals.tasks.iter().map(|(kind, count)| format!("{count} {}", kind.name())).collect();
    println!("commit {}, seed {}, {} threads", totals.commit, totals.seed, totals.jobs);
    println!("tasks: {}; pairs: {} of {}", tasks.join(", "), totals.pairs.0, totals.pairs.1);
    println!(
        "{} states in {} s ({} a second), {} recoveries, {}",
        totals.states,
        totals.seconds,
        totals.states_per_second,
        totals.recoveries,
        if totals.violation.is_some() { "a promise is BROKEN" } else { "no promise broken" }
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_a_task_once_and_names_are_read_back() {
        let plan = Plan::new(9);
        let mut pairs = std::collections::HashSet::new();
        for place in 0..plan.singles * Geometry::ALL.len() as u64 + 2 * plan.pairs {
            let task = plan.task(place);
            assert_eq!(task.to_string().parse::<Task>().unwrap(), task);
            if task.kind == Kind::Pair && task.geometry == 0 {
                assert!(pairs.insert(task.number), "{task} comes twice");
            }
        }
        assert_eq!(pairs.len() as u64, plan.pairs);
        assert!("pair:tiny".parse::<Task>().is_err());
        assert!("pair:huge:1".parse::<Task>().is_err());
    }
}
