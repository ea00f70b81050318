//! The item tree, as much of it as is in memory.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `nodes` | the nodes in memory and which of them may go |
//! | `plan` | what a transaction needs in memory, found before anything is changed |
//! | `snapshot` | the dirty nodes, for a checkpoint |
//!
//! Each node in memory has a slot; an inner node links to those of its children that are in memory and holds
//! the pointers of the others. A search that needs another node ends with a [`NodeRef`] to it; whoever has
//! read the node hands it in ([`Tree::seek`], [`Tree::adopt`]), and the search is made again.
//!
//! Invariants:
//! - a node in memory that is not the root is linked by its parent, which is in memory too;
//! - an ancestor of a dirty node is dirty, so a snapshot that follows dirty nodes from the root finds all;
//! - the first slot of the leftmost inner nodes has the lowest key there is;
//! - a leaf is empty only if it is the root;
//! - a change that was planned misses no node, except neighbours that it would merge with: then it does not.

mod nodes;
mod plan;
mod snapshot;

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use smallvec::SmallVec;

use crate::ondisk::node::{ABSENT, Node, SLOT_LEN};
use crate::ondisk::superblock::NodePtr;
use crate::ondisk::{Key, Kind};
use crate::units::BlockAddr;

use nodes::Nodes;

pub(super) use nodes::node_cost;
pub(super) use plan::{Plan, Unplanned};
pub(super) use snapshot::{ChildPlace, Snapshot};

/// The lowest key.
pub(super) const KEY_MIN: Key = Key { owner: 0, kind: Kind::Group, offset: 0 };

/// Bytes that a child takes in an inner node.
const CHILD_LEN: usize = SLOT_LEN + 24;

/// Leaves that a scan asks for at a time once it has left its first one. Picked: half a million bytes of
/// items hide a device's latency, and are soon used.
const SCAN_AHEAD: usize = 8;

/// A tree node that is not in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRef {
    pub(super) addr: BlockAddr,
    level: u8,
    /// A key whose way leads through the node.
    key: Key,
}

/// The tree.
pub(super) struct Tree {
    nodes: Nodes,
    root: u32,
    node_size: usize,
    /// Nodes in all.
    live: usize,
    /// Places of nodes that were removed or moved since the last snapshot.
    dropped: Vec<BlockAddr>,
    /// Grows whenever a node is added or removed: ways found before may not hold any more.
    version: u64,
    stamp: u64,
}

/// Inner nodes on the way to a leaf: slot and index of the child taken.
type Path = SmallVec<[(u32, u16); 8]>;

/// What a [`NodeRef`] leads to by now.
pub(super) enum Seek {
    /// The node came into memory.
    Resident(u32),
    /// The node is to be read.
    Absent(Vacancy),
    /// The node is not there any more, or something above it has to be read first.
    Elsewhere,
}

/// Where a node that is not in memory belongs.
pub(super) struct Vacancy {
    parent: u32,
    index: usize,
    pub(super) ptr: NodePtr,
    pub(super) level: u8,
    /// Keys that the node may hold: from, and up to but not including.
    pub(super) bounds: (Key, Option<Key>),
}

impl Tree {
    /// A tree of one empty leaf, with room for `capacity` nodes in memory.
    pub(super) fn new(node_size: usize, capacity: usize) -> Self {
        Self::with_root(Node::new(node_size, 0), None, node_size, 1, capacity)
    }

    /// A tree of `live` nodes whose root was read from `ptr`; the others are on the device.
    pub(super) fn load(root: Node, ptr: NodePtr, node_size: usize, live: usize, capacity: usize) -> Self {
        Self::with_root(root, Some(ptr), node_size, live, capacity)
    }

    fn with_root(root: Node, ptr: Option<NodePtr>, node_size: usize, live: usize, capacity: usize) -> Self {
        let mut nodes = Nodes::new(capacity);
        let root = nodes.add(root, ptr);
        Self { nodes, root, node_size, live, dropped: Vec::new(), version: 0, stamp: 0 }
    }

