//! Inodes in memory.
//!
//! An inode has *stored* attributes, those of its item in the tree, and *live* ones, those that `stat`
//! shows. They differ in size and times while buffered data waits for its write-back: the stored size moves
//! in the transaction that maps the data, so that no size ever covers data that is not there.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::Fs;
use crate::data::FileData;
use crate::error::{Corruption, FsError, Try};
use crate::ondisk::{FILE_SIZE_MAX, InodeItem, Key};
use crate::units::InodeId;

/// Inodes in memory that nothing needs to be there, at most. Picked: 64 Ki take about 25 MiB; one that went
/// comes back from a cached node in less than a microsecond.
pub(super) const INODES_MAX: usize = 64 << 10;

/// Inodes that one insertion looks at to find one that may go.
const EVICTIONS_TRIED_MAX: usize = 4;

/// The inodes in memory.
#[derive(Default)]
pub(crate) struct InodeTable {
    inodes: HashMap<InodeId, Rc<Inode>, RandomState>,
    /// Their numbers in the order in which they are looked at; may name inodes that have gone.
    order: VecDeque<InodeId>,
}

impl InodeTable {
    /// The inode, if it is in memory.
    pub(crate) fn get(&self, id: &InodeId) -> Option<&Rc<Inode>> {
        self.inodes.get(id).inspect(|inode| inode.used.set(true))
    }

    /// Adds an inode; another one may go.
    pub(crate) fn insert(&mut self, id: InodeId, inode: Rc<Inode>) {
        if self.inodes.insert(id, inode).is_none() {
            self.order.push_back(id);
        }
        for _ in 0..EVICTIONS_TRIED_MAX {
            if self.order.len() <= INODES_MAX {
                return;
            }
            self.evict_first();
        }
    }

    fn evict_first(&mut self) {
        let Some(id) = self.order.pop_front() else { return };
        let Some(inode) = self.inodes.get(&id) else { return };
        if inode.used.replace(false) || !inode.is_evictable() {
            self.order.push_back(id);
        } else {
            self.inodes.remove(&id);
        }
    }

    /// Removes an inode that was deleted.
    pub(crate) fn remove(&mut self, id: &InodeId) {
        self.inodes.remove(id);
    }

    /// Lets an inode go that nothing needs.
    #[cfg(test)]
    pub(crate) fn evict(&mut self, id: &InodeId) {
        assert!(self.inodes.remove(id).is_some_and(|inode| inode.is_evictable()));
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }
}

/// An inode in memory.
pub struct Inode {
    /// Its number.
    pub id: InodeId,
    /// What `stat` shows.
    pub(crate) live: RefCell<InodeItem>,
    /// The size in the tree's item.
    pub(crate) stored_size: Cell<u64>,
    /// Live times or size are ahead of the tree's item.
    pub(crate) ahead: Cell<bool>,
    /// It has been deleted; whoever still holds it must not bring it back.
    pub(crate) gone: Cell<bool>,
    /// Looked for since the table considered letting it go.
    used: Cell<bool>,
    /// Cached pages, range locks.
    pub(crate) data: FileData,
}

impl Inode {
    pub(crate) fn new(id: InodeId, item: InodeItem) -> Rc<Self> {
        Rc::new(Self {
            id,
            stored_size: Cell::new(item.size),
            live: RefCell::new(item),
            ahead: Cell::new(false),
            gone: Cell::new(false),
            used: Cell::new(false),
            data: FileData::default(),
        })
    }

    /// Whether the tree has all that is known of the inode, so that it need not be in memory: nobody works
    /// with it, nothing is ahead of the tree, and no data is cached. One without a name stays, because its
    /// last session's forget deletes it.
    fn is_evictable(self: &Rc<Self>) -> bool {
        Rc::strong_count(self) == 1
            && !self.ahead.get()
            && self.live.borrow().nlink > 0
            && self.data.is_idle()
    }

    /// Fails once the inode has been deleted.
    pub(crate) fn check_alive(&self) -> Result<(), FsError> {
        if self.gone.get() { Err(FsError::Stale) } else { Ok(()) }
    }

    /// Whether the tree has a size of at least `size`, or the file is shorter or gone by now.
    pub(crate) fn has_stored(&self, size: u64) -> bool {
        self.gone.get() || self.stored_size.get() >= size.min(self.live.borrow().size)
    }

    /// The live attributes with the stored size: what a transaction that maps no data puts into the tree.
    pub(crate) fn stored_item(&self) -> InodeItem {
        InodeItem { size: self.stored_size.get(), ..*self.live.borrow() }
    }

    /// The live attributes after a transaction has put `item` into the tree: the same, with the live size.
    pub(crate) fn settle(&self, item: InodeItem) {
        let ahead_size = self.live.borrow().size;
        let buffered = self.stored_size.get() != ahead_size;
        let size = if buffered { ahead_size } else { item.size };
        self.stored_size.set(item.size);
        *self.live.borrow_mut() = InodeItem { size, ..item };
        self.ahead.set(buffered);
    }
}

impl Fs {
    /// The inode with that number, loaded when needed.
    ///
    /// # Errors
    /// A wait; [`FsError::Stale`] when there is no such inode.
    pub(crate) fn inode(&self, id: InodeId) -> Try<Rc<Inode>> {
        if let Some(inode) = self.inodes.borrow().get(&id) {
            return Ok(inode.clone());
        }
        let item = self.store.get(&Key::inode(id), |value| value.map(InodeItem::decode))?;
        // What counts with sizes and blocks may rely on them.
        let possible = |item: &InodeItem| item.size <= FILE_SIZE_MAX && item.blocks <= FILE_SIZE_MAX / 512;
        let item = item.ok_or(FsError::Stale)?.filter(possible).ok_or_else(|| {
            FsError::from(Corruption { structure: "inode item", offset: id.0, problem: "malformed".into() })
        })?;
        let inode = Inode::new(id, item);
        // It may have been in memory before, and nobody knows which of the writes since the last flush were its.
        inode.data.count_as_written(self.store.last_written());
        self.inodes.borrow_mut().insert(id, inode.clone());
        Ok(inode)
    }
}
