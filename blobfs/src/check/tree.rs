//! Metadata places and the nodes in them.
//!
//! The tree is walked leaf by leaf in key order; only the nodes on the way to the next leaf and a batch of
//! pages per level are in memory. A node that cannot be used leaves a gap: its part of the key space is
//! unknown, which the walk says where it happens.

use std::collections::{HashSet, VecDeque};
use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError};
use reactor::sync::join_all;

use super::finding::{Finding, Findings};
use super::remedy::Remedy;
use crate::ondisk::node::{Expected, Node, own_ptr};
use crate::ondisk::superblock::{NodePtr, Superblock};
use crate::ondisk::{Key, Kind, chunk_map};
use crate::store::{Chunks, chunk_in_data_area, read};
use crate::units::BlockAddr;

/// Nodes that are read at a time.
const READS_AT_A_TIME: usize = 64;

/// The lowest key.
const KEY_MIN: Key = Key { owner: 0, kind: Kind::Group, offset: 0 };

/// Why a page was not read.
enum Unread {
    Outside,
    Device(BdevError),
}

impl Unread {
    fn problem(&self) -> String {
        match self {
            Self::Outside => "lies outside the device".to_owned(),
            Self::Device(error) => error.to_string(),
        }
    }
}

async fn read_page(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    addr: u64,
) -> Result<Rc<AlignedBuf>, Unread> {
    let end = addr.checked_add(superblock.node_blocks());
    if end.is_none_or(|end| end > superblock.block_count) {
        return Err(Unread::Outside);
    }
    let offset = addr * u64::from(superblock.block_size);
    read(bdev, offset, superblock.node_size as usize).await.map_err(Unread::Device)
}

/// The metadata chunks and which places in them are in use.
pub(super) struct Places {
    pub(super) chunks: Chunks,
    /// Every page of the map was read.
    pub(super) whole: bool,
    /// Places that a pointer leads to.
    reached: HashSet<u64>,
    /// Those of them that hold pages of the map.
    pages: Vec<u64>,
    node_blocks: u64,
}

impl Places {
    /// Reads the chunk map.
    pub(super) async fn read(bdev: &Rc<dyn Bdev>, superblock: &Superblock, findings: &mut Findings) -> Self {
        let node_blocks = superblock.node_blocks();
        let chunks = Chunks::new(node_blocks);
        let mut places =
            Self { chunks, whole: true, reached: HashSet::new(), pages: Vec::new(), node_blocks };
        let mut next = Some(superblock.chunk_map);
        while let Some(ptr) = next {
            if !places.reached.insert(ptr.addr) {
                let remedy = Remedy::lossy("the list of pages ends there");
                findings.push(Finding::PlaceUsedTwice { block: ptr.addr }, remedy);
                places.whole = false;
                break;
            }
            places.pages.push(ptr.addr);
            match read_map_page(bdev, superblock, ptr).await {
                Ok((entries, following)) => {
                    for entry in entries {
                        places.add(superblock, entry, findings);
                    }
                    next = following;
                }
                Err(problem) => {
                    let remedy = Remedy::lossy("made anew from the nodes that are there");
                    findings.push(Finding::ChunkMap { block: ptr.addr, problem }, remedy);
                    places.whole = false;
                    break;
                }
            }
        }
        for block in &places.pages {
            places.check_marked(*block, findings);
        }
        places
    }

    /// Adds a chunk.
    pub(super) fn add(
        &mut self,
        superblock: &Superblock,
        entry: chunk_map::ChunkEntry,
        findings: &mut Findings,
    ) {
        let block = entry.start;
        let remedy = Remedy::safe("left out of the chunk map");
        if !chunk_in_data_area(superblock, entry.start, entry.nodes) {
            findings.push(Finding::Chunk { block, problem: "lies outside the data area" }, remedy);
        } else if !self.chunks.add(entry) {
            findings.push(Finding::Chunk { block, problem: "overlaps another chunk" }, remedy);
        }
    }

    fn check_marked(&self, block: u64, findings: &mut Findings) {
        if self.whole && !self.chunks.is_used(BlockAddr(block)) {
            findings.push(Finding::PlaceNotMarked { block }, Remedy::safe("marked"));
        }
    }

    /// A pointer leads to `block`.
    fn reach(&mut self, block: u64, findings: &mut Findings) {
        self.reached.insert(block);
        self.check_marked(block, findings);
    }

    /// Whether a pointer leads to `block`.
    pub(super) fn is_reached(&self, block: u64) -> bool {
        self.reached.contains(&block)
    }

    /// All places that pointers lead to, pages of the map among them, in order.
    pub(super) fn reached(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self.reached.iter().copied().collect();
        blocks.sort_unstable();
        blocks
    }

