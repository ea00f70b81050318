//! A tree node: a slotted page.
//!
//! ```text
//! header (64 bytes) | slots in key order (24 bytes each) | free | values, from the end downwards
//! ```
//!
//! A leaf's values are the items' bytes; an inner node's values are child pointers, and the key of a slot is
//! the lower bound of what the child holds. The first slot of an inner node takes everything below the
//! second one's key.
//!
//! A [`Node`] in memory is the page itself, so lookups need no decoding; what differs is that an inner node
//! also *links* to those of its children that are in memory, and that the pointers of these children mean
//! nothing: the checkpoint that writes the node fills them in.
//!
//! Invariants: keys ascend strictly; values that are not empty lie behind the slots and do not overlap; no item is longer than
//! [`item_len_max`], so a full node can always be split in two that have room for one more.

use std::cell::Cell;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::superblock::{NodePtr, RawPtr};
use super::{Key, Kind, crc32c};

/// Bytes of a node's header.
pub const NODE_HEADER_LEN: usize = 64;

/// Bytes of a slot.
pub const SLOT_LEN: usize = 24;

/// First bytes of a node.
pub const NODE_MAGIC: u32 = u32::from_le_bytes(*b"NODE");

/// Longest value: with its slot it takes at most a third of what a node can hold.
pub const fn item_len_max(node_size: usize) -> usize {
    (node_size - NODE_HEADER_LEN) / 3 - SLOT_LEN
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    crc: U32,
    addr: U64,
    uuid: [u8; 16],
    generation: U64,
    level: u8,
    reserved: u8,
    count: U16,
    reserved2: [u8; 20],
}

const _: () = assert!(size_of::<RawHeader>() == NODE_HEADER_LEN);

/// Bytes in front of what the checksum covers: magic and the checksum.
const CRC_FROM: usize = 8;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSlot {
    owner: U64,
    kind: u8,
    reserved: u8,
    at: U16,
    len: U16,
    reserved2: U16,
    offset: U64,
}

const _: () = assert!(size_of::<RawSlot>() == SLOT_LEN);

impl RawSlot {
    fn order(&self) -> (u64, u8, u64) {
        (self.owner.get(), self.kind, self.offset.get())
    }
}

fn order(key: &Key) -> (u64, u8, u64) {
    (key.owner, key.kind as u8, key.offset)
}

/// Link to a child that is not in memory.
pub const ABSENT: u32 = u32::MAX;

/// A node in memory.
#[derive(Debug, Clone)]
pub struct Node {
    page: Vec<u8>,
    level: u8,
    count: usize,
    /// Lowest byte that a value uses.
    heap: usize,
    /// Bytes of all values.
    live: usize,
    /// Of an inner node, where the children are in memory. They change without the content: also while a
    /// checkpoint holds the node.
    links: Vec<Cell<u32>>,
}

/// What a page that is read must be.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Pointer that led to it.
    pub ptr: NodePtr,
    /// Level below its parent's.
    pub level: u8,
    /// The file system.
    pub uuid: [u8; 16],
}

impl Node {
    /// An empty node.
    pub fn new(node_size: usize, level: u8) -> Self {
        Self { page: vec![0; node_size], level, count: 0, heap: node_size, live: 0, links: Vec::new() }
    }

    /// Level above the leaves.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Number of items or children.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes that items and their slots take.
    pub fn used(&self) -> usize {
        self.live + self.count * SLOT_LEN
    }

    /// Bytes that they can take.
    pub fn capacity(&self) -> usize {
        self.page.len() - NODE_HEADER_LEN
    }

    fn slots(&self) -> &[RawSlot] {
        let bytes = &self.page[NODE_HEADER_LEN..NODE_HEADER_LEN + self.count * SLOT_LEN];
        <[RawSlot]>::ref_from_bytes(bytes).expect("a slot has no alignment")
    }

    fn slot_mut(&mut self, index: usize) -> &mut RawSlot {
        let at = NODE_HEADER_LEN + index * SLOT_LEN;
        RawSlot::mut_from_bytes(&mut self.page[at..at + SLOT_LEN]).expect("a slot has no alignment")
    }

