//! File data that a replay finds in the journal, and its way to the blocks of its files.
//!
//! Logged data is named by file and range. What later records settled, replaced or cut off counts no longer;
//! what is left when the journal ends is newer than the files' blocks, and belongs there before the journal is
//! let go. It was mapped by the transaction that logged it, so it has blocks.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError, IoBuffers, WriteFlags};
use reactor::sync::join_all;

use super::Store;
use super::checkpoint::buffer_align;
use super::journal::LOGGED_SHARE;
use super::load::Pins;
use crate::error::{Corruption, FsError, Stop, Try};
use crate::ondisk::journal::Record;
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{ExtentFlags, InodeItem, Key};
use crate::units::{InodeId, MapId};

/// Pieces that are written at a time.
const PIECES_AT_A_TIME: usize = 64;

/// Bytes of one file by their offset; the ranges are apart.
type Pieces = BTreeMap<u64, Vec<u8>>;

/// Logged data that counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Logged {
    files: BTreeMap<InodeId, Pieces>,
    bytes: u64,
}

impl Logged {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Whether there is some of a file.
    pub(crate) fn contains(&self, inode: InodeId) -> bool {
        self.files.contains_key(&inode)
    }

    /// Does what a record says, if it is about logged data.
    ///
    /// # Errors
    /// It names parts of blocks, there would be more than the journal of `superblock` may hold, or blocks have
    /// checksums, which such data would not agree with.
    pub(crate) fn apply(&mut self, superblock: &Superblock, record: &Record<'_>) -> Result<(), &'static str> {
        let is_whole = |offset: u64| offset.is_multiple_of(u64::from(superblock.block_size));
        match *record {
            Record::Log { .. } if superblock.has_data_sums() => {
                return Err("logs data of blocks with checksums");
            }
            Record::Log { inode, offset, bytes } if is_whole(offset) && is_whole(bytes.len() as u64) => {
                self.log(inode, offset, bytes);
            }
            Record::Settle { inode, start, end } if is_whole(start) && is_whole(end) => {
                self.settle(inode, start..end);
            }
            Record::Log { .. } | Record::Settle { .. } => return Err("logs or settles part of a block"),
            _ => {}
        }
        match self.bytes <= superblock.journal_bytes() / LOGGED_SHARE {
            true => Ok(()),
            false => Err("more file data than a journal may hold"),
        }
    }

    /// Adds bytes of a file in place of what was there.
    fn log(&mut self, inode: InodeId, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.settle(inode, offset..offset + bytes.len() as u64);
        self.bytes += bytes.len() as u64;
        self.files.entry(inode).or_default().insert(offset, bytes.to_vec());
    }

    /// Takes bytes of a file out.
    fn settle(&mut self, inode: InodeId, range: Range<u64>) {
        let Some(pieces) = self.files.get_mut(&inode) else { return };
        let touched: Vec<u64> = pieces
            .range(..range.end)
            .rev()
            .take_while(|(start, bytes)| **start + bytes.len() as u64 > range.start)
            .map(|(start, _)| *start)
            .collect();
        for start in touched {
            let Some(mut bytes) = pieces.remove(&start) else { continue };
            self.bytes -= bytes.len() as u64;
            let end = start + bytes.len() as u64;
            if end > range.end {
                let rest = bytes[(range.end - start) as usize..].to_vec();
                self.bytes += rest.len() as u64;
                pieces.insert(range.end, rest);
            }
            if start < range.start {
                bytes.truncate((range.start - start) as usize);
                self.bytes += bytes.len() as u64;
                pieces.insert(start, bytes);
            }
        }
        if pieces.is_empty() {
            self.files.remove(&inode);
        }
    }

    /// The parts of a file's range that are here: offset and bytes.
    pub(crate) fn parts(&self, inode: InodeId, range: &Range<u64>) -> impl Iterator<Item = (u64, &[u8])> {
        let (from, to) = (range.start, range.end);
        let pieces = self.files.get(&inode).into_iter().flatten();
        pieces.filter_map(move |(start, bytes)| {
            let end = start + bytes.len() as u64;
            let (first, last) = ((*start).max(from), end.min(to));
            (first < last).then(|| (first, &bytes[(first - start) as usize..(last - start) as usize]))
        })
    }

    /// All of it, file by file.
    pub(crate) fn files(&self) -> impl Iterator<Item = (InodeId, impl Iterator<Item = (u64, &[u8])>)> {
        self.files
            .iter()
            .map(|(inode, pieces)| (*inode, pieces.iter().map(|(start, bytes)| (*start, bytes.as_slice()))))
    }
}

/// Read-only mounts.
impl Store {
    /// Whether a read-only mount found data of a file in the journal that is newer than the file's blocks.
    #[inline]
    pub(crate) fn has_overlay(&self, inode: InodeId) -> bool {
        let logged = self.logged.borrow();
        !logged.is_empty() && logged.contains(inode)
    }

