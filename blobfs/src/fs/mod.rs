//! The public calls of a mounted file system.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `mount` | mounting, unmounting, waiting |
//! | `inode` | inodes in memory |
//! | `session` | what each client knows and thereby keeps alive |
//! | `attr` | `stat` and changes of attributes |
//! | `dir` | entries: search, scan |
//! | `create`, `unlink`, `rename` | changes of the name space |
//! | `orphan` | inodes without a name |
//! | `xattr` | extended attributes |

mod attr;
mod create;
mod dir;
mod inode;
mod mount;
mod orphan;
mod rename;
mod session;
mod unlink;
mod xattr;

pub mod types;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;

use crate::data::Cache;
use crate::ondisk::Timestamp;
use crate::store::Store;
use crate::txn::{Origin, Txn};

pub(crate) use attr::{regular_file, without_privileges};
pub(crate) use dir::check_name;
pub use inode::Inode;
pub use mount::MountOptions;
pub(crate) use mount::libc_mode;
pub use types::*;
pub use xattr::XattrValue;
pub(crate) use xattr::{XATTR_SIZE_MAX, check_name_space, stays_in_item, xattr_flags};

/// A mounted file system: one per image, on one thread, shared by `Rc`.
pub struct Fs {
    pub(crate) store: Rc<Store>,
    pub(crate) cache: Cache,
    pub(crate) inodes: RefCell<inode::InodeTable>,
    sessions: RefCell<session::Sessions>,
    options: MountOptions,
}

impl Fs {
    /// The time of a change.
    pub(crate) fn now(&self) -> Timestamp {
        let now = self.store.reactor().clock().realtime();
        Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() }
    }

    /// A transaction on behalf of a client.
    pub(crate) fn begin(&self, ctx: &Context) -> Txn {
        Txn::new(Origin { session: ctx.session.0, request: ctx.request })
    }
}
