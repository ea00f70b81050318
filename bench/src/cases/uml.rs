//! A real guest: User-Mode Linux with the kernel's own virtio-fs driver.
//!
//! Guest and server share one core, where figures hold still and a server that spins in vain would lose; one table
//! has them on two cores. A round is one boot that does every row; boots alternate between the sides.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use vhostfs_tests::{artifacts::MOUNT_POINT, uml::UmlGuest};

use crate::{
    guest::{self, Done, Mark, Stage, Work},
    machine::{CLIENT_CORE, SERVER_CORE},
    material,
    result::{Figure, Goal, Row, Table, Unit},
    run::Run,
    server::{Media, ServerProcess, Side},
};

/// Time for a boot with all rows.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// Bytes of an operation where a row counts bytes.
const BYTES_PER_OPERATION: f64 = (1 << 20) as f64;

/// A row, measured over each kind of media.
struct GuestRow {
    name: &'static str,
    what: &'static str,
    unit: Unit,
    work: Work,
    goals: &'static [Goal],
}

/// Better than the peer, with a third of its CPU time.
const BETTER: &[Goal] = &[Goal::TimesPeer(1.0), Goal::CpuOfPeer(1.0 / 3.0)];
/// Where round trips are saved.
const TWICE: &[Goal] = &[Goal::TimesPeer(2.0), Goal::CpuOfPeer(1.0 / 3.0)];

#[rustfmt::skip]
const ROWS: &[GuestRow] = &[
    row("direct-read", "4 KiB random direct read", Unit::KiloPerSecond, guest::direct_read, BETTER),
    row("direct-write", "4 KiB random direct write", Unit::KiloPerSecond, guest::direct_write, BETTER),
    row("direct-read-8", "4 KiB random direct read, 8 jobs", Unit::KiloPerSecond, guest::direct_read_jobs, BETTER),
    row("direct-write-8", "4 KiB random direct write, 8 jobs", Unit::KiloPerSecond, guest::direct_write_jobs, BETTER),
    row("direct-read-1m", "1 MiB direct read", Unit::GigabytesPerSecond, guest::sequential_read, BETTER),
    row("direct-write-1m", "1 MiB direct write", Unit::GigabytesPerSecond, guest::sequential_write, BETTER),
    row("write-1m", "1 MiB buffered write, fsync at the end", Unit::GigabytesPerSecond, guest::buffered_write, BETTER),
    row("write-1m-unthrottled", "1 MiB buffered write, fsync, max_ratio 100", Unit::GigabytesPerSecond, guest::buffered_write_unthrottled, BETTER),
    row("read-1m", "1 MiB buffered read, warm", Unit::GigabytesPerSecond, guest::buffered_read, BETTER),
    row("write-fsync", "4 KiB random write and fsync", Unit::KiloPerSecond, guest::write_fsync, BETTER),
    row("create", "create", Unit::KiloPerSecond, guest::create, TWICE),
    row("unlink", "unlink", Unit::KiloPerSecond, guest::unlink, TWICE),
    row("open-close", "open and close", Unit::KiloPerSecond, guest::open_close, TWICE),
    row("write-new", "write 1 byte to a new file", Unit::KiloPerSecond, guest::write_new, BETTER),
    row("chmod", "chmod", Unit::KiloPerSecond, guest::chmod, BETTER),
    row("rename", "rename", Unit::KiloPerSecond, guest::rename, TWICE),
    row("mkdir", "mkdir", Unit::KiloPerSecond, guest::mkdir, BETTER),
    row("rmdir", "rmdir", Unit::KiloPerSecond, guest::rmdir, BETTER),
    row("untar", "untar of 1,608 entries", Unit::Seconds, guest::untar, TWICE),
    row("git-clone", "git clone of these", Unit::Seconds, guest::git_clone, TWICE),
    row("git-status", "git status, caches dropped", Unit::Seconds, guest::git_status, BETTER),
    row("sqlite", "sqlite insert, synced", Unit::PerSecond, guest::sqlite, BETTER),
];

