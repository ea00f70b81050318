//! Round trips: the synthetic client on one core, the server on the other.
//!
//! Both servers run at the same time on the server's core, and rounds alternate between them; the one that is not
//! measured is idle. CPU time per operation contains the polling of a server that polls.

use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

use anyhow::Context as _;
use vhostfs_tests::process::output_of;

use crate::{
    client::{Client, ClientOptions},
    load::{self, Round, Workload},
    machine::{CLIENT_CORE, SERVER_CORE, pin_to},
    result::{Figure, Goal, Row, Table, Unit},
    run::Run,
    server::{Media, ServerProcess, Side},
    workloads::{Create, Getattr, Lookup, RandomRead, RandomWrite, TestFile, Unlink, directory},
};

/// File that is read from the cache: fits into every cache here, and into no cache of the processor.
const CACHED_FILE_LEN: u64 = 64 << 20;

/// Bytes of a large direct read.
const LARGE_READ_LEN: u32 = 1 << 20;

/// Files in the directory whose names are looked up.
const LOOKUP_FILES: u64 = 1000;

/// Files that a round of creates makes at most, and that the first round of unlinks removes.
const CREATES_MAX: u64 = 50_000;
const FIRST_UNLINKS: u64 = 10_000;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    CachedRead(u32),
    DirectRead,
    LargeDirectRead,
    DirectWrite,
    SyncedWrite,
    Getattr,
    Lookup,
    Create,
    Unlink,
}

/// What is made of the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Metric {
    Rate,
    Latency,
    Throughput,
}

/// A row.
struct Case {
    name: &'static str,
    what: &'static str,
    kind: Kind,
    depth: usize,
    metric: Metric,
    media: Media,
    goals: &'static [Goal],
}

/// Better than the peer: the least that every row must be.
const BETTER: Goal = Goal::TimesPeer(1.0);

#[rustfmt::skip]
const CASES: &[Case] = &[
    // In memory: what the software costs.
    case("read-4k", "cached 4 KiB read, depth 1", Kind::CachedRead(4096), 1, Metric::Latency, Media::Memory, &[Goal::Figure(3.0), BETTER]),
    case("read-4k-32", "cached 4 KiB read, depth 32", Kind::CachedRead(4096), 32, Metric::Rate, Media::Memory, &[Goal::Figure(700.0), BETTER]),
    case("read-1m", "cached 1 MiB read, depth 4", Kind::CachedRead(1 << 20), 4, Metric::Throughput, Media::Memory, &[Goal::Figure(8.0), BETTER]),
    case("getattr", "GETATTR, depth 1", Kind::Getattr, 1, Metric::Latency, Media::Memory, &[BETTER]),
    case("getattr-32", "GETATTR, depth 32", Kind::Getattr, 32, Metric::Rate, Media::Memory, &[Goal::Figure(1000.0), BETTER]),
    case("lookup-32", "LOOKUP, depth 32", Kind::Lookup, 32, Metric::Rate, Media::Memory, &[Goal::Figure(800.0), BETTER]),
    case("create-32", "CREATE, depth 32", Kind::Create, 32, Metric::Rate, Media::Memory, &[Goal::Figure(250.0), BETTER]),
    case("unlink-32", "UNLINK, depth 32", Kind::Unlink, 32, Metric::Rate, Media::Memory, &[Goal::Figure(200.0), BETTER]),
    case("direct-read", "O_DIRECT 4 KiB random read, depth 1", Kind::DirectRead, 1, Metric::Latency, Media::Memory, &[BETTER]),
    case("direct-read-32", "O_DIRECT 4 KiB random read, depth 32", Kind::DirectRead, 32, Metric::Rate, Media::Memory, &[Goal::Figure(700.0), BETTER]),
    case("direct-write-32", "O_DIRECT 4 KiB random write, depth 32", Kind::DirectWrite, 32, Metric::Rate, Media::Memory, &[BETTER]),
    case("write-fsync", "4 KiB random write and FSYNC, depth 1", Kind::SyncedWrite, 1, Metric::Rate, Media::Memory, &[BETTER]),
    // On a file: what the user gets.
    case("file-read-4k", "file: cached 4 KiB read, depth 1", Kind::CachedRead(4096), 1, Metric::Latency, Media::File, &[BETTER]),
    case("file-read-1m", "file: cached 1 MiB read, depth 4", Kind::CachedRead(1 << 20), 4, Metric::Throughput, Media::File, &[BETTER]),
    case("file-getattr-32", "file: GETATTR, depth 32", Kind::Getattr, 32, Metric::Rate, Media::File, &[BETTER]),
    case("file-lookup-32", "file: LOOKUP, depth 32", Kind::Lookup, 32, Metric::Rate, Media::File, &[BETTER]),
    case("file-create-32", "file: CREATE, depth 32", Kind::Create, 32, Metric::Rate, Media::File, &[BETTER]),
    case("file-unlink-32", "file: UNLINK, depth 32", Kind::Unlink, 32, Metric::Rate, Media::File, &[BETTER]),
    case("file-direct-read", "file: O_DIRECT 4 KiB random read, depth 1", Kind::DirectRead, 1, Metric::Latency, Media::FileDirect, &[Goal::TimesReference(0.9), BETTER]),
    case("file-direct-read-32", "file: O_DIRECT 4 KiB random read, depth 32", Kind::DirectRead, 32, Metric::Rate, Media::FileDirect, &[Goal::TimesReference(0.9), BETTER]),
    case("file-direct-write-32", "file: O_DIRECT 4 KiB random write, depth 32", Kind::DirectWrite, 32, Metric::Rate, Media::FileDirect, &[Goal::TimesReference(0.9), BETTER]),
    case("file-write-fsync", "file: 4 KiB random write and FSYNC, depth 1", Kind::SyncedWrite, 1, Metric::Rate, Media::File, &[BETTER]),
];

