//! Journal blocks and the records in them.
//!
//! ```text
//! header (64 bytes) | records | zeros up to a whole file system block
//! ```
//!
//! A block belongs to the journal when file system, epoch, sequence number and the predecessor's checksum
//! are the expected ones and its own checksum is right: stale blocks never fit.
//!
//! A record is a transaction: `length u32, number of changes u32, transaction number u64, session u64,
//! request u64, next id u64`, then the changes, each beginning with its type:
//!
//! | type | change | fields |
//! | --- | --- | --- |
//! | 1 | put | owner u64, kind u8, offset u64, length u16, value |
//! | 2 | delete | owner u64, kind u8, offset u64 |
//! | 3 | alloc | start u64, count u32 |
//! | 4 | free | start u64, count u32 |
//! | 5 | claim a metadata chunk | start u64, nodes u32 |
//! | 6 | give back an empty metadata chunk | start u64, nodes u32 |
//! | 7 | log file data | inode u64, offset u64, length u32, bytes |
//! | 8 | settle logged data | inode u64, first byte u64, byte behind the last u64 |

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FILE_SIZE_MAX, Key, Kind, crc32c};
use crate::units::{BlockAddr, BlockRange, InodeId};

/// Bytes of a block's header.
pub const JOURNAL_HEADER_LEN: usize = 64;

/// First bytes of a journal block.
pub const JOURNAL_MAGIC: u32 = u32::from_le_bytes(*b"JRNL");

/// Longest block that a reader accepts.
pub const JOURNAL_BLOCK_LEN_MAX: usize = 1 << 20;

/// Bytes of a record's header.
pub const RECORD_HEADER_LEN: usize = 40;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    crc: U32,
    uuid: [u8; 16],
    epoch: U64,
    seq: U64,
    previous_crc: U32,
    len: U32,
    reserved: [u8; 16],
}

const _: () = assert!(size_of::<RawHeader>() == JOURNAL_HEADER_LEN);

const CRC_FROM: usize = 8;

/// What makes a block the next one of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockId {
    /// The file system.
    pub uuid: [u8; 16],
    /// The mount.
    pub epoch: u64,
    /// Position in the sequence.
    pub seq: u64,
    /// Checksum of the predecessor.
    pub previous_crc: u32,
}

/// Fills in the header of a block whose first [`JOURNAL_HEADER_LEN`] bytes are free; returns its checksum.
pub fn seal_block(block: &mut [u8], id: &BlockId) -> u32 {
    let header = RawHeader {
        magic: JOURNAL_MAGIC.into(),
        crc: U32::ZERO,
        uuid: id.uuid,
        epoch: id.epoch.into(),
        seq: id.seq.into(),
        previous_crc: id.previous_crc.into(),
        len: (block.len() as u32).into(),
        reserved: [0; 16],
    };
    block[..JOURNAL_HEADER_LEN].copy_from_slice(header.as_bytes());
    let crc = crc32c(&block[CRC_FROM..]);
    block[4..8].copy_from_slice(U32::new(crc).as_bytes());
    crc
}

/// Identity and length in bytes of the block that starts with `bytes`; its checksum is not checked yet.
pub fn block_header(bytes: &[u8]) -> Option<(BlockId, usize)> {
    let (header, _) = RawHeader::ref_from_prefix(bytes).ok()?;
    let len = header.len.get() as usize;
    let id = BlockId {
        uuid: header.uuid,
        epoch: header.epoch.get(),
        seq: header.seq.get(),
        previous_crc: header.previous_crc.get(),
    };
    let fits =
        header.magic.get() == JOURNAL_MAGIC && (JOURNAL_HEADER_LEN..=JOURNAL_BLOCK_LEN_MAX).contains(&len);
    fits.then_some((id, len))
}

/// Length in bytes of the block that starts with `bytes`, when it is the block with that id (its checksum
/// is not checked yet).
pub fn block_len(bytes: &[u8], id: &BlockId) -> Option<usize> {
    block_header(bytes).filter(|(found, _)| found == id).map(|(_, len)| len)
}

/// Checksum of a whole block, when it is the stored one.
pub fn check_block(block: &[u8]) -> Option<u32> {
    let (header, _) = RawHeader::ref_from_prefix(block).ok()?;
    let crc = crc32c(&block[CRC_FROM..]);
    (header.crc.get() == crc).then_some(crc)
}

