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
use crate::ondisk::node::{Expected, Node};
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
    node_blocks: u64,
}

impl Places {
    /// Reads the chunk map.
    pub(super) async fn read(bdev: &Rc<dyn Bdev>, superblock: &Superblock, findings: &mut Findings) -> Self {
        let node_blocks = superblock.node_blocks();
        let chunks = Chunks::new(node_blocks);
        let mut places = Self { chunks, whole: true, reached: HashSet::new(), node_blocks };
        let mut pages = Vec::new();
        let mut next = Some(superblock.chunk_map);
        while let Some(ptr) = next {
            if !places.reached.insert(ptr.addr) {
                findings.push(Finding::PlaceUsedTwice { block: ptr.addr });
                places.whole = false;
                break;
            }
            pages.push(ptr.addr);
            match read_map_page(bdev, superblock, ptr).await {
                Ok((entries, following)) => {
                    for entry in entries {
                        places.add(superblock, entry, findings);
                    }
                    next = following;
                }
                Err(problem) => {
                    findings.push(Finding::ChunkMap { block: ptr.addr, problem });
                    places.whole = false;
                    break;
                }
            }
        }
        for block in pages {
            places.check_marked(block, findings);
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
        if !chunk_in_data_area(superblock, entry.start, entry.nodes) {
            findings.push(Finding::Chunk { block, problem: "lies outside the data area" });
        } else if !self.chunks.add(entry) {
            findings.push(Finding::Chunk { block, problem: "overlaps another chunk" });
        }
    }

    /// A pointer leads to `block`; false when another one did before.
    fn reach(&mut self, block: u64, findings: &mut Findings) -> bool {
        if !self.reached.insert(block) {
            findings.push(Finding::PlaceUsedTwice { block });
            return false;
        }
        self.check_marked(block, findings);
        true
    }

    fn check_marked(&self, block: u64, findings: &mut Findings) {
        if self.whole && !self.chunks.is_used(BlockAddr(block)) {
            findings.push(Finding::PlaceNotMarked { block });
        }
    }

    /// Places that are marked as used.
    pub(super) fn marked(&self) -> u64 {
        self.chunks.entries().map(|chunk| u64::from(chunk.used.count_ones())).sum()
    }

    /// Looks for places that nothing uses, once every node was reached.
    pub(super) fn find_leaked(&self, findings: &mut Findings) {
        for chunk in self.chunks.entries() {
            for place in (0..chunk.nodes).filter(|place| chunk.used & 1 << place != 0) {
                let block = chunk.start + u64::from(place) * self.node_blocks;
                if !self.reached.contains(&block) {
                    findings.push(Finding::PlaceLeaked { block });
                }
            }
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

/// The rest of the children of one node, or of several of one level.
struct Level {
    level: u8,
    children: VecDeque<Child>,
    /// Pages that were read ahead, in the order of the children.
    pages: VecDeque<(Child, Result<Rc<AlignedBuf>, Unread>)>,
}

/// What comes next in key order.
pub(super) enum Step {
    /// A leaf.
    Leaf(Node),
    /// Part of the key space is unknown.
    Gap,
}

/// A walk over the leaves.
pub(super) struct Walk<'a> {
    bdev: &'a Rc<dyn Bdev>,
    superblock: &'a Superblock,
    stack: Vec<Level>,
    /// Nodes seen so far.
    pub(super) nodes: u64,
}

impl<'a> Walk<'a> {
    /// A walk that begins at the first leaf.
    pub(super) fn new(bdev: &'a Rc<dyn Bdev>, superblock: &'a Superblock) -> Self {
        let root = Child { ptr: superblock.root, from: KEY_MIN, to: None, newest: superblock.generation };
        let level =
            Level { level: superblock.root_level, children: VecDeque::from([root]), pages: VecDeque::new() };
        Self { bdev, superblock, stack: vec![level], nodes: 0 }
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
            let block = child.ptr.addr;
            if !places.reach(block, findings) {
                return Some(Step::Gap);
            }
            match self.take(child, page, level) {
                Ok((node, _)) if level == 0 => return Some(Step::Leaf(node)),
                Ok((_, children)) => {
                    self.stack.push(Level { level: level - 1, children, pages: VecDeque::new() });
                }
                Err(problem) => {
                    findings.push(Finding::Node { block, level, problem });
                    return Some(Step::Gap);
                }
            }
        }
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