/// With checksums of data, beside the same without.
#[rustfmt::skip]
const CHECKSUM_CASES: &[Case] = &[
    case("sums-read-4k", "checksums: cached 4 KiB read, depth 1", Kind::CachedRead(4096), 1, Metric::Latency, Media::FileInMemory, &[]),
    case("sums-direct-read", "checksums: O_DIRECT 4 KiB random read, depth 1", Kind::DirectRead, 1, Metric::Latency, Media::FileInMemory, &[]),
    case("sums-direct-read-32", "checksums: O_DIRECT 4 KiB random read, depth 32", Kind::DirectRead, 32, Metric::Rate, Media::FileInMemory, &[]),
    case("sums-direct-read-1m", "checksums: O_DIRECT 1 MiB random read, depth 4", Kind::LargeDirectRead, 4, Metric::Throughput, Media::FileInMemory, &[]),
    case("sums-direct-write-32", "checksums: O_DIRECT 4 KiB random write, depth 32", Kind::DirectWrite, 32, Metric::Rate, Media::FileInMemory, &[]),
    case("sums-write-fsync", "checksums: 4 KiB random write and FSYNC, depth 1", Kind::SyncedWrite, 1, Metric::Rate, Media::FileInMemory, &[]),
];

const fn case(
    name: &'static str,
    what: &'static str,
    kind: Kind,
    depth: usize,
    metric: Metric,
    media: Media,
    goals: &'static [Goal],
) -> Case {
    Case { name, what, kind, depth, metric, media, goals }
}

/// Names and questions of the rows.
pub fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    CASES.iter().map(|case| (case.name, case.what))
}

/// The same of what checksums of data cost.
pub fn checksum_names() -> impl Iterator<Item = (&'static str, &'static str)> {
    CHECKSUM_CASES.iter().map(|case| (case.name, case.what))
}

