//! The journal on top of the checkpoint, without changing either: what each item becomes.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::rc::Rc;

use bdev::{Bdev, BdevError};

use super::finding::{Finding, Findings};
use super::remedy::Remedy;
use crate::ondisk::journal::{BlockId, Record, TxnRecord, block_header, check_block, decode_block};
use crate::ondisk::node::item_len_max;
use crate::ondisk::superblock::{COUNTER_MAX, JournalTail, Superblock};
use crate::ondisk::{Key, Kind};
use crate::store::{JournalReader, Logged, read};

/// What the journal makes of an item.
pub(super) struct Overlaid {
    /// Its value, or that it is deleted.
    pub(super) value: Option<Vec<u8>>,
    /// The first change deletes it, so the checkpoint must hold it.
    pub(super) must_exist: bool,
    /// Journal block of the first change.
    pub(super) block: BlockPlace,
}

/// What a transaction changed, to take it back.
type Undo = Vec<(Key, Option<Overlaid>)>;

/// A journal block.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockPlace {
    pub(super) sequence: u64,
    pub(super) block: u64,
}

impl BlockPlace {
    /// A finding about it.
    pub(super) fn finding(self, problem: impl Into<String>) -> Finding {
        Finding::Journal { sequence: self.sequence, block: self.block, problem: problem.into() }
    }
}

/// A change of the use of blocks.
#[derive(Debug, Clone, Copy)]
pub(super) enum SpaceChange {
    /// Blocks become used or free.
    Mark { start: u64, count: u64, used: bool },
    /// Free blocks become a chunk of so many nodes.
    Claim { start: u64, nodes: u32 },
    /// An empty chunk of so many nodes becomes free blocks.
    GiveBack { start: u64, nodes: u32 },
}

/// The journal.
pub(super) struct Journal {
    pub(super) items: BTreeMap<Key, Overlaid>,
    pub(super) space: Vec<(BlockPlace, SpaceChange)>,
    pub(super) next_id: u64,
    pub(super) blocks: u64,
    pub(super) transactions: u64,
    /// Everything was applied.
    pub(super) whole: bool,
    /// The device does not give part of it.
    pub(super) unreadable: bool,
    /// Where what was applied ends.
    pub(super) end: JournalTail,
    /// Last transaction that was applied.
    pub(super) last_txn: u64,
    /// File data that a mount would write to its files' blocks.
    pub(super) logged: Rc<Logged>,
    superblock: Superblock,
    item_len_max: usize,
}

impl Journal {
    /// Reads the valid part of the journal.
    pub(super) async fn read(bdev: &Rc<dyn Bdev>, superblock: &Superblock, findings: &mut Findings) -> Self {
        let mut journal = Self {
            items: BTreeMap::new(),
            space: Vec::new(),
            next_id: superblock.next_id,
            blocks: 0,
            transactions: 0,
            whole: true,
            unreadable: false,
            end: superblock.tail,
            logged: Rc::default(),
            superblock: superblock.clone(),
            last_txn: superblock.last_txn,
            item_len_max: item_len_max(superblock.node_size as usize),
        };
        let unit = u64::from(superblock.block_size);
        let mut reader = JournalReader::new(bdev, superblock);
        loop {
            let (bytes, next) = match reader.next(journal.end).await {
                Ok(Some(found)) => found,
                Ok(None) => break,
                Err(error) => {
                    journal.cannot_read(superblock, error, findings);
                    return journal;
                }
            };
            let start = next.pos - (bytes.len() as u64).next_multiple_of(unit);
            let place =
                BlockPlace { sequence: journal.end.seq, block: superblock.journal_start + start / unit };
            if let Err(problem) = journal.apply(place, &bytes) {
                let remedy = Remedy::lossy("the journal ends in front of this transaction");
                findings.push(place.finding(problem), remedy);
                journal.whole = false;
                return journal;
            }
            journal.blocks += 1;
            journal.end = next;
        }
        if superblock.clean && journal.blocks > 0 {
            let remedy = Remedy::safe("applied");
            findings.push(Finding::CleanWithJournal { blocks: journal.blocks }, remedy);
        }
        if !superblock.clean
            && let Ok(Some(found)) = later_block(bdev, superblock, journal.end).await
        {
            let remedy = Remedy::lossy("the journal ends there");
            findings.push(Finding::JournalGap { expected: journal.end.seq, found }, remedy);
        }
        journal
    }

    /// The device does not give what may be the next block.
    fn cannot_read(&mut self, superblock: &Superblock, error: BdevError, findings: &mut Findings) {
        let block = superblock.journal_start + self.end.pos / u64::from(superblock.block_size);
        let place = BlockPlace { sequence: self.end.seq, block };
        let remedy = Remedy::lossy("the journal ends in front of it");
        findings.push(place.finding(error.to_string()), remedy);
        (self.whole, self.unreadable) = (false, true);
    }

