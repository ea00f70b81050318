//! The item tree in memory.
//!
//! All nodes are in memory: loaded at mount, kept until the end. Each has a slot in a slab; an inner node
//! names its children by slot. What was changed since the last [`Tree::snapshot`] is *dirty*.
//!
//! Invariants:
//! - an ancestor of a dirty node is dirty, so a snapshot that follows dirty nodes from the root finds all;
//! - the first slot of the leftmost inner nodes has the lowest key there is;
//! - a leaf is empty only if it is the root;
//! - a slot's `durable` pointer is where the last snapshot put the node; nobody but that snapshot's
//!   checkpoint may rely on its checksum before that checkpoint has ended.

use std::ops::ControlFlow;
use std::rc::Rc;

use smallvec::SmallVec;

use crate::ondisk::node::{Node, SLOT_LEN};
use crate::ondisk::superblock::NodePtr;
use crate::ondisk::{Key, Kind};
use crate::units::BlockAddr;

/// The lowest key.
pub(super) const KEY_MIN: Key = Key { owner: 0, kind: Kind::Group, offset: 0 };

/// Bytes that a child takes in an inner node.
const CHILD_LEN: usize = SLOT_LEN + 24;

struct Slot {
    node: Rc<Node>,
    dirty: bool,
    durable: Option<NodePtr>,
    /// Tells this use of the slot from others.
    serial: u64,
    /// Last footprint that counted the node.
    stamp: u64,
}

/// The tree.
pub(super) struct Tree {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    root: u32,
    node_size: usize,
    live: usize,
    dirty: usize,
    /// Places of nodes that were removed or moved since the last snapshot.
    dropped: Vec<BlockAddr>,
    serial: u64,
    stamp: u64,
}

/// Where a child of a node in a [`Snapshot`] is.
#[derive(Clone, Copy)]
pub(super) enum ChildPlace {
    /// In the same snapshot, at this index.
    Fresh(usize),
    /// Where an earlier checkpoint wrote it.
    Durable(NodePtr),
}

/// A node to be written by a checkpoint.
pub(super) struct SnapshotNode {
    slot: u32,
    serial: u64,
    pub(super) node: Rc<Node>,
    pub(super) addr: BlockAddr,
    pub(super) children: Vec<ChildPlace>,
}

/// The dirty nodes at one transaction boundary, children before parents.
pub(super) struct Snapshot {
    pub(super) nodes: Vec<SnapshotNode>,
    /// Where the root is.
    pub(super) root: ChildPlace,
    pub(super) root_level: u8,
    /// Places that no node of the snapshot uses any more.
    pub(super) dropped: Vec<BlockAddr>,
}

/// What a transaction's keys touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Footprint {
    /// Nodes on the ways to the keys.
    pub(super) touched: usize,
    /// Those of them that are not dirty.
    pub(super) clean: usize,
}

/// Inner nodes on the way to a leaf: slot and index of the child taken.
type Path = SmallVec<[(u32, usize); 8]>;

impl Tree {
    /// A tree of one empty leaf.
    pub(super) fn new(node_size: usize) -> Self {
        let mut tree = Self {
            slots: Vec::new(),
            free: Vec::new(),
            root: 0,
            node_size,
            live: 0,
            dirty: 0,
            dropped: Vec::new(),
            serial: 0,
            stamp: 0,
        };
        tree.root = tree.add(Node::new(node_size, 0));
        tree
    }

    /// A tree whose nodes are still to be given by [`Tree::adopt`] and [`Tree::set_root`].
    pub(super) fn unloaded(node_size: usize) -> Self {
        let mut tree = Self::new(node_size);
        tree.slots.clear();
        tree.live = 0;
        tree.dirty = 0;
        tree
    }

    /// Takes a node that was read from the device.
    pub(super) fn adopt(&mut self, node: Node, ptr: NodePtr) -> u32 {
        let slot = self.add(node);
        let entry = self.slot_mut(slot);
        entry.dirty = false;
        entry.durable = Some(ptr);
        self.dirty -= 1;
        slot
    }

    /// Names the root among adopted nodes.
    pub(super) fn set_root(&mut self, root: u32) {
        self.root = root;
    }