    /// Forgets which places pointers lead to, except for the pages of the map: before another walk.
    pub(super) fn walk_again(&mut self) {
        self.reached = self.pages.iter().copied().collect();
    }

    /// Places that are marked as used, but that no pointer leads to.
    pub(super) fn unreached(&self) -> Vec<u64> {
        let mut blocks = Vec::new();
        for chunk in self.chunks.entries() {
            let places = (0..chunk.nodes).filter(|place| chunk.used & 1 << place != 0);
            let places = places.map(|place| chunk.start + u64::from(place) * self.node_blocks);
            blocks.extend(places.filter(|block| !self.reached.contains(block)));
        }
        blocks
    }

    /// Places that are marked as used.
    pub(super) fn marked(&self) -> u64 {
        self.chunks.entries().map(|chunk| u64::from(chunk.used.count_ones())).sum()
    }

    /// Looks for places that nothing uses, once every node was reached.
    pub(super) fn find_leaked(&self, findings: &mut Findings) {
        for block in self.unreached() {
            findings.push(Finding::PlaceLeaked { block }, Remedy::safe("marked as free"));
        }
    }
}

type MapPage = (Vec<chunk_map::ChunkEntry>, Option<NodePtr>);

async fn read_map_page(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    ptr: NodePtr,
) -> Result<MapPage, String> {
    let page = read_page(bdev, superblock, ptr.addr).await.map_err(|unread| unread.problem())?;
    check_generation(ptr, superblock.generation)?;
    chunk_map::decode_page(&page, ptr, superblock.uuid)
}

/// What is pointed to was written by the same checkpoint or by an earlier one.
fn check_generation(ptr: NodePtr, newest: u64) -> Result<(), String> {
    match ptr.generation <= newest {
        true => Ok(()),
        false => Err(format!("generation {} is newer than {newest}, which leads to it", ptr.generation)),
    }
}

/// A node that a pointer leads to.
struct Child {
    ptr: NodePtr,
    /// Keys that it may hold: from, and up to but not including.
    from: Key,
    to: Option<Key>,
    /// Generation of what holds the pointer.
    newest: u64,
}

/// A leaf that was found without the inner nodes above it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rescued {
    pub(super) ptr: NodePtr,
    first: Key,
    last: Key,
}

/// Reads places that are marked as used although nothing leads to them, and gives the leaves there in key
/// order: what hung on inner nodes that are lost. A checkpoint marks exactly what it uses, so these are no
/// leaves of an earlier state.
pub(super) async fn rescue(bdev: &Rc<dyn Bdev>, superblock: &Superblock, places: &Places) -> Vec<Rescued> {
    let mut found = Vec::new();
    for batch in places.unreached().chunks(READS_AT_A_TIME) {
        let pages = join_all(batch.iter().map(|block| read_page(bdev, superblock, *block))).await;
        for (block, page) in batch.iter().zip(pages) {
            found.extend(page.ok().and_then(|page| rescued_leaf(superblock, *block, &page)));
        }
    }
    found.sort_unstable_by_key(|leaf| leaf.first);
    let mut leaves: Vec<Rescued> = Vec::with_capacity(found.len());
    for leaf in found {
        if leaves.last().is_none_or(|before| before.last < leaf.first) {
            leaves.push(leaf);
        }
    }
    leaves
}

fn rescued_leaf(superblock: &Superblock, block: u64, page: &[u8]) -> Option<Rescued> {
    let ptr = own_ptr(page)?;
    if ptr.addr != block || ptr.generation > superblock.generation {
        return None;
    }
    let node = Node::decode(page, &Expected { ptr, level: 0, uuid: superblock.uuid }).ok()?;
    let last = node.count().checked_sub(1)?;
    Some(Rescued { ptr, first: node.key(0), last: node.key(last) })
}

/// The rest of the children of one node, or of several of one level.
struct Level {
    level: u8,
    children: VecDeque<Child>,
    /// Pages that were read ahead, in the order of the children.
    pages: VecDeque<(Child, Result<Rc<AlignedBuf>, Unread>)>,
}

/// A leaf, and what leads to it.
pub(super) struct Leaf {
    pub(super) node: Node,
    pub(super) ptr: NodePtr,
}

/// What comes next in key order.
pub(super) enum Step {
    /// A leaf.
    Leaf(Leaf),
    /// Part of the key space is unknown.
    Gap,
}

/// A walk over the leaves.
pub(super) struct Walk<'a> {
    bdev: &'a Rc<dyn Bdev>,
    superblock: &'a Superblock,
    stack: Vec<Level>,
    /// Leaves that take the place of the inner nodes above them, which are lost; in key order.
    rescued: &'a [Rescued],
    /// Nodes seen so far.
    pub(super) nodes: u64,
}