    /// Key of a slot.
    pub fn key(&self, index: usize) -> Key {
        let slot = &self.slots()[index];
        let kind = Kind::from_number(slot.kind).expect("kinds are checked when a node is read");
        Key::new(slot.owner.get(), kind, slot.offset.get())
    }

    /// Value of a slot.
    pub fn value(&self, index: usize) -> &[u8] {
        let slot = &self.slots()[index];
        &self.page[usize::from(slot.at.get())..][..usize::from(slot.len.get())]
    }

    /// Value of a slot, to be changed in place.
    pub fn value_mut(&mut self, index: usize) -> &mut [u8] {
        let slot = self.slots()[index];
        &mut self.page[usize::from(slot.at.get())..][..usize::from(slot.len.get())]
    }

    /// Slot of `key`, or where it would be inserted.
    ///
    /// # Errors
    /// The place to insert at, when there is no such key.
    pub fn search(&self, key: &Key) -> Result<usize, usize> {
        self.slots().binary_search_by_key(&order(key), RawSlot::order)
    }

    /// Slot of the child that `key` belongs to.
    pub fn child_index(&self, key: &Key) -> usize {
        match self.search(key) {
            Ok(index) => index,
            Err(index) => index.saturating_sub(1),
        }
    }

    /// Where a child is in memory, or [`ABSENT`].
    pub fn child(&self, index: usize) -> u32 {
        self.links[index].get()
    }

