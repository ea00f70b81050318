//! Checksums of file data: one item for each group of file blocks.
//!
//! The value is an array of u32, one for each block of the group, up to the last one that has a checksum. The
//! checksum of a block is its CRC-32C, and all ones where that is zero: a zero stands for a block without one.

use super::crc32c;

/// File blocks of a group. With more an item would not fit the smallest nodes.
pub const SUM_GROUP_BLOCKS: u64 = 64;

/// Bytes of the longest value.
pub const SUM_GROUP_LEN: usize = SUM_GROUP_BLOCKS as usize * size_of::<u32>();

const _: () =
    assert!(SUM_GROUP_LEN <= super::node::item_len_max(*super::superblock::NODE_SIZES.start() as usize));

/// The checksum of a block's bytes; never 0.
pub fn block_sum(bytes: &[u8]) -> u32 {
    match crc32c(bytes) {
        0 => u32::MAX,
        sum => sum,
    }
}

/// The groups that file blocks lie in, each by its first block.
pub fn sum_groups(blocks: &std::ops::Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let first = blocks.start / SUM_GROUP_BLOCKS;
    let end = if blocks.is_empty() { first } else { blocks.end.div_ceil(SUM_GROUP_BLOCKS) };
    (first..end).map(|group| group * SUM_GROUP_BLOCKS)
}

/// Checksums of a group; 0 for blocks that have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumGroup(pub [u32; SUM_GROUP_BLOCKS as usize]);

impl SumGroup {
    /// No block has a checksum.
    pub const EMPTY: Self = Self([0; SUM_GROUP_BLOCKS as usize]);

    /// The group in `bytes`; `None` unless they are 1 to 64 whole numbers, the last of which is not 0.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (sums, rest) = bytes.as_chunks::<4>();
        let mut group = Self::EMPTY;
        let stored = group.0.get_mut(..sums.len()).filter(|_| rest.is_empty())?;
        stored.iter_mut().zip(sums).for_each(|(sum, bytes)| *sum = u32::from_le_bytes(*bytes));
        (*stored.last()? != 0).then_some(group)
    }

    /// The bytes of an item; none when no block has a checksum, for which there is no item.
    pub fn encode(&self) -> Vec<u8> {
        let len = self.0.iter().rposition(|sum| *sum != 0).map_or(0, |last| last + 1);
        self.0[..len].iter().flat_map(|sum| sum.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_ends_with_its_last_checksum() {
        let mut group = SumGroup::EMPTY;
        assert!(group.encode().is_empty());
        (group.0[0], group.0[2]) = (0x0102_0304, 5);
        let bytes = group.encode();
        assert_eq!(bytes, [4, 3, 2, 1, 0, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(SumGroup::decode(&bytes), Some(group));
        group.0[63] = 1;
        assert_eq!(SumGroup::decode(&group.encode()), Some(group));
        for wrong in [&[][..], &[1; 3], &[1, 1, 1, 1, 0, 0, 0, 0], &[1; SUM_GROUP_LEN + 4]] {
            assert_eq!(SumGroup::decode(wrong), None);
        }
    }

    #[test]
    fn groups_cover_their_blocks() {
        assert_eq!(sum_groups(&(0..0)).count(), 0);
        assert_eq!(sum_groups(&(63..65)).collect::<Vec<_>>(), [0, 64]);
        assert_eq!(sum_groups(&(64..128)).collect::<Vec<_>>(), [64]);
    }

    #[test]
    fn no_block_has_the_checksum_of_none() {
        let bytes = [0xab, 0x9b, 0xe0, 0x9b];
        assert_eq!((crc32c(&bytes), block_sum(&bytes)), (0, u32::MAX));
        assert_eq!(block_sum(b"123456789"), 0xe306_9283);
    }
}
