//! Every sequence of one operation and of two over a small tree, with every kind of sync behind each of them, and
//! any of three; cut at every device operation (in the manner of CrashMonkey and ACE).
//!
//! Sequences share their beginnings, and what power cuts leave of those: each explores only what is new in it.

use std::sync::Arc;

use bdev::sim::Image;
use blobfs::fs::{FallocateMode, RenameMode, XattrMode};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::crash::{Depth, Explorer, Seen, record_sequence};
use crate::operation::{Durability, NewKind, Operation, Target, direct};
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
    Operation::Write { target: at(path), offset, len, tag, append: false, durability, from_cache: false }
}

/// From the client's own cache.
fn write_back(path: &str, offset: u64, len: usize, tag: u64) -> Operation {
    let durability = Durability::None;
    Operation::Write { target: at(path), offset, len, tag, append: false, durability, from_cache: true }
}

fn append(path: &str, len: usize, tag: u64) -> Operation {
    Operation::append(path, len, tag, Durability::None)
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
        // The end of the file is in the middle of a block.
        append("a", 4096, direct(44)),
        write("a", 512, 512, direct(48), Durability::None),
        write("a", 0, 4096, direct(52), Durability::Data),
        write("d/x", 4096, 4096, direct(56), Durability::None),
        write_back("a", 900, 700, 45),
        write_back("n", 0, 1300, 46),
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

/// Every kind of operation, with syncs and time for write-back in between.
#[cfg(test)]
pub(crate) fn every_kind() -> Vec<Operation> {
    let mut operations = Vec::new();
    for (number, operation) in vocabulary().into_iter().enumerate() {
        operations.push(operation);
        match number % 5 {
            1 => operations.push(Operation::Fsync { target: at(""), data_only: false }),
            3 => operations.push(Operation::Syncfs),
            4 => operations.push(Operation::Sleep { seconds: 40 }),
            _ => {}
        }
    }
    operations
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
pub(crate) fn base(geometry: &Geometry, seed: u64) -> Result<(Image, State), String> {
    prepared(geometry, seed, foundation())
}

/// The unmounted image that operations lead to, and what is in it.
pub(crate) fn prepared(
    geometry: &Geometry,
    seed: u64,
    operations: Vec<Operation>,
) -> Result<(Image, State), String> {
    let mut workload = Workload::new(World::mount(&geometry.format(seed), geometry, 0)?)?;
    for operation in operations {
        workload.perform(&operation)?;
    }
    let mut state = workload.state().clone();
    forget_nameless(&mut state);
    let disk = workload.world.unmount().map_err(|error| error.to_string())?;
    Ok((disk.snapshot(), state))
}

/// Sequences of operations, cut.
pub(crate) struct Sequences {
    explorer: Explorer,
    base: (Image, State),
    words: Vec<Operation>,
    depth: Depth,
}

impl Sequences {
    /// Sequences on a file system that is made from `seed`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn new(geometry: Geometry, seed: u64, depth: Depth, seen: Arc<Seen>) -> Result<Self, String> {
        Ok(Self {
            explorer: Explorer::counting(geometry, seed, seen),
            base: base(&geometry, seed)?,
            words: vocabulary(),
            depth,
        })
    }

    /// Sequences of one operation.
    pub(crate) fn singles() -> u64 {
        vocabulary().len() as u64
    }

    /// Sequences of two operations; [`Sequences::pair`] knows as many.
    pub(crate) fn pairs() -> u64 {
        let words = vocabulary().len() as u64;
        words * GAPS.len() as u64 * words
    }

    /// An operation and every gap behind it.
    ///
    /// # Errors
    /// The broken promise.
    pub(crate) fn single(&mut self, number: u64) -> Result<(), String> {
        let word = self.words[number as usize % self.words.len()].clone();
        self.every_end(Vec::new(), word)
    }

    /// Two operations with a gap between them and every gap behind them: each power cut from the beginning of the
    /// second one on.
    ///
    /// # Errors
    /// The broken promise.
    pub(crate) fn pair(&mut self, number: u64) -> Result<(), String> {
        let (first, gap) = self.word(number);
        let beginnings = (self.words.len() * GAPS.len()) as u64;
        let second = self.words[(number / beginnings) as usize % self.words.len()].clone();
        self.every_end(vec![(first, gap)], second)
    }

    /// Three random operations and gaps.
    ///
    /// # Errors
    /// The broken promise.
    pub(crate) fn triple(&mut self, seed: u64) -> Result<(), String> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut word = || self.word(rng.random());
        let (beginning, last) = (vec![word(), word()], word().0);
        self.every_end(beginning, last)
    }

    /// The operation and the gap of a number.
    fn word(&self, number: u64) -> (Operation, Gap) {
        let gaps = GAPS.len() as u64;
        let word = (number / gaps) as usize % self.words.len();
        (self.words[word].clone(), GAPS[(number % gaps) as usize])
    }

    fn every_end(&mut self, beginning: Vec<(Operation, Gap)>, last: Operation) -> Result<(), String> {
        let mut operations = Vec::new();
        for (word, gap) in beginning {
            let sync = gap.after(&word);
            operations.push(word);
            operations.extend(sync);
        }
        operations.push(last.clone());
        for gap in GAPS {
            let mut operations = operations.clone();
            // What the operation itself does is the same whatever comes behind it; `Nothing` looks at it.
            let new = operations.len() - usize::from(gap == Gap::Nothing);
            match gap.after(&last) {
                None if gap != Gap::Nothing => continue,
                sync => operations.extend(sync),
            }
            self.run(&operations, new, matches!(gap, Gap::Nothing | Gap::Fsync))?;
        }
        Ok(())
    }

    /// Explores what power cuts leave from the beginning of operation `new` on.
    fn run(&mut self, operations: &[Operation], new: usize, unmount: bool) -> Result<(), String> {
        let geometry = self.explorer.geometry;
        // Which operations of the device end out of order is the same in all sequences that share a beginning.
        let latency = operations[0].to_string().len().is_multiple_of(2);
        let (log, mut history) = record_sequence(&geometry, &self.base, operations, unmount, latency)?;
        self.explorer.restart(new as u64);
        self.explorer.explore_from(&log, &mut history, log.begun[new], self.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_single_operation_survives_every_power_cut() {
        for geometry in Geometry::ALL {
            let depth = Depth { points: usize::MAX, choices: 8, again: 0.3 };
            let mut sequences = Sequences::new(geometry, 1, depth, Arc::default()).unwrap();
            for number in 0..Sequences::singles() {
                let result = sequences.single(number);
                result.unwrap_or_else(|problem| panic!("{geometry:?}, single {number}: {problem}"));
            }
            eprintln!("{} states", sequences.explorer.states());
        }
    }

    /// One in so many of the pairs and a few triples; `cargo xtask crash` takes them all.
    #[test]
    fn pairs_and_triples_of_operations_survive_power_cuts() {
        const ONE_IN: usize = 29;
        let depth = Depth { points: usize::MAX, choices: 2, again: 0.05 };
        let mut sequences = Sequences::new(Geometry::TINY, 2, depth, Arc::default()).unwrap();
        for number in (0..Sequences::pairs()).step_by(ONE_IN) {
            sequences.pair(number).unwrap_or_else(|problem| panic!("pair {number}: {problem}"));
        }
        for seed in 0..60 {
            sequences.triple(seed).unwrap_or_else(|problem| panic!("triple {seed}: {problem}"));
        }
        eprintln!("{} states", sequences.explorer.states());
    }
}