    /// Where all children are in memory, in order.
    pub fn children(&self) -> impl Iterator<Item = u32> + '_ {
        self.links.iter().map(Cell::get)
    }

    /// Links to a child that came into memory.
    pub fn link(&self, index: usize, child: u32) {
        self.links[index].set(child);
    }

    /// Forgets where a child was in memory; from now on the pointer counts.
    pub fn unlink(&mut self, index: usize, ptr: NodePtr) {
        self.value_mut(index).copy_from_slice(RawPtr::from(ptr).as_bytes());
        self.links[index].set(ABSENT);
    }

    /// Pointer to a child that is not in memory.
    pub fn child_ptr(&self, index: usize) -> NodePtr {
        let raw =
            RawPtr::ref_from_bytes(self.value(index)).expect("pointers are checked when a node is read");
        NodePtr::from(*raw)
    }

    /// Inserts an item; it must fit.
    pub fn insert(&mut self, index: usize, key: &Key, value: &[u8]) {
        debug_assert!(self.used() + SLOT_LEN + value.len() <= self.capacity());
        let slots_end = NODE_HEADER_LEN + self.count * SLOT_LEN;
        if slots_end + SLOT_LEN + value.len() > self.heap {
            self.compact();
        }
        let at = NODE_HEADER_LEN + index * SLOT_LEN;
        self.page.copy_within(at..slots_end, at + SLOT_LEN);
        self.heap -= value.len();
        self.page[self.heap..self.heap + value.len()].copy_from_slice(value);
        let slot = RawSlot {
            owner: key.owner.into(),
            kind: key.kind as u8,
            reserved: 0,
            at: (self.heap as u16).into(),
            len: (value.len() as u16).into(),
            reserved2: U16::ZERO,
            offset: key.offset.into(),
        };
        self.page[at..at + SLOT_LEN].copy_from_slice(slot.as_bytes());
        self.count += 1;
        self.live += value.len();
    }

    /// Inserts a child whose pointer is not known yet.
    pub fn insert_child(&mut self, index: usize, key: &Key, child: u32) {
        self.insert(index, key, &[0; RawPtr::SIZE]);
        self.links.insert(index, Cell::new(child));
    }

    /// Removes an item, or a child together with its place in memory.
    pub fn remove(&mut self, index: usize) {
        let slot = self.slots()[index];
        let len = usize::from(slot.len.get());
        if usize::from(slot.at.get()) == self.heap {
            self.heap += len;
        }
        let slots_end = NODE_HEADER_LEN + self.count * SLOT_LEN;
        let at = NODE_HEADER_LEN + index * SLOT_LEN;
        self.page.copy_within(at + SLOT_LEN..slots_end, at);
        self.count -= 1;
        self.live -= len;
        if self.level > 0 {
            self.links.remove(index);
        }
    }

    /// Gives a slot another key; the order must stay.
    pub fn set_key(&mut self, index: usize, key: &Key) {
        let slot = self.slot_mut(index);
        slot.owner = key.owner.into();
        slot.kind = key.kind as u8;
        slot.offset = key.offset.into();
    }

    /// Moves everything from slot `at` on into a new node.
    pub fn split_off(&mut self, at: usize) -> Node {
        let mut right = Node::new(self.page.len(), self.level);
        right.append_from(self, at);
        let mut left = Node::new(self.page.len(), self.level);
        self.count = at;
        left.append_from(self, 0);
        *self = left;
        right
    }

    /// Appends everything from slot `from` of `other` on; it must fit.
    pub fn append_from(&mut self, other: &Node, from: usize) {
        for index in from..other.count {
            self.insert(self.count, &other.key(index), other.value(index));
        }
        if self.level > 0 {
            self.links.extend_from_slice(&other.links[from..other.count]);
        }
    }

    /// Length of the value in a slot.
    pub fn value_len(&self, index: usize) -> usize {
        usize::from(self.slots()[index].len.get())
    }

    fn compact(&mut self) {
        let mut packed = Node::new(self.page.len(), self.level);
        packed.links = std::mem::take(&mut self.links);
        let slots = NODE_HEADER_LEN..NODE_HEADER_LEN + self.count * SLOT_LEN;
        packed.page[slots.clone()].copy_from_slice(&self.page[slots]);
        packed.count = self.count;
        packed.live = self.live;
        for index in 0..self.count {
            let value = self.value(index);
            packed.heap -= value.len();
            packed.page[packed.heap..packed.heap + value.len()].copy_from_slice(value);
            packed.slot_mut(index).at = (packed.heap as u16).into();
        }
        *self = packed;
    }

    /// The page as it is written to `ptr` (whose checksum does not count yet), with the pointers of an inner
    /// node's children. Returns the checksum.
    pub fn encode(&self, ptr: NodePtr, uuid: [u8; 16], children: &[NodePtr], out: &mut [u8]) -> u32 {
        let slots_end = NODE_HEADER_LEN + self.count * SLOT_LEN;
        out[..slots_end].copy_from_slice(&self.page[..slots_end]);
        out[slots_end..self.heap].fill(0);
        out[self.heap..].copy_from_slice(&self.page[self.heap..]);
        for (slot, child) in self.slots().iter().zip(children) {
            let at = usize::from(slot.at.get());
            out[at..at + RawPtr::SIZE].copy_from_slice(RawPtr::from(*child).as_bytes());
        }
        let header = RawHeader {
            magic: NODE_MAGIC.into(),
            crc: U32::ZERO,
            addr: ptr.addr.into(),
            uuid,
            generation: ptr.generation.into(),
            level: self.level,
            reserved: 0,
            count: (self.count as u16).into(),
            reserved2: [0; 20],
        };
        out[..NODE_HEADER_LEN].copy_from_slice(header.as_bytes());
        seal(out)
    }

    /// The node in a page that was read; none of its children is in memory.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(page: &[u8], expected: &Expected) -> Result<Self, String> {
        check_header(page, NODE_MAGIC, expected.ptr, expected.uuid)?;
        let (header, _) = RawHeader::ref_from_prefix(page).map_err(|_| "too short")?;
        if header.level != expected.level {
            return Err(format!("level {} instead of {}", header.level, expected.level));
        }
        let mut node = Self::new(page.len(), header.level);
        node.page.copy_from_slice(page);
        node.count = usize::from(header.count.get());
        if node.count * SLOT_LEN > node.capacity() {
            return Err(format!("{} slots do not fit", node.count));
        }
        node.check_slots()?;
        node.check_pointers()?;
        Ok(node)
    }

    /// Checks order and place of the slots, and finds out what the values use.
    fn check_slots(&mut self) -> Result<(), String> {
        let slots_end = NODE_HEADER_LEN + self.count * SLOT_LEN;
        let item_max = item_len_max(self.page.len());
        let mut places = Vec::with_capacity(self.count);
        for (index, slot) in self.slots().iter().enumerate() {
            let (at, len) = (usize::from(slot.at.get()), usize::from(slot.len.get()));
            if Kind::from_number(slot.kind).is_none() {
                return Err(format!("slot {index} has the unknown kind {:#x}", slot.kind));
            }
            // The place of an empty value says nothing: slots may have grown over it.
            if (at < slots_end && len > 0) || at + len > self.page.len() || len > item_max {
                return Err(format!("value of slot {index} at {at} with {len} bytes"));
            }
            if index > 0 && self.slots()[index - 1].order() >= slot.order() {
                return Err(format!("slot {index} is out of order"));
            }
            places.push((at, at + len));
        }
        places.retain(|(start, end)| start != end);
        places.sort_unstable();
        if places.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err("values overlap".to_owned());
        }
        self.heap = places.first().map_or(self.page.len(), |(start, _)| *start);
        self.live = places.iter().map(|(start, end)| end - start).sum();
        Ok(())
    }

    fn check_pointers(&mut self) -> Result<(), String> {
        if self.level == 0 {
            return Ok(());
        }
        if self.count == 0 {
            return Err("an inner node without children".to_owned());
        }
        match (0..self.count).find(|index| self.value_len(*index) != RawPtr::SIZE) {
            Some(index) => Err(format!("child {index} is no pointer")),
            None => {
                self.links = vec![Cell::new(ABSENT); self.count];
                Ok(())
            }
        }
    }
}

