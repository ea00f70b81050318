//! Memory that a frontend shares, seen from its own side: through the file, never through the mapping.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

/// A memfd.
pub(crate) struct SharedMemory {
    file: File,
}

impl SharedMemory {
    /// A file of zeros.
    pub(crate) fn new(len: u64) -> Self {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(fd);
        file.set_len(len).expect("room in memory");
        Self { file }
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset).expect("a memfd takes what fits");
    }

    /// Bytes at `offset`, zeros behind the end.
    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _behind_the_end = self.file.read_exact_at(&mut bytes, offset);
        bytes
    }

    /// As [`SharedMemory::read`], of any length.
    pub(crate) fn read_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _behind_the_end = self.file.read_exact_at(&mut bytes, offset);
        bytes
    }

    pub(crate) fn read_word(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    /// Another descriptor of the same file.
    pub(crate) fn descriptor(&self) -> OwnedFd {
        self.file.as_fd().try_clone_to_owned().expect("a descriptor")
    }

    /// Makes the file shorter, or longer again.
    pub(crate) fn resize(&self, len: u64) {
        self.file.set_len(len).expect("room in memory");
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The bytes of a descriptor (`struct virtq_desc`).
pub(crate) fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
