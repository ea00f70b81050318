//! The image behind the device: opened or made, mounted, and left clean.

use std::rc::Rc;

use reactor::Reactor;
use vhostfs::device::fs::{FuseHandler, Handled, Request};
use vhostfs::poller::Poller;

use crate::config::ServeArgs;
use crate::failure::Failure;

/// A mounted file system.
pub(crate) struct Filesystem {}

pub(crate) struct Handler {}

impl FuseHandler for Handler {
    fn handle(&self, _: Request) -> Handled {
        Handled::Unanswerable
    }
    fn reset(&self) {}
}

impl Filesystem {
    pub(crate) fn open(args: &ServeArgs, _reactor: &Rc<Reactor>) -> Result<Self, Failure> {
        let image = args.image.as_deref().unwrap_or_default();
        Err(Failure::new(image, "this build has no file system yet", "wait"))
    }

    pub(crate) fn handler(&self) -> Handler {
        Handler {}
    }

    pub(crate) fn wake(&self, _poller: &mut Poller) -> std::io::Result<()> {
        Ok(())
    }

    pub(crate) fn close(self, _reactor: &Rc<Reactor>) -> Result<(), Failure> {
        Ok(())
    }
}
