//! See `vhostfs_fuzz::chain`.
#![cfg_attr(fuzzing, no_main)]

vhostfs_fuzz::target!(chain);