/// The one row with a core for each.
#[rustfmt::skip]
const TWO_CORES: &[GuestRow] = &[
    row("direct-read", "4 KiB random direct read, median", Unit::Microseconds, guest::direct_read, &[Goal::Figure(50.0), Goal::TimesPeer(1.0)]),
];

const fn row(
    name: &'static str,
    what: &'static str,
    unit: Unit,
    work: Work,
    goals: &'static [Goal],
) -> GuestRow {
    GuestRow { name, what, unit, work, goals }
}

/// Rows measured in the same way.
struct Plan {
    table: &'static str,
    prefix: &'static str,
    about: &'static str,
    media: Media,
    guest_core: usize,
    rows: &'static [GuestRow],
}

#[rustfmt::skip]
const PLANS: &[Plan] = &[
    Plan { table: "uml-file", prefix: "uml-file-", about: "guest and server on one core; image file against folder", media: Media::File, guest_core: SERVER_CORE, rows: ROWS },
    Plan { table: "uml-memory", prefix: "uml-memory-", about: "guest and server on one core; memory: against tmpfs", media: Media::Memory, guest_core: SERVER_CORE, rows: ROWS },
    Plan { table: "uml-two-cores", prefix: "uml-two-cores-", about: "guest on one core, server on the other; memory: against tmpfs", media: Media::Memory, guest_core: CLIENT_CORE, rows: TWO_CORES },
];

/// Table, name and question of every row.
pub fn names() -> impl Iterator<Item = (&'static str, String, &'static str)> {
    PLANS.iter().flat_map(|plan| plan.rows.iter().map(|row| (plan.table, plan.name(row), row.what)))
}

/// Measures the chosen rows.
pub fn run(run: &Run) -> anyhow::Result<Vec<Table>> {
    let wanted = |plan: &Plan| plan.wanted(run).next().is_some();
    let plans: Vec<&Plan> = PLANS.iter().filter(|plan| wanted(plan)).collect();
    if !plans.is_empty() {
        material::make(&run.material())?;
    }
    Ok(plans.into_iter().map(|plan| plan.measure(run)).collect())
}

/// Does the work of rows inside the guest. Names that it does not know are left out.
pub fn perform(stage: &Stage, names: &[String]) {
    for row in ROWS.iter().filter(|row| names.iter().any(|name| name == row.name)) {
        stage.perform(row.name, row.work);
    }
}

/// What one round gave for one row.
#[derive(Debug, Clone, Copy)]
struct Sample {
    value: f64,
    cpu_us: f64,
}

/// Samples of the rounds, by row and side.
type Samples = BTreeMap<(String, Side), Vec<Sample>>;
/// Why a row has no figure, by row.
type Failures = BTreeMap<String, Vec<String>>;

impl Plan {
    fn name(&self, row: &GuestRow) -> String {
        format!("{}{}", self.prefix, row.name)
    }

