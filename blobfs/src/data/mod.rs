//! File data: extents, reading, writing, truncation.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `extent` | which device blocks hold a range of a file, and changes of that |
//! | `io` | reading and writing |
//! | `space` | truncation, allocation ahead, holes |
//! | `sync` | durability |
//!
//! Every write goes through to the device: there is no data cache yet. Operations that touch the device hold
//! the inode's data lock from mapping lookup to completion, so none sees another's blocks half moved.
//!
//! Invariants:
//! - an extent enters the tree only after its data is on the device;
//! - bytes of a file's last block behind the end of the file are unspecified until the file grows: whatever
//!   makes it grow first zeroes them (`tail_clean`).

mod extent;
mod io;
mod space;
mod sync;

use std::cell::Cell;
use std::rc::Rc;

use reactor::sync::Notify;

/// Data state of one inode.
#[derive(Default)]
pub struct FileData {
    locked: Cell<bool>,
    unlocked: Notify,
    /// The last block's bytes behind the end of the file are known to be zero.
    tail_clean: Cell<bool>,
}

/// The right to touch an inode's data; given back when dropped.
pub(crate) struct DataLock(Rc<crate::fs::Inode>);

impl DataLock {
    /// Waits for the right.
    pub(crate) async fn acquire(inode: &Rc<crate::fs::Inode>) -> Self {
        while inode.data.locked.get() {
            inode.data.unlocked.notified().await;
        }
        inode.data.locked.set(true);
        Self(inode.clone())
    }
}

impl Drop for DataLock {
    fn drop(&mut self) {
        self.0.data.locked.set(false);
        self.0.data.unlocked.notify_all();
    }
}
