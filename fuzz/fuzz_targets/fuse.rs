//! See `vhostfs_fuzz::fuse`.
#![cfg_attr(fuzzing, no_main)]

vhostfs_fuzz::target!(fuse);
