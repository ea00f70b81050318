//! What each client knows.
//!
//! A session counts, for each inode, how often it was told of it (`nlookup`). Only those inodes may be named
//! in a request, so a client reaches nothing by guessing numbers. An inode without a name lives as long as a
//! session counts it.

use std::rc::Rc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::{Fs, SessionId};
use crate::error::FsError;
use crate::units::InodeId;

/// Inodes that one client may know at a time. A client that never forgets is told `ENOMEM` behind this; 16
/// million is more than a Linux guest with 64 GiB keeps, and 400 MiB of tables here.
const KNOWN_MAX: usize = 16 << 20;

type Known = HashMap<InodeId, u64, RandomState>;

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
        sessions.known.insert(id, Known::default());
        id
    }

    /// Ends a session: everything that it knew is forgotten.
    pub fn close_session(self: &Rc<Self>, session: SessionId) {
        let known = self.sessions.borrow_mut().known.remove(&session);
        for inode in known.into_iter().flatten().map(|(inode, _)| inode) {
            self.release(inode);
        }
    }

    /// Fails for an inode that the session was not told of.
    ///
    /// # Errors
    /// [`FsError::Stale`].
    pub fn check_known(&self, session: SessionId, inode: InodeId) -> Result<(), FsError> {
        let sessions = self.sessions.borrow();
        let known = sessions.known.get(&session).is_some_and(|known| known.contains_key(&inode));
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
            *known.entry(inode).or_default() += 1;
        }
    }

    /// The session drops `nlookup` of its counts of `inode`.
    pub fn forget(self: &Rc<Self>, session: SessionId, inode: InodeId, nlookup: u64) {
        let gone = {
            let mut sessions = self.sessions.borrow_mut();
            let Some(known) = sessions.known.get_mut(&session) else { return };
            let Some(count) = known.get_mut(&inode) else { return };
            *count = count.saturating_sub(nlookup);
            *count == 0 && known.remove(&inode).is_some()
        };
        if gone {
            self.release(inode);
        }
    }

    /// Whether any session knows the inode.
    pub(super) fn is_known(&self, inode: InodeId) -> bool {
        self.sessions.borrow().known.values().any(|known| known.contains_key(&inode))
    }
}
