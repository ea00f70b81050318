//! Promises: what data that is still in memory will need on the device.
//!
//! Whoever is told that bytes are written must find them written later, on a full device too. So a write reserves
//! blocks before it changes a page, and room in the tree for what will name them: an extent that may split another one,
//! and checksums. A [`Reservation`] is held until the transaction with both is applied.
//!
//! Blocks that were allocated ahead need only the room in the tree. They were promised to whoever allocated them, so
//! they may use one half of the nodes that are kept back, which blocks of new data may not.

use std::iter::Sum;
use std::ops::Add;
use std::rc::Rc;

use super::journal::Room as JournalRoom;
use super::rounds::CHUNK_RECORD_LEN;
use super::space::Space;
use super::{Allocation, Store};
use crate::error::{FsError, Try, Wait};
use crate::ondisk::node::{NODE_HEADER_LEN, SLOT_LEN};
use crate::ondisk::{ExtentItem, SUM_GROUP_BLOCKS, SUM_GROUP_LEN};
use crate::units::BlockRange;

/// Items that a piece puts into the tree, at most: it may split an extent into three.
const EXTENTS_OF_PIECE: u64 = 2;

/// Free blocks that are left to metadata for so many blocks of new data. Picked: of blocks of 4 KiB, room for several
/// extents each, so that data may lie in fragments.
const BLOCKS_PER_METADATA_BLOCK: u64 = 32;

/// What a later change needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Demand {
    /// Blocks where there are none.
    pub holes: u64,
    /// Blocks that take the place of others.
    pub replaced: u64,
    /// Runs of blocks that enter the tree as what they are not yet: each may be an extent of its own, and has its
    /// checksums, if there are such, in one item.
    pub pieces: u64,
}

impl Demand {
    /// Nothing.
    pub const NONE: Self = Self { holes: 0, replaced: 0, pieces: 0 };

    /// New blocks for a run of file blocks.
    pub fn of_holes(blocks: &std::ops::Range<u64>, has_sums: bool) -> Self {
        Self { holes: blocks.end - blocks.start, replaced: 0, pieces: pieces(blocks, has_sums) }
    }

    /// New blocks in place of those of a run of file blocks.
    pub fn of_replaced(blocks: &std::ops::Range<u64>, has_sums: bool) -> Self {
        Self { holes: 0, replaced: blocks.end - blocks.start, pieces: pieces(blocks, has_sums) }
    }

    /// A run of file blocks that were allocated ahead.
    pub fn of_ahead(blocks: &std::ops::Range<u64>, has_sums: bool) -> Self {
        Self { holes: 0, replaced: 0, pieces: pieces(blocks, has_sums) }
    }

    /// Data blocks to allocate.
    pub fn blocks(&self) -> u64 {
        self.holes.saturating_add(self.replaced)
    }

    /// What is needed beyond what is reserved.
    #[must_use]
    pub fn beyond(&self, reserved: &Self) -> Self {
        Self {
            holes: self.holes.saturating_sub(reserved.holes),
            replaced: self.replaced.saturating_sub(reserved.replaced),
            pieces: self.pieces.saturating_sub(reserved.pieces),
        }
    }
}

/// Runs that hold `blocks`, each with its checksums in one item.
fn pieces(blocks: &std::ops::Range<u64>, has_sums: bool) -> u64 {
    match has_sums {
        true => blocks.end.div_ceil(SUM_GROUP_BLOCKS) - blocks.start / SUM_GROUP_BLOCKS,
        false => 1,
    }
}

impl Add for Demand {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            holes: self.holes.saturating_add(other.holes),
            replaced: self.replaced.saturating_add(other.replaced),
            pieces: self.pieces.saturating_add(other.pieces),
        }
    }
}

impl Sum for Demand {
    fn sum<I: Iterator<Item = Self>>(demands: I) -> Self {
        demands.fold(Self::NONE, Add::add)
    }
}

/// What there is for a demand.
enum Room {
    Enough,
    /// It cannot be told before the free runs of this group are known.
    Unknown(u64),
    /// Data may take the runs that these nodes need: they have to be claimed first, and so many blocks left. It may
    /// suffice even if that cannot be.
    ToClaim {
        nodes: u64,
        kept: u64,
        may_suffice: bool,
    },
    None,
}

