//! What is changed in a sound image.

use std::ops::Range;

use arbitrary::Arbitrary;
use blobfs::ondisk::journal::{
    BlockId, JOURNAL_HEADER_LEN, RECORD_HEADER_LEN, Record, TxnHeader, append_txn, seal_block,
};
use blobfs::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, InodeFlags, InodeItem, Key, Kind, Timestamp, encode_dirent,
    encode_xattr_inline, encode_xattr_stored, name_hash,
};
use blobfs::units::{BlockAddr, BlockRange, InodeId, MapId};
use zerocopy::FromZeros;

use super::seal::{self, Layout, NODE_HEADER_LEN, SLOT_LEN, get_u32, get_u64, put};

/// A number, mostly one that is plausible.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum Number {
    Small(u8),
    Medium(u16),
    Any(u64),
    /// So much below the largest.
    Top(u8),
    /// A power of two and so much more or less.
    Power(u8, i8),
}

impl Number {
    fn get(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Medium(value) => value.into(),
            Self::Any(value) => value,
            Self::Top(below) => u64::MAX - u64::from(below),
            Self::Power(power, more) => (1_u64 << (power % 64)).wrapping_add_signed(more.into()),
        }
    }
}

/// A change of a field that is there.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum Value {
    Set(Number),
    Add(i8),
    Flip(u8),
}

impl Value {
    /// Changes the little-endian number of `len` bytes at `at`.
    fn change(self, image: &mut [u8], at: usize, len: usize) {
        let mut bytes = [0; 8];
        let Some(old) = image.get(at..at + len.min(8)).filter(|old| !old.is_empty()) else { return };
        bytes[..old.len()].copy_from_slice(old);
        let (old, len) = (u64::from_le_bytes(bytes), old.len());
        let new = match self {
            Self::Set(number) => number.get(),
            Self::Add(more) => old.wrapping_add_signed(more.into()),
            Self::Flip(bit) => old ^ 1 << (usize::from(bit) % (len * 8)),
        };
        put(image, at, &new.to_le_bytes()[..len]);
    }
}

/// One change.
#[derive(Debug, Arbitrary)]
pub(super) enum Edit {
    /// A field of the superblock that counts, or of both.
    Superblock { field: u8, value: Value, both: bool },
    /// A field of a node's header.
    NodeHeader { node: u8, field: u8, value: Value },
    /// A field of a slot.
    Slot { node: u8, slot: u8, field: u8, value: Value },
    /// A part of an item or pointer.
    Item { node: u8, slot: u8, at: u8, len: u8, value: Value },
    /// A field of an entry of the chunk map; the page's own header for entry 0.
    ChunkMap { page: u8, entry: u8, field: u8, value: Value },
    /// Bytes of a journal block.
    Journal { block: u8, at: u16, len: u8, value: Value },
    /// A journal block that follows the others.
    Append { changes: Vec<Change>, sequence: i8 },
    /// Anywhere.
    Bytes { at: u32, bytes: Vec<u8> },
    /// Anywhere, and no checksum is made right any more.
    Unsealed { at: u32, bytes: Vec<u8> },
}

/// A change of the items, as the journal has it.
#[derive(Debug, Arbitrary)]
pub(super) enum Change {
    Inode {
        id: Number,
        mode: u16,
        nlink: u8,
        flags: u8,
        size: Number,
        blocks: Number,
        map: Number,
        parent: Number,
    },
    Extent {
        map: Number,
        at: Number,
        start: Number,
        count: u16,
        stored: u16,
        skipped: u8,
        flags: u8,
    },
    Entry {
        dir: Number,
        inode: Number,
        kind: u8,
        name: Vec<u8>,
        slot: u8,
    },
    Xattr {
        inode: Number,
        name: Vec<u8>,
        value: Vec<u8>,
        slot: u8,
    },
    StoredXattr {
        inode: Number,
        name: Vec<u8>,
        map: Number,
        size: Number,
    },
    Inline {
        map: Number,
        value: Vec<u8>,
    },
    Other {
        owner: Number,
        kind: u8,
        offset: Number,
        value: Vec<u8>,
    },
    /// An item that is there, with another value.
    Replace {
        item: u8,
        at: u8,
        len: u8,
        value: Value,
    },
    Delete {
        item: u8,
    },
    DeleteOther {
        owner: Number,
        kind: u8,
        offset: Number,
    },
    Alloc {
        start: Number,
        count: u16,
    },
    Free {
        start: Number,
        count: u16,
    },
    Claim {
        start: Number,
        nodes: u8,
    },
    GiveBack {
        start: Number,
        nodes: u8,
    },
    Log {
        inode: Number,
        offset: Number,
        len: u16,
    },
    Settle {
        inode: Number,
        start: Number,
        len: Number,
    },
}