    /// Changes how many nodes may be in memory.
    pub(super) fn set_capacity(&mut self, capacity: usize) {
        self.nodes.set_capacity(capacity);
        self.make_room(0);
    }

    /// Nodes in all.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// Nodes that the next checkpoint has to write.
    pub(super) fn dirty(&self) -> usize {
        self.nodes.dirty()
    }

    /// Nodes that operations hold in memory.
    pub(super) fn pinned(&self) -> usize {
        self.nodes.pinned()
    }

    /// Nodes that take memory, copies for a running checkpoint included.
    #[cfg(test)]
    pub(super) fn pages(&self) -> usize {
        self.nodes.pages()
    }

    /// Levels.
    pub(super) fn height(&self) -> usize {
        usize::from(self.node(self.root).level()) + 1
    }

    fn node(&self, slot: u32) -> &Node {
        self.nodes.node(slot)
    }

    fn add(&mut self, node: Node) -> u32 {
        self.live += 1;
        self.version += 1;
        self.nodes.add(node, None)
    }

    fn discard(&mut self, slot: u32) {
        self.live = self.live.saturating_sub(1);
        self.version += 1;
        let durable = self.nodes.remove(slot);
        self.dropped.extend(durable.map(|ptr| BlockAddr(ptr.addr)));
    }

    /// A child that is not in memory. Whatever key was looked for, that of its slot leads to it.
    fn absent(&self, parent: &Node, index: usize) -> NodeRef {
        let addr = BlockAddr(parent.child_ptr(index).addr);
        NodeRef { addr, level: parent.level() - 1, key: parent.key(index) }
    }

    fn descend(&self, key: &Key) -> Result<(Path, u32), NodeRef> {
        let mut path = Path::new();
        let mut at = self.root;
        loop {
            let node = self.node(at);
            if node.level() == 0 {
                return Ok((path, at));
            }
            let index = node.child_index(key);
            let child = node.child(index);
            if child == ABSENT {
                return Err(self.absent(node, index));
            }
            path.push((at, index as u16));
            at = child;
        }
    }

    /// Looks for the place of a node that was missing.
    pub(super) fn seek(&self, wanted: &NodeRef) -> Seek {
        let mut at = self.root;
        let mut bounds = (KEY_MIN, None);
        loop {
            let node = self.node(at);
            if node.level() <= wanted.level {
                return Seek::Elsewhere;
            }
            let index = node.child_index(&wanted.key);
            if index > 0 {
                bounds.0 = node.key(index);
            }
            if index + 1 < node.count() {
                bounds.1 = Some(node.key(index + 1));
            }
            let (child, level) = (node.child(index), node.level() - 1);
            match child {
                ABSENT if level == wanted.level && node.child_ptr(index).addr == wanted.addr.0 => {
                    let ptr = node.child_ptr(index);
                    return Seek::Absent(Vacancy { parent: at, index, ptr, level, bounds });
                }
                ABSENT => return Seek::Elsewhere,
                child if level == wanted.level => return Seek::Resident(child),
                child => at = child,
            }
        }
    }

    /// Takes a node that was read into memory; others go when there is no room.
    pub(super) fn adopt(&mut self, place: &Vacancy, node: Node) -> u32 {
        let slot = self.nodes.add(node, Some(place.ptr));
        self.node(place.parent).link(place.index, slot);
        self.nodes.pin(slot);
        self.make_room(0);
        let serial = self.nodes.slot(slot).serial;
        self.nodes.unpin(slot, serial);
        slot
    }

    /// Keeps a node in memory; gives the serial to unpin it with.
    pub(super) fn pin(&self, slot: u32) -> u64 {
        self.nodes.pin(slot)
    }

    /// Takes back a [`Tree::pin`].
    pub(super) fn unpin(&self, slot: u32, serial: u64) {
        self.nodes.unpin(slot, serial);
    }