    fn apply(&mut self, place: BlockPlace, block: &[u8]) -> Result<(), &'static str> {
        for TxnRecord { header, records } in decode_block(block).ok_or("malformed record")? {
            if Some(header.seq.get()) != self.last_txn.checked_add(1) {
                return Err("transactions are not in sequence");
            }
            if header.next_id.get() > COUNTER_MAX {
                return Err("a number beyond what its counter can reach");
            }
            self.apply_transaction(place, &records)?;
            self.last_txn += 1;
            self.next_id = self.next_id.max(header.next_id.get());
            self.transactions += 1;
        }
        Ok(())
    }

    /// Applies a transaction, or nothing of it.
    fn apply_transaction(&mut self, place: BlockPlace, records: &[Record<'_>]) -> Result<(), &'static str> {
        let (mut undo, space) = (Vec::new(), self.space.len());
        let applied = records.iter().try_for_each(|record| self.apply_record(place, record, &mut undo));
        if applied.is_err() {
            self.space.truncate(space);
            while let Some((key, before)) = undo.pop() {
                match before {
                    Some(before) => self.items.insert(key, before),
                    None => self.items.remove(&key),
                };
            }
        }
        applied
    }

    /// Replaces what becomes of an item, and remembers what it was.
    fn set(&mut self, place: BlockPlace, key: Key, value: Option<&[u8]>, undo: &mut Undo) {
        let first = self.items.get(&key).map(|known| (known.must_exist, known.block));
        let (must_exist, block) = first.unwrap_or((value.is_none(), place));
        let new = Overlaid { value: value.map(<[u8]>::to_vec), must_exist, block };
        undo.push((key, self.items.insert(key, new)));
    }

    fn apply_record(
        &mut self,
        place: BlockPlace,
        record: &Record<'_>,
        undo: &mut Undo,
    ) -> Result<(), &'static str> {
        match record {
            Record::Put(key, _) if key.kind == Kind::Group => return Err("puts a bitmap"),
            Record::Put(_, value) if value.len() > self.item_len_max => return Err("an item is too long"),
            Record::Put(key, value) => self.set(place, *key, Some(value), undo),
            Record::Delete(key) => match self.items.get(key) {
                Some(Overlaid { value: None, .. }) => return Err("deletes an item that does not exist"),
                _ => self.set(place, *key, None, undo),
            },
            Record::Alloc(range) | Record::Free(range) => {
                let used = matches!(record, Record::Alloc(_));
                let (start, count) = (range.start.0, u64::from(range.count));
                self.space.push((place, SpaceChange::Mark { start, count, used }));
            }
            Record::Claim { start, nodes } => {
                self.space.push((place, SpaceChange::Claim { start: *start, nodes: *nodes }));
            }
            Record::GiveBack { start, nodes } => {
                self.space.push((place, SpaceChange::GiveBack { start: *start, nodes: *nodes }));
            }
            Record::Log { .. } | Record::Settle { .. } => {
                Rc::make_mut(&mut self.logged).apply(&self.superblock, record)?;
            }
        }
        Ok(())
    }
}

/// Sequence number of a valid block of this epoch behind the end of the journal: blocks are written one
/// after the other, so everything before it was durable once.
async fn later_block(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    end: JournalTail,
) -> Result<Option<u64>, BdevError> {
    let later = |id: &BlockId| id.epoch == superblock.epoch && id.seq > end.seq;
    let mut found = None;
    scan_blocks(bdev, superblock, later, |id| {
        found = Some(id.seq);
        ControlFlow::Break(())
    })
    .await?;
    Ok(found)
}

/// The newest epoch that is in use: the superblock's, or one that a block anywhere in the journal has.
///
/// # Errors
/// The device's.
pub(super) async fn newest_epoch(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> Result<u64, BdevError> {
    let newest = Cell::new(superblock.epoch);
    // No mount had a larger one than COUNTER_MAX.
    let newer = |id: &BlockId| id.epoch > newest.get() && id.epoch < COUNTER_MAX;
    scan_blocks(bdev, superblock, newer, |id| {
        newest.set(id.epoch);
        ControlFlow::Continue(())
    })
    .await?;
    Ok(newest.get())
}

/// Calls `each` for the blocks of this file system in the journal's area that are wanted and valid, in the order of their
/// places.
async fn scan_blocks(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    is_wanted: impl Fn(&BlockId) -> bool,
    mut each: impl FnMut(&BlockId) -> ControlFlow<()>,
) -> Result<(), BdevError> {
    let unit = superblock.block_size as usize;
    let (start, area) = (superblock.journal_start * unit as u64, superblock.journal_bytes());
    let mut pos = 0;
    while pos < area {
        let window = read(bdev, start + pos, WINDOW_LEN.min(area - pos) as usize).await?;
        for at in (0..window.len()).step_by(unit) {
            let Some((id, len)) = block_header(&window[at..]) else { continue };
            let place = pos + at as u64;
            let padded = len.next_multiple_of(unit) as u64;
            if id.uuid != superblock.uuid || !is_wanted(&id) || padded > area - place {
                continue;
            }
            let block = read(bdev, start + place, padded as usize).await?;
            if check_block(&block[..len]).is_some() && each(&id).is_break() {
                return Ok(());
            }
        }
        pos += window.len() as u64;
    }
    Ok(())
}

/// Bytes of the journal that are looked at together; a multiple of every block size.
const WINDOW_LEN: u64 = 1 << 20;
