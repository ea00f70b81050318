//! The image behind the device: opened or made, mounted, and left clean.
//!
//! Not connected yet: `blobfs` cannot be mounted and `fuse-map` has no session, so every image is refused and
//! [`Filesystem`] has no values. The rest of the daemon is written against the four functions below.

use std::convert::Infallible;
use std::io;
use std::rc::Rc;

use reactor::Reactor;
use vhostfs::device::fs::{FuseHandler, Handled, Request};
use vhostfs::poller::Poller;

use crate::config::ServeArgs;
use crate::failure::Failure;

/// A mounted file system.
pub(crate) struct Filesystem {
    never: Infallible,
}

/// The FUSE server over an export of it.
pub(crate) struct Handler {
    never: Infallible,
}

impl FuseHandler for Handler {
    fn handle(&self, _request: Request) -> Handled {
        match self.never {}
    }

    fn reset(&self) {
        match self.never {}
    }
}

impl Filesystem {
    /// Opens the image, creating and formatting it if it does not exist and a size is given, and mounts it.
    pub(crate) fn open(args: &ServeArgs, _reactor: &Rc<Reactor>) -> Result<Self, Failure> {
        let image = args.image.as_deref().unwrap_or_default();
        Err(Failure::new(image, "this build contains no file system", "use a build with blobfs"))
    }

    /// The FUSE server over the export that was asked for.
    pub(crate) fn handler(&self) -> Handler {
        match self.never {}
    }

    /// Lets the device's completions wake the poller.
    pub(crate) fn wake(&self, _poller: &mut Poller) -> io::Result<()> {
        match self.never {}
    }

    /// Commits everything and marks the file system clean.
    pub(crate) fn close(self, _reactor: &Rc<Reactor>) -> Result<(), Failure> {
        match self.never {}
    }
}