/// Fields of a superblock, in bytes of it (`docs/FORMAT.md`).
const SUPERBLOCK_FIELDS: [Range<usize>; 27] = [
    0..8,
    12..16,
    16..24,
    24..32,
    32..40,
    40..48,
    56..64,
    88..92,
    92..96,
    96..100,
    100..104,
    104..112,
    112..120,
    120..128,
    128..136,
    144..152,
    152..160,
    160..161,
    161..162,
    168..176,
    176..184,
    192..200,
    200..208,
    216..224,
    224..232,
    240..248,
    248..256,
];

const HEADER_FIELDS: [Range<usize>; 6] = [0..4, 8..16, 16..24, 32..40, 40..41, 42..44];
const SLOT_FIELDS: [Range<usize>; 5] = [0..8, 8..9, 10..12, 12..14, 16..24];
const CHUNK_FIELDS: [Range<usize>; 3] = [0..8, 8..16, 16..20];
const CHUNK_HEADER_FIELDS: [Range<usize>; 6] = [0..4, 8..16, 32..40, 40..44, 44..52, 52..60];

const KINDS: [Kind; 12] = [
    Kind::Group,
    Kind::Orphan,
    Kind::Intent,
    Kind::Volume,
    Kind::RefCount,
    Kind::Quota,
    Kind::Inode,
    Kind::Inline,
    Kind::Dirent,
    Kind::Xattr,
    Kind::Extent,
    Kind::Checksum,
];

fn pick<T: Clone>(from: &[T], number: u8) -> Option<T> {
    from.get(usize::from(number).checked_rem(from.len())?).cloned()
}

/// Makes the changes, then the checksums right.
pub(super) fn apply(image: &mut [u8], edits: &[Edit]) {
    for edit in edits {
        apply_one(image, edit);
    }
    seal::seal(image);
    for edit in edits {
        if let Edit::Unsealed { at, bytes } = edit {
            put(image, *at as usize % image.len(), bytes);
        }
    }
}

fn apply_one(image: &mut [u8], edit: &Edit) {
    if let Edit::Bytes { at, bytes } = edit {
        put(image, *at as usize % image.len(), bytes);
    }
    let Some(layout) = Layout::find(image) else { return };
    let node = |image: &[u8], number| pick(&layout.nodes(image), number).map(|(range, _)| range.start);
    let field = |fields: &[Range<usize>], number| pick(fields, number).unwrap_or(0..0);
    match *edit {
        Edit::Superblock { field: number, value, both } => {
            let field = field(&SUPERBLOCK_FIELDS, number);
            let all = blobfs::ondisk::superblock::SUPERBLOCK_OFFSETS.map(|offset| offset as usize);
            for at in all.into_iter().filter(|at| both || *at == layout.superblock_at) {
                value.change(image, at + field.start, field.len());
                seal::seal_superblock(image, at);
            }
        }
        Edit::NodeHeader { node: number, field: of, value } => {
            let field = field(&HEADER_FIELDS, of);
            if let Some(start) = node(image, number) {
                value.change(image, start + field.start, field.len());
            }
        }
        Edit::Slot { node: number, slot, field: of, value } => {
            let field = field(&SLOT_FIELDS, of);
            if let Some(start) = node(image, number) {
                let at = start + NODE_HEADER_LEN + usize::from(slot) * SLOT_LEN;
                value.change(image, at + field.start, field.len());
            }
        }
        Edit::Item { node: number, slot, at, len, value } => {
            if let Some((range, _)) = pick(&layout.nodes(image), number) {
                let page = &image[range.clone()];
                let Some(slot) = usize::from(slot).checked_rem(seal::slots(page)) else { return };
                let place = range.start + seal::value(page, slot).start + usize::from(at);
                value.change(image, place, usize::from(len % 9));
            }
        }
        Edit::ChunkMap { page, entry, field: of, value } => {
            let Some(page) = pick(&layout.chunk_map(image), page) else { return };
            let (start, field) = match usize::from(entry) {
                0 => (page.start, field(&CHUNK_HEADER_FIELDS, of)),
                entry => (page.start + 64 + (entry - 1) * 24, field(&CHUNK_FIELDS, of)),
            };
            value.change(image, start + field.start, field.len());
        }
        Edit::Journal { block, at, len, value } => {
            if let Some(block) = pick(&layout.journal(image).0, block) {
                let at = block.start + usize::from(at) % block.len();
                value.change(image, at, usize::from(len % 9));
            }
        }
        Edit::Append { ref changes, sequence } => append(image, &layout, changes, sequence),
        Edit::Bytes { .. } | Edit::Unsealed { .. } => {}
    }
}

