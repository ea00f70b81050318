//! Memory that devices read and write.
//!
//! A [`Segment`] is a validated piece of memory that may be shared with somebody outside the process (a
//! guest): nobody makes a `&[u8]` of it, bytes are only copied in and out. An [`IoBuffers`] is a list of
//! segments together with the `hold` that keeps their memory mapped, so it can travel to a device and
//! outlive the request that it came from. An [`AlignedBuf`] is private memory with an alignment.
//!
//! Invariant: every segment of an `IoBuffers` lies in memory that its `hold` keeps mapped.

#![expect(unsafe_code, reason = "raw memory that is shared with guests and devices")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

use smallvec::SmallVec;

/// A piece of memory: address and length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    addr: *mut u8,
    len: usize,
}

impl Segment {
    /// A segment over `len` bytes at `addr`.
    ///
    /// # Safety
    /// The bytes must stay mapped, readable and writable for as long as the `hold` of each [`IoBuffers`]
    /// lives that the segment is put into, and no Rust reference to them may be used meanwhile by code that
    /// expects them not to change.
    pub unsafe fn new(addr: *mut u8, len: usize) -> Self {
        Self { addr, len }
    }

    /// Address as a number, for alignment checks.
    pub fn addr(&self) -> usize {
        self.addr.addr()
    }

    /// Address as a pointer, for system calls.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// This segment and `next` as one, when `next` begins where this one ends and both are of one mapping.
    pub fn followed_by(&self, next: &Self) -> Option<Self> {
        (self.addr.wrapping_add(self.len) == next.addr)
            .then(|| Self { addr: self.addr, len: self.len + next.len })
    }

    /// Fills it with zeros.
    pub fn zero(&self) {
        // SAFETY: mapped and writable for `len` bytes (contract of `Segment::new`).
        unsafe { std::ptr::write_bytes(self.addr, 0, self.len) };
    }

    /// Copies the bytes of `src` to its begin, as many as fit.
    pub fn copy_from(&self, src: &[u8]) {
        let len = src.len().min(self.len);
        // SAFETY: `src` is a slice, the segment is mapped and writable; a slice is never shared memory.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), self.addr, len) };
    }

    /// The part from `start` on, of at most `len` bytes; both are cut to the segment.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len);
        Self { addr: self.addr.wrapping_add(start), len: len.min(self.len - start) }
    }
}

/// Segments of one I/O in order, with what keeps their memory alive.
#[derive(Clone)]
pub struct IoBuffers {
    segments: SmallVec<[Segment; 4]>,
    len: usize,
    hold: Option<Rc<dyn Any>>,
}

impl IoBuffers {
    /// No bytes at all.
    pub fn empty() -> Self {
        Self { segments: SmallVec::new(), len: 0, hold: None }
    }

    /// Segments whose memory `hold` keeps mapped. Empty segments are left out.
    pub fn new(segments: impl IntoIterator<Item = Segment>, hold: Rc<dyn Any>) -> Self {
        let segments: SmallVec<[Segment; 4]> = segments.into_iter().filter(|s| !s.is_empty()).collect();
        let len = segments.iter().map(Segment::len).sum();
        Self { segments, len, hold: Some(hold) }
    }

    /// All of an aligned buffer.
    pub fn from_aligned(buf: &Rc<AlignedBuf>) -> Self {
        // SAFETY: the buffer's memory lives as long as the `Rc` put into `hold`; `AlignedBuf` hands out
        // references only while it is not shared (`Rc::get_mut`) or through copies.
        let segment = unsafe { Segment::new(buf.ptr.as_ptr(), buf.len) };
        Self::new([segment], buf.clone())
    }

    /// The segments, in order, none of them empty.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes over all segments.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes from byte `start` on; both are cut to what is there.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let mut skip = start;
        let mut left = len.min(self.len.saturating_sub(start));
        let total = left;
        let mut segments = SmallVec::new();
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let part = segment.slice(skip, left);
            skip = 0;
            left -= part.len;
            segments.push(part);
        }
        Self { segments, len: total, hold: self.hold.clone() }
    }

    /// Copies bytes from position `start` into `dst`; returns how many there were.
    pub fn copy_to(&self, start: usize, dst: &mut [u8]) -> usize {
        self.walk(start, dst.len(), |segment, done| {
            // SAFETY: the segment is mapped (invariant of `IoBuffers`), `dst` has room for `done + len`
            // bytes, and `dst` is an exclusive borrow, so the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(segment.addr, dst[done..].as_mut_ptr(), segment.len) };
        })
    }

    /// Copies `src` to position `start`; returns how many bytes found room.
    pub fn copy_from(&self, start: usize, src: &[u8]) -> usize {
        self.walk(start, src.len(), |segment, done| {
            // SAFETY: as in `copy_to`, with the directions exchanged.
            unsafe { std::ptr::copy_nonoverlapping(src[done..].as_ptr(), segment.addr, segment.len) };
        })
    }

    /// Fills `len` bytes from position `start` on with zeros; returns how many there were.
    pub fn zero(&self, start: usize, len: usize) -> usize {
        self.walk(start, len, |segment, _| {
            // SAFETY: the segment is mapped and writable (invariant of `IoBuffers`).
            unsafe { std::ptr::write_bytes(segment.addr, 0, segment.len) };
        })
    }

    /// A place in the bytes, for copying piece after piece.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { segments: &self.segments, skip: 0 }
    }

    /// Calls `each(part, bytes before it)` for the parts of `len` bytes from `start` on.
    fn walk(&self, start: usize, len: usize, mut each: impl FnMut(Segment, usize)) -> usize {
        let mut skip = start;
        let mut done = 0;
        for segment in &self.segments {
            if done == len {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let part = segment.slice(skip, len - done);
            skip = 0;
            each(part, done);
            done += part.len;
        }
        done
    }
}

