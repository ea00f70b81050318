//! What a transaction is going to touch: found before anything is changed.
//!
//! A [`Plan`] holds the way to each item that a transaction changes, in the order of the changes. Making it
//! finds the nodes that have to be read first; applying the changes then uses the ways instead of searching
//! again, as long as no node was split, joined or removed meanwhile.

use std::mem;

use smallvec::SmallVec;

use super::{CHILD_LEN, NodeRef, Path, Tree};
use crate::ondisk::Key;
use crate::ondisk::node::{ABSENT, SLOT_LEN};

/// The way to one item.
struct Way {
    path: Path,
    leaf: u32,
    /// Bytes that a deletion takes from the leaf.
    removed: usize,
}

/// The ways to the items that a transaction changes. Its memory is used again for the next one.
#[derive(Default)]
pub(in crate::store) struct Plan {
    ways: Vec<Way>,
    next: usize,
    version: u64,
    missing: Vec<NodeRef>,
}

/// A change needs a node that was not planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Unplanned;

/// What a transaction's keys touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Footprint {
    /// Nodes on the ways to the keys.
    pub(in crate::store) touched: usize,
    /// Those of them that are not dirty.
    pub(in crate::store) clean: usize,
}

impl Plan {
    fn miss(&mut self, node: NodeRef) {
        if !self.missing.iter().any(|missing| missing.addr == node.addr) {
            self.missing.push(node);
        }
    }
}

impl Tree {
    /// Begins a new plan.
    pub(in crate::store) fn begin_plan(&self, plan: &mut Plan) {
        plan.ways.clear();
        plan.missing.clear();
        plan.next = 0;
        plan.version = self.version;
    }

    /// Adds the way to `key`, whose item is to be changed, inserted or, when it `goes`, removed.
    pub(in crate::store) fn plan(&self, plan: &mut Plan, key: &Key, goes: bool) {
        let (path, leaf) = match self.descend(key) {
            Ok(way) => way,
            Err(node) => return plan.miss(node),
        };
        let slot = self.nodes.slot(leaf);
        slot.used.set(true);
        let removed = match goes {
            true => slot.node.search(key).map_or(0, |index| SLOT_LEN + slot.node.value_len(index)),
            false => 0,
        };
        plan.ways.push(Way { path, leaf, removed });
    }

    /// Ends a plan. When nodes are not in memory gives them: then nothing may be changed yet.
    pub(in crate::store) fn end_plan(&self, plan: &mut Plan) -> Result<(), Vec<NodeRef>> {
        if plan.missing.is_empty() {
            self.plan_neighbours(plan);
        }
        if plan.missing.is_empty() { Ok(()) } else { Err(mem::take(&mut plan.missing)) }
    }

    /// Neighbours that a node may be merged with, wherever deletions may leave it too empty.
    fn plan_neighbours(&self, plan: &mut Plan) {
        let removed: usize = plan.ways.iter().map(|way| way.removed).sum();
        if removed == 0 {
            return;
        }
        let children = plan.ways.iter().filter(|way| way.removed > 0).count() * CHILD_LEN;
        let mut wanted: SmallVec<[NodeRef; 4]> = SmallVec::new();
        for way in plan.ways.iter().filter(|way| way.removed > 0) {
            let (mut node, mut loss) = (self.node(way.leaf), removed);
            for (parent, index) in way.path.iter().rev() {
                if node.used() >= node.capacity() / 4 + loss {
                    break;
                }
                (node, loss) = (self.node(*parent), children);
                let index = usize::from(*index);
                let pair = [index.checked_sub(1), Some(index + 1).filter(|next| *next < node.count())];
                for at in pair.into_iter().flatten() {
                    if node.child(at) == ABSENT {
                        wanted.push(self.absent(node, at));
                    }
                }
            }
        }
        wanted.into_iter().for_each(|node| plan.miss(node));
    }

    /// The way to the next item of the plan, whose key is `key`.
    pub(super) fn take_way(&self, plan: &mut Plan, key: &Key) -> Result<(Path, u32), Unplanned> {
        let way = plan.ways.get_mut(plan.next).ok_or(Unplanned)?;
        plan.next += 1;
        if plan.version == self.version {
            return Ok((mem::take(&mut way.path), way.leaf));
        }
        self.descend(key).map_err(|_| Unplanned)
    }

    /// What a plan touches.
    pub(in crate::store) fn footprint(&mut self, plan: &Plan) -> Footprint {
        self.stamp += 1;
        let stamp = self.stamp;
        let mut footprint = Footprint { touched: 0, clean: 0 };
        for way in &plan.ways {
            for slot in way.path.iter().map(|(slot, _)| *slot).chain([way.leaf]) {
                let entry = self.nodes.slot_mut(slot);
                if entry.stamp != stamp {
                    entry.stamp = stamp;
                    footprint.touched += 1;
                    footprint.clean += usize::from(!entry.dirty);
                }
            }
        }
        footprint
    }
}
