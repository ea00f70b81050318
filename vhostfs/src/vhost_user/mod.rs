//! vhost-user, backend side: what a frontend says about memory and rings, without ever blocking on it.
//!
//! | module | what it provides |
//! | --- | --- |
//! | [`message`] | bytes of a message to a typed [`message::Message`] |
//! | [`connection`] | frames over a socket: partial input, descriptors, replies |
//! | [`session`] | one frontend: features, memory table, queues, messages that wait |
//!
//! The message structs are those of the `vhost` crate. Its own server is not used: it blocks on a partial
//! message, ends the connection on a handler's error and insists on SET_MEM_TABLE's exact size, which
//! User-Mode Linux does not keep to.

pub mod connection;
pub mod message;
pub mod session;
