//! The free-space bitmap of an allocation group: one bit per block, set when it is used, lowest bit first.
//!
//! A group without an item is wholly free.

use std::ops::Range;

/// Sets or clears the bits of `range`; `false`, with nothing changed, when one of them had that value
/// already or lies outside.
pub fn change(bits: &mut [u8], range: Range<usize>, used: bool) -> bool {
    if range.end > bits.len() * 8
        || pieces(&range).any(|(byte, mask)| (if used { bits[byte] } else { !bits[byte] }) & mask != 0)
    {
        return false;
    }
    for (byte, mask) in pieces(&range) {
        bits[byte] ^= mask;
    }
    true
}

/// The bytes of a range of bits, each with a mask of those that belong to it.
fn pieces(range: &Range<usize>) -> impl Iterator<Item = (usize, u8)> + use<> {
    let range = range.clone();
    (range.start / 8..range.end.div_ceil(8)).map(move |byte| {
        let from = range.start.saturating_sub(byte * 8) as u32;
        let to = (range.end - byte * 8).min(8) as u32;
        (byte, (0xff_u8 >> (8 - (to - from))) << from)
    })
}

/// The runs of clear bits among the first `len`.
pub fn free_runs(bits: &[u8], len: usize) -> Vec<Range<usize>> {
    let len = len.min(bits.len() * 8);
    let mut runs = Vec::new();
    let mut at = 0;
    while let Some(start) = next(bits, at, len, false) {
        let end = next(bits, start, len, true).unwrap_or(len);
        runs.push(start..end);
        at = end;
    }
    runs
}

/// The first bit from `from` on, and before `len`, that has that value. Whole words without one are skipped.
fn next(bits: &[u8], from: usize, len: usize, used: bool) -> Option<usize> {
    let mut at = from;
    while at < len {
        let mut word = [if used { 0 } else { 0xff }; 8];
        let bytes = &bits[at / 8..bits.len().min(at / 8 + 8)];
        word[..bytes.len()].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        let wanted = (if used { word } else { !word }) >> (at % 8);
        if wanted != 0 {
            return Some(at + wanted.trailing_zeros() as usize).filter(|found| *found < len);
        }
        at += 64 - at % 8;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_behave_like_a_vector_of_flags(changes in prop::collection::vec((0..70_usize, 1..70_usize, any::<bool>()), 1..40)) {
            let mut bits = [0_u8; 8];
            let mut model = [false; 64];
            for (start, len, used) in changes {
                let range = start..start + len;
                let allowed = range.end <= 64 && model[range.clone()].iter().all(|&flag| flag != used);
                prop_assert_eq!(change(&mut bits, range.clone(), used), allowed);
                if allowed {
                    model[range].fill(used);
                }
            }
            let free: Vec<usize> = free_runs(&bits, 64).into_iter().flatten().collect();
            let expected: Vec<usize> = (0..64).filter(|&at| !model[at]).collect();
            prop_assert_eq!(free, expected);
        }
    }
}
