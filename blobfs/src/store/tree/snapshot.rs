//! The dirty nodes at one transaction boundary, for a checkpoint to write.

use std::rc::Rc;

use super::Tree;
use crate::ondisk::node::{ABSENT, Node};
use crate::ondisk::superblock::NodePtr;
use crate::units::BlockAddr;

/// Where a child of a node in a [`Snapshot`] is.
#[derive(Clone, Copy)]
pub(in crate::store) enum ChildPlace {
    /// In the same snapshot, at this index.
    Fresh(usize),
    /// Where an earlier checkpoint wrote it.
    Durable(NodePtr),
}

/// A node to be written by a checkpoint.
pub(in crate::store) struct SnapshotNode {
    slot: u32,
    serial: u64,
    pub(in crate::store) node: Rc<Node>,
    pub(in crate::store) addr: BlockAddr,
    pub(in crate::store) children: Vec<ChildPlace>,
}

/// The dirty nodes at one transaction boundary, children before parents.
pub(in crate::store) struct Snapshot {
    pub(in crate::store) nodes: Vec<SnapshotNode>,
    /// Where the root is.
    pub(in crate::store) root: ChildPlace,
    pub(in crate::store) root_level: u8,
    /// Places that no node of the snapshot uses any more.
    pub(in crate::store) dropped: Vec<BlockAddr>,
}

impl Tree {
    /// Takes all dirty nodes and gives each a new place. They are clean afterwards, but stay in memory until
    /// [`Tree::settle`]; a later change does not reach the snapshot.
    pub(in crate::store) fn snapshot(
        &mut self,
        generation: u64,
        mut place: impl FnMut() -> BlockAddr,
    ) -> Snapshot {
        let mut nodes = Vec::with_capacity(self.nodes.dirty());
        let root = self.snapshot_node(self.root, generation, &mut place, &mut nodes);
        debug_assert_eq!(self.nodes.dirty(), 0, "a dirty node hangs below a clean one");
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
        let entry = self.nodes.slot(slot);
        if let (false, Some(ptr)) = (entry.dirty, entry.durable) {
            return ChildPlace::Durable(ptr);
        }
        let node = entry.node.clone();
        let serial = entry.serial;
        let child_place = |(index, child)| match child {
            ABSENT => ChildPlace::Durable(node.child_ptr(index)),
            child => self.snapshot_node(child, generation, place, nodes),
        };
        let children = node.children().enumerate().map(child_place).collect();
        let addr = place();
        let old = self.nodes.hold(slot, NodePtr { addr: addr.0, generation, crc: 0 });
        self.dropped.extend(old.map(|ptr| BlockAddr(ptr.addr)));
        nodes.push(SnapshotNode { slot, serial, node, addr, children });
        ChildPlace::Fresh(nodes.len() - 1)
    }

    /// The snapshot is on the device, its nodes at `pointers`.
    pub(in crate::store) fn settle(&mut self, snapshot: Snapshot, pointers: &[NodePtr]) {
        for (node, ptr) in snapshot.nodes.into_iter().zip(pointers) {
            self.nodes.unhold(node.slot, node.serial, *ptr);
        }
        self.nodes.drop_copies();
        self.make_room(0);
    }
}
