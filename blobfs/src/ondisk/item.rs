//! Values of the items that files and directories are made of.

use bitflags::bitflags;
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{BlockAddr, BlockRange, InodeId, MapId};

/// Largest size of a file in bytes: offsets are signed in the protocol.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;

/// Seconds since 1970-01-01 UTC (may be negative) and nanoseconds below 10^9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub nanoseconds: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTime {
    seconds: I64,
    nanoseconds: U32,
}

impl From<Timestamp> for RawTime {
    fn from(time: Timestamp) -> Self {
        Self { seconds: time.seconds.into(), nanoseconds: time.nanoseconds.into() }
    }
}

impl From<RawTime> for Timestamp {
    fn from(raw: RawTime) -> Self {
        Self { seconds: raw.seconds.get(), nanoseconds: raw.nanoseconds.get() }
    }
}

bitflags! {
    /// Facts about an inode that save a search.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct InodeFlags: u32 {
        /// There may be extended attributes.
        const XATTRS = 1 << 0;
        /// There may be a POSIX ACL (access or default).
        const ACL = 1 << 1;
        /// There may be a `security.capability` attribute.
        const CAPABILITY = 1 << 2;
        /// The content is an inline item, not extents.
        const INLINE = 1 << 3;
    }
}

/// An inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeItem {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Number of names (for a directory: 2 plus the number of its subdirectories).
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, in the kernel's 32-bit encoding.
    pub rdev: u32,
    /// See [`InodeFlags`].
    pub flags: InodeFlags,
    /// Project id (later).
    pub project: u32,
    /// Stored size in bytes; for a directory the number of its entries.
    pub size: u64,
    /// Data blocks that the file's extents hold, in file system blocks.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Birth.
    pub btime: Timestamp,
    /// The map that extents and inline data hang on.
    pub map: MapId,
    /// Map below `map`, for clones (later); 0 for none.
    pub parent_map: MapId,
    /// Of a directory, the directory that holds it (the root holds itself); 0 otherwise.
    pub parent: InodeId,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawInode {
    mode: U32,
    nlink: U32,
    uid: U32,
    gid: U32,
    rdev: U32,
    flags: U32,
    project: U32,
    reserved: U32,
    size: U64,
    blocks: U64,
    atime: RawTime,
    mtime: RawTime,
    ctime: RawTime,
    btime: RawTime,
    map: U64,
    parent_map: U64,
    parent: U64,
    reserved2: [U64; 2],
}

const _: () = assert!(size_of::<RawInode>() == InodeItem::SIZE);

impl InodeItem {
    /// Bytes of an inode item.
    pub const SIZE: usize = 136;

    /// The item's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let raw = RawInode {
            mode: self.mode.into(),
            nlink: self.nlink.into(),
            uid: self.uid.into(),
            gid: self.gid.into(),
            rdev: self.rdev.into(),
            flags: self.flags.bits().into(),
            project: self.project.into(),
            reserved: U32::ZERO,
            size: self.size.into(),
            blocks: self.blocks.into(),
            atime: self.atime.into(),
            mtime: self.mtime.into(),
            ctime: self.ctime.into(),
            btime: self.btime.into(),
            map: self.map.0.into(),
            parent_map: self.parent_map.0.into(),
            parent: self.parent.0.into(),
            reserved2: [U64::ZERO; 2],
        };
        zerocopy::transmute!(raw)
    }

    /// An inode without anything: no links, no content, times of 0, its own map.
    pub fn empty(inode: InodeId, mode: u32) -> Self {
        let never = Timestamp::default();
        Self {
            mode,
            nlink: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: InodeFlags::empty(),
            project: 0,
            size: 0,
            blocks: 0,
            atime: never,
            mtime: never,
            ctime: never,
            btime: never,
            map: MapId(inode.0),
            parent_map: MapId(0),
            parent: InodeId(0),
        }
    }

    /// Sets times of 10^9 nanoseconds or more in an item's bytes to 0; nothing when the length is wrong.
    pub fn clear_impossible_times(bytes: &mut [u8]) {
        let Ok(raw) = RawInode::mut_from_bytes(bytes) else { return };
        for time in [&mut raw.atime, &mut raw.mtime, &mut raw.ctime, &mut raw.btime] {
            if time.nanoseconds.get() >= 1_000_000_000 {
                *time = Timestamp::default().into();
            }
        }
    }

    /// The inode in `bytes`; `None` when the length is wrong or a time has 10^9 nanoseconds or more.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let raw = RawInode::ref_from_bytes(bytes).ok()?;
        let times = [raw.atime, raw.mtime, raw.ctime, raw.btime].map(Timestamp::from);
        if times.iter().any(|time| time.nanoseconds >= 1_000_000_000) {
            return None;
        }
        Some(Self {
            mode: raw.mode.get(),
            nlink: raw.nlink.get(),
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            rdev: raw.rdev.get(),
            flags: InodeFlags::from_bits_retain(raw.flags.get()),
            project: raw.project.get(),
            size: raw.size.get(),
            blocks: raw.blocks.get(),
            atime: times[0],
            mtime: times[1],
            ctime: times[2],
            btime: times[3],
            map: MapId(raw.map.get()),
            parent_map: MapId(raw.parent_map.get()),
            parent: InodeId(raw.parent.get()),
        })
    }
}

bitflags! {
    /// State of an extent.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ExtentFlags: u8 {
        /// Allocated but not written: reads as zeros.
        const UNWRITTEN = 1 << 0;
        /// Other maps may use these blocks: look up the reference count before overwriting (later).
        const MAYBE_SHARED = 1 << 1;
    }
}