    /// Puts that data over what was read from the blocks of a file from byte `start` on.
    pub(crate) fn overlay(&self, inode: InodeId, start: u64, buffers: &IoBuffers) {
        let logged = self.logged.borrow();
        for (at, bytes) in logged.parts(inode, &(start..start + buffers.len() as u64)) {
            buffers.copy_from((at - start) as usize, bytes);
        }
    }
}

/// A run of blocks, by its first byte on the device, and what goes into it.
pub(crate) struct Home<'a> {
    pub(crate) device: u64,
    pub(crate) bytes: &'a [u8],
}

/// Writes whole blocks, some at a time.
///
/// # Errors
/// The device's.
pub(crate) async fn write_homes(bdev: &Rc<dyn Bdev>, homes: &[Home<'_>]) -> Result<(), BdevError> {
    let write = |home: &Home<'_>| {
        let mut buf = AlignedBuf::zeroed(home.bytes.len(), buffer_align(bdev));
        buf.copy_from_slice(home.bytes);
        bdev.write(home.device, IoBuffers::from_aligned(&Rc::new(buf)), WriteFlags::NONE)
    };
    for some in homes.chunks(PIECES_AT_A_TIME) {
        join_all(some.iter().map(write)).await.into_iter().collect::<Result<(), _>>()?;
    }
    Ok(())
}

impl Store {
    /// Writes logged data to the blocks of its files. A file without a name is about to be deleted: its data
    /// stays where it is.
    pub(super) async fn write_logged(self: &Rc<Self>, logged: &Logged) -> Result<(), FsError> {
        for (inode, pieces) in logged.files() {
            let item = self.load(|store| store.inode_item(inode)).await?;
            let Some(item) = item.filter(|item| item.nlink > 0) else { continue };
            let mut homes = Vec::new();
            for (offset, bytes) in pieces {
                self.find_homes(inode, item.map, offset, bytes, &mut homes).await?;
            }
            write_homes(&self.bdev, &homes).await?;
        }
        Ok(())
    }

    /// Makes a call again and again until it finds the nodes that it needs.
    async fn load<T>(self: &Rc<Self>, mut call: impl FnMut(&Self) -> Try<T>) -> Result<T, FsError> {
        let mut pins = Pins::default();
        loop {
            match call(self) {
                Ok(value) => return Ok(value),
                Err(Stop::Fail(error)) => return Err(error),
                Err(Stop::Wait(wait)) => self.wait_pinned(&wait, &mut pins).await?,
            }
        }
    }

    fn inode_item(&self, inode: InodeId) -> Try<Option<InodeItem>> {
        self.get(&Key::inode(inode), |value| value.and_then(InodeItem::decode))
    }

    async fn find_homes<'a>(
        self: &Rc<Self>,
        inode: InodeId,
        map: MapId,
        offset: u64,
        bytes: &'a [u8],
        homes: &mut Vec<Home<'a>>,
    ) -> Result<(), FsError> {
        let block = u64::from(self.block_size());
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let found = self.load(|store| store.mapped_at(map, at / block)).await?;
            let (addr, blocks) = found.ok_or_else(|| {
                let problem = format!("has no block for byte {at} of inode {inode}");
                FsError::from(Corruption { structure: "logged data", offset: at, problem })
            })?;
            let len = (blocks * block).min((bytes.len() - done) as u64) as usize;
            homes.push(Home { device: addr * block, bytes: &bytes[done..done + len] });
            done += len;
        }
        Ok(())
    }

    /// Device block of a file block that holds data, and how many follow it.
    fn mapped_at(&self, map: MapId, block: u64) -> Try<Option<(u64, u64)>> {
        self.last_at_or_before(&Key::extent(map, block), &Key::extent(map, 0), |found| {
            let (key, value) = found?;
            let item = self.extent(key.offset, value)?;
            let inside = block - key.offset;
            let holds = inside < u64::from(item.blocks) && !item.flags.contains(ExtentFlags::UNWRITTEN);
            holds.then(|| (item.device_range().start.0 + inside, u64::from(item.blocks) - inside))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: InodeId = InodeId(5);

    #[derive(Debug, Clone)]
    enum Step {
        Log(u64, Vec<u8>),
        Settle(Range<u64>),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..60u64, proptest::collection::vec(1..=255u8, 1..20))
                .prop_map(|(at, bytes)| Step::Log(at, bytes)),
            (0..80u64, 0..80u64).prop_map(|(a, b)| Step::Settle(a.min(b)..a.max(b))),
        ]
    }

    proptest! {
        #[test]
        fn what_counts_is_what_a_plain_array_would_hold(steps in proptest::collection::vec(step(), 0..30)) {
            let (mut logged, mut plain) = (Logged::default(), [0; 80]);
            for step in steps {
                match step {
                    Step::Log(at, bytes) => {
                        logged.log(FILE, at, &bytes);
                        plain[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                    }
                    Step::Settle(range) => {
                        logged.settle(FILE, range.clone());
                        plain[range.start as usize..range.end as usize].fill(0);
                    }
                }
            }
            let mut found = [0; 80];
            for (at, bytes) in logged.parts(FILE, &(0..80)) {
                found[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            }
            prop_assert_eq!(found, plain);
            prop_assert_eq!(logged.bytes, plain.iter().filter(|byte| **byte != 0).count() as u64);
            prop_assert_eq!(logged.is_empty(), !logged.contains(FILE));
        }
    }
}
