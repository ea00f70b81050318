//! What the tests of this crate share.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

pub mod daemon;
pub mod empty_fs;
pub mod guest;