impl<'a> Walk<'a> {
    /// A walk that begins at the first leaf.
    pub(super) fn new(bdev: &'a Rc<dyn Bdev>, superblock: &'a Superblock, rescued: &'a [Rescued]) -> Self {
        let root = Child { ptr: superblock.root, from: KEY_MIN, to: None, newest: superblock.generation };
        let level =
            Level { level: superblock.root_level, children: VecDeque::from([root]), pages: VecDeque::new() };
        Self { bdev, superblock, stack: vec![level], rescued, nodes: 0 }
    }

    /// The next leaf or gap; `None` at the end.
    pub(super) async fn next(&mut self, places: &mut Places, findings: &mut Findings) -> Option<Step> {
        loop {
            let top = self.stack.last_mut()?;
            if top.pages.is_empty() {
                read_ahead(self.bdev, self.superblock, top).await;
            }
            let level = top.level;
            let Some((child, page)) = top.pages.pop_front() else {
                self.stack.pop();
                continue;
            };
            self.nodes += 1;
            let (block, ptr, bounds) = (child.ptr.addr, child.ptr, (child.from, child.to));
            if places.is_reached(block) {
                let remedy = Remedy::lossy("the second pointer to it is dropped");
                findings.push(Finding::PlaceUsedTwice { block }, remedy);
                return Some(Step::Gap);
            }
            match self.take(child, page, level) {
                Ok((node, children)) => {
                    places.reach(block, findings);
                    if level == 0 {
                        return Some(Step::Leaf(Leaf { node, ptr }));
                    }
                    self.stack.push(Level { level: level - 1, children, pages: VecDeque::new() });
                }
                Err(problem) => {
                    let rescued = self.rescued_within(bounds, level);
                    let remedy = match rescued.is_empty() {
                        true => Remedy::lossy("dropped, with what it held"),
                        false => Remedy::lossy("the leaves below it are linked again"),
                    };
                    findings.push(Finding::Node { block, level, problem }, remedy);
                    if rescued.is_empty() {
                        return Some(Step::Gap);
                    }
                    self.stack.push(Level { level: 0, children: rescued, pages: VecDeque::new() });
                }
            }
        }
    }

    /// The rescued leaves that belong below an inner node.
    fn rescued_within(&self, (from, to): (Key, Option<Key>), level: u8) -> VecDeque<Child> {
        let inside = |leaf: &&Rescued| level > 0 && leaf.first >= from && to.is_none_or(|to| leaf.last < to);
        let child = |leaf: &Rescued| Child {
            ptr: leaf.ptr,
            from: leaf.first,
            to,
            newest: self.superblock.generation,
        };
        self.rescued.iter().filter(inside).map(child).collect()
    }

    /// Checks a node; gives it with its children.
    fn take(
        &self,
        child: Child,
        page: Result<Rc<AlignedBuf>, Unread>,
        level: u8,
    ) -> Result<(Node, VecDeque<Child>), String> {
        let page = page.map_err(|unread| unread.problem())?;
        check_generation(child.ptr, child.newest)?;
        let expected = Expected { ptr: child.ptr, level, uuid: self.superblock.uuid };
        let node = Node::decode(&page, &expected)?;
        let keys: Vec<Key> = (0..node.count()).map(|index| node.key(index)).collect();
        let below = keys.first().is_some_and(|key| *key < child.from);
        let above = keys.last().zip(child.to).is_some_and(|(key, end)| *key >= end);
        if below || above {
            return Err("keys lie outside the range of the slot that leads here".to_owned());
        }
        if keys.is_empty() && child.ptr != self.superblock.root {
            return Err("is empty".to_owned());
        }
        let bounds = |index: usize| {
            let from = if index == 0 { child.from } else { keys[index] };
            (from, keys.get(index + 1).copied().or(child.to))
        };
        let count = if level > 0 { node.count() } else { 0 };
        let children = (0..count).map(|index| {
            let (from, to) = bounds(index);
            Child { ptr: node.child_ptr(index), from, to, newest: child.ptr.generation }
        });
        let children = children.collect();
        Ok((node, children))
    }
}

async fn read_ahead(bdev: &Rc<dyn Bdev>, superblock: &Superblock, level: &mut Level) {
    let count = level.children.len().min(READS_AT_A_TIME);
    let batch: Vec<Child> = level.children.drain(..count).collect();
    let pages = join_all(batch.iter().map(|child| read_page(bdev, superblock, child.ptr.addr))).await;
    level.pages = batch.into_iter().zip(pages).collect();
}