/// Blocks, and room in the tree, that later changes can count on. Dropping it gives back what was not used.
pub struct Reservation {
    store: Rc<Store>,
    blocks: u64,
    pieces: u64,
}

impl Reservation {
    /// Data blocks left in the reservation.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What is left in the reservation.
    pub fn left(&self) -> Demand {
        Demand { holes: self.blocks, replaced: 0, pieces: self.pieces }
    }

    /// Moves a part of the reservation into one of its own.
    pub fn split(&mut self, demand: &Demand) -> Reservation {
        let (blocks, pieces) = (demand.blocks().min(self.blocks), demand.pieces.min(self.pieces));
        self.blocks -= blocks;
        self.pieces -= pieces;
        Reservation { store: self.store.clone(), blocks, pieces }
    }

    /// Adds another reservation to this one.
    pub fn merge(&mut self, mut other: Reservation) {
        self.blocks += std::mem::take(&mut other.blocks);
        self.pieces += std::mem::take(&mut other.pieces);
    }

    /// Takes blocks out that have been allocated.
    pub(super) fn use_up(&mut self, blocks: u64) {
        self.blocks -= blocks;
        self.store.space.borrow_mut().unreserve(blocks);
    }

    /// Takes blocks back that were allocated out of it and that no device operation has touched.
    pub(crate) fn take_back(&mut self, mut allocation: Allocation) {
        let BlockRange { start, count } = allocation.range;
        allocation.committed = true;
        let mut space = self.store.space.borrow_mut();
        space.insert(start.0, u64::from(count));
        space.reserve(u64::from(count));
        self.blocks += u64::from(count);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.store.space.borrow_mut().unreserve(self.blocks);
        self.store.promised_pieces.set(self.store.promised_pieces.get() - self.pieces);
    }
}

impl Store {
    /// Reserves data blocks and room for what maps them.
    ///
    /// # Errors
    /// A wait while running operations, a commit or a checkpoint may give space back; then
    /// [`FsError::NoSpace`]. Whoever holds an [`super::IoToken`] should give it up before that wait: it may be what
    /// is waited for, for a second.
    pub fn reserve(self: &Rc<Self>, demand: Demand) -> Try<Reservation> {
        self.release_space();
        loop {
            match self.room_for(&demand) {
                Room::Enough => break,
                Room::Unknown(group) => self.learn(group)?,
                Room::ToClaim { nodes, kept, .. } if self.claim_for_promises(nodes, kept)? => {}
                Room::ToClaim { may_suffice: true, .. } => break,
                Room::ToClaim { .. } | Room::None if self.may_get_space() => return Err(Wait::Space.into()),
                Room::ToClaim { .. } | Room::None if self.may_help_to_checkpoint(&demand) => {
                    return Err(Wait::Checkpoint.into());
                }
                Room::ToClaim { .. } | Room::None => return Err(FsError::NoSpace.into()),
            }
        }
        if self.refused.get().is_some_and(|(refused, _)| refused == demand) {
            self.refused.set(None);
        }
        self.space.borrow_mut().reserve(demand.blocks());
        self.promised_pieces.set(self.promised_pieces.get() + demand.pieces);
        Ok(Reservation { store: self.clone(), blocks: demand.blocks(), pieces: demand.pieces })
    }

    fn room_for(&self, demand: &Demand) -> Room {
        if *demand == Demand::NONE {
            return Room::Enough;
        }
        let space = self.space.borrow();
        let blocks = demand.blocks();
        let kept = if blocks == 0 { self.reserve_nodes } else { 2 * self.reserve_nodes };
        let lacking = self.lacking_blocks(kept, self.promised_pieces.get().saturating_add(demand.pieces));
        let promised = space.reserved().saturating_add(blocks);
        let for_data = if blocks == 0 { 0 } else { promised.saturating_add(metadata_blocks(promised)) };
        if for_data.saturating_add(lacking).max(space.reserved() + lacking) > space.free() {
            return Room::None;
        }
        // Nodes need runs of blocks. Data may take any, and each piece of it may spoil two chunks.
        let chunk = space.chunk_blocks();
        let lacking = lacking.next_multiple_of(chunk);
        let pieces = self.promised_pieces.get().saturating_add(demand.pieces);
        let all = promised.max(for_data).saturating_add(lacking);
        if lacking == 0 || space.claimable() >= all.saturating_add(pieces.saturating_mul(2 * chunk)) {
            return Room::Enough;
        }
        if space.claimable() >= lacking {
            let nodes = lacking / self.superblock.node_blocks();
            let kept = promised.max(for_data) - space.reserved();
            return Room::ToClaim { nodes, kept, may_suffice: space.claimable() >= all };
        }
        space.unknown_group().map_or(Room::None, Room::Unknown)
    }

