//! Writing a checkpoint: dirty nodes and the chunk map to new places, then the other superblock.

use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError, IoBuffers, WriteFlags};
use reactor::sync::join_all;

use super::chunks::Chunks;
use super::tree::{ChildPlace, Snapshot, Tree};
use crate::ondisk::chunk_map::{self, ChunkEntry};
use crate::ondisk::superblock::{NodePtr, SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS, Superblock};
use crate::units::BlockAddr;

/// Nodes that are encoded and written at a time. Picked: half a megabyte of nodes keeps a device busy, and
/// encoding them takes well under a millisecond.
const NODES_AT_A_TIME: usize = 32;

/// A checkpoint that was cut at a transaction boundary and is now to be written.
pub(super) struct Checkpoint {
    snapshot: Snapshot,
    /// Chunks as they are once the checkpoint is durable.
    entries: Vec<ChunkEntry>,
    map_pages: Vec<BlockAddr>,
    superblock: Superblock,
    /// Places that nobody uses once the checkpoint is durable.
    freed: Vec<BlockAddr>,
}

/// A checkpoint that is durable.
pub(super) struct Written {
    snapshot: Snapshot,
    pointers: Vec<NodePtr>,
    freed: Vec<BlockAddr>,
    pub(super) superblock: Superblock,
}

/// Pages of the chunk map for so many chunks.
pub(super) fn map_pages(chunks: usize, node_size: usize) -> usize {
    chunks.div_ceil(chunk_map::entries_per_page(node_size)).max(1)
}

impl Checkpoint {
    /// Cuts a checkpoint: gives every dirty node and every page of the map a place. `superblock` says
    /// everything but where root and map are. `old_map` becomes the new map's pages.
    ///
    /// # Panics
    /// When there are fewer free places than dirty nodes: admission sees to that.
    pub(super) fn cut(
        tree: &mut Tree,
        chunks: &mut Chunks,
        old_map: &mut Vec<BlockAddr>,
        mut superblock: Superblock,
    ) -> Self {
        let mut place = || chunks.allocate().expect("admission keeps a place for each dirty node");
        let snapshot = tree.snapshot(superblock.generation, &mut place);
        superblock.root_level = snapshot.root_level;
        let pages = map_pages(chunks.count(), superblock.node_size as usize);
        let mut place = || chunks.allocate().expect("admission keeps places for the chunk map");
        let new_map: Vec<BlockAddr> = (0..pages).map(|_| place()).collect();
        let mut freed = std::mem::replace(old_map, new_map.clone());
        freed.extend_from_slice(&snapshot.dropped);
        let mut later = Chunks::new(superblock.node_blocks());
        for entry in chunks.entries() {
            later.add(entry);
        }
        for addr in &freed {
            later.release(*addr);
        }
        Self { snapshot, entries: later.entries().collect(), map_pages: new_map, superblock, freed }
    }

    /// Writes the checkpoint:
    ///
    /// 1. nodes, children before parents, to places that the checkpoint before does not use: a power cut
    ///    leaves that one whole;
    /// 2. the pages of the chunk map, the last one first;
    /// 3. FLUSH: without it the superblock could become durable before what it names, or before file data
    ///    that its extents name;
    /// 4. the superblock copy that the checkpoint before did not write, durable by FUA. From here on this
    ///    checkpoint counts.
    ///
    /// `flush` is called for step 3, on a device that needs it.
    ///
    /// # Errors
    /// The device's. It is then open which of the two checkpoints counts.
    pub(super) async fn write(
        mut self,
        bdev: &Rc<dyn Bdev>,
        flush: impl AsyncFnOnce() -> Result<(), BdevError>,
    ) -> Result<Written, BdevError> {
        let pointers = self.write_nodes(bdev).await?;
        self.superblock.root = resolve(&self.snapshot.root, &pointers);
        self.superblock.chunk_map = self.write_map(bdev).await?;
        if bdev.limits().volatile_cache {
            flush().await?;
        }
        write_superblock(bdev, &self.superblock).await?;
        Ok(Written { snapshot: self.snapshot, pointers, freed: self.freed, superblock: self.superblock })
    }

