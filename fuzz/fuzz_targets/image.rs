//! See `vhostfs_fuzz::image`.
#![cfg_attr(fuzzing, no_main)]

vhostfs_fuzz::target!(image);