/// A run of file blocks and where it is stored. The key's offset is the first file block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentItem {
    /// First block of the stored extent on the device.
    pub addr: BlockAddr,
    /// Blocks of the stored extent.
    pub stored_blocks: u32,
    /// File blocks that this item maps.
    pub blocks: u32,
    /// First block of this item within the (decoded) stored extent.
    pub stored_offset: u32,
    /// How the stored extent is encoded: 0 = as it is.
    pub encoding: u8,
    /// State.
    pub flags: ExtentFlags,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtent {
    addr: U64,
    stored_blocks: U32,
    blocks: U32,
    stored_offset: U32,
    encoding: u8,
    flags: u8,
    reserved: U16,
}

const _: () = assert!(size_of::<RawExtent>() == ExtentItem::SIZE);

impl ExtentItem {
    /// Bytes of an extent item.
    pub const SIZE: usize = 24;

    /// A plain extent over all of `range`.
    pub fn plain(range: BlockRange, flags: ExtentFlags) -> Self {
        Self {
            addr: range.start,
            stored_blocks: range.count,
            blocks: range.count,
            stored_offset: 0,
            encoding: 0,
            flags,
        }
    }

    /// The device blocks that hold the mapped file blocks, for a plain extent.
    pub fn device_range(&self) -> BlockRange {
        BlockRange::new(BlockAddr(self.addr.0 + u64::from(self.stored_offset)), self.blocks)
    }

    /// The item's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let raw = RawExtent {
            addr: self.addr.0.into(),
            stored_blocks: self.stored_blocks.into(),
            blocks: self.blocks.into(),
            stored_offset: self.stored_offset.into(),
            encoding: self.encoding,
            flags: self.flags.bits(),
            reserved: U16::ZERO,
        };
        zerocopy::transmute!(raw)
    }

    /// The extent in `bytes`; `None` when the length is wrong, it maps nothing, or a plain extent maps
    /// more than it stores.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let raw = RawExtent::ref_from_bytes(bytes).ok()?;
        let item = Self {
            addr: BlockAddr(raw.addr.get()),
            stored_blocks: raw.stored_blocks.get(),
            blocks: raw.blocks.get(),
            stored_offset: raw.stored_offset.get(),
            encoding: raw.encoding,
            flags: ExtentFlags::from_bits_retain(raw.flags),
        };
        let end = item.stored_offset.checked_add(item.blocks)?;
        item.addr.0.checked_add(u64::from(item.stored_blocks))?;
        (item.encoding == 0 && item.blocks > 0 && end <= item.stored_blocks).then_some(item)
    }
}

/// A directory entry inside its item: `inode u64 | file type u8 (DT_*) | name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirentRef<'a> {
    /// The inode that the name stands for.
    pub inode: InodeId,
    /// Type of the inode as `DT_*`.
    pub file_type: u8,
    /// 1 to 255 bytes, without `/` and NUL.
    pub name: &'a [u8],
}

impl<'a> DirentRef<'a> {
    /// The entry in `bytes`; `None` when it is too short or the name is too long or empty.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (inode, rest) = bytes.split_first_chunk::<8>()?;
        let (&file_type, name) = rest.split_first()?;
        let inode = InodeId(U64::from_bytes(*inode).get());
        (1..=255).contains(&name.len()).then_some(Self { inode, file_type, name })
    }
}

/// The bytes of a directory entry.
pub fn encode_dirent(entry: DirentRef<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(U64::new(entry.inode.0).as_bytes());
    out.push(entry.file_type);
    out.extend_from_slice(entry.name);
}

/// An extended attribute inside its item: `name length u8 | place u8 | name | value`, where place 0 is
/// followed by the value itself and place 1 by `map u64, size u32`: the value lies in that map's extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrRef<'a> {
    /// The value lies in the item.
    Inline {
        /// Full name with its prefix.
        name: &'a [u8],
        /// The value.
        value: &'a [u8],
    },
    /// The value lies in extents.
    Stored {
        /// Full name with its prefix.
        name: &'a [u8],
        /// Map of the value's extents.
        map: MapId,
        /// Bytes of the value.
        size: u32,
    },
}

impl<'a> XattrRef<'a> {
    /// The attribute in `bytes`; `None` when it is malformed.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (&[name_len, place], rest) = bytes.split_first_chunk::<2>()?;
        let (name, rest) = rest.split_at_checked(usize::from(name_len))?;
        if name.is_empty() {
            return None;
        }
        match place {
            0 => Some(Self::Inline { name, value: rest }),
            1 => {
                let (map, size) = rest.split_first_chunk::<8>()?;
                let size: [u8; 4] = size.try_into().ok()?;
                let map = MapId(U64::from_bytes(*map).get());
                Some(Self::Stored { name, map, size: U32::from_bytes(size).get() })
            }
            _ => None,
        }
    }

    /// Full name.
    pub fn name(&self) -> &'a [u8] {
        match self {
            Self::Inline { name, .. } | Self::Stored { name, .. } => name,
        }
    }
}

/// The bytes of an attribute whose value lies in the item.
///
/// # Panics
/// When the name is longer than 255 bytes: callers check names first.
pub fn encode_xattr_inline(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(u8::try_from(name.len()).expect("checked name"));
    out.push(0);
    out.extend_from_slice(name);
    out.extend_from_slice(value);
}

/// The bytes of an attribute whose value lies in extents.
///
/// # Panics
/// When the name is longer than 255 bytes: callers check names first.
pub fn encode_xattr_stored(name: &[u8], map: MapId, size: u32, out: &mut Vec<u8>) {
    out.push(u8::try_from(name.len()).expect("checked name"));
    out.push(1);
    out.extend_from_slice(name);
    out.extend_from_slice(U64::new(map.0).as_bytes());
    out.extend_from_slice(U32::new(size).as_bytes());
}