    /// Evicts nodes until `count` more fit, or none may go.
    pub(super) fn make_room(&mut self, count: usize) {
        while let Some(victim) = self.nodes.victim(count, self.root) {
            self.evict(victim);
        }
    }

    /// Forgets a clean node without children in memory.
    fn evict(&mut self, victim: u32) {
        let slot = self.nodes.slot(victim);
        let Some(durable) = slot.durable else { return };
        let key = slot.node.key(0);
        let level = slot.node.level();
        let mut parent = self.root;
        while self.node(parent).level() > level + 1 {
            let node = self.node(parent);
            parent = node.child(node.child_index(&key));
        }
        let index = self.node(parent).child_index(&key);
        debug_assert_eq!(self.node(parent).child(index), victim);
        self.nodes.unlink(parent, index, durable);
        self.nodes.remove(victim);
    }

    /// Value of an item.
    pub(super) fn get(&self, key: &Key) -> Result<Option<&[u8]>, NodeRef> {
        let mut slot = self.nodes.slot(self.root);
        while slot.node.level() > 0 {
            let node = &*slot.node;
            let index = node.child_index(key);
            let child = node.child(index);
            if child == ABSENT {
                return Err(self.absent(node, index));
            }
            slot = self.nodes.slot(child);
        }
        slot.used.set(true);
        Ok(slot.node.search(key).ok().map(|index| slot.node.value(index)))
    }