/// Puts the checksum into a page whose header starts with magic and checksum; returns it.
pub(crate) fn seal(page: &mut [u8]) -> u32 {
    let crc = crc32c(&page[CRC_FROM..]);
    page[4..8].copy_from_slice(U32::new(crc).as_bytes());
    crc
}

/// The pointer that would lead to a page, as the page's own header has it; nothing of it is checked.
pub(crate) fn own_ptr(page: &[u8]) -> Option<NodePtr> {
    let (header, _) = RawHeader::ref_from_prefix(page).ok()?;
    let (addr, generation, crc) = (header.addr.get(), header.generation.get(), header.crc.get());
    Some(NodePtr { addr, generation, crc })
}

/// Checks magic, checksum, address, owner and generation of a page.
pub(crate) fn check_header(page: &[u8], magic: u32, ptr: NodePtr, uuid: [u8; 16]) -> Result<(), String> {
    let (header, _) = RawHeader::ref_from_prefix(page).map_err(|_| "too short")?;
    if header.magic.get() != magic {
        return Err(format!("magic {:#010x} instead of {magic:#010x}", header.magic.get()));
    }
    let crc = crc32c(&page[CRC_FROM..]);
    if header.crc.get() != crc || ptr.crc != crc {
        return Err(format!(
            "checksum {crc:#010x}, stored {:#010x}, pointer {:#010x}",
            header.crc.get(),
            ptr.crc
        ));
    }
    if header.addr.get() != ptr.addr || header.generation.get() != ptr.generation {
        let (addr, generation) = (header.addr.get(), header.generation.get());
        return Err(format!("block {addr} of generation {generation} instead of {ptr:?}"));
    }
    if header.uuid != uuid {
        return Err("belongs to another file system".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE_SIZE: usize = 1024;

    fn reread(node: &Node) -> Result<Node, String> {
        let mut ptr = NodePtr { addr: 7, generation: 3, crc: 0 };
        let mut page = vec![0; NODE_SIZE];
        ptr.crc = node.encode(ptr, [5; 16], &[], &mut page);
        Node::decode(&page, &Expected { ptr, level: 0, uuid: [5; 16] })
    }

    /// Many orphans in a leaf that held something else before made it unreadable: slots had grown over the
    /// place of an empty value.
    #[test]
    fn slots_may_grow_over_the_place_of_an_empty_value() {
        let key = |offset| Key::new(0, Kind::Orphan, offset);
        let mut node = Node::new(NODE_SIZE, 0);
        node.insert(0, &key(0), &[1; 290]);
        node.insert(1, &key(1), &[]);
        node.remove(0);
        for offset in 2..36 {
            node.insert(node.count(), &key(offset), &[]);
        }
        let read = reread(&node).unwrap();
        assert_eq!(read.count(), 35);
        assert!(
            (0..35).all(|index| read.key(index) == key(index as u64 + 1) && read.value(index).is_empty())
        );
    }
}
