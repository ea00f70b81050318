//! Every sequence of one operation and of two over a small tree, with every kind of sync between them, cut at
//! every device operation (in the manner of CrashMonkey and ACE).

use bdev::sim::Image;
use blobfs::fs::{FallocateMode, RenameMode, XattrMode};

use crate::campaign;
use crate::crash::{Depth, Explorer, record_sequence};
use crate::operation::{Durability, NewKind, Operation, Target};
use crate::oracle::State;
use crate::workload::{Workload, forget_nameless};
use crate::world::{Geometry, World};

fn at(path: &str) -> Target {
    Target::Path(path.to_owned())
}

fn create(path: &str, kind: NewKind) -> Operation {
    Operation::Create { path: path.to_owned(), kind, mode: 0o640 }
}

fn write(path: &str, offset: u64, len: usize, tag: u64, durability: Durability) -> Operation {
    Operation::Write { target: at(path), offset, len, tag, append: false, durability }
}

fn append(path: &str, len: usize, tag: u64) -> Operation {
    Operation::Write { target: at(path), offset: 0, len, tag, append: true, durability: Durability::None }
}

fn fallocate(path: &str, mode: FallocateMode, offset: u64, len: u64) -> Operation {
    Operation::Fallocate { target: at(path), mode, offset, len }
}

fn rename(from: &str, to: &str, mode: RenameMode, whiteout: bool) -> Operation {
    Operation::Rename { from: from.to_owned(), to: to.to_owned(), mode, whiteout }
}

fn set_xattr(path: &str, name: u8, tag: u64) -> Operation {
    Operation::SetXattr { target: at(path), name, len: 90, tag, mode: XattrMode::Set }
}

fn unlink(path: &str, hold: bool) -> Operation {
    Operation::Unlink { path: path.to_owned(), hold }
}

/// What the tree holds before each sequence: files `a` (attribute 0), `b` = `d/h` and `d/x`, an empty
/// directory `e`.
fn foundation() -> Vec<Operation> {
    vec![
        create("a", NewKind::File),
        write("a", 0, 1900, 1, Durability::None),
        set_xattr("a", 0, 2),
        create("b", NewKind::File),
        write("b", 0, 700, 3, Durability::None),
        create("d", NewKind::Directory),
        create("e", NewKind::Directory),
        Operation::Link { target: at("b"), path: "d/h".to_owned() },
        create("d/x", NewKind::File),
        write("d/x", 3000, 2600, 4, Durability::None),
    ]
}

/// The operations that sequences are made of: each kind in each situation that the tree offers, `n` and
/// `d/n` being free names.
pub(crate) fn vocabulary() -> Vec<Operation> {
    use FallocateMode::{Allocate, PunchHole, Zero};
    use RenameMode::{Exchange, Replace};
    let mut all = vec![
        create("n", NewKind::File),
        create("d/n", NewKind::File),
        create("n", NewKind::Directory),
        create("d/n", NewKind::Symlink { target_len: 60 }),
        create("n", NewKind::CharDevice { rdev: 7 }),
        Operation::Tmpfile { directory: "d".to_owned() },
        Operation::Link { target: Target::Nameless(0), path: "n".to_owned() },
        Operation::Link { target: at("a"), path: "d/n".to_owned() },
        unlink("a", false),
        unlink("a", true),
        unlink("b", false),
        unlink("d/x", false),
        Operation::Forget { nameless: 0 },
        Operation::Rmdir { path: "e".to_owned() },
        Operation::Rmdir { path: "n".to_owned() },
        Operation::Chmod { target: at("a"), mode: 0o400 },
        Operation::Chmod { target: at("d"), mode: 0o500 },
        Operation::Chown { target: at("b"), uid: 5, gid: 6 },
        Operation::Utimes { target: at("a"), seconds: 5 },
        set_xattr("a", 0, 21),
        set_xattr("a", 1, 22),
        set_xattr("d", 1, 23),
        Operation::RemoveXattr { target: at("a"), name: 0 },
        append("a", 500, 31),
        append("n", 900, 32),
        append("d/n", 2100, 33),
        write("a", 512, 512, 34, Durability::None),
        write("a", 300, 900, 35, Durability::None),
        write("a", 6000, 900, 36, Durability::None),
        write("a", 100, 50, 37, Durability::Data),
        write("a", 1800, 1500, 38, Durability::Full),
        write("b", 0, 4096, 40, Durability::None),
        write("d/x", 1000, 2500, 39, Durability::None),
        append("a", 20_000, 41),
        // Direct, by its tag: the end of the file is in the middle of a block.
        append("a", 4096, 44),
        fallocate("a", PunchHole, 512, 1024),
        fallocate("d/x", PunchHole, 3100, 2000),
        fallocate("a", Zero { keep_size: false }, 400, 3000),
        fallocate("a", Allocate { keep_size: true }, 1000, 5000),
        fallocate("b", Allocate { keep_size: false }, 0, 3000),
    ];
    all.extend([0, 700, 1024, 5000].map(|size| Operation::Truncate { target: at("a"), size }));
    all.extend([4000, 0].map(|size| Operation::Truncate { target: at("d/x"), size }));
    let moves = [
        ("a", "n", Replace, false),
        ("a", "b", Replace, false),
        ("n", "a", Replace, false),
        ("a", "d/x", Replace, false),
        ("d/x", "n", Replace, false),
        ("d/n", "a", Replace, false),
        ("b", "d/h", Replace, false),
        ("d", "n", Replace, false),
        ("d", "e", Replace, false),
        ("e", "d/n", Replace, false),
        ("a", "d/x", Exchange, false),
        ("a", "d", Exchange, false),
        ("d/x", "e", Exchange, false),
        ("a", "n", Replace, true),
        ("a", "d/x", Replace, true),
    ];
    all.extend(moves.map(|(from, to, mode, whiteout)| rename(from, to, mode, whiteout)));
    all
}

