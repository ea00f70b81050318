//! The bytes of a simulated device: sparse, and shared between clones until one of them changes.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;
use std::rc::Rc;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

/// Unit of sharing between clones. One page: a file system's small writes copy little, and a 1 MiB device
/// has 256 of them.
const CHUNK: usize = 4096;

#[derive(Clone)]
struct Chunk {
    bytes: [u8; CHUNK],
    /// Hash of the bytes since they last changed; clones of an image share it with the chunk.
    hash: Cell<Option<u64>>,
}

impl Chunk {
    fn zeroed() -> Self {
        Self { bytes: [0; CHUNK], hash: Cell::new(None) }
    }

    fn bytes_mut(&mut self) -> &mut [u8; CHUNK] {
        self.hash.set(None);
        &mut self.bytes
    }

    /// The same for equal bytes; 0 for zeros, which count as not stored.
    fn hash(&self, hasher: &foldhash::quality::FixedState) -> u64 {
        self.hash.get().unwrap_or_else(|| {
            let zero = self.bytes.iter().all(|&byte| byte == 0);
            let hash = if zero { 0 } else { hasher.hash_one(&self.bytes[..]).max(1) };
            self.hash.set(Some(hash));
            hash
        })
    }
}

/// Content of a device. Cloning costs nothing; the first change of a clone copies its map of chunks, each
/// change of a shared chunk that chunk.
#[derive(Clone)]
pub struct Image {
    size: u64,
    /// Chunks by number; one that is missing reads as zeros.
    chunks: Rc<BTreeMap<u64, Rc<Chunk>>>,
}

impl Image {
    /// `size` zero bytes.
    pub fn zeroed(size: u64) -> Self {
        Self { size, chunks: Rc::default() }
    }

    /// Bytes of the device.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies bytes at `offset` into `out`; what lies behind the end reads as zeros.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for piece in pieces(offset, out.len()) {
            let part = &mut out[piece.done.clone()];
            match self.chunks.get(&piece.chunk) {
                Some(chunk) => part.copy_from_slice(&chunk.bytes[piece.inside]),
                None => part.fill(0),
            }
        }
    }

    /// Replaces the bytes at `offset`.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let chunks = Rc::make_mut(&mut self.chunks);
        for piece in pieces(offset, bytes.len()) {
            let chunk = chunks.entry(piece.chunk).or_insert_with(|| Rc::new(Chunk::zeroed()));
            Rc::make_mut(chunk).bytes_mut()[piece.inside].copy_from_slice(&bytes[piece.done]);
        }
    }

    /// Makes a range read as zeros. Its cost depends on what is stored there, not on its length.
    pub fn clear(&mut self, range: Range<u64>) {
        self.change_stored(range, |_, bytes| bytes.fill(0));
    }

    /// Fills what is stored in a range with garbage that depends on `seed` alone. Parts that were never
    /// written stay zeros: undefined content may be that, too, and the image stays sparse.
    pub fn scramble(&mut self, range: Range<u64>, seed: u64) {
        self.change_stored(range, |chunk, bytes| SmallRng::seed_from_u64(seed ^ chunk).fill_bytes(bytes));
    }

    fn change_stored(&mut self, range: Range<u64>, mut change: impl FnMut(u64, &mut [u8])) {
        if range.is_empty() {
            return;
        }
        let unit = CHUNK as u64;
        let chunks = Rc::make_mut(&mut self.chunks);
        for (&number, chunk) in chunks.range_mut(range.start / unit..range.end.div_ceil(unit)) {
            let base = number * unit;
            let start = range.start.saturating_sub(base) as usize;
            let end = (range.end - base).min(unit) as usize;
            change(number, &mut Rc::make_mut(chunk).bytes_mut()[start..end]);
        }
    }

    /// A number that is equal for images of equal content (and different for others, but for accidents). Only chunks
    /// that changed since they were last hashed, in this image or the one that they come from, are read.
    pub fn content_hash(&self) -> u64 {
        let state = foldhash::quality::FixedState::with_seed(self.size);
        let mut hasher = state.build_hasher();
        for (number, chunk) in self.chunks.iter() {
            let hash = chunk.hash(&state);
            if hash != 0 {
                hasher.write_u64(*number);
                hasher.write_u64(hash);
            }
        }
        hasher.finish()
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({} bytes, {} chunks stored)", self.size, self.chunks.len())
    }
}

/// The part of an access that lies in one chunk.
struct Piece {
    chunk: u64,
    inside: Range<usize>,
    /// The same bytes, counted from the start of the access.
    done: Range<usize>,
}

fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let start = (at % CHUNK as u64) as usize;
        let count = (CHUNK - start).min(len - done);
        let piece =
            Piece { chunk: at / CHUNK as u64, inside: start..start + count, done: done..done + count };
        done += count;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_do_not_see_each_others_changes() {
        let mut image = Image::zeroed(1 << 20);
        image.write(4000, &[7; 200]);
        let before = image.clone();
        image.clear(4096..8192);
        let mut bytes = [0; 200];
        before.read(4000, &mut bytes);
        assert_eq!(bytes, [7; 200]);
        image.read(4000, &mut bytes);
        assert_eq!(bytes[..96], [7; 96]);
        assert_eq!(bytes[96..], [0; 104]);
    }

    #[test]
    fn hash_depends_on_content_and_not_on_how_it_came() {
        let mut one = Image::zeroed(1 << 40);
        one.write(1 << 39, &[1]);
        let with_byte = one.content_hash();
        one.clear(0..1 << 40);
        assert_eq!(one.content_hash(), Image::zeroed(1 << 40).content_hash());
        assert_ne!(one.content_hash(), with_byte);
    }
}
