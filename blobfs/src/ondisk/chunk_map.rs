//! The chunk map: which node-sized places of the metadata chunks are used.
//!
//! A list of pages of node size, each naming the next; every checkpoint writes it whole to new places.
//!
//! ```text
//! header (64 bytes, as a node's; next page in its last 24) | entries (24 bytes each)
//! ```

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::node::{check_header, seal};
use super::superblock::{NodePtr, RawPtr};

/// First bytes of a page.
pub const CHUNK_MAP_MAGIC: u32 = u32::from_le_bytes(*b"CMAP");

/// Nodes of a whole chunk: one word of use bits.
pub const CHUNK_NODES: u32 = 64;

/// A run of blocks that tree nodes live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// First block.
    pub start: u64,
    /// One bit per node: used by the checkpoint.
    pub used: u64,
    /// Nodes that fit, 1 to 64.
    pub nodes: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    crc: U32,
    addr: U64,
    uuid: [u8; 16],
    generation: U64,
    /// Number of entries.
    count: U32,
    next: [u8; RawPtr::SIZE - 4],
}

const HEADER_LEN: usize = 64;
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    start: U64,
    used: U64,
    nodes: U32,
    reserved: U32,
}

const ENTRY_LEN: usize = 24;
const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// Entries of a page.
pub fn entries_per_page(node_size: usize) -> usize {
    (node_size - HEADER_LEN) / ENTRY_LEN
}

/// Writes a page of the map into `out`; returns its checksum.
pub fn encode_page(
    entries: &[ChunkEntry],
    ptr: NodePtr,
    next: NodePtr,
    uuid: [u8; 16],
    out: &mut [u8],
) -> u32 {
    out.fill(0);
    let mut raw_next = [0; RawPtr::SIZE - 4];
    // The pointer's last word is reserved and zero.
    raw_next.copy_from_slice(&RawPtr::from(next).as_bytes()[..RawPtr::SIZE - 4]);
    let header = RawHeader {
        magic: CHUNK_MAP_MAGIC.into(),
        crc: U32::ZERO,
        addr: ptr.addr.into(),
        uuid,
        generation: ptr.generation.into(),
        count: (entries.len() as u32).into(),
        next: raw_next,
    };
    out[..HEADER_LEN].copy_from_slice(header.as_bytes());
    for (entry, bytes) in entries.iter().zip(out[HEADER_LEN..].chunks_exact_mut(ENTRY_LEN)) {
        let raw = RawEntry {
            start: entry.start.into(),
            used: entry.used.into(),
            nodes: entry.nodes.into(),
            reserved: U32::ZERO,
        };
        bytes.copy_from_slice(raw.as_bytes());
    }
    seal(out)
}

/// The entries of a page, and the pointer to the next one.
///
/// # Errors
/// What is wrong with the page.
pub fn decode_page(
    page: &[u8],
    ptr: NodePtr,
    uuid: [u8; 16],
) -> Result<(Vec<ChunkEntry>, Option<NodePtr>), String> {
    check_header(page, CHUNK_MAP_MAGIC, ptr, uuid)?;
    let (header, rest) = RawHeader::ref_from_prefix(page).map_err(|_| "too short")?;
    let count = header.count.get() as usize;
    if count > entries_per_page(page.len()) {
        return Err(format!("{count} entries do not fit"));
    }
    let mut next = [0; RawPtr::SIZE];
    next[..RawPtr::SIZE - 4].copy_from_slice(&header.next);
    let next: RawPtr = zerocopy::transmute!(next);
    let next = NodePtr::from(next);
    let mut entries = Vec::with_capacity(count);
    for bytes in rest.chunks_exact(ENTRY_LEN).take(count) {
        let raw = RawEntry::ref_from_bytes(bytes).map_err(|_| "too short")?;
        let entry = ChunkEntry { start: raw.start.get(), used: raw.used.get(), nodes: raw.nodes.get() };
        if !(1..=CHUNK_NODES).contains(&entry.nodes) || entry.used & !mask(entry.nodes) != 0 {
            return Err(format!("chunk at block {} of {} nodes", entry.start, entry.nodes));
        }
        entries.push(entry);
    }
    Ok((entries, (next.addr != 0).then_some(next)))
}

/// A word with a bit for each of `nodes` nodes.
pub fn mask(nodes: u32) -> u64 {
    u64::MAX >> (CHUNK_NODES - nodes)
}