/// Measures the chosen rows.
pub fn run(run: &Run) -> anyhow::Result<Option<Table>> {
    let cases: Vec<&Case> = CASES.iter().filter(|case| run.wants("round-trip", case.name)).collect();
    if cases.is_empty() {
        return Ok(None);
    }
    pin_to(CLIENT_CORE)?;
    let mut rows = Vec::new();
    for media in [Media::Memory, Media::File, Media::FileDirect] {
        let cases: Vec<&Case> = cases.iter().copied().filter(|case| case.media == media).collect();
        if cases.is_empty() {
            continue;
        }
        let mut guests = Guests::start(run, run.programs.sides(), media);
        for case in cases {
            let row = measure(run, &mut guests, case);
            run.show(&row);
            rows.push(row);
        }
    }
    let caption = format!(
        "Round trips: synthetic client on core {CLIENT_CORE}, server on core {SERVER_CORE}; medians of {} rounds of {} ms; \
         memory: against tmpfs, image file against folder",
        run.rounds,
        run.round.as_millis()
    );
    Ok(Some(Table { name: "round-trip", caption, rows }))
}

/// Measures the chosen rows of what checksums of data cost.
pub fn run_checksums(run: &Run) -> anyhow::Result<Option<Table>> {
    let cases: Vec<&Case> = CHECKSUM_CASES.iter().filter(|case| run.wants("checksums", case.name)).collect();
    if cases.is_empty() || run.programs.ours.is_none() {
        return Ok(None);
    }
    pin_to(CLIENT_CORE)?;
    let mut guests = Guests::start(run, [Side::Ours, Side::Summed], Media::FileInMemory);
    let mut rows = Vec::new();
    for case in cases {
        let row = measure_checksums(run, &mut guests, case);
        run.show(&row);
        rows.push(row);
    }
    let caption = format!(
        "What checksums of data cost: vhostfs alone, an image made with --data-checksum beside one without, both files on \
         tmpfs; otherwise as round-trip; medians of {} rounds of {} ms",
        run.rounds,
        run.round.as_millis()
    );
    Ok(Some(Table { name: "checksums", caption, rows }))
}

/// A row of them: what there is without checksums is the reference.
fn measure_checksums(run: &Run, guests: &mut Guests, case: &Case) -> Row {
    let Measured { mut figures, failures } = measure_sides(run, guests, case);
    let without = figures.remove(&Side::Ours);
    let name = match without.and_then(|figure| figure.cpu_us) {
        Some(cpu) => format!("without (cpu/op {cpu:.2} us)"),
        None => "without".to_owned(),
    };
    Row {
        name: case.name.into(),
        what: case.what.into(),
        unit: case.unit(),
        ours: figures.remove(&Side::Summed),
        peer: None,
        reference: without.map(|figure| (name, figure.value)),
        goals: case.goals.to_vec(),
        failures,
    }
}

/// The servers of one kind of media, each with its client.
struct Guests {
    sides: BTreeMap<Side, Result<(ServerProcess, Client), String>>,
}

impl Guests {
    /// A server that cannot be started, or does not answer, is reported in each of its rows.
    fn start(run: &Run, sides: impl IntoIterator<Item = Side>, media: Media) -> Self {
        let start = |side| -> anyhow::Result<(ServerProcess, Client)> {
            let server = ServerProcess::start(&run.programs, side, media, run.scratch())?;
            let client = Client::connect(server.socket(), ClientOptions::default())?;
            Ok((server, client))
        };
        let started = sides.into_iter().map(|side| (side, start(side).map_err(|error| format!("{error:#}"))));
        Self { sides: started.collect() }
    }
}

/// What the sides reached in a case, and why those without a figure have none.
struct Measured {
    figures: BTreeMap<Side, Figure>,
    failures: Vec<String>,
}

/// Rounds of one case, alternating between the sides.
fn measure_sides(run: &Run, guests: &mut Guests, case: &Case) -> Measured {
    let mut rounds: BTreeMap<Side, Vec<Round>> = BTreeMap::new();
    let mut failures: BTreeMap<Side, String> = BTreeMap::new();
    let mut subjects: BTreeMap<Side, Subject> = BTreeMap::new();
    for round in 0..=run.rounds {
        for (side, guest) in &mut guests.sides {
            if failures.contains_key(side) {
                continue;
            }
            let done = one_round(run, guest, case, subjects.remove(side));
            match done {
                // The first round warms up.
                Ok((subject, done)) => {
                    subjects.insert(*side, subject);
                    if round > 0 {
                        rounds.entry(*side).or_default().push(done);
                    }
                }
                Err(error) => {
                    failures.insert(*side, format!("{error:#}"));
                }
            }
        }
    }
    Measured {
        figures: rounds.into_iter().map(|(side, rounds)| (side, figure_of(rounds, case))).collect(),
        failures: failures.into_iter().map(|(side, why)| format!("{side:?}: {why}")).collect(),
    }
}

