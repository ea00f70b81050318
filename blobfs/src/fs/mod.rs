//! The public calls of a mounted file system.

mod inode;
pub mod types;

use std::cell::RefCell;
use std::rc::Rc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use crate::error::{FsError, Stop, Try, Wait};
use crate::store::Store;
use crate::units::InodeId;

pub use inode::Inode;

/// A mounted file system: one per image, on one thread, shared by `Rc`.
pub struct Fs {
    pub(crate) store: Rc<Store>,
    pub(crate) inodes: RefCell<HashMap<InodeId, Rc<Inode>, RandomState>>,
}

impl Fs {
    /// Waits for what a call waits for; then the call is made again.
    ///
    /// # Errors
    /// What prevents the wait from ever ending: the device's error, or corruption.
    pub async fn wait(self: &Rc<Self>, wait: Wait) -> Result<(), FsError> {
        self.store.wait(&wait).await.map(drop)
    }

    /// Makes a call again and again until it does not have to wait.
    ///
    /// # Errors
    /// Those of the call and of its waits.
    pub async fn run<T>(self: &Rc<Self>, mut call: impl FnMut(&Rc<Self>) -> Try<T>) -> Result<T, FsError> {
        loop {
            match call(self) {
                Ok(value) => return Ok(value),
                Err(Stop::Fail(error)) => return Err(error),
                Err(Stop::Wait(wait)) => self.wait(wait).await?,
            }
        }
    }
}
