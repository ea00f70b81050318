//! The guest-facing side of the file service: vhost-user sessions, virtqueues and virtio devices on one
//! poller.
//!
//! A request's way: [`poller`] looks at each [`queue`] in turn; its [`ring`] gives a chain of segments in
//! [`guest_mem`]; the [`device`] answers it; the answer goes back into the ring. Memory and rings come from
//! [`vhost_user`] messages, and when there is nothing to do the poller sleeps on its [`events`].
//!
//! Left to others: what a FUSE request means (`fuse-map`), files (`blobfs`), block devices (`bdev`), tasks
//! and time (`reactor`).

pub mod descriptor;
pub mod device;
pub mod events;
pub mod guest_mem;
pub mod log_limit;
pub mod poller;
pub mod queue;
pub mod ring;
pub mod vhost_user;