/// An item that is there: its key and value.
fn item(image: &[u8], layout: &Layout, number: u8) -> Option<(Key, Vec<u8>)> {
    let leaves = layout.nodes(image).into_iter().filter(|(_, level)| *level == 0);
    let items = leaves.flat_map(|(range, _)| {
        let page = &image[range];
        (0..seal::slots(page)).filter_map(move |slot| {
            let at = NODE_HEADER_LEN + slot * SLOT_LEN;
            let kind = Kind::from_number(page[at + 8])?;
            let key = Key::new(get_u64(page, at), kind, get_u64(page, at + 16));
            Some((key, page[seal::value(page, slot)].to_vec()))
        })
    });
    pick(&items.collect::<Vec<_>>(), number)
}

/// Transaction number and journal block that come next.
struct End {
    transaction: u64,
    block: BlockId,
    place: Range<usize>,
}

fn end(image: &[u8], layout: &Layout) -> End {
    let superblock = &layout.superblock;
    let (blocks, pos) = layout.journal(image);
    let mut transaction = superblock.last_txn;
    for block in &blocks {
        let mut at = block.start + JOURNAL_HEADER_LEN;
        while at + RECORD_HEADER_LEN <= block.end && get_u32(image, at) as usize >= RECORD_HEADER_LEN {
            transaction = get_u64(image, at + 8);
            at += get_u32(image, at) as usize;
        }
    }
    let area = superblock.journal_start * u64::from(superblock.block_size);
    let seq = superblock.tail.seq + blocks.len() as u64;
    // The predecessor's checksum is made right later.
    let block = BlockId { uuid: superblock.uuid, epoch: superblock.epoch, seq, previous_crc: 0 };
    End { transaction, block, place: (area + pos) as usize..(area + superblock.journal_bytes()) as usize }
}

fn append(image: &mut [u8], layout: &Layout, changes: &[Change], sequence: i8) {
    let end = end(image, layout);
    let mut values = Vec::new();
    let owned: Vec<Owned> =
        changes.iter().filter_map(|change| own(image, layout, change, &mut values)).collect();
    let records = owned.iter().map(|record| match record {
        Owned::Put(key, value) => Record::Put(*key, &values[value.clone()]),
        Owned::Log(inode, offset, bytes) => {
            Record::Log { inode: *inode, offset: *offset, bytes: &values[bytes.clone()] }
        }
        Owned::Bare(record) => *record,
    });
    let header = TxnHeader {
        seq: end.transaction.wrapping_add(1).wrapping_add_signed(sequence.into()).into(),
        next_id: layout.superblock.next_id.into(),
        ..TxnHeader::new_zeroed()
    };
    let mut block = vec![0; JOURNAL_HEADER_LEN];
    append_txn(&mut block, header, records);
    seal_block(&mut block, &end.block);
    let unit = layout.superblock.block_size as usize;
    if end.place.start + block.len().next_multiple_of(unit) <= end.place.end {
        put(image, end.place.start, &block);
    }
}

