//! What each client knows.
//!
//! A session counts, for each inode, how often it was told of it (`nlookup`). Only those inodes may be named
//! in a request, so a client reaches nothing by guessing numbers. An inode without a name lives as long as a
//! session counts it.

use std::hash::BuildHasher;
use std::rc::Rc;

use foldhash::fast::{FixedState, RandomState};
use hashbrown::{HashMap, HashTable};
use reactor::sync::yield_now;

use super::{Fs, SessionId};
use crate::error::FsError;
use crate::units::InodeId;

/// Inodes that one client may know at a time. A client that never forgets is told `ENOMEM` behind this; 16
/// million is more than a Linux guest with 64 GiB keeps, and 430 MiB of tables here.
const KNOWN_MAX: usize = 16 << 20;

/// Inodes of a session that has ended to look at before others get their turn. Picked: some ten microseconds.
const RELEASED_AT_ONCE: usize = 256;

/// Number (low half, high half) and count of an inode: 12 bytes instead of 16. A count that reaches the
/// largest one stays there until the session ends.
#[derive(Clone, Copy)]
struct Lookups([u32; 3]);

impl Lookups {
    fn new(inode: InodeId) -> Self {
        Self([inode.0 as u32, (inode.0 >> 32) as u32, 0])
    }

    fn inode(self) -> InodeId {
        InodeId(u64::from(self.0[0]) | u64::from(self.0[1]) << 32)
    }

    fn add(&mut self, count: u64) {
        let sum = u64::from(self.0[2]).saturating_add(count);
        self.0[2] = u32::try_from(sum).unwrap_or(u32::MAX);
    }

    /// Takes from the count; true when nothing is left.
    fn take(&mut self, count: u64) -> bool {
        if self.0[2] != u32::MAX {
            self.0[2] = u64::from(self.0[2]).saturating_sub(count) as u32;
        }
        self.0[2] == 0
    }
}

/// The inodes that a session knows.
struct Known {
    table: HashTable<Lookups>,
    hasher: FixedState,
}

impl Known {
    /// `seed` decides in which order the end of the session looks at them: the same in every run of a simulation.
    fn new(seed: u64) -> Self {
        Self { table: HashTable::new(), hasher: FixedState::with_seed(seed) }
    }

    fn len(&self) -> usize {
        self.table.len()
    }

    fn contains(&self, inode: InodeId) -> bool {
        self.table.find(self.hasher.hash_one(inode), |known| known.inode() == inode).is_some()
    }

    fn add(&mut self, inode: InodeId, count: u64) {
        let hash = |known: &Lookups| self.hasher.hash_one(known.inode());
        let entry = self.table.entry(self.hasher.hash_one(inode), |known| known.inode() == inode, hash);
        entry.or_insert(Lookups::new(inode)).get_mut().add(count);
    }

    /// Takes from an inode's count; true when that made it unknown.
    fn take(&mut self, inode: InodeId, count: u64) -> bool {
        let found = self.table.find_entry(self.hasher.hash_one(inode), |known| known.inode() == inode);
        let Ok(mut entry) = found else { return false };
        let gone = entry.get_mut().take(count);
        if gone {
            entry.remove();
        }
        gone
    }
}

#[derive(Default)]
pub(super) struct Sessions {
    last: u64,
    known: HashMap<SessionId, Known, RandomState>,
}

impl Fs {
    /// Begins a client's session.
    pub fn open_session(&self) -> SessionId {
        let mut sessions = self.sessions.borrow_mut();
        sessions.last += 1;
        let id = SessionId(sessions.last);
        sessions.known.insert(id, Known::new(self.store.hash_seed()));
        id
    }

    /// Ends a session: everything that it knew is forgotten at once, and what nobody knows any more is deleted in
    /// the background.
    pub fn close_session(self: &Rc<Self>, session: SessionId) {
        let Some(known) = self.sessions.borrow_mut().known.remove(&session) else { return };
        let fs = self.clone();
        self.store.reactor().spawn(async move {
            for (number, lookups) in known.table.into_iter().enumerate() {
                fs.delete_released(lookups.inode()).await;
                if number % RELEASED_AT_ONCE == RELEASED_AT_ONCE - 1 {
                    yield_now().await;
                }
            }
        });
    }

    /// Fails for an inode that the session was not told of.
    ///
    /// # Errors
    /// [`FsError::Stale`].
    pub fn check_known(&self, session: SessionId, inode: InodeId) -> Result<(), FsError> {
        let sessions = self.sessions.borrow();
        let known = sessions.known.get(&session).is_some_and(|known| known.contains(inode));
        if known || inode == InodeId::ROOT { Ok(()) } else { Err(FsError::Stale) }
    }

    /// Room for one more inode in the session's table, before an operation that tells it of one.
    pub(super) fn check_session_room(&self, session: SessionId) -> Result<(), FsError> {
        let sessions = self.sessions.borrow();
        let known = sessions.known.get(&session).ok_or(FsError::Stale)?;
        if known.len() < KNOWN_MAX { Ok(()) } else { Err(FsError::OutOfMemory) }
    }

    /// The session is told of `inode` once more.
    pub(super) fn remember(&self, session: SessionId, inode: InodeId) {
        if let Some(known) = self.sessions.borrow_mut().known.get_mut(&session) {
            known.add(inode, 1);
        }
    }

    /// The session drops `nlookup` of its counts of `inode`.
    pub fn forget(self: &Rc<Self>, session: SessionId, inode: InodeId, nlookup: u64) {
        let gone = {
            let mut sessions = self.sessions.borrow_mut();
            let Some(known) = sessions.known.get_mut(&session) else { return };
            known.take(inode, nlookup)
        };
        if gone {
            self.release(inode);
        }
    }

    /// Whether any session knows the inode.
    pub(super) fn is_known(&self, inode: InodeId) -> bool {
        self.sessions.borrow().known.values().any(|known| known.contains(inode))
    }
}
