//! Who may touch which pages of a file.
//!
//! | | transfer | write-back | change |
//! | --- | --- | --- | --- |
//! | **transfer**: reads extents and the device | together | together | one after the other |
//! | **write-back**: writes cached pages, maps them | together | one after the other | one after the other |
//! | **change**: direct write, punch, truncation, deletion | one after the other | … | … |
//!
//! Transfers and write-back may overlap because a page is either cached and written back, or not cached and
//! read. Nobody who holds a range asks for another one of the same file. A change that waits keeps later
//! requests for its range out, so that it is not starved.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use smallvec::SmallVec;

use crate::fs::Inode;

/// What a range is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Transfer,
    WriteBack,
    Change,
}

impl Mode {
    fn excludes(self, other: Self) -> bool {
        match (self, other) {
            (Self::Change, _) | (_, Self::Change) | (Self::WriteBack, Self::WriteBack) => true,
            (Self::Transfer, _) | (_, Self::Transfer) => false,
        }
    }
}

struct Entry {
    /// Orders the entries.
    number: u64,
    mode: Mode,
    pages: Range<u64>,
    held: bool,
}

#[derive(Default)]
struct Entries {
    list: SmallVec<[Entry; 2]>,
    next: u64,
}

/// The ranges of one file.
#[derive(Default)]
pub(super) struct RangeLock {
    entries: RefCell<Entries>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLock {
    /// Whether nobody holds or wants anything.
    pub(super) fn is_idle(&self) -> bool {
        self.entries.borrow().list.is_empty()
    }

    /// Whether `pages` could not be had for `mode` now.
    #[inline]
    pub(super) fn is_refused(&self, pages: &Range<u64>, mode: Mode) -> bool {
        self.conflicts(pages, mode, u64::MAX)
    }

    /// Whether somebody holds `pages` for what excludes `mode`.
    fn is_held(&self, pages: &Range<u64>, mode: Mode) -> bool {
        let in_the_way =
            |entry: &Entry| entry.held && mode.excludes(entry.mode) && overlap(&entry.pages, pages);
        self.entries.borrow().list.iter().any(in_the_way)
    }

    /// Whether an entry older than `number`, or any that is held, is in the way.
    fn conflicts(&self, pages: &Range<u64>, mode: Mode, number: u64) -> bool {
        self.entries.borrow().list.iter().any(|entry| {
            entry.number != number
                && (entry.held || entry.number < number)
                && mode.excludes(entry.mode)
                && overlap(&entry.pages, pages)
        })
    }
}

/// A range that is held, or wanted; given back when dropped.
pub(crate) struct RangeGuard {
    inode: Rc<Inode>,
    number: u64,
}

impl RangeGuard {
    /// Queues for a range and waits for it.
    pub(super) async fn acquire(inode: &Rc<Inode>, pages: Range<u64>, mode: Mode) -> Self {
        let guard = Self::enqueue(inode, pages.clone(), mode);
        while inode.data.lock.conflicts(&pages, mode, guard.number) {
            inode.data.changed().await;
        }
        guard.hold();
        guard
    }

    /// Takes a range if that is possible at once.
    pub(super) fn try_acquire(inode: &Rc<Inode>, pages: Range<u64>, mode: Mode) -> Option<Self> {
        if inode.data.lock.is_refused(&pages, mode) {
            return None;
        }
        let guard = Self::enqueue(inode, pages, mode);
        guard.hold();
        Some(guard)
    }

    /// Takes a range for the write-back of logged pages, in front of those who wait for it: they may wait for a
    /// checkpoint, and that for these pages.
    pub(super) fn try_acquire_first(inode: &Rc<Inode>, pages: Range<u64>) -> Option<Self> {
        if inode.data.lock.is_held(&pages, Mode::WriteBack) {
            return None;
        }
        let guard = Self::enqueue(inode, pages, Mode::WriteBack);
        guard.hold();
        Some(guard)
    }

    fn enqueue(inode: &Rc<Inode>, pages: Range<u64>, mode: Mode) -> Self {
        let mut entries = inode.data.lock.entries.borrow_mut();
        let number = entries.next;
        entries.next += 1;
        entries.list.push(Entry { number, mode, pages, held: false });
        Self { inode: inode.clone(), number }
    }

    fn hold(&self) {
        let mut entries = self.inode.data.lock.entries.borrow_mut();
        if let Some(entry) = entries.list.iter_mut().find(|entry| entry.number == self.number) {
            entry.held = true;
        }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut entries = self.inode.data.lock.entries.borrow_mut();
        entries.list.retain(|entry| entry.number != self.number);
        drop(entries);
        self.inode.data.notify();
    }
}
