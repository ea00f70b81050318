//! A client against sessions over real file systems on devices in memory.
//!
//! `client` encodes requests and decodes replies; it checks the form of every reply. The other modules test
//! one part of the protocol each, `decode` the decoder alone.

mod client;

mod attrs;
mod data;
mod decode;
mod dirs;
mod hostile;
mod names;
mod opens;
mod sessions;
mod xattrs;
