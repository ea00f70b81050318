//! The nodes of a tree that are in memory: which there are, which have to stay, which may go.
//!
//! A node stays while it is *dirty* (changed since the last snapshot), *held* by a checkpoint that writes it,
//! *pinned* by an operation, the root, or linked to children in memory. All others may be evicted: a clock
//! hand goes round the slots and takes the first that was not used since its last visit.
//!
//! What is counted are nodes, at [`node_cost`] bytes each, copies that a running checkpoint holds included.

use std::cell::Cell;
use std::rc::Rc;

use crate::ondisk::node::{ABSENT, Node, SLOT_LEN};
use crate::ondisk::superblock::NodePtr;

/// Memory that a node takes, at most: its page, the links of an inner node, and what keeps account of it.
pub(in crate::store) fn node_cost(node_size: usize) -> usize {
    let links = node_size / (SLOT_LEN + 24) * size_of::<u32>();
    node_size + links + size_of::<Node>() + size_of::<Option<Slot>>() + 64
}

/// A node in memory.
pub(super) struct Slot {
    pub(super) node: Rc<Node>,
    /// Changed since the last snapshot.
    pub(super) dirty: bool,
    /// A checkpoint under way writes the node; until it has ended, `durable` lacks the checksum.
    pub(super) held: bool,
    /// Used since the clock hand came by.
    pub(super) used: Cell<bool>,
    pub(super) pins: Cell<u32>,
    /// Where the last snapshot put the node.
    pub(super) durable: Option<NodePtr>,
    /// Tells this use of the slot from others.
    pub(super) serial: u64,
    /// Last footprint that counted the node.
    pub(super) stamp: u64,
}

/// All nodes in memory.
pub(super) struct Nodes {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    resident: usize,
    dirty: usize,
    pinned: Cell<usize>,
    /// Copies of changed or removed nodes that only a running checkpoint still has.
    copies: usize,
    capacity: usize,
    hand: usize,
    /// The hand went round in vain and nothing has become evictable since.
    stuck: Cell<bool>,
    serial: u64,
}

