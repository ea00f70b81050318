//! Finding the structures of an image, and making their checksums right again. Offsets are those of `docs/FORMAT.md`.

use std::ops::Range;

use blobfs::ondisk::superblock::{SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS, Superblock};

pub(super) const NODE_HEADER_LEN: usize = 64;
pub(super) const SLOT_LEN: usize = 24;
const POINTER_LEN: usize = 24;

/// Places of fields in a superblock.
const SUPERBLOCK_ROOT: usize = 168;
const SUPERBLOCK_CHUNK_MAP: usize = 192;

/// Nodes, pages and blocks that are looked at: more than a base image has, and a damaged one shall cost no more.
const STRUCTURES_MAX: usize = 300;

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Little-endian numbers at places that may lie outside: then nothing happens.
pub(super) fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

pub(super) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    get(bytes, at).map_or(0, u64::from_le_bytes)
}

pub(super) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    get(bytes, at).map_or(0, u32::from_le_bytes)
}

pub(super) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    get(bytes, at).map_or(0, u16::from_le_bytes)
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        place.copy_from_slice(value);
    }
}

/// The structures of an image, as far as its geometry makes sense.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) superblock: Superblock,
    /// Byte of the superblock that counts.
    pub(super) superblock_at: usize,
}

impl Layout {
    /// Finds the superblock that counts.
    pub(super) fn find(image: &[u8]) -> Option<Self> {
        let copies = SUPERBLOCK_OFFSETS.iter().filter_map(|offset| {
            let at = *offset as usize;
            let superblock = Superblock::decode(&get::<SUPERBLOCK_LEN>(image, at)?).ok()?;
            Some(Self { superblock, superblock_at: at })
        });
        copies.max_by_key(|layout| layout.superblock.generation)
    }

    fn node_range(&self, image: &[u8], address: u64) -> Option<Range<usize>> {
        let start = address.checked_mul(u64::from(self.superblock.block_size))?;
        let end = start.checked_add(u64::from(self.superblock.node_size))?;
        (address != 0 && end <= image.len() as u64).then_some(start as usize..end as usize)
    }

    /// Nodes that can be reached, parents before children, with their levels.
    pub(super) fn nodes(&self, image: &[u8]) -> Vec<(Range<usize>, u8)> {
        let mut found: Vec<(Range<usize>, u8)> = Vec::new();
        let root = self.node_range(image, self.superblock.root.addr);
        found.extend(root.map(|range| (range, self.superblock.root_level)));
        let mut next = 0;
        while next < found.len() && found.len() < STRUCTURES_MAX {
            let (range, level) = found[next].clone();
            next += 1;
            for at in pointers(&image[range.clone()], level) {
                let child = self.node_range(image, get_u64(image, range.start + at));
                let new = child.filter(|child| found.iter().all(|(known, _)| known != child));
                found.extend(new.map(|child| (child, level - 1)));
            }
        }
        found
    }

    /// Pages of the chunk map.
    pub(super) fn chunk_map(&self, image: &[u8]) -> Vec<Range<usize>> {
        let mut found: Vec<Range<usize>> = Vec::new();
        let mut address = self.superblock.chunk_map.addr;
        while let Some(page) = self.node_range(image, address)
            && !found.contains(&page)
            && found.len() < STRUCTURES_MAX
        {
            // The pointer to the next page stands behind the number of entries.
            address = get_u64(image, page.start + 44);
            found.push(page);
        }
        found
    }

