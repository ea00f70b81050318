//! Rounds of work that ends by a kill: of the daemon, of the guest, of both. What a guest was told is durable must be
//! there in the next one.
//!
//! `guest/promises` does the work. It prints what each sync has made durable, and the guest's console is what survives
//! the kill: no part of what the rounds are judged by lies in the file system under test. The next guest checks all that
//! it finds, and prints how much that is; it may be more than was promised, but not less. `blobfs fsck` looks at
//! the image in between, before any mount replays its journal.

use std::{
    collections::BTreeMap,
    env,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use super::{Case, CaseContext, Scale};
use crate::{
    artifacts::{MOUNT_POINT, Server},
    daemon::{Daemon, fsck, image_path},
    process::output_of,
    progress::note,
    qemu::{Hardware, QemuGuest},
    uml::{UmlGuest, UmlRun},
};

pub(super) const KILLS: Case = Case {
    name: "kills",
    about: "daemon and guest are killed under fio, git, sqlite and a writer; everything synced is there (10 rounds)",
    run,
};

const ROUNDS_SHORT: u64 = 10;
const ROUNDS_LONG: u64 = 200;

/// Where chance begins. A failure names the round; the same seed kills in the same way after the same times.
const SEED: &str = "VHOSTFS_KILLS_SEED";
const SEED_DEFAULT: u64 = 1;

/// Images of a run: what the work leaves grows, and so does the time to check it. Every second one has checksums of
/// file data.
const IMAGES_SHORT: u64 = 2;
const IMAGES_LONG: u64 = 10;

const IMAGE_SIZE: &str = "1G";

/// One round of so many is in a QEMU guest, which is slow; the others are in User-Mode Linux.
const QEMU_EVERY: u64 = 10;

/// Booting, mounting and checking what is there: some seconds, more on a loaded machine.
const CHECK_LIMIT: Duration = Duration::from_secs(400);

/// How long the guest works before the kill.
const WORK_MS: std::ops::Range<u64> = 50..5000;
/// The same in a QEMU guest, where everything takes longer.
const WORK_MS_QEMU: std::ops::Range<u64> = 2000..15_000;

const SCRIPT: &str = include_str!("../../guest/promises");

/// A small generator (splitmix64), so that a seed gives the same rounds for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn time(&mut self, bounds: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(bounds.start + self.next() % (bounds.end - bounds.start))
    }
}

/// How a round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The daemon is killed under its guest.
    Daemon,
    /// The guest loses its power; the daemon serves on.
    Guest,
    /// The guest loses its power, and a moment later the daemon is killed.
    Both,
    /// The guest loses its power, and the daemon is told to stop.
    Stop,
}

impl End {
    fn draw(random: &mut Random) -> Self {
        match random.next() % 10 {
            0..5 => Self::Daemon,
            5..7 => Self::Guest,
            7..9 => Self::Both,
            _ => Self::Stop,
        }
    }
}

/// What is known to be durable: numbers by the names of what they count.
#[derive(Debug, Default)]
struct Promises {
    durable: BTreeMap<String, u64>,
    /// Numbers that were compared with what was found.
    compared: u64,
}

impl Promises {
    /// Takes in a line that a guest printed.
    fn hear(&mut self, line: &str) -> anyhow::Result<()> {
        ensure!(!line.starts_with("@damaged"), "{line}");
        if let Some((name, number)) = numbered(line, "@durable ")? {
            self.durable.insert(name.to_owned(), number);
        } else if let Some((name, number)) = numbered(line, "@found ")? {
            let promised = self.durable.insert(name.to_owned(), number).unwrap_or(0);
            ensure!(number >= promised, "{name}: {number} is left of {promised} that were durable");
            self.compared += u64::from(promised > 0);
        }
        Ok(())
    }

    fn bursts(&self) -> u64 {
        self.durable.get("bursts").copied().unwrap_or(0)
    }
}

/// Name and number of a line that begins with `mark`. A line that a kill has cut off does not count.
fn numbered<'a>(line: &'a str, mark: &str) -> anyhow::Result<Option<(&'a str, u64)>> {
    let Some(rest) = line.strip_prefix(mark) else { return Ok(None) };
    let (name, number) = rest.split_once(' ').with_context(|| format!("half a line: {line}"))?;
    let number = number.parse().with_context(|| format!("no number: {line}"))?;
    Ok(Some((name, number)))
}

/// A guest of either kind.
enum Guest {
    Uml(UmlRun),
    Qemu(QemuGuest),
}

impl Guest {
    fn start(context: &CaseContext<'_>, daemon: &Daemon, in_qemu: bool, bursts: u64) -> anyhow::Result<Self> {
        let arguments = format!("set -- {MOUNT_POINT} {bursts}");
        let script = format!("{arguments}\n{SCRIPT}");
        if in_qemu {
            let (artifacts, scratch) = (context.artifacts, context.scratch);
            let hardware = Hardware { cpus: 2, ..Hardware::default() };
            let mut guest = QemuGuest::boot_mounted(artifacts, scratch, "qemu", daemon.socket(), &hardware)?;
            guest.start(&script)?;
            return Ok(Self::Qemu(guest));
        }
        Ok(Self::Uml(UmlGuest::new(daemon.socket()).start(context.scratch, "uml", &script)?))
    }