/// A record whose value lies elsewhere.
enum Owned {
    Put(Key, Range<usize>),
    Log(InodeId, u64, Range<usize>),
    Bare(Record<'static>),
}

fn own(image: &[u8], layout: &Layout, change: &Change, values: &mut Vec<u8>) -> Option<Owned> {
    let range = |start: Number, count: u16| {
        let start = start.get().min(u64::MAX - u64::from(count));
        BlockRange::new(BlockAddr(start), count.into())
    };
    let begin = values.len();
    let key = match change {
        Change::Alloc { start, count } => return Some(Owned::Bare(Record::Alloc(range(*start, *count)))),
        Change::Free { start, count } => return Some(Owned::Bare(Record::Free(range(*start, *count)))),
        Change::Claim { start, nodes } => {
            return Some(Owned::Bare(Record::Claim { start: start.get(), nodes: (*nodes).into() }));
        }
        Change::GiveBack { start, nodes } => {
            return Some(Owned::Bare(Record::GiveBack { start: start.get(), nodes: (*nodes).into() }));
        }
        Change::Log { inode, offset, len } => {
            values.resize(begin + usize::from(*len), b'l');
            return Some(Owned::Log(InodeId(inode.get()), offset.get(), begin..values.len()));
        }
        Change::Settle { inode, start, len } => {
            let (start, inode) = (start.get(), InodeId(inode.get()));
            let end = start.wrapping_add(len.get());
            return Some(Owned::Bare(Record::Settle { inode, start, end }));
        }
        Change::Delete { item: number } => {
            return Some(Owned::Bare(Record::Delete(item(image, layout, *number)?.0)));
        }
        Change::DeleteOther { owner, kind, offset } => {
            let key = Key::new(owner.get(), pick(&KINDS, *kind)?, offset.get());
            return Some(Owned::Bare(Record::Delete(key)));
        }
        Change::Replace { item: number, at, len, value } => {
            let (key, bytes) = item(image, layout, *number)?;
            values.extend(bytes);
            value.change(values, begin + usize::from(*at), usize::from(len % 9));
            key
        }
        new => put_item(layout, new, values)?,
    };
    Some(Owned::Put(key, begin..values.len()))
}

/// Key and value of a new item.
fn put_item(layout: &Layout, change: &Change, values: &mut Vec<u8>) -> Option<Key> {
    let named = |name: &[u8], slot: u8| name_hash(layout.superblock.hash_key, name) << 8 | u64::from(slot);
    Some(match change {
        Change::Inode { id, mode, nlink, flags, size, blocks, map, parent } => {
            let time = Timestamp { seconds: 1_000_000, nanoseconds: 0 };
            let item = InodeItem {
                mode: (*mode).into(),
                nlink: (*nlink).into(),
                uid: 0,
                gid: 0,
                rdev: 0,
                flags: InodeFlags::from_bits_retain((*flags).into()),
                project: 0,
                size: size.get(),
                blocks: blocks.get(),
                atime: time,
                mtime: time,
                ctime: time,
                btime: time,
                map: MapId(map.get()),
                parent_map: MapId(0),
                parent: InodeId(parent.get()),
            };
            values.extend(item.encode());
            Key::inode(InodeId(id.get()))
        }
        Change::Extent { map, at, start, count, stored, skipped, flags } => {
            let item = ExtentItem {
                addr: BlockAddr(start.get()),
                stored_blocks: (*stored).into(),
                blocks: (*count).into(),
                stored_offset: (*skipped).into(),
                encoding: 0,
                flags: ExtentFlags::from_bits_retain(*flags),
            };
            values.extend(item.encode());
            Key::extent(MapId(map.get()), at.get())
        }
        Change::Entry { dir, inode, kind, name, slot } => {
            let name = &name[..name.len().min(255)];
            encode_dirent(DirentRef { inode: InodeId(inode.get()), file_type: *kind, name }, values);
            Key::dirent(InodeId(dir.get()), named(name, *slot))
        }
        Change::Xattr { inode, name, value, slot } => {
            let name = &name[..name.len().min(255)];
            encode_xattr_inline(name, value, values);
            Key::xattr(InodeId(inode.get()), named(name, *slot))
        }
        Change::StoredXattr { inode, name, map, size } => {
            let name = &name[..name.len().min(255)];
            encode_xattr_stored(name, MapId(map.get()), size.get() as u32, values);
            Key::xattr(InodeId(inode.get()), named(name, 0))
        }
        Change::Inline { map, value } => {
            values.extend(value);
            Key::inline(MapId(map.get()))
        }
        Change::Other { owner, kind, offset, value } => {
            values.extend(value);
            Key::new(owner.get(), pick(&KINDS, *kind)?, offset.get())
        }
        _ => return None,
    })
}