    /// Calls `each` for the items from `from` (inclusive) to `to` (exclusive); gives the nodes that are
    /// missing to go on.
    pub(super) fn scan(
        &self,
        from: &Key,
        to: &Key,
        each: &mut impl FnMut(&Key, &[u8]) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Vec<NodeRef>> {
        self.scan_node(self.root, from, to, each)
    }

    fn scan_node(
        &self,
        slot: u32,
        from: &Key,
        to: &Key,
        each: &mut impl FnMut(&Key, &[u8]) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Vec<NodeRef>> {
        let entry = self.nodes.slot(slot);
        let node = &*entry.node;
        if node.level() > 0 {
            let first = node.child_index(from);
            for index in first..node.count() {
                if index > first && node.key(index) >= *to {
                    return Ok(ControlFlow::Break(()));
                }
                let child = match node.child(index) {
                    ABSENT if index == first => return Err(vec![self.absent(node, index)]),
                    ABSENT => return Err(self.absent_run(node, index, to)),
                    child => child,
                };
                if self.scan_node(child, from, to, each)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            return Ok(ControlFlow::Continue(()));
        }
        entry.used.set(true);
        let start = node.search(from).unwrap_or_else(|index| index);
        for index in start..node.count() {
            let key = node.key(index);
            if key >= *to || each(&key, node.value(index)).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The child at `index` and those behind it that a scan up to `to` is going to need.
    fn absent_run(&self, node: &Node, index: usize, to: &Key) -> Vec<NodeRef> {
        (index..node.count())
            .take(SCAN_AHEAD)
            .take_while(|at| node.key(*at) < *to)
            .filter(|at| node.child(*at) == ABSENT)
            .map(|at| self.absent(node, at))
            .collect()
    }

    /// The last item whose key is at most `key` and at least `not_before`.
    pub(super) fn last_at_or_before(
        &self,
        key: &Key,
        not_before: &Key,
    ) -> Result<Option<(Key, &[u8])>, NodeRef> {
        let found = self.last_in(self.root, key, not_before)?;
        Ok(found.filter(|(found, _)| found >= not_before))
    }

    fn last_in(&self, slot: u32, key: &Key, not_before: &Key) -> Result<Option<(Key, &[u8])>, NodeRef> {
        let entry = self.nodes.slot(slot);
        let node = &*entry.node;
        if node.level() > 0 {
            let index = node.child_index(key);
            let child = match node.child(index) {
                ABSENT => return Err(self.absent(node, index)),
                child => child,
            };
            let here = self.last_in(child, key, not_before)?;
            // Everything in the child before is smaller than this child's lower bound, and it is not empty.
            if here.is_some() || index == 0 || node.key(index) <= *not_before {
                return Ok(here);
            }
            return match node.child(index - 1) {
                ABSENT => Err(self.absent(node, index - 1)),
                child => self.last_in(child, key, not_before),
            };
        }
        entry.used.set(true);
        let index = match node.search(key) {
            Ok(index) => index,
            Err(0) => return Ok(None),
            Err(index) => index - 1,
        };
        Ok(Some((node.key(index), node.value(index))))
    }

    /// Inserts or replaces an item.
    pub(super) fn put(&mut self, plan: &mut Plan, key: &Key, value: &[u8]) -> Result<(), Unplanned> {
        let (path, leaf) = self.take_way(plan, key)?;
        self.put_at(path, leaf, key, value);
        Ok(())
    }

    fn put_at(&mut self, path: Path, leaf: u32, key: &Key, value: &[u8]) {
        self.touch(&path, leaf);
        let node = self.nodes.node_mut(leaf);
        let index = match node.search(key) {
            Ok(index) if node.value_len(index) == value.len() => {
                return node.value_mut(index).copy_from_slice(value);
            }
            Ok(index) => {
                node.remove(index);
                index
            }
            Err(index) => index,
        };
        if node.used() + SLOT_LEN + value.len() <= node.capacity() {
            return node.insert(index, key, value);
        }
        let (at, in_right) = split_point(node, index, SLOT_LEN + value.len());
        let mut right = node.split_off(at);
        match in_right {
            true => right.insert(index - at, key, value),
            false => node.insert(index, key, value),
        }
        let separator = right.key(0);
        let right = self.add(right);
        self.insert_child(path, separator, right);
    }

    /// Changes the value of an item in place, or inserts `absent` as it then is, when there is one. `None`
    /// when there is neither.
    pub(super) fn update<R>(
        &mut self,
        plan: &mut Plan,
        key: &Key,
        absent: Option<&mut [u8]>,
        with: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<Option<R>, Unplanned> {
        let (path, leaf) = self.take_way(plan, key)?;
        match (self.node(leaf).search(key), absent) {
            (Ok(index), _) => {
                self.touch(&path, leaf);
                Ok(Some(with(self.nodes.node_mut(leaf).value_mut(index))))
            }
            (Err(_), Some(value)) => {
                let result = with(value);
                self.put_at(path, leaf, key, value);
                Ok(Some(result))
            }
            (Err(_), None) => Ok(None),
        }
    }

    /// Removes an item; returns whether it was there.
    pub(super) fn delete(&mut self, plan: &mut Plan, key: &Key) -> Result<bool, Unplanned> {
        let (path, leaf) = self.take_way(plan, key)?;
        let Ok(index) = self.node(leaf).search(key) else { return Ok(false) };
        self.touch(&path, leaf);
        self.nodes.node_mut(leaf).remove(index);
        self.shrink(path, leaf);
        Ok(true)
    }

    /// Marks the way to a leaf that is about to change.
    fn touch(&mut self, path: &Path, leaf: u32) {
        if !self.nodes.slot(leaf).dirty {
            for (slot, _) in path {
                self.nodes.touch(*slot);
            }
        }
    }

    /// Puts a new node behind the child that the path took.
    fn insert_child(&mut self, mut path: Path, key: Key, child: u32) {
        let Some((parent, index)) = path.pop() else {
            return self.grow(&key, child);
        };
        let node = self.nodes.node_mut(parent);
        let index = usize::from(index) + 1;
        if node.used() + CHILD_LEN <= node.capacity() {
            return node.insert_child(index, &key, child);
        }
        let (at, in_right) = split_point(node, index, CHILD_LEN);
        let mut right = node.split_off(at);
        match in_right {
            true => right.insert_child(index - at, &key, child),
            false => node.insert_child(index, &key, child),
        }
        let separator = right.key(0);
        let right = self.add(right);
        self.insert_child(path, separator, right);
    }

    /// Puts a new root over the old one and its new neighbour.
    fn grow(&mut self, key: &Key, right: u32) {
        let left = self.root;
        let mut root = Node::new(self.node_size, self.node(left).level() + 1);
        root.insert_child(0, &KEY_MIN, left);
        root.insert_child(1, key, right);
        self.root = self.add(root);
    }

    /// Keeps a node from which something was removed from getting too empty.
    fn shrink(&mut self, mut path: Path, slot: u32) {
        let Some((parent, index)) = path.pop() else {
            return self.lower_root();
        };
        let index = usize::from(index);
        let node = self.node(slot);
        if node.count() > 0 && node.used() >= node.capacity() / 4 {
            return;
        }
        if node.count() == 0 {
            self.remove_child(parent, index);
            self.discard(slot);
        } else if !self.merge(parent, index) {
            return;
        }
        self.shrink(path, parent);
    }

    /// Removes a child from its parent; what it covered goes to a neighbour.
    fn remove_child(&mut self, parent: u32, index: usize) {
        let node = self.nodes.node_mut(parent);
        let lowest = node.key(0);
        node.remove(index);
        if index == 0 && node.count() > 0 {
            node.set_key(0, &lowest);
        }
    }

    /// Moves a child's content into a neighbour in memory that has room. A quarter stays free, so that the
    /// next insertion does not split again.
    fn merge(&mut self, parent: u32, index: usize) -> bool {
        let node = self.node(parent);
        let pairs = [index.checked_sub(1), (index + 1 < node.count()).then_some(index)];
        for left_index in pairs.into_iter().flatten() {
            let (left, right) = (node.child(left_index), node.child(left_index + 1));
            if left == ABSENT || right == ABSENT {
                continue;
            }
            let used = self.node(left).used() + self.node(right).used();
            if used <= self.node(left).capacity() / 4 * 3 {
                self.join(parent, left_index, left, right);
                return true;
            }
        }
        false
    }

    fn join(&mut self, parent: u32, left_index: usize, left: u32, right: u32) {
        let separator = self.node(parent).key(left_index + 1);
        let mut moved = self.node(right).clone();
        if moved.level() > 0 {
            // What lies between the separator and the first child's key belongs to the first child.
            moved.set_key(0, &separator);
        }
        self.nodes.node_mut(left).append_from(&moved, 0);
        self.remove_child(parent, left_index + 1);
        self.discard(right);
    }

    fn lower_root(&mut self) {
        while self.node(self.root).level() > 0 && self.node(self.root).count() <= 1 {
            let old = self.root;
            let child = self.node(old).children().next();
            self.root = match child {
                None => self.add(Node::new(self.node_size, 0)),
                // A root with one child does no harm; the next deletion has the child in memory.
                Some(ABSENT) => return,
                Some(child) => child,
            };
            self.discard(old);
        }
    }
}

/// Where to split a node that is to take an entry of `len` bytes at `index`: the slot that becomes the
/// right node's first, and whether the entry goes there.
///
/// Appending at the end leaves the left node full: whoever appends once does it again. Otherwise the halves
/// become as equal as they can; each has room, because no entry takes more than a third.
fn split_point(node: &Node, index: usize, len: usize) -> (usize, bool) {
    let count = node.count();
    if index == count {
        return (count, true);
    }
    let total = node.used() + len;
    let mut left = 0;
    let mut best = (usize::MAX, 0, false);
    for boundary in 1..=count {
        // Entries in order with the new one among them; `boundary` of them go to the left.
        let last = boundary - 1;
        left += match last.cmp(&index) {
            std::cmp::Ordering::Less => SLOT_LEN + node.value_len(last),
            std::cmp::Ordering::Equal => len,
            std::cmp::Ordering::Greater => SLOT_LEN + node.value_len(last - 1),
        };
        let larger = left.max(total - left);
        if larger < best.0 {
            let in_right = index >= boundary;
            best = (larger, if in_right { boundary } else { boundary - 1 }, in_right);
        }
    }
    (best.1, best.2)
}