/// A change as the journal holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// Inserts or replaces an item.
    Put(Key, &'a [u8]),
    /// Removes an item.
    Delete(Key),
    /// Marks data blocks as used.
    Alloc(BlockRange),
    /// Marks data blocks as free.
    Free(BlockRange),
    /// Makes free blocks a metadata chunk.
    Claim {
        /// First block.
        start: u64,
        /// Nodes that fit.
        nodes: u32,
    },
    /// Makes an empty metadata chunk free blocks.
    GiveBack {
        /// First block.
        start: u64,
        /// Nodes that fit.
        nodes: u32,
    },
    /// Bytes of a file that its blocks need not hold yet.
    Log {
        /// The file.
        inode: InodeId,
        /// Where in the file they begin.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Bytes of a file that were logged before count no longer: its blocks, or their absence, say what it holds.
    Settle {
        /// The file.
        inode: InodeId,
        /// First byte.
        start: u64,
        /// Byte behind the last one.
        end: u64,
    },
}

/// Head of a transaction's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TxnHeader {
    /// Bytes of the record.
    pub len: U32,
    /// Number of changes.
    pub count: U32,
    /// Number of the transaction.
    pub seq: U64,
    /// Who asked.
    pub session: U64,
    /// For what.
    pub request: U64,
    /// Next inode or map number at that time.
    pub next_id: U64,
}

const _: () = assert!(size_of::<TxnHeader>() == RECORD_HEADER_LEN);

/// Appends a transaction to a block.
pub fn append_txn<'a>(block: &mut Vec<u8>, mut header: TxnHeader, records: impl Iterator<Item = Record<'a>>) {
    let start = block.len();
    block.resize(start + RECORD_HEADER_LEN, 0);
    let mut count = 0;
    for record in records {
        append_record(block, &record);
        count += 1;
    }
    header.len = ((block.len() - start) as u32).into();
    header.count = count.into();
    block[start..start + RECORD_HEADER_LEN].copy_from_slice(header.as_bytes());
}

fn append_record(block: &mut Vec<u8>, record: &Record<'_>) {
    match record {
        Record::Put(key, value) => {
            block.push(1);
            append_key(block, key);
            block.extend_from_slice(U16::new(value.len() as u16).as_bytes());
            block.extend_from_slice(value);
        }
        Record::Delete(key) => {
            block.push(2);
            append_key(block, key);
        }
        Record::Alloc(range) => append_range(block, 3, range.start.0, range.count),
        Record::Free(range) => append_range(block, 4, range.start.0, range.count),
        Record::Claim { start, nodes } => append_range(block, 5, *start, *nodes),
        Record::GiveBack { start, nodes } => append_range(block, 6, *start, *nodes),
        Record::Log { inode, offset, bytes } => {
            block.push(7);
            append_u64s(block, &[inode.0, *offset]);
            block.extend_from_slice(U32::new(bytes.len() as u32).as_bytes());
            block.extend_from_slice(bytes);
        }
        Record::Settle { inode, start, end } => {
            block.push(8);
            append_u64s(block, &[inode.0, *start, *end]);
        }
    }
}

fn append_u64s(block: &mut Vec<u8>, numbers: &[u64]) {
    numbers.iter().for_each(|number| block.extend_from_slice(U64::new(*number).as_bytes()));
}

fn append_key(block: &mut Vec<u8>, key: &Key) {
    block.extend_from_slice(U64::new(key.owner).as_bytes());
    block.push(key.kind as u8);
    block.extend_from_slice(U64::new(key.offset).as_bytes());
}

fn append_range(block: &mut Vec<u8>, kind: u8, start: u64, count: u32) {
    block.push(kind);
    block.extend_from_slice(U64::new(start).as_bytes());
    block.extend_from_slice(U32::new(count).as_bytes());
}

/// A transaction read back.
pub struct TxnRecord<'a> {
    /// Its head.
    pub header: TxnHeader,
    /// Its changes.
    pub records: Vec<Record<'a>>,
}

