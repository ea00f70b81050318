//! File data: the page cache, extents, direct I/O, write-back.

/// Data state of one inode.
#[derive(Default)]
pub struct FileData {}