    async fn write_nodes(&self, bdev: &Rc<dyn Bdev>) -> Result<Vec<NodePtr>, BdevError> {
        let superblock = &self.superblock;
        let mut pointers: Vec<NodePtr> = Vec::with_capacity(self.snapshot.nodes.len());
        for batch in self.snapshot.nodes.chunks(NODES_AT_A_TIME) {
            let mut writes = Vec::with_capacity(batch.len());
            for node in batch {
                let mut ptr = NodePtr { addr: node.addr.0, generation: superblock.generation, crc: 0 };
                let children: Vec<NodePtr> =
                    node.children.iter().map(|place| resolve(place, &pointers)).collect();
                let mut page = page_buffer(bdev, superblock);
                ptr.crc = node.node.encode(ptr, superblock.uuid, &children, &mut page);
                pointers.push(ptr);
                writes.push(write_page(bdev, superblock, node.addr, page));
            }
            join_all(writes).await.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(pointers)
    }

    async fn write_map(&self, bdev: &Rc<dyn Bdev>) -> Result<NodePtr, BdevError> {
        let superblock = &self.superblock;
        let per_page = chunk_map::entries_per_page(superblock.node_size as usize);
        let mut next = NodePtr::default();
        for (number, addr) in self.map_pages.iter().enumerate().rev() {
            let from = (number * per_page).min(self.entries.len());
            let to = (from + per_page).min(self.entries.len());
            let mut ptr = NodePtr { addr: addr.0, generation: superblock.generation, crc: 0 };
            let mut page = page_buffer(bdev, superblock);
            ptr.crc = chunk_map::encode_page(&self.entries[from..to], ptr, next, superblock.uuid, &mut page);
            write_page(bdev, superblock, *addr, page).await?;
            next = ptr;
        }
        Ok(next)
    }
}

impl Written {
    /// Tells tree and chunks that the checkpoint counts.
    pub(super) fn settle(self, tree: &mut Tree, chunks: &mut Chunks) {
        tree.settle(self.snapshot, &self.pointers);
        for addr in &self.freed {
            chunks.release(*addr);
        }
    }
}

fn resolve(place: &ChildPlace, fresh: &[NodePtr]) -> NodePtr {
    match place {
        ChildPlace::Fresh(index) => fresh[*index],
        ChildPlace::Durable(ptr) => *ptr,
    }
}

/// Alignment of buffers that a device takes as they are.
pub(super) fn buffer_align(bdev: &Rc<dyn Bdev>) -> usize {
    bdev.limits().dma_align.max(bdev.limits().block_size) as usize
}

/// Memory for a node or a page of the chunk map.
pub(crate) fn page_buffer(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> AlignedBuf {
    AlignedBuf::zeroed(superblock.node_size as usize, buffer_align(bdev))
}

/// Writes a node or a page of the chunk map.
pub(crate) fn write_page(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    addr: BlockAddr,
    page: AlignedBuf,
) -> bdev::Io {
    let offset = addr.0 * u64::from(superblock.block_size);
    bdev.write(offset, IoBuffers::from_aligned(&Rc::new(page)), WriteFlags::NONE)
}

/// Makes both places of a superblock zero, durably.
pub(super) async fn erase_superblocks(bdev: &Rc<dyn Bdev>) -> Result<(), BdevError> {
    let len = SUPERBLOCK_LEN.next_multiple_of(bdev.limits().block_size as usize);
    let zeros = Rc::new(AlignedBuf::zeroed(len, buffer_align(bdev)));
    for offset in SUPERBLOCK_OFFSETS {
        bdev.write(offset, IoBuffers::from_aligned(&zeros), WriteFlags::FUA).await?;
    }
    Ok(())
}

/// Writes the copy that belongs to the superblock's generation, durably.
pub(crate) async fn write_superblock(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> Result<(), BdevError> {
    let len = SUPERBLOCK_LEN.next_multiple_of(bdev.limits().block_size as usize);
    let mut bytes = AlignedBuf::zeroed(len, buffer_align(bdev));
    bytes[..SUPERBLOCK_LEN].copy_from_slice(&superblock.encode());
    let offset = SUPERBLOCK_OFFSETS[(superblock.generation % 2) as usize];
    bdev.write(offset, IoBuffers::from_aligned(&Rc::new(bytes)), WriteFlags::FUA).await
}