    /// Tells an adopted inner node where its children are.
    pub(super) fn set_children(&mut self, slot: u32, children: Vec<u32>) {
        Rc::make_mut(&mut self.slot_mut(slot).node).set_children(children);
    }

    /// Nodes in all.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// Nodes that the next checkpoint has to write.
    pub(super) fn dirty(&self) -> usize {
        self.dirty
    }

    /// Levels.
    pub(super) fn height(&self) -> usize {
        usize::from(self.node(self.root).level()) + 1
    }

    fn slot(&self, slot: u32) -> &Slot {
        self.slots[slot as usize].as_ref().expect("a child's slot is in use")
    }

    fn slot_mut(&mut self, slot: u32) -> &mut Slot {
        self.slots[slot as usize].as_mut().expect("a child's slot is in use")
    }

    fn node(&self, slot: u32) -> &Node {
        &self.slot(slot).node
    }

    /// The node for a change: dirty from now on, and no snapshot's.
    fn node_mut(&mut self, slot: u32) -> &mut Node {
        let entry = self.slots[slot as usize].as_mut().expect("a child's slot is in use");
        if !entry.dirty {
            entry.dirty = true;
            self.dirty += 1;
        }
        Rc::make_mut(&mut entry.node)
    }

    fn add(&mut self, node: Node) -> u32 {
        self.serial += 1;
        self.live += 1;
        self.dirty += 1;
        let slot =
            Slot { node: Rc::new(node), dirty: true, durable: None, serial: self.serial, stamp: self.stamp };
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(slot);
            return index;
        }
        self.slots.push(Some(slot));
        (self.slots.len() - 1) as u32
    }

    fn discard(&mut self, slot: u32) {
        let entry = self.slots[slot as usize].take().expect("a child's slot is in use");
        self.live -= 1;
        self.dirty -= usize::from(entry.dirty);
        self.dropped.extend(entry.durable.map(|ptr| BlockAddr(ptr.addr)));
        self.free.push(slot);
    }

    fn descend(&self, key: &Key) -> (Path, u32) {
        let mut path = Path::new();
        let mut at = self.root;
        while self.node(at).level() > 0 {
            let index = self.node(at).child_index(key);
            path.push((at, index));
            at = self.node(at).child(index);
        }
        (path, at)
    }

    /// Value of an item.
    pub(super) fn get(&self, key: &Key) -> Option<&[u8]> {
        let mut node = self.node(self.root);
        while node.level() > 0 {
            node = self.node(node.child(node.child_index(key)));
        }
        node.search(key).ok().map(|index| node.value(index))
    }

    /// Calls `each` for the items from `from` (inclusive) to `to` (exclusive).
    pub(super) fn scan(
        &self,
        from: &Key,
        to: &Key,
        each: &mut impl FnMut(&Key, &[u8]) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.scan_node(self.root, from, to, each)
    }

    fn scan_node(
        &self,
        slot: u32,
        from: &Key,
        to: &Key,
        each: &mut impl FnMut(&Key, &[u8]) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let node = self.node(slot);
        if node.level() > 0 {
            for index in node.child_index(from)..node.count() {
                if index > 0 && node.key(index) >= *to {
                    return ControlFlow::Break(());
                }
                self.scan_node(node.child(index), from, to, each)?;
            }
            return ControlFlow::Continue(());
        }
        let start = node.search(from).unwrap_or_else(|index| index);
        for index in start..node.count() {
            let key = node.key(index);
            if key >= *to {
                return ControlFlow::Break(());
            }
            each(&key, node.value(index))?;
        }
        ControlFlow::Continue(())
    }

    /// The last item whose key is at most `key`.
    pub(super) fn last_at_or_before(&self, key: &Key) -> Option<(Key, &[u8])> {
        self.last_in(self.root, key)
    }

    fn last_in(&self, slot: u32, key: &Key) -> Option<(Key, &[u8])> {
        let node = self.node(slot);
        if node.level() > 0 {
            let index = node.child_index(key);
            let here = self.last_in(node.child(index), key);
            // Everything in the child before is smaller, and it is not empty.
            return here.or_else(|| index.checked_sub(1).and_then(|i| self.last_in(node.child(i), key)));
        }
        let index = match node.search(key) {
            Ok(index) => index,
            Err(index) => index.checked_sub(1)?,
        };
        Some((node.key(index), node.value(index)))
    }

    /// Inserts or replaces an item.
    pub(super) fn put(&mut self, key: &Key, value: &[u8]) {
        let (path, leaf) = self.descend(key);
        self.touch(&path);
        let node = self.node_mut(leaf);
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

    /// Changes an item's value in place; `None` when there is no such item.
    pub(super) fn update<R>(&mut self, key: &Key, with: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let (path, leaf) = self.descend(key);
        let index = self.node(leaf).search(key).ok()?;
        self.touch(&path);
        Some(with(self.node_mut(leaf).value_mut(index)))
    }

    /// Removes an item; returns whether it was there.
    pub(super) fn delete(&mut self, key: &Key) -> bool {
        let (path, leaf) = self.descend(key);
        let Ok(index) = self.node(leaf).search(key) else { return false };
        self.touch(&path);
        self.node_mut(leaf).remove(index);
        self.shrink(path, leaf);
        true
    }

    fn touch(&mut self, path: &Path) {
        for (slot, _) in path {
            self.node_mut(*slot);
        }
    }

    /// Puts a new node behind the child that the path took.
    fn insert_child(&mut self, mut path: Path, key: Key, child: u32) {
        let Some((parent, index)) = path.pop() else {
            return self.grow(&key, child);
        };
        let node = self.node_mut(parent);
        let index = index + 1;
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
        let node = self.node_mut(parent);
        let lowest = node.key(0);
        node.remove(index);
        if index == 0 && node.count() > 0 {
            node.set_key(0, &lowest);
        }
    }

    /// Moves a child's content into a neighbour that has room. A quarter stays free, so that the next
    /// insertion does not split again.
    fn merge(&mut self, parent: u32, index: usize) -> bool {
        let node = self.node(parent);
        let pairs = [index.checked_sub(1), (index + 1 < node.count()).then_some(index)];
        for left_index in pairs.into_iter().flatten() {
            let (left, right) = (node.child(left_index), node.child(left_index + 1));
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
        self.node_mut(left).append_from(&moved, 0);
        self.remove_child(parent, left_index + 1);
        self.discard(right);
    }

    fn lower_root(&mut self) {
        while self.node(self.root).level() > 0 && self.node(self.root).count() <= 1 {
            let old = self.root;
            self.root = match self.node(old).count() {
                0 => self.add(Node::new(self.node_size, 0)),
                _ => self.node(old).child(0),
            };
            self.discard(old);
        }
    }

    /// What the ways to `keys` touch.
    pub(super) fn footprint<'a>(&mut self, keys: impl Iterator<Item = &'a Key>) -> Footprint {
        self.stamp += 1;
        let stamp = self.stamp;
        let mut footprint = Footprint { touched: 0, clean: 0 };
        for key in keys {
            let (path, leaf) = self.descend(key);
            for slot in path.iter().map(|(slot, _)| *slot).chain([leaf]) {
                let entry = self.slot_mut(slot);
                if entry.stamp != stamp {
                    entry.stamp = stamp;
                    footprint.touched += 1;
                    footprint.clean += usize::from(!entry.dirty);
                }
            }
        }
        footprint
    }

    /// Takes all dirty nodes and gives each a new place. They are clean afterwards; a later change does not
    /// reach the snapshot.
    pub(super) fn snapshot(&mut self, generation: u64, mut place: impl FnMut() -> BlockAddr) -> Snapshot {
        let mut nodes = Vec::with_capacity(self.dirty);
        let root = self.snapshot_node(self.root, generation, &mut place, &mut nodes);
        debug_assert_eq!(self.dirty, 0, "a dirty node hangs below a clean one");
        let root_level = self.node(self.root).level();
        Snapshot { nodes, root, root_level, dropped: std::mem::take(&mut self.dropped) }
    }

    fn snapshot_node(
        &mut self,
        slot: u32,
        generation: u64,
        place: &mut impl FnMut() -> BlockAddr,
        nodes: &mut Vec<SnapshotNode>,
    ) -> ChildPlace {
        let entry = self.slot(slot);
        if let (false, Some(ptr)) = (entry.dirty, entry.durable) {
            return ChildPlace::Durable(ptr);
        }
        let node = entry.node.clone();
        let serial = entry.serial;
        let children = node
            .children()
            .iter()
            .map(|child| self.snapshot_node(*child, generation, place, nodes))
            .collect();
        let addr = place();
        let entry = self.slot_mut(slot);
        let old = entry.durable.replace(NodePtr { addr: addr.0, generation, crc: 0 });
        entry.dirty = false;
        self.dirty -= 1;
        self.dropped.extend(old.map(|ptr| BlockAddr(ptr.addr)));
        nodes.push(SnapshotNode { slot, serial, node, addr, children });
        ChildPlace::Fresh(nodes.len() - 1)
    }

    /// A node of the last snapshot is on the device.
    pub(super) fn written(&mut self, node: &SnapshotNode, ptr: NodePtr) {
        if let Some(entry) = self.slots[node.slot as usize].as_mut().filter(|slot| slot.serial == node.serial)
        {
            entry.durable = Some(ptr);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const NODE_SIZE: usize = 1024;

    fn key() -> impl Strategy<Value = Key> {
        (0..40_u64, prop_oneof![Just(Kind::Group), Just(Kind::Dirent), Just(Kind::Extent)], 0..30_u64)
            .prop_map(|(owner, kind, offset)| Key::new(owner, kind, offset))
    }

    fn change() -> impl Strategy<Value = (Key, Option<Vec<u8>>)> {
        (
            key(),
            prop_oneof![
                3 => prop::collection::vec(any::<u8>(), 0..=296).prop_map(Some),
                2 => Just(None),
            ],
        )
    }

    fn check(tree: &Tree, model: &BTreeMap<Key, Vec<u8>>) {
        let mut items = Vec::new();
        let end = Key::new(u64::MAX, Kind::Checksum, u64::MAX);
        let _ = tree.scan(&KEY_MIN, &end, &mut |key, value| {
            items.push((*key, value.to_vec()));
            ControlFlow::Continue(())
        });
        assert!(items.iter().map(|(k, v)| (k, v)).eq(model.iter()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_tree_is_an_ordered_map(changes in prop::collection::vec(change(), 1..600), probes in prop::collection::vec(key(), 20)) {
            let mut tree = Tree::new(NODE_SIZE);
            let mut model = BTreeMap::new();
            let mut next = 0;
            for (number, (key, value)) in changes.into_iter().enumerate() {
                match value {
                    Some(value) => {
                        tree.put(&key, &value);
                        model.insert(key, value);
                    }
                    None => prop_assert_eq!(tree.delete(&key), model.remove(&key).is_some()),
                }
                if number % 50 == 49 {
                    tree.snapshot(1, || { next += 1; BlockAddr(next) });
                    prop_assert_eq!(tree.dirty(), 0);
                }
            }
            check(&tree, &model);
            for probe in probes {
                prop_assert_eq!(tree.get(&probe), model.get(&probe).map(Vec::as_slice));
                let before = model.range(..=probe).next_back().map(|(k, v)| (*k, v.as_slice()));
                prop_assert_eq!(tree.last_at_or_before(&probe), before);
                let from = model.range(probe..).next().map(|(k, _)| *k);
                let mut first = None;
                let end = Key::new(u64::MAX, Kind::Checksum, u64::MAX);
                let _ = tree.scan(&probe, &end, &mut |key, _| { first = Some(*key); ControlFlow::Break(()) });
                prop_assert_eq!(first, from);
            }
            let keys: Vec<Key> = model.keys().copied().collect();
            for key in keys {
                prop_assert!(tree.delete(&key));
            }
            prop_assert_eq!((tree.live(), tree.height()), (1, 1));
        }
    }

    #[test]
    fn a_snapshot_does_not_see_later_changes() {
        let mut tree = Tree::new(NODE_SIZE);
        tree.put(&KEY_MIN, b"old");
        let snapshot = tree.snapshot(1, || BlockAddr(1));
        tree.put(&KEY_MIN, b"new");
        assert_eq!(snapshot.nodes[0].node.value(0), b"old");
        assert_eq!(tree.get(&KEY_MIN), Some(b"new".as_slice()));
        assert_eq!(tree.dirty(), 1);
    }
}