/// The transactions of a block whose checksum is right; `None` when one is malformed.
pub fn decode_block(block: &[u8]) -> Option<Vec<TxnRecord<'_>>> {
    let mut rest = block.get(JOURNAL_HEADER_LEN..)?;
    let mut txns = Vec::new();
    while !rest.is_empty() {
        let (header, _) = TxnHeader::ref_from_prefix(rest).ok()?;
        let header = *header;
        let (record, behind) = rest.split_at_checked(header.len.get() as usize)?;
        let mut reader = Reader(record.get(RECORD_HEADER_LEN..)?);
        let mut records = Vec::new();
        for _ in 0..header.count.get() {
            records.push(reader.record()?);
        }
        reader.0.is_empty().then_some(())?;
        txns.push(TxnRecord { header, records });
        rest = behind;
    }
    Some(txns)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn key(&mut self) -> Option<Key> {
        let owner = self.u64()?;
        let [kind] = self.array()?;
        Some(Key::new(owner, Kind::from_number(kind)?, self.u64()?))
    }

    fn range(&mut self) -> Option<BlockRange> {
        let start = self.u64()?;
        let count = self.u32()?;
        start.checked_add(u64::from(count))?;
        Some(BlockRange::new(BlockAddr(start), count))
    }

    fn record(&mut self) -> Option<Record<'a>> {
        let [kind] = self.array()?;
        Some(match kind {
            1 => {
                let key = self.key()?;
                let len = u16::from_le_bytes(self.array()?);
                Record::Put(key, self.take(usize::from(len))?)
            }
            2 => Record::Delete(self.key()?),
            3 => Record::Alloc(self.range()?),
            4 => Record::Free(self.range()?),
            5 => {
                let range = self.range()?;
                Record::Claim { start: range.start.0, nodes: range.count }
            }
            6 => {
                let range = self.range()?;
                Record::GiveBack { start: range.start.0, nodes: range.count }
            }
            7 => {
                let (inode, offset, len) = (InodeId(self.u64()?), self.u64()?, self.u32()?);
                let bytes = self.take(len as usize)?;
                offset.checked_add(u64::from(len)).filter(|end| *end <= FILE_SIZE_MAX)?;
                Record::Log { inode, offset, bytes }
            }
            8 => Record::Settle { inode: InodeId(self.u64()?), start: self.u64()?, end: self.u64()? },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    const ID: BlockId = BlockId { uuid: [3; 16], epoch: 4, seq: 5, previous_crc: 6 };

    fn block() -> Vec<u8> {
        let mut block = vec![0; JOURNAL_HEADER_LEN];
        let key = Key::new(7, Kind::Dirent, 9);
        let records = [
            Record::Put(key, b"value"),
            Record::Delete(key),
            Record::Alloc(BlockRange::new(BlockAddr(1), 2)),
            Record::Free(BlockRange::new(BlockAddr(3), 4)),
            Record::Claim { start: 5, nodes: 64 },
            Record::GiveBack { start: 6, nodes: 16 },
            Record::Log { inode: InodeId(7), offset: 8, bytes: b"data" },
            Record::Settle { inode: InodeId(7), start: 8, end: u64::MAX },
        ];
        append_txn(&mut block, TxnHeader::new_zeroed(), records.into_iter());
        seal_block(&mut block, &ID);
        block
    }

    #[test]
    fn records_come_back_as_they_were_written() {
        let block = block();
        assert_eq!(block_len(&block, &ID), Some(block.len()));
        assert!(check_block(&block).is_some());
        let txns = decode_block(&block).unwrap();
        assert_eq!(txns.len(), 1);
        assert_eq!(txns[0].records[0], Record::Put(Key::new(7, Kind::Dirent, 9), b"value"));
        assert_eq!(txns[0].records.len(), 8);
        assert_eq!(txns[0].records[5], Record::GiveBack { start: 6, nodes: 16 });
        assert_eq!(txns[0].records[6], Record::Log { inode: InodeId(7), offset: 8, bytes: b"data" });
        assert_eq!(txns[0].records[7], Record::Settle { inode: InodeId(7), start: 8, end: u64::MAX });
    }

    #[test]
    fn stale_blocks_and_damage_are_not_taken() {
        let mut block = block();
        for other in [
            BlockId { epoch: 5, ..ID },
            BlockId { seq: 4, ..ID },
            BlockId { previous_crc: 7, ..ID },
            BlockId { uuid: [4; 16], ..ID },
        ] {
            assert_eq!(block_len(&block, &other), None);
        }
        for cut in JOURNAL_HEADER_LEN + 1..block.len() {
            assert!(decode_block(&block[..cut]).is_none(), "cut at {cut}");
        }
        block[70] ^= 1;
        assert_eq!(check_block(&block), None);
    }
}