/// A row against the peer.
fn measure(run: &Run, guests: &mut Guests, case: &Case) -> Row {
    let Measured { mut figures, mut failures } = measure_sides(run, guests, case);
    let needs_reference = case.goals.iter().any(|goal| matches!(goal, Goal::TimesReference(_)));
    let reference = if needs_reference { fio_reference(run, case) } else { Ok(None) };
    let reference = reference.unwrap_or_else(|error| {
        failures.push(format!("fio: {error:#}"));
        None
    });
    Row {
        name: case.name.into(),
        what: case.what.into(),
        unit: case.unit(),
        ours: figures.remove(&Side::Ours),
        peer: figures.remove(&Side::Peer),
        reference,
        goals: case.goals.to_vec(),
        failures,
    }
}

impl Case {
    fn unit(&self) -> Unit {
        match self.metric {
            Metric::Rate => Unit::KiloPerSecond,
            Metric::Latency => Unit::Microseconds,
            Metric::Throughput => Unit::GigabytesPerSecond,
        }
    }

    fn bytes_per_operation(&self) -> f64 {
        match self.kind {
            Kind::CachedRead(len) => f64::from(len),
            Kind::LargeDirectRead => f64::from(LARGE_READ_LEN),
            _ => 4096.0,
        }
    }
}

fn one_round(
    run: &Run,
    guest: &mut Result<(ServerProcess, Client), String>,
    case: &Case,
    subject: Option<Subject>,
) -> anyhow::Result<(Subject, Round)> {
    let (server, client) = guest.as_mut().map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut subject = match subject {
        Some(subject) => subject,
        None => Subject::prepare(run, client, case).context("prepare")?,
    };
    let round = subject.round(server, client, case, run.round)?;
    Ok((subject, round))
}

fn figure_of(mut rounds: Vec<Round>, case: &Case) -> Figure {
    let value = |round: &mut Round| match case.metric {
        Metric::Rate => round.rate() / 1e3,
        Metric::Throughput => round.rate() * case.bytes_per_operation() / 1e9,
        Metric::Latency => round.quantile_us(0.5).unwrap_or(f64::NAN),
    };
    let values = rounds.iter_mut().map(value).collect();
    let p99 = rounds.iter_mut().filter_map(|round| round.quantile_us(0.99)).collect();
    let p99 = if case.metric == Metric::Latency { p99 } else { Vec::new() };
    let cpu = rounds.iter().map(Round::cpu_us).collect();
    Figure::of_rounds(values, p99, cpu)
}

/// A case made ready on one server.
enum Subject {
    /// Requests that leave things as they are.
    Steady(Box<dyn Workload>),
    /// Creates in a directory, removed after each round.
    Creates(u64),
    /// Unlinks in a directory, whose files are made before each round.
    Unlinks { directory: u64, count: u64 },
}

