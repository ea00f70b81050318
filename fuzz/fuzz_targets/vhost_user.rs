//! See `vhostfs_fuzz::vhost_user`.
#![cfg_attr(fuzzing, no_main)]

vhostfs_fuzz::target!(vhost_user);