    /// Claims a chunk of at most `nodes`, if the journal has room for its record; leaves `kept` blocks.
    fn claim_for_promises(&self, nodes: u64, kept: u64) -> Try<bool> {
        self.check_writable()?;
        match self.journal.borrow().room(CHUNK_RECORD_LEN) {
            JournalRoom::Enough => {}
            JournalRoom::AfterCommit => return Err(Wait::Commit.into()),
            JournalRoom::AfterCheckpoint => return Err(Wait::Checkpoint.into()),
        }
        self.claim_chunk(nodes, kept)
    }

    /// Whether somebody for whose demand there is no room should wait for a checkpoint: there is something to write, and
    /// the last ones were not in vain already while others went on committing.
    fn may_help_to_checkpoint(&self, demand: &Demand) -> bool {
        /// So many checkpoints later it is refused; many more later it is somebody else who asks for as much.
        const IN_VAIN: std::ops::Range<u64> = 2..10;
        let generation = self.generation.get();
        let since = |refused: (Demand, u64)| generation - refused.1;
        let refused = self.refused.get().filter(|refused| since(*refused) < IN_VAIN.end);
        let is_in_vain = |refused: (Demand, u64)| refused.0 == *demand && IN_VAIN.contains(&since(refused));
        if self.checkpointed.get() >= self.seq.get() || refused.is_some_and(is_in_vain) {
            self.refused.set(None);
            return false;
        }
        self.refused.set(refused.or(Some((*demand, generation))));
        true
    }

    /// Whether data in memory holds promises: writing it back may give room.
    pub(crate) fn has_promises(&self) -> bool {
        self.promised_pieces.get() > 0
    }

    /// Nodes that free blocks can become without touching what is reserved for data.
    pub(super) fn claimable_nodes(&self) -> i64 {
        let space = self.space.borrow();
        let for_data = space.reserved() + metadata_blocks(space.reserved());
        let blocks = (space.claimable() + space.unknown_free()).saturating_sub(for_data);
        (blocks / self.superblock.node_blocks()) as i64
    }

    /// Nodes that the tree may need to keep all promises.
    pub(super) fn promised_nodes(&self) -> usize {
        self.nodes_for(self.promised_pieces.get())
    }

    /// Nodes that pieces may fill, at most: each of their items may split a node that is full, as long as there are
    /// such; nodes that were split are half full.
    fn nodes_for(&self, pieces: u64) -> usize {
        if pieces == 0 {
            return 0;
        }
        let extent = (SLOT_LEN + ExtentItem::SIZE) as u64;
        let (sums, sums_len) =
            if self.has_data_sums() { (1, (SLOT_LEN + SUM_GROUP_LEN) as u64) } else { (0, 0) };
        let items = pieces.saturating_mul(EXTENTS_OF_PIECE + sums);
        let bytes = pieces.saturating_mul(EXTENTS_OF_PIECE * extent + sums_len);
        let half = (self.superblock.node_size as usize - NODE_HEADER_LEN) as u64 / 2;
        (items.min(self.tree.borrow().live() as u64).saturating_add(bytes / half + 1)) as usize
    }

    /// Blocks that have to become nodes before `kept` nodes are left beside those of `pieces`.
    fn lacking_blocks(&self, kept: usize, pieces: u64) -> u64 {
        let nodes = kept.saturating_add(self.nodes_for(pieces));
        let lacking = (nodes as i64).saturating_sub(self.slack()).max(0) as u64;
        lacking.saturating_mul(self.superblock.node_blocks())
    }

    /// Free blocks that are not to be had for data. Without the room for pieces that is promised for a moment: most of
    /// it turns out not to be needed.
    pub(super) fn headroom(&self, space: &Space) -> u64 {
        self.lacking_blocks(2 * self.reserve_nodes, 0).saturating_add(metadata_blocks(space.reserved()))
    }
}

/// Free blocks that are left to metadata for promised blocks of data.
pub(super) fn metadata_blocks(promised: u64) -> u64 {
    promised / BLOCKS_PER_METADATA_BLOCK
}