impl Nodes {
    /// No nodes, and room for `capacity` of them.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            resident: 0,
            dirty: 0,
            pinned: Cell::new(0),
            copies: 0,
            capacity,
            hand: 0,
            stuck: Cell::new(false),
            serial: 0,
        }
    }

    pub(super) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.stuck.set(false);
    }

    /// Pages that take memory.
    pub(super) fn pages(&self) -> usize {
        self.resident + self.copies
    }

    pub(super) fn dirty(&self) -> usize {
        self.dirty
    }

    pub(super) fn pinned(&self) -> usize {
        self.pinned.get()
    }

    pub(super) fn slot(&self, index: u32) -> &Slot {
        self.slots[index as usize].as_ref().expect("a linked slot is in use")
    }

    pub(super) fn slot_mut(&mut self, index: u32) -> &mut Slot {
        self.slots[index as usize].as_mut().expect("a linked slot is in use")
    }

    /// The slot, if it is still used for the node of that serial.
    pub(super) fn same(&mut self, index: u32, serial: u64) -> Option<&mut Slot> {
        self.slots[index as usize].as_mut().filter(|slot| slot.serial == serial)
    }

    pub(super) fn node(&self, index: u32) -> &Node {
        &self.slot(index).node
    }

    /// Marks a node as changed. Its content may still be a checkpoint's.
    pub(super) fn touch(&mut self, index: u32) {
        let entry = self.slots[index as usize].as_mut().expect("a linked slot is in use");
        if !entry.dirty {
            entry.dirty = true;
            self.dirty += 1;
        }
    }

    /// The node for a change: dirty from now on, and no checkpoint's.
    pub(super) fn node_mut(&mut self, index: u32) -> &mut Node {
        self.touch(index);
        let entry = self.slots[index as usize].as_mut().expect("a linked slot is in use");
        if entry.held && Rc::strong_count(&entry.node) > 1 {
            self.copies += 1;
        }
        Rc::make_mut(&mut entry.node)
    }

    /// Puts the pointer of a child that is forgotten into its parent, which that does not change otherwise.
    pub(super) fn unlink(&mut self, parent: u32, index: usize, ptr: NodePtr) {
        let entry = self.slots[parent as usize].as_mut().expect("a linked slot is in use");
        self.copies += usize::from(Rc::strong_count(&entry.node) > 1);
        Rc::make_mut(&mut entry.node).unlink(index, ptr);
        // It is not worth less than the child was.
        entry.used.set(true);
    }

    /// Adds a node: a clean one that was read from `durable`, or a new one.
    pub(super) fn add(&mut self, node: Node, durable: Option<NodePtr>) -> u32 {
        self.serial += 1;
        self.resident += 1;
        let dirty = durable.is_none();
        self.dirty += usize::from(dirty);
        let slot = Slot {
            node: Rc::new(node),
            dirty,
            held: false,
            used: Cell::new(false),
            pins: Cell::new(0),
            durable,
            serial: self.serial,
            stamp: 0,
        };
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(slot);
            return index;
        }
        self.slots.push(Some(slot));
        (self.slots.len() - 1) as u32
    }

    /// Forgets a node; gives where it was on the device.
    pub(super) fn remove(&mut self, index: u32) -> Option<NodePtr> {
        let entry = self.slots[index as usize].take().expect("a linked slot is in use");
        self.resident -= 1;
        self.dirty -= usize::from(entry.dirty);
        self.pinned.set(self.pinned.get() - usize::from(entry.pins.get() > 0));
        self.copies += usize::from(entry.held && Rc::strong_count(&entry.node) > 1);
        self.free.push(index);
        entry.durable
    }

    /// A checkpoint takes the node as it is; gives the place that it had before.
    pub(super) fn hold(&mut self, index: u32, place: NodePtr) -> Option<NodePtr> {
        let entry = self.slots[index as usize].as_mut().expect("a linked slot is in use");
        debug_assert!(entry.dirty && !entry.held);
        entry.dirty = false;
        entry.held = true;
        self.dirty -= 1;
        entry.durable.replace(place)
    }

    /// The checkpoint has written the node.
    pub(super) fn unhold(&mut self, index: u32, serial: u64, ptr: NodePtr) {
        if let Some(entry) = self.same(index, serial) {
            entry.held = false;
            entry.durable = Some(ptr);
        }
    }

    /// The checkpoint has ended and given its copies back.
    pub(super) fn drop_copies(&mut self) {
        self.copies = 0;
        self.stuck.set(false);
    }

    /// Keeps a node in memory; gives the serial to unpin it with.
    pub(super) fn pin(&self, index: u32) -> u64 {
        let slot = self.slot(index);
        if slot.pins.replace(slot.pins.get() + 1) == 0 {
            self.pinned.set(self.pinned.get() + 1);
        }
        slot.serial
    }

    /// Takes a pin back. The node may have gone meanwhile, by a merge.
    pub(super) fn unpin(&self, index: u32, serial: u64) {
        let Some(slot) = self.slots[index as usize].as_ref().filter(|slot| slot.serial == serial) else {
            return;
        };
        slot.pins.set(slot.pins.get() - 1);
        if slot.pins.get() == 0 {
            self.pinned.set(self.pinned.get() - 1);
            self.stuck.set(false);
        }
    }

    /// The next node that may go, so that there is room for `count` more; `None` when there is room, or no
    /// such node.
    pub(super) fn victim(&mut self, count: usize, root: u32) -> Option<u32> {
        if self.pages() + count <= self.capacity || self.stuck.get() {
            return None;
        }
        for _ in 0..2 * self.slots.len() {
            self.hand = if self.hand + 1 < self.slots.len() { self.hand + 1 } else { 0 };
            let Some(slot) = &self.slots[self.hand] else { continue };
            if !slot.used.replace(false) && self.hand as u32 != root && slot.is_idle() {
                return Some(self.hand as u32);
            }
        }
        self.stuck.set(true);
        None
    }
}

impl Slot {
    fn is_idle(&self) -> bool {
        !self.dirty && !self.held && self.pins.get() == 0 && self.node.children().all(|child| child == ABSENT)
    }
}