/// A place in the bytes of an [`IoBuffers`] that moves on with each copy. What was copied costs nothing any
/// more, however many segments it has: a client decides about their number.
#[derive(Clone)]
pub struct Cursor<'a> {
    segments: &'a [Segment],
    skip: usize,
}

impl Cursor<'_> {
    /// Copies `src` to the cursor's place; returns how many bytes found room.
    #[inline]
    pub fn fill(&mut self, src: Segment) -> usize {
        self.each_part(src.len, |part, done| {
            // SAFETY: both segments are mapped (invariant of `IoBuffers`, contract of `Segment::new`), and
            // `each_part` keeps to their lengths. They may overlap when a guest names the same memory twice.
            unsafe { std::ptr::copy(src.addr.add(done), part.addr, part.len) };
        })
    }

    /// Copies bytes from the cursor's place to `dst`; returns how many there were.
    #[inline]
    pub fn drain(&mut self, dst: Segment) -> usize {
        self.each_part(dst.len, |part, done| {
            // SAFETY: as in `fill`, with the directions exchanged.
            unsafe { std::ptr::copy(part.addr, dst.addr.add(done), part.len) };
        })
    }

    /// Copies bytes from the cursor's place to `dst`; returns how many there were.
    #[inline]
    pub fn copy_to(&mut self, dst: &mut [u8]) -> usize {
        self.each_part(dst.len(), |part, done| {
            // SAFETY: the segment is mapped (invariant of `IoBuffers`), `dst` has room for `done + len`
            // bytes, and `dst` is an exclusive borrow, so the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(part.addr, dst[done..].as_mut_ptr(), part.len) };
        })
    }

    /// Passes over bytes; returns how many there were.
    #[inline]
    pub fn skip(&mut self, len: usize) -> usize {
        self.each_part(len, |_, _| {})
    }

    fn each_part(&mut self, len: usize, mut each: impl FnMut(Segment, usize)) -> usize {
        let mut done = 0;
        while done < len
            && let Some(first) = self.segments.first()
        {
            let part = first.slice(self.skip, len - done);
            each(part, done);
            done += part.len;
            self.skip += part.len;
            if self.skip == first.len {
                self.segments = &self.segments[1..];
                self.skip = 0;
            }
        }
        done
    }
}

impl std::fmt::Debug for IoBuffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuffers({} bytes in {} segments)", self.len, self.segments.len())
    }
}

/// Zeroed private memory with an alignment, for direct I/O.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
    align: usize,
}

impl AlignedBuf {
    /// `len` zeroed bytes aligned to `align` (a power of two).
    ///
    /// # Panics
    /// When `align` is not a power of two, or `len` overflows with it.
    pub fn zeroed(len: usize, align: usize) -> Self {
        let layout = Self::layout(len, align);
        // SAFETY: the layout has a non-zero size (see `layout`).
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Self { ptr, len, align }
    }

    fn layout(len: usize, align: usize) -> Layout {
        Layout::from_size_align(len.max(1), align).expect("alignment is a power of two and length is sane")
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` owns `len` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `ptr` owns `len` initialised bytes and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with this very layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len, self.align)) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 32,768 segments over the same 16 bytes, read piece after piece: each segment is stepped over once.
    #[test]
    fn a_cursor_leaves_behind_what_it_has_read() {
        const SEGMENTS: usize = 32_768;
        let mut buf = AlignedBuf::zeroed(16, 16);
        buf.copy_from_slice(b"0123456789abcdef");
        let unit = IoBuffers::from_aligned(&Rc::new(buf));
        let repeated = unit.segments().iter().copied().cycle().take(SEGMENTS);
        let bytes = IoBuffers::new(repeated, Rc::new(unit.clone()));
        let mut cursor = bytes.cursor();
        assert_eq!(cursor.skip(5), 5);
        let mut piece = [0; 16];
        for passed in 1..SEGMENTS {
            assert_eq!(cursor.copy_to(&mut piece), 16);
            assert_eq!(&piece, b"56789abcdef01234");
            assert_eq!(cursor.segments.len(), SEGMENTS - passed);
        }
        assert_eq!(cursor.copy_to(&mut piece), 11);
        assert_eq!((cursor.copy_to(&mut piece), cursor.skip(1)), (0, 0));
    }
}
