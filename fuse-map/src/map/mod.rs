//! A short function per opcode: arguments -> `blobfs` call -> reply.

pub(crate) mod attr;
pub(crate) mod data;
pub(crate) mod dir;
pub(crate) mod misc;
pub(crate) mod name;
pub(crate) mod xattr;
