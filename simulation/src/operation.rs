//! What a test can ask of a file system, as data: printed in a failure, performed on both sides.
//!
//! Names are paths from the root without a leading slash; the root itself is "". A file that has lost its
//! last name while a client still knows it is reached by its rank among those files.

use std::fmt;

use blobfs::fs::{FallocateMode, RenameMode, XattrMode};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::oracle::{Body, State};

/// What an operation works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Path(String),
    /// The n-th (modulo their number) file without a name.
    Nameless(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewKind {
    File,
    Directory,
    Symlink { target_len: usize },
    Fifo,
    CharDevice { rdev: u32 },
}

/// How durable a write is when it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    None,
    Data,
    Full,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operation {
    Create {
        path: String,
        kind: NewKind,
        mode: u32,
    },
    Tmpfile {
        directory: String,
    },
    Link {
        target: Target,
        path: String,
    },
    /// With `hold` the client goes on knowing the file.
    Unlink {
        path: String,
        hold: bool,
    },
    Rmdir {
        path: String,
    },
    Rename {
        from: String,
        to: String,
        mode: RenameMode,
        whiteout: bool,
    },
    Chmod {
        target: Target,
        mode: u32,
    },
    Chown {
        target: Target,
        uid: u32,
        gid: u32,
    },
    Utimes {
        target: Target,
        seconds: i64,
    },
    Truncate {
        target: Target,
        size: u64,
    },
    /// `tag` names the content. The offset of an append is the end of the file.
    Write {
        target: Target,
        offset: u64,
        len: usize,
        tag: u64,
        append: bool,
        durability: Durability,
        /// Written back from the client's own cache: changes no times.
        from_cache: bool,
    },
    Fallocate {
        target: Target,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    },
    SetXattr {
        target: Target,
        name: u8,
        len: usize,
        tag: u64,
        mode: XattrMode,
    },
    RemoveXattr {
        target: Target,
        name: u8,
    },
    Fsync {
        target: Target,
        data_only: bool,
    },
    Syncfs,
    /// The client forgets a file without a name.
    Forget {
        nameless: usize,
    },
    /// Time passes.
    Sleep {
        seconds: u64,
    },
}

impl Operation {
    /// A write at the end of a file.
    pub(crate) fn append(path: &str, len: usize, tag: u64, durability: Durability) -> Self {
        let target = Target::Path(path.to_owned());
        Self::Write { target, offset: 0, len, tag, append: true, durability, from_cache: false }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The content that writes and attributes named `tag` have at `offset`: words of 8 bytes that tell which
/// write and which place they belong to, never zero.
pub(crate) fn pattern(tag: u64, offset: u64, len: usize) -> Vec<u8> {
    let byte = |at: u64| {
        let word = ((tag << 24) ^ (at / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (word >> (8 * (at % 8))) as u8 | 1
    };
    (offset..offset + len as u64).map(byte).collect()
}

/// A tag like `tag` of a write that goes past the cache if it can. The tag says it, so that a write is told by its content
/// how it was made.
pub(crate) fn direct(tag: u64) -> u64 {
    tag.next_multiple_of(4)
}

/// Whether a tag is one of [`direct`].
pub(crate) fn is_direct(tag: u64) -> bool {
    tag.is_multiple_of(4)
}

/// Name of the `n`-th extended attribute.
pub(crate) fn xattr_name(n: u8) -> Vec<u8> {
    format!("user.attribute-{n}").into_bytes()
}

/// Target of a symbolic link of that length.
pub(crate) fn symlink_target(len: usize) -> Vec<u8> {
    (0..len).map(|at| b'a' + (at % 26) as u8).collect()
}

/// What random operations are like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Profile {
    /// Names in a directory.
    pub(crate) names: usize,
    /// Files start below this offset.
    pub(crate) offset_max: u64,
    /// Bytes of a write.
    pub(crate) write_max: usize,
    /// Share of the writes that are to be durable at once.
    pub(crate) durable: f64,
}

impl Profile {
    /// Small files in a small tree.
    pub(crate) const SMALL: Self = Self { names: 6, offset_max: 12_000, write_max: 5_000, durable: 0.1 };
    /// More names than a few nodes hold, and files of many extents.
    pub(crate) const WIDE: Self = Self { names: 60, offset_max: 120_000, write_max: 40_000, durable: 0.1 };
    /// Large files: a small device is full after a few writes, and stays so.
    pub(crate) const FULL: Self = Self { names: 12, offset_max: 500_000, write_max: 60_000, durable: 0.1 };
    /// A few files that synced, buffered and direct writes, truncations and holes have in common: what the journal has of
    /// their data is replaced in every way.
    pub(crate) const SYNCED: Self = Self { names: 3, offset_max: 24_000, write_max: 9_000, durable: 0.5 };
    pub(crate) const ALL: [Self; 4] = [Self::SMALL, Self::WIDE, Self::FULL, Self::SYNCED];
}

/// Draws operations that fit a state; most of them succeed.
pub(crate) struct Generator<'a> {
    pub(crate) rng: &'a mut SmallRng,
    pub(crate) state: &'a State,
    pub(crate) profile: Profile,
}

impl Generator<'_> {
    pub(crate) fn draw(&mut self) -> Operation {
        match self.rng.random_range(0..100) {
            0..=13 => self.create(),
            14 => Operation::Tmpfile { directory: self.directory() },
            15..=18 => Operation::Link { target: self.target(), path: self.path() },
            19..=25 => Operation::Unlink { path: self.path(), hold: self.rng.random_bool(0.3) },
            26..=28 => Operation::Rmdir { path: self.path() },
            29..=37 => self.rename(),
            38..=40 => Operation::Chmod { target: self.target(), mode: self.rng.random_range(0..0o1000) },
            41 => Operation::Chown { target: self.target(), uid: self.small(), gid: self.small() },
            42 => Operation::Utimes { target: self.target(), seconds: i64::from(self.small()) * 1_000_003 },
            43..=48 => Operation::Truncate { target: self.file(), size: self.offset() },
            49..=70 => self.write(),
            71..=78 => self.fallocate(),
            79..=84 => self.set_xattr(),
            85 | 86 => Operation::RemoveXattr { target: self.target(), name: self.rng.random_range(0..5) },
            87..=91 => Operation::Fsync { target: self.target(), data_only: self.rng.random() },
            92..=94 => Operation::Syncfs,
            95 | 96 => Operation::Forget { nameless: self.rng.random_range(0..4) },
            _ => Operation::Sleep { seconds: self.rng.random_range(0..8) },
        }
    }

    fn small(&mut self) -> u32 {
        self.rng.random_range(0..1000)
    }

    fn directory(&mut self) -> String {
        let paths = self.state.paths(|body| matches!(body, Body::Directory { .. }));
        // Few levels, so that names meet.
        let paths: Vec<_> = paths.into_iter().filter(|path| path.matches('/').count() < 3).collect();
        paths[self.rng.random_range(0..paths.len())].clone()
    }

    /// A path that may exist or not, in a directory that does.
    fn path(&mut self) -> String {
        let directory = self.directory();
        let number = self.rng.random_range(0..self.profile.names);
        // Names of very different length: nodes split unevenly.
        let name = match number % 4 {
            0 => format!("{number}-{}", "long".repeat(number % 40)),
            _ => format!("n{number}"),
        };
        if directory.is_empty() { name } else { format!("{directory}/{name}") }
    }

    fn existing(&mut self, what: fn(&Body) -> bool) -> Target {
        let nameless = self.state.nameless().len();
        if nameless > 0 && self.rng.random_bool(0.15) {
            return Target::Nameless(self.rng.random_range(0..nameless));
        }
        let paths = self.state.paths(what);
        match paths.is_empty() {
            true => Target::Path(self.path()),
            false => Target::Path(paths[self.rng.random_range(0..paths.len())].clone()),
        }
    }

    fn target(&mut self) -> Target {
        self.existing(|_| true)
    }

    fn file(&mut self) -> Target {
        // Sometimes anything, for the errors.
        match self.rng.random_bool(0.03) {
            true => self.target(),
            false => self.existing(|body| matches!(body, Body::File(_))),
        }
    }

    fn create(&mut self) -> Operation {
        let kind = match self.rng.random_range(0..10) {
            0..=5 => NewKind::File,
            6 | 7 => NewKind::Directory,
            8 => NewKind::Symlink { target_len: self.rng.random_range(1..200) },
            _ if self.rng.random() => NewKind::Fifo,
            _ => NewKind::CharDevice { rdev: self.small() },
        };
        Operation::Create { path: self.path(), kind, mode: self.rng.random_range(0..0o1000) }
    }

    fn rename(&mut self) -> Operation {
        let from = match self.existing(|_| true) {
            Target::Path(path) if !path.is_empty() => path,
            _ => self.path(),
        };
        let mode = match self.rng.random_range(0..6) {
            0..=3 => RenameMode::Replace,
            4 => RenameMode::NoReplace,
            _ => RenameMode::Exchange,
        };
        let to = match self.existing(|_| true) {
            Target::Path(path) if !path.is_empty() && self.rng.random() => path,
            _ => self.path(),
        };
        Operation::Rename { from, to, mode, whiteout: self.rng.random_bool(0.15) }
    }

    fn offset(&mut self) -> u64 {
        let offset = self.rng.random_range(0..self.profile.offset_max);
        match self.rng.random_range(0..4) {
            0 => offset / 4096 * 4096,
            1 => offset / 512 * 512,
            _ => offset,
        }
    }

    fn len(&mut self) -> usize {
        let len = self.rng.random_range(1..=self.profile.write_max);
        match self.rng.random_range(0..4) {
            0 => len.next_multiple_of(512),
            1 => len % 300 + 1,
            _ => len,
        }
    }

    fn write(&mut self) -> Operation {
        let durability = match self.rng.random_bool(self.profile.durable) {
            false => Durability::None,
            true if self.rng.random() => Durability::Full,
            true => Durability::Data,
        };
        let (mut offset, mut len, mut tag) = (self.offset(), self.len(), self.rng.random_range(1..1 << 40));
        let is_direct = self.rng.random_bool(0.3);
        if is_direct {
            // Whole blocks of every geometry.
            (offset, len) = (offset / 4096 * 4096, len.next_multiple_of(4096));
            tag = direct(tag);
        }
        Operation::Write {
            target: self.file(),
            offset,
            len,
            tag,
            append: self.rng.random_bool(0.2),
            durability,
            from_cache: !is_direct && self.rng.random_bool(0.1),
        }
    }

    fn fallocate(&mut self) -> Operation {
        let keep_size = self.rng.random();
        let mode = match self.rng.random_range(0..5) {
            0..=2 => FallocateMode::PunchHole,
            3 => FallocateMode::Zero { keep_size },
            _ => FallocateMode::Allocate { keep_size },
        };
        Operation::Fallocate { target: self.file(), mode, offset: self.offset(), len: self.len() as u64 }
    }

    fn set_xattr(&mut self) -> Operation {
        let mode = match self.rng.random_range(0..6) {
            0 => XattrMode::Create,
            1 => XattrMode::Replace,
            _ => XattrMode::Set,
        };
        Operation::SetXattr {
            target: self.target(),
            name: self.rng.random_range(0..5),
            // Mostly in the tree; some in extents of their own.
            len: if self.rng.random_bool(0.8) { self.small() as usize / 5 } else { self.len() },
            tag: self.rng.random_range(1..1 << 40),
            mode,
        }
    }
}