    fn wanted<'a>(&'a self, run: &'a Run) -> impl Iterator<Item = &'static GuestRow> + 'a {
        self.rows.iter().filter(|row| run.wants(self.table, &self.name(row)))
    }

    fn measure(&self, run: &Run) -> Table {
        let (mut samples, mut failures) = (Samples::new(), Failures::new());
        for round in 0..run.boots {
            for side in run.programs.sides() {
                let mut taken = |row: String, taken: Result<Sample, String>| match taken {
                    Ok(sample) => samples.entry((row, side)).or_default().push(sample),
                    Err(why) => failures.entry(row).or_default().push(format!("{side:?}: {why}")),
                };
                if let Err(error) = self.boot(run, side, round, &mut taken) {
                    self.wanted(run).for_each(|row| taken(row.name.into(), Err(format!("{error:#}"))));
                }
            }
        }
        let rows: Vec<Row> = self.wanted(run).map(|row| self.row(row, &mut samples, &mut failures)).collect();
        rows.iter().for_each(|row| run.show(row));
        let caption = format!("User-Mode Linux guest: {}; medians of {} boots", self.about, run.boots);
        Table { name: self.table, caption, rows }
    }

    fn row(&self, row: &GuestRow, samples: &mut Samples, failures: &mut Failures) -> Row {
        let mut figure = |side| {
            let samples = samples.remove(&(row.name.to_owned(), side))?;
            let values = samples.iter().map(|sample| sample.value).collect();
            let cpu = samples.iter().map(|sample| sample.cpu_us).collect();
            Some(Figure::of_rounds(values, Vec::new(), cpu))
        };
        let mut failures = failures.remove(row.name).unwrap_or_default();
        failures.dedup();
        Row {
            name: self.name(row),
            what: format!("{}: {}", self.table, row.what),
            unit: row.unit,
            ours: figure(Side::Ours),
            peer: figure(Side::Peer),
            reference: None,
            goals: row.goals.to_vec(),
            failures,
        }
    }

    /// One boot of one side, with all wanted rows.
    fn boot(
        &self,
        run: &Run,
        side: Side,
        round: u32,
        taken: &mut dyn FnMut(String, Result<Sample, String>),
    ) -> anyhow::Result<()> {
        let server = ServerProcess::start(&run.programs, side, self.media, run.scratch())?;
        let core = self.guest_core.to_string();
        let guest = UmlGuest { cpus: Some(&core), ..UmlGuest::new(server.socket()) };
        let name = format!("{}-{side:?}-{round}", self.table).to_lowercase();
        let mut cpu_at_begin = None;
        let mut on_line = |line: &str| -> anyhow::Result<()> {
            match Mark::parse(line) {
                Some(Mark::Begin(_)) => cpu_at_begin = Some(server.cpu_time()?),
                Some(Mark::Failed { row, why }) => taken(row, Err(why)),
                Some(Mark::End { row, done }) => {
                    let before = cpu_at_begin.take().context("a row ended that had not begun")?;
                    let sample = self.sample(&row, done, server.cpu_time()?.saturating_sub(before));
                    taken(row, Ok(sample));
                }
                None => {}
            }
            Ok(())
        };
        guest.run_watched(run.scratch(), &name, &self.script(run, round)?, BOOT_LIMIT, &mut on_line)?;
        server.stop()
    }

    fn script(&self, run: &Run, round: u32) -> anyhow::Result<String> {
        let program = std::env::current_exe()?;
        let rows: Vec<&str> = self.wanted(run).map(|row| row.name).collect();
        let folder = format!("{MOUNT_POINT}/round-{round}");
        Ok(format!(
            "'{}' in-guest --folder {folder} --material '{}' --round-ms {} --names {} {}\n\
             status=$?; rm -rf {folder}; exit $status\n",
            program.display(),
            run.material().display(),
            run.round.as_millis(),
            run.guest_names,
            rows.join(" ")
        ))
    }

    fn sample(&self, row: &str, done: Done, cpu: Duration) -> Sample {
        let Done { amount, elapsed, median } = done;
        let unit = self.rows.iter().find(|known| known.name == row).map_or(Unit::Seconds, |row| row.unit);
        let rate = amount / elapsed.as_secs_f64();
        let value = match unit {
            Unit::KiloPerSecond => rate / 1e3,
            Unit::GigabytesPerSecond => rate / 1e9,
            Unit::Microseconds => median.map_or(f64::NAN, |median| median.as_secs_f64() * 1e6),
            Unit::PerSecond | Unit::Mebibytes | Unit::Percent => rate,
            Unit::Seconds => elapsed.as_secs_f64(),
        };
        let operations = if unit == Unit::GigabytesPerSecond { amount / BYTES_PER_OPERATION } else { amount };
        Sample { value, cpu_us: cpu.as_secs_f64() * 1e6 / operations }
    }
}
