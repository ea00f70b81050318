//! What a device holds, told by the marks that file systems, partition tables and the like leave at its
//! start.
//!
//! A short list, not a catalogue: enough that a device in use is not formatted by mistake. Places and marks
//! are those of util-linux's `libblkid`.

use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError, IoBuffers};

/// What is known: name, byte offset of the mark, the mark.
const KNOWN: &[(&str, usize, &[u8])] = &[
    ("a blobfs file system", 4096, b"vfsblob\0"),
    ("a blobfs file system", 8192, b"vfsblob\0"),
    ("an ext2, ext3 or ext4 file system", 1080, &[0x53, 0xef]),
    ("an XFS file system", 0, b"XFSB"),
    ("a btrfs file system", 0x10040, b"_BHRfS_M"),
    ("a bcachefs file system", 4120, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]),
    ("an f2fs file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    ("a squashfs file system", 0, b"hsqs"),
    ("an EROFS file system", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("an ISO 9660 file system", 0x8001, b"CD001"),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("an LVM volume", 536, b"LVM2 001"),
    ("a RAID member", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table", 4096, b"EFI PART"),
    ("a boot sector or partition table", 510, &[0x55, 0xaa]),
];

/// Bytes at the start that hold all marks: the farthest one is btrfs's.
const HEAD_LEN: usize = 0x11000;

/// The name of what the device holds, if that is known.
pub(crate) async fn find(device: &Rc<dyn Bdev>) -> Result<Option<&'static str>, BdevError> {
    let limits = device.limits();
    let align = limits.dma_align.max(limits.block_size) as usize;
    let len = HEAD_LEN.next_multiple_of(limits.block_size as usize).min(limits.size as usize);
    let head = Rc::new(AlignedBuf::zeroed(len, align));
    let buffers = IoBuffers::from_aligned(&head);
    let step = limits.max_transfer.max(limits.block_size as usize);
    for done in (0..len).step_by(step) {
        device.read(done as u64, buffers.slice(done, step)).await?;
    }
    Ok(name_of(&head))
}

fn name_of(head: &[u8]) -> Option<&'static str> {
    let has = |offset: usize, mark: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(mark));
    KNOWN.iter().find(|(_, offset, mark)| has(*offset, mark)).map(|(name, ..)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_is_found_and_lies_in_what_is_read() {
        for (name, offset, mark) in KNOWN {
            let mut head = vec![0; HEAD_LEN];
            assert_eq!(name_of(&head), None);
            head[*offset..offset + mark.len()].copy_from_slice(mark);
            assert_eq!(name_of(&head), Some(*name));
        }
    }

    #[test]
    fn a_device_shorter_than_the_marks_is_no_problem() {
        assert_eq!(name_of(&[0; 512]), None);
        assert_eq!(name_of(&[]), None);
    }
}