    fn line(&mut self, deadline: Instant) -> anyhow::Result<Option<String>> {
        match self {
            Self::Uml(guest) => guest.line(deadline),
            Self::Qemu(guest) => guest.line(deadline),
        }
    }

    fn kill(self) -> Vec<String> {
        match self {
            Self::Uml(guest) => guest.kill(),
            Self::Qemu(guest) => guest.kill(),
        }
    }
}

fn run(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (rounds, images) = match context.scale {
        Scale::Long => (ROUNDS_LONG, IMAGES_LONG),
        Scale::Short => (ROUNDS_SHORT, IMAGES_SHORT),
    };
    let seed = match env::var(SEED) {
        Ok(seed) => seed.parse().with_context(|| format!("{SEED} is no number: {seed}"))?,
        Err(_) => SEED_DEFAULT,
    };
    note(&format!("seed {seed} ({SEED} sets another one)"));
    let mut random = Random(seed);
    let mut compared = 0;
    for image in 0..images {
        let (first, last) = (image * rounds / images + 1, (image + 1) * rounds / images);
        let has_checksums = image % 2 == 1;
        compared += one_image(context, &mut random, first..=last, has_checksums)?;
        note(&format!("{last} of {rounds} rounds: {compared} durable numbers were found again"));
    }
    Ok(())
}

/// Rounds on a new image. Returns how many durable numbers were found again.
fn one_image(
    context: &CaseContext<'_>,
    random: &mut Random,
    rounds: std::ops::RangeInclusive<u64>,
    has_checksums: bool,
) -> anyhow::Result<u64> {
    let name = format!("fs{}", rounds.start());
    let server = &context.artifacts.server;
    if has_checksums && let Server::Vhostfs { blobfs, .. } = server {
        let image = image_path(context.scratch, &name);
        let mut mkfs = Command::new(blobfs);
        output_of(mkfs.args(["mkfs", "--data-checksum", "--size", IMAGE_SIZE]).arg(image))?;
    }
    let start = || Daemon::start(server, context.scratch, &name, IMAGE_SIZE, &[]);
    let mut promises = Promises::default();
    let mut daemon = Some(start()?);
    for round in rounds {
        let running = match daemon.take() {
            Some(running) => running,
            None => start()?,
        };
        let end = End::draw(random);
        let before = promises.durable.clone();
        daemon = one_round(context, random, running, &mut promises, round, end)
            .with_context(|| format!("round {round}, which ended by {end:?}; durable before: {before:?}"))?;
    }
    let daemon = match daemon {
        Some(daemon) => daemon,
        None => start()?,
    };
    last_look(context, &daemon, &mut promises).context("after the last round")?;
    let image = daemon.image().to_owned();
    daemon.stop_and_check()?;
    std::fs::remove_file(image)?;
    Ok(promises.compared)
}

/// Checks, works, kills. Returns the daemon if it still serves.
fn one_round(
    context: &CaseContext<'_>,
    random: &mut Random,
    mut daemon: Daemon,
    promises: &mut Promises,
    round: u64,
    end: End,
) -> anyhow::Result<Option<Daemon>> {
    let in_qemu = round.is_multiple_of(QEMU_EVERY);
    let mut guest = Guest::start(context, &daemon, in_qemu, promises.bursts())?;
    check(&mut guest, promises)?;
    let work = random.time(if in_qemu { WORK_MS_QEMU } else { WORK_MS });
    let until = Instant::now() + work;
    while let Some(line) = guest.line(until)? {
        promises.hear(&line)?;
    }
    let image = daemon.image().to_owned();
    let mut kept = None;
    let last_words = match end {
        End::Daemon => {
            daemon.kill();
            guest.kill()
        }
        End::Guest => {
            let last_words = guest.kill();
            daemon.expect_next_guest()?;
            kept = Some(daemon);
            last_words
        }
        End::Both => {
            let last_words = guest.kill();
            std::thread::sleep(random.time(0..100));
            daemon.kill();
            last_words
        }
        End::Stop => {
            let last_words = guest.kill();
            daemon.stop_and_check()?;
            last_words
        }
    };
    // The kill may have cut off the last line.
    let whole = last_words.len().saturating_sub(1);
    for line in &last_words[..whole] {
        promises.hear(line)?;
    }
    if kept.is_none() {
        check_image(context, &image)?;
    }
    Ok(kept)
}

/// Waits until the guest has checked what it found.
fn check(guest: &mut Guest, promises: &mut Promises) -> anyhow::Result<()> {
    let deadline = Instant::now() + CHECK_LIMIT;
    loop {
        match guest.line(deadline)? {
            Some(line) if line == "@checked" => return Ok(()),
            Some(line) => promises.hear(&line)?,
            None => bail!("the guest took too long to check what it found"),
        }
    }
}

/// What the last round left, in a guest that does nothing else.
fn last_look(context: &CaseContext<'_>, daemon: &Daemon, promises: &mut Promises) -> anyhow::Result<()> {
    let mut guest = Guest::start(context, daemon, false, promises.bursts())?;
    check(&mut guest, promises)?;
    guest.kill();
    Ok(())
}

fn check_image(context: &CaseContext<'_>, image: &Path) -> anyhow::Result<()> {
    match &context.artifacts.server {
        Server::Vhostfs { blobfs, .. } => fsck(blobfs, image),
        Server::Virtiofsd(_) => Ok(()),
    }
}
