//! What the device asks of a FUSE server.

pub use fuse_map::{Handled, Request};

/// A FUSE server: one session, as long as the device exists.
pub trait FuseHandler: 'static {
    /// Handles one request. Never blocks, and never panics whatever the guest sent.
    fn handle(&self, request: Request) -> Handled;

    /// Drops what the guest holds: lookups, pins, locks. Requests under way get no reply any more.
    fn reset(&self);
}

impl FuseHandler for std::rc::Rc<fuse_map::Session> {
    fn handle(&self, request: Request) -> Handled {
        fuse_map::Session::handle(self, request)
    }

    fn reset(&self) {
        fuse_map::Session::reset(self);
    }
}
