//! A userspace blob file system on a raw block device.
//!
//! From the bottom up, each layer using only those above it in this list:
//!
//! | module | what it provides |
//! | --- | --- |
//! | [`units`] | numbers that must not be swapped: inode, map, block address |
//! | [`ondisk`] | pure bytes <-> structs, no I/O: keys, items |
//! | [`txn`] | a transaction: the list of item changes that is atomic |
//! | [`store`] | the transactional item store: tree, journal, checkpoint, space |
//! | [`data`] | file data: page cache, extents, direct I/O, write-back |
//! | [`fs`] | the public calls: names, attributes, xattrs, sessions |
//! | [`check`] | the checker: every structure against every other; repair and scrub |
//!
//! # Prepare and apply
//!
//! A call such as [`fs::Fs`]'s `create` is an ordinary function on cached state. It first only reads; if
//! something that it needs is not in memory it returns [`Stop::Wait`] and has changed nothing. The caller
//! satisfies the wait (`Fs::wait`) and calls again. Once everything is at hand, [`store::Store::commit`]
//! applies the whole transaction: it checks all that could go wrong before it changes the first byte. So
//! every operation is atomic, needs no lock, and a simulator can drive it.

pub mod check;
pub mod data;
pub mod error;
pub mod fs;
pub mod ondisk;
pub mod store;
pub mod txn;
pub mod units;

pub use error::{FsError, Stop, Try, Wait};
pub use fs::Fs;
