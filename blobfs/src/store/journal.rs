//! The journal's writing side: the open block, and the circular area that sealed blocks go to.
//!
//! Positions count bytes since mount, including what is skipped at the end of the area; the place on the
//! device is the position modulo the area's length. A block never wraps: when it does not fit before the
//! end, it goes to the start.
//!
//! Invariant: `head - tail` never exceeds the area, so nothing that a replay needs is overwritten.

use std::rc::Rc;

use bdev::AlignedBuf;

use crate::ondisk::journal::{BlockId, JOURNAL_HEADER_LEN, Record, TxnHeader, append_txn, seal_block};
use crate::ondisk::superblock::{JournalTail, Superblock};
use crate::units::TxnSeq;

/// Longest block. Picked: a commit of this size costs about as much as two small ones on a fast device.
const BLOCK_LEN_MAX: u64 = 256 * 1024;

/// The area holds at least this many of the longest blocks, so that a checkpoint runs beside commits.
const BLOCKS_MIN: u64 = 8;

/// File data takes at most this part of the area.
pub(super) const LOGGED_SHARE: u64 = 2;

/// Bytes kept for the claims of metadata chunks that go in front of a transaction.
pub(super) const CLAIMS_LEN: usize = 1024;

/// A block to be written.
pub(super) struct SealedBlock {
    pub(super) offset: u64,
    pub(super) bytes: Rc<AlignedBuf>,
    pub(super) last_txn: TxnSeq,
    /// Data that was written by now has to be durable before this block.
    pub(super) shows_data: bool,
}

/// Whether a transaction finds room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// It does.
    Enough,
    /// The open block has to be written first.
    AfterCommit,
    /// The area has to be emptied first.
    AfterCheckpoint,
}

/// The journal.
pub(super) struct Journal {
    /// First byte of the area on the device.
    start: u64,
    len: u64,
    /// Blocks are padded to this.
    unit: u64,
    align: usize,
    block_len_max: u64,
    head: u64,
    tail: u64,
    next: BlockId,
    open: Vec<u8>,
    last_txn: TxnSeq,
    shows_data: bool,
    /// Bytes of file data since the tail.
    logged: u64,
    /// The same at the end of the last checkpoint that was cut.
    logged_at_cut: u64,
}

impl Journal {
    /// A journal that goes on at `from`, with the epoch of `superblock`.
    pub(super) fn new(superblock: &Superblock, from: JournalTail, transfer_max: usize, align: usize) -> Self {
        let unit = u64::from(superblock.block_size);
        let len = superblock.journal_bytes();
        let block_len_max = BLOCK_LEN_MAX.min(len / BLOCKS_MIN).min(transfer_max as u64) / unit * unit;
        Self {
            start: superblock.journal_start * unit,
            len,
            unit,
            align,
            block_len_max,
            head: from.pos,
            tail: from.pos,
            next: BlockId {
                uuid: superblock.uuid,
                epoch: superblock.epoch,
                seq: from.seq,
                previous_crc: from.previous_crc,
            },
            open: Vec::new(),
            last_txn: TxnSeq(superblock.last_txn),
            shows_data: false,
            logged: 0,
            logged_at_cut: 0,
        }
    }

    /// Bytes that the longest transaction may take.
    pub(super) fn txn_len_max(&self) -> usize {
        self.block_len_max as usize - JOURNAL_HEADER_LEN - CLAIMS_LEN
    }

    /// Whether the open block holds transactions.
    pub(super) fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Whether the open block is worth writing without anybody asking for it.
    pub(super) fn is_long(&self) -> bool {
        self.open.len() as u64 > self.block_len_max / 2
    }

    /// Whether more than half of the area waits for a checkpoint.
    pub(super) fn is_half_full(&self) -> bool {
        self.head - self.tail > self.len / 2
    }

    fn padded(&self, len: usize) -> u64 {
        (len as u64).next_multiple_of(self.unit)
    }

    /// Whether a transaction of at most `len` bytes finds room, claims in front of it included.
    pub(super) fn room(&self, len: usize) -> Room {
        let open = self.open.len().max(JOURNAL_HEADER_LEN) + len + CLAIMS_LEN;
        if open as u64 > self.block_len_max {
            return Room::AfterCommit;
        }
        // A block may leave nearly its own length unused at the end of the area.
        match self.head - self.tail + 2 * self.padded(open) <= self.len {
            true => Room::Enough,
            false => Room::AfterCheckpoint,
        }
    }

    /// Appends a transaction for which there is room.
    pub(super) fn append<'a>(&mut self, header: TxnHeader, records: impl Iterator<Item = Record<'a>>) {
        if self.open.is_empty() {
            self.open.resize(JOURNAL_HEADER_LEN, 0);
        }
        self.last_txn = TxnSeq(header.seq.get());
        let logged = &mut self.logged;
        let records = records.inspect(|record| {
            if let Record::Log { bytes, .. } = record {
                *logged += bytes.len() as u64;
            }
        });
        append_txn(&mut self.open, header, records);
    }

    /// The open block shows data, and must not be durable before it.
    pub(super) fn show_data(&mut self) {
        self.shows_data = true;
    }

    /// Whether so much more file data leaves half of the area to everything else.
    pub(super) fn has_room_to_log(&self, len: usize) -> bool {
        self.logged + len as u64 <= self.len / LOGGED_SHARE
    }

    /// Closes the open block and gives it its place; `None` when it is empty.
    pub(super) fn seal(&mut self) -> Option<SealedBlock> {
        if self.open.is_empty() {
            return None;
        }
        let crc = seal_block(&mut self.open, &self.next);
        let len = self.padded(self.open.len());
        let mut pos = self.head % self.len;
        if pos + len > self.len {
            self.head += self.len - pos;
            pos = 0;
        }
        self.head += len;
        debug_assert!(self.head - self.tail <= self.len);
        self.next = BlockId { seq: self.next.seq + 1, previous_crc: crc, ..self.next };
        let mut bytes = AlignedBuf::zeroed(len as usize, self.align);
        bytes[..self.open.len()].copy_from_slice(&self.open);
        self.open.clear();
        Some(SealedBlock {
            offset: self.start + pos,
            bytes: Rc::new(bytes),
            last_txn: self.last_txn,
            shows_data: std::mem::take(&mut self.shows_data),
        })
    }

    /// Where replay starts after a checkpoint of all that is sealed, and the position to free up to.
    pub(super) fn cut(&mut self) -> (JournalTail, u64) {
        self.logged_at_cut = self.logged;
        let pos = self.head % self.len;
        (JournalTail { pos, seq: self.next.seq, previous_crc: self.next.previous_crc }, self.head)
    }

    /// A durable checkpoint stands at position `tail`.
    pub(super) fn free_up_to(&mut self, tail: u64) {
        self.tail = tail;
        self.logged -= std::mem::take(&mut self.logged_at_cut);
    }
}