impl Subject {
    fn prepare(run: &Run, client: &mut Client, case: &Case) -> anyhow::Result<Self> {
        let cached = |client: &mut Client| TestFile::make(client, "cached", CACHED_FILE_LEN, false);
        let direct = |client: &mut Client| TestFile::make(client, "direct", run.direct_file_len, true);
        Ok(Self::Steady(match case.kind {
            Kind::CachedRead(len) => Box::new(RandomRead::new(cached(client)?, len, case.depth)),
            Kind::DirectRead => Box::new(RandomRead::new(direct(client)?, 4096, case.depth)),
            Kind::LargeDirectRead => Box::new(RandomRead::new(direct(client)?, LARGE_READ_LEN, case.depth)),
            Kind::DirectWrite => Box::new(RandomWrite::new(direct(client)?, case.depth)),
            Kind::SyncedWrite => Box::new(RandomWrite::synced(cached(client)?)),
            Kind::Getattr => Box::new(Getattr::new(TestFile::make(client, "attributes", 4096, false)?)),
            Kind::Lookup => Box::new(Lookup::make(client, LOOKUP_FILES)?),
            Kind::Create => return Ok(Self::Creates(directory(client, "create")?)),
            Kind::Unlink => {
                let directory = directory(client, "unlink")?;
                return Ok(Self::Unlinks { directory, count: FIRST_UNLINKS });
            }
        }))
    }

    fn round(
        &mut self,
        server: &ServerProcess,
        client: &mut Client,
        case: &Case,
        budget: Duration,
    ) -> anyhow::Result<Round> {
        match self {
            Self::Steady(workload) => metered(server, client, workload.as_mut(), case.depth, budget),
            Self::Creates(directory) => {
                let mut create = Create::new(client, *directory, CREATES_MAX);
                let round = metered(server, client, &mut create, case.depth, budget)?;
                let mut unlink = Unlink::new(*directory, create.created.len() as u64);
                create.release(client)?;
                load::run(client, &mut unlink, case.depth, Duration::MAX)?;
                create.forget(client)?;
                Ok(round)
            }
            Self::Unlinks { directory, count } => {
                let mut create = Create::new(client, *directory, *count);
                load::run(client, &mut create, case.depth, Duration::MAX)?;
                create.release(client)?;
                let mut unlink = Unlink::new(*directory, *count);
                let round = metered(server, client, &mut unlink, case.depth, Duration::MAX)?;
                create.forget(client)?;
                *count = ((round.rate() * budget.as_secs_f64()) as u64).clamp(1, CREATES_MAX);
                Ok(round)
            }
        }
    }
}

/// A round with the server's CPU time.
fn metered(
    server: &ServerProcess,
    client: &mut Client,
    workload: &mut dyn Workload,
    depth: usize,
    budget: Duration,
) -> anyhow::Result<Round> {
    let before = server.cpu_time()?;
    let mut round = load::run(client, workload, depth, budget)?;
    round.server_cpu = server.cpu_time()?.saturating_sub(before);
    Ok(round)
}

/// What fio reaches by io_uring on a file of the same size beside the image, on the server's core.
fn fio_reference(run: &Run, case: &Case) -> anyhow::Result<Option<(String, f64)>> {
    let file = run.scratch().join("fio.file");
    let is_read = case.kind == Kind::DirectRead;
    let figures = fio(&file, run, if is_read { "randread" } else { "randwrite" }, case.depth)?;
    let job = figures["jobs"][0][if is_read { "read" } else { "write" }].clone();
    let value = match case.metric {
        Metric::Latency => job["clat_ns"]["percentile"]["50.000000"].as_f64().map(|ns| ns / 1e3),
        Metric::Rate => job["iops"].as_f64().map(|rate| rate / 1e3),
        Metric::Throughput => job["bw_bytes"].as_f64().map(|rate| rate / 1e9),
    };
    Ok(Some(("fio io_uring".into(), value.context("fio printed no figure")?)))
}

fn fio(file: &Path, run: &Run, pattern: &str, depth: usize) -> anyhow::Result<serde_json::Value> {
    let seconds = (run.round * run.rounds).as_secs_f64().ceil();
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &SERVER_CORE.to_string(), "fio", "--name=reference", "--output-format=json"]);
    command.arg(format!("--filename={}", file.display()));
    command.arg(format!("--size={}", run.direct_file_len));
    command.args(["--ioengine=io_uring", "--direct=1", "--bs=4k", "--time_based", "--ramp_time=500ms"]);
    command.args([format!("--runtime={seconds}s"), format!("--rw={pattern}"), format!("--iodepth={depth}")]);
    Ok(serde_json::from_str(&output_of(&mut command)?)?)
}