/// What happens between the operations of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gap {
    Nothing,
    Fsync,
    FsyncDirectory,
    Fdatasync,
    Syncfs,
    /// Long enough for everything that is written by itself.
    Pause,
}

const GAPS: [Gap; 6] =
    [Gap::Nothing, Gap::Fsync, Gap::FsyncDirectory, Gap::Fdatasync, Gap::Syncfs, Gap::Pause];

/// The path that an operation leaves its result at.
fn result_of(operation: &Operation) -> Target {
    match operation {
        Operation::Create { path, .. } | Operation::Link { path, .. } => at(path),
        Operation::Rename { to, .. } => at(to),
        Operation::Chmod { target, .. }
        | Operation::Chown { target, .. }
        | Operation::Utimes { target, .. }
        | Operation::Truncate { target, .. }
        | Operation::Write { target, .. }
        | Operation::Fallocate { target, .. }
        | Operation::SetXattr { target, .. }
        | Operation::RemoveXattr { target, .. } => target.clone(),
        Operation::Unlink { hold: true, .. } | Operation::Tmpfile { .. } => Target::Nameless(0),
        _ => at(""),
    }
}

impl Gap {
    fn after(self, operation: &Operation) -> Option<Operation> {
        let target = result_of(operation);
        Some(match self {
            Self::Nothing => return None,
            Self::Fsync => Operation::Fsync { target, data_only: false },
            Self::FsyncDirectory => {
                let Target::Path(path) = target else { return None };
                let directory = crate::oracle::split(&path).0.to_owned();
                Operation::Fsync { target: Target::Path(directory), data_only: false }
            }
            Self::Fdatasync => Operation::Fsync { target, data_only: true },
            Self::Syncfs => Operation::Syncfs,
            Self::Pause => Operation::Sleep { seconds: 40 },
        })
    }
}

/// The image that every sequence starts from, and what is in it.
pub(crate) fn base(geometry: &Geometry) -> Result<(Image, State), String> {
    let mut workload = Workload::new(World::mount(&geometry.format(1), geometry, 0)?)?;
    for operation in foundation() {
        workload.perform(&operation)?;
    }
    let mut state = workload.state().clone();
    forget_nameless(&mut state);
    let disk = workload.world.unmount().map_err(|error| error.to_string())?;
    Ok((disk.snapshot(), state))
}

/// Sequences of operations, cut.
pub(crate) struct Sequences {
    pub(crate) explorer: Explorer,
    base: (Image, State),
    depth: Depth,
}

impl Sequences {
    pub(crate) fn new(geometry: Geometry, seed: u64, depth: Depth) -> Result<Self, String> {
        Ok(Self { explorer: Explorer::new(geometry, seed), base: base(&geometry)?, depth })
    }

    /// Number of sequences that [`Sequences::pair`] knows.
    pub(crate) fn pairs() -> usize {
        let words = vocabulary().len();
        words * words * GAPS.len()
    }

    /// The `number`-th sequence of two operations and what comes between them.
    ///
    /// # Errors
    /// The broken promise.
    pub(crate) fn pair(&mut self, number: usize) -> Result<(), String> {
        let words = vocabulary();
        let (gap, rest) = (GAPS[number % GAPS.len()], number / GAPS.len());
        let (first, second) = (&words[rest / words.len() % words.len()], &words[rest % words.len()]);
        let mut operations = vec![first.clone()];
        operations.extend(gap.after(first));
        operations.push(second.clone());
        // The end: whichever sync covers the most, or the least that covers the last operation.
        let ends = [Gap::Syncfs, Gap::Fsync, Gap::Pause];
        operations.extend(ends[(number + rest) % ends.len()].after(second));
        self.run(&operations, rest % 4 == 0).map_err(|problem| format!("sequence {number}: {problem}"))
    }

    fn run(&mut self, operations: &[Operation], unmount: bool) -> Result<(), String> {
        let geometry = self.explorer.geometry;
        let (log, mut history) = record_sequence(&geometry, &self.base, operations, unmount)?;
        self.explorer.explore(&log, &mut history, self.depth)
    }
}

/// A few choices at every point: the sequences are many.
const DEPTH: Depth = Depth { points: usize::MAX, choices: 2, again: 0.05 };

#[test]
fn every_single_operation_survives_every_power_cut() {
    for geometry in Geometry::ALL {
        let depth = Depth { choices: 8, again: 0.3, ..DEPTH };
        let mut sequences = Sequences::new(geometry, 1, depth).unwrap();
        for operation in vocabulary() {
            for gap in GAPS {
                let mut operations = vec![operation.clone()];
                operations.extend(gap.after(&operation));
                let result = sequences.run(&operations, true);
                result.unwrap_or_else(|problem| panic!("{geometry:?}: {problem}"));
            }
        }
        eprintln!("{} states", sequences.explorer.states);
    }
}

/// Every pair of operations, each with one of the gaps; the campaign takes them all.
#[test]
fn every_pair_of_operations_survives_power_cuts() {
    let mut sequences = Sequences::new(Geometry::TINY, 2, DEPTH).unwrap();
    let short = (0..Sequences::pairs() / GAPS.len()).map(|pair| pair * GAPS.len() + pair % 59 % GAPS.len());
    for number in campaign::numbers(short.map(|number| number as u64)) {
        sequences.pair(number as usize).unwrap_or_else(|problem| panic!("{problem}"));
    }
    eprintln!("{} states", sequences.explorer.states);
}