    /// Blocks that a replay reads, whether their checksums are right or not, and the place behind the last one.
    pub(super) fn journal(&self, image: &[u8]) -> (Vec<Range<usize>>, u64) {
        let superblock = &self.superblock;
        let unit = u64::from(superblock.block_size);
        let area = superblock.journal_start * unit;
        let (mut found, mut pos) = (Vec::new(), superblock.tail.pos);
        while found.len() < STRUCTURES_MAX {
            let sequence = superblock.tail.seq + found.len() as u64;
            let is_next = |pos: u64| {
                let start = (area + pos) as usize;
                let len = u64::from(get_u32(image, start + 44));
                let is_block = get(image, start) == Some(*b"JRNL")
                    && get_u64(image, start + 24) == superblock.epoch
                    && get_u64(image, start + 32) == sequence
                    && (64..=1 << 20).contains(&len)
                    && pos + len.next_multiple_of(unit) <= superblock.journal_bytes();
                is_block.then_some((start, len))
            };
            let block = [pos, 0].into_iter().find_map(|pos| Some((pos, is_next(pos)?)));
            let Some((at, (start, len))) = block else { break };
            pos = at + len.next_multiple_of(unit);
            found.push(start..start + len as usize);
        }
        (found, pos)
    }
}

/// Places of the pointers to children in a node.
fn pointers(node: &[u8], level: u8) -> Vec<usize> {
    if level == 0 {
        return Vec::new();
    }
    let values = (0..slots(node)).map(|slot| value(node, slot).start);
    values.filter(|at| at + POINTER_LEN <= node.len()).collect()
}

/// Slots of a node that lie in it.
pub(super) fn slots(node: &[u8]) -> usize {
    usize::from(get_u16(node, 42)).min((node.len() - NODE_HEADER_LEN) / SLOT_LEN)
}

/// Where the value of a slot lies, cut off at the node's end.
pub(super) fn value(node: &[u8], slot: usize) -> Range<usize> {
    let at = NODE_HEADER_LEN + slot * SLOT_LEN;
    let start = usize::from(get_u16(node, at + 10)).min(node.len());
    start..(start + usize::from(get_u16(node, at + 12))).min(node.len())
}

/// Makes all checksums right that can be reached.
pub(super) fn seal(image: &mut [u8]) {
    for offset in SUPERBLOCK_OFFSETS {
        seal_superblock(image, offset as usize);
    }
    let Some(layout) = Layout::find(image) else { return };
    seal_journal(image, &layout);
    // Children come after their parents. A node with several parents gets its checksum into all of them.
    let nodes = layout.nodes(image);
    for (range, _) in nodes.iter().rev() {
        let address = range.start as u64 / u64::from(layout.superblock.block_size);
        let crc = seal_page(image, range);
        for (parent, level) in &nodes {
            for at in pointers(&image[parent.clone()], *level) {
                if get_u64(image, parent.start + at) == address {
                    put(image, parent.start + at + 16, &crc.to_le_bytes());
                }
            }
        }
        if address == layout.superblock.root.addr {
            put(image, layout.superblock_at + SUPERBLOCK_ROOT + 16, &crc.to_le_bytes());
        }
    }
    let pages = layout.chunk_map(image);
    for (index, page) in pages.iter().enumerate().rev() {
        let crc = seal_page(image, page);
        let pointer = match index.checked_sub(1) {
            Some(before) => pages[before].start + 44,
            None => layout.superblock_at + SUPERBLOCK_CHUNK_MAP,
        };
        put(image, pointer + 16, &crc.to_le_bytes());
    }
    seal_superblock(image, layout.superblock_at);
}

pub(super) fn seal_superblock(image: &mut [u8], at: usize) {
    if let Some(bytes) = image.get(at + 12..at + SUPERBLOCK_LEN) {
        let crc = crc32c(bytes);
        put(image, at + 8, &crc.to_le_bytes());
    }
}

fn seal_page(image: &mut [u8], range: &Range<usize>) -> u32 {
    let crc = crc32c(&image[range.start + 8..range.end]);
    put(image, range.start + 4, &crc.to_le_bytes());
    crc
}

fn seal_journal(image: &mut [u8], layout: &Layout) {
    let mut before = layout.superblock.tail.previous_crc;
    for block in layout.journal(image).0 {
        put(image, block.start + 40, &before.to_le_bytes());
        before = seal_page(image, &block);
    }
}
