//! Requests: the one place where lengths, names and offsets of the client are checked.
//!
//! Everything is copied out of the client's memory once, before it is looked at: the client may change its
//! memory at any time. A read never goes behind the length that the request's header states, and that length
//! never behind the readable memory.

use std::mem::offset_of;

use bdev::{Cursor, IoBuffers};
use blobfs::fs::types::{FallocateMode, IoFlags, RenameMode, SeekTarget, SetAttr, SetTime, XattrMode};
use blobfs::ondisk::Timestamp;
use smallvec::SmallVec;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::abi::*;
use crate::errno::Errno;
use crate::session::TRANSFER_MAX;

/// Longest request in bytes: a WRITE of [`TRANSFER_MAX`] with room to spare for its header and arguments. All
/// others are shorter. A client's memory is no limit: a chain of buffers may name the same memory many times.
pub(crate) const REQUEST_LEN_MAX: usize = TRANSFER_MAX as usize + (64 << 10);

/// Longest name of a directory entry or an attribute in bytes.
const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link in bytes (the kernel's `PATH_MAX` with the final NUL).
const TARGET_LEN_MAX: usize = 4095;
/// Longest value of an extended attribute in bytes (the kernel's `XATTR_SIZE_MAX`).
const XATTR_SIZE_MAX: u32 = 65536;
/// Largest position in a file (`loff_t`).
const OFFSET_MAX: u64 = i64::MAX as u64;
/// Longest security context that is accepted, in bytes (a page; SELinux's are below 256).
const SECURITY_CONTEXT_LEN_MAX: usize = 4096;

/// A name out of a request; most are short.
pub(crate) type Name = SmallVec<[u8; 64]>;

/// Reads the header. `None` if the request has none.
pub(crate) fn header(readable: &IoBuffers) -> Option<fuse_in_header> {
    let mut header = fuse_in_header::new_zeroed();
    let len = readable.copy_to(0, header.as_mut_bytes());
    (len == size_of::<fuse_in_header>()).then_some(header)
}

/// What can be told of a request whose header may end too early.
pub(crate) struct Head {
    pub(crate) opcode: Option<u32>,
    /// 0 when it is not there: the reply then names no request, but there is one.
    pub(crate) unique: u64,
}

/// Reads the part of the header that is there.
pub(crate) fn head(readable: &IoBuffers) -> Head {
    let mut header = fuse_in_header::new_zeroed();
    let len = readable.copy_to(0, header.as_mut_bytes());
    let has = |end| len >= end;
    Head {
        opcode: has(offset_of!(fuse_in_header, unique)).then_some(header.opcode),
        unique: if has(offset_of!(fuse_in_header, nodeid)) { header.unique } else { 0 },
    }
}

/// The arguments behind a header, read from front to back.
///
/// `cursor` stands at byte `at`. Only it is read from: looking for a position from the first segment on, for
/// each argument, would cost a client's number of segments times its number of arguments.
pub(crate) struct Args<'a> {
    bytes: &'a IoBuffers,
    cursor: Cursor<'a>,
    at: usize,
    end: usize,
}

impl<'a> Args<'a> {
    /// The arguments of the request with that header.
    pub(crate) fn new(bytes: &'a IoBuffers, header: &fuse_in_header) -> Result<Self, Errno> {
        let at = size_of::<fuse_in_header>();
        let end = header.len as usize;
        let extensions = usize::from(header.total_extlen) * FUSE_REC_ALIGN;
        if end > bytes.len().min(REQUEST_LEN_MAX) || end < at + extensions {
            return Err(Errno::INVALID);
        }
        let mut cursor = bytes.cursor();
        cursor.skip(at);
        Ok(Self { bytes, cursor, at, end })
    }

    /// Bytes that are left.
    pub(crate) fn left(&self) -> usize {
        self.end - self.at
    }

    /// The next argument, a struct.
    pub(crate) fn take<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.fill(value.as_mut_bytes())?;
        Ok(value)
    }

    fn fill(&mut self, dst: &mut [u8]) -> Result<(), Errno> {
        if dst.len() > self.left() || self.cursor.copy_to(dst) != dst.len() {
            return Err(Errno::INVALID);
        }
        self.at += dst.len();
        Ok(())
    }

    /// Passes over the next `len` bytes. `len` was bounded by the caller.
    fn skip(&mut self, len: usize) {
        self.cursor.skip(len);
        self.at += len;
    }

    /// The next `len` bytes as they lie in the client's memory; nothing is read behind them.
    pub(crate) fn data(self, len: usize) -> Result<IoBuffers, Errno> {
        if len > self.left() {
            return Err(Errno::INVALID);
        }
        Ok(self.bytes.slice(self.at, len))
    }

    /// The next `len` bytes, copied. `len` was bounded by the caller.
    pub(crate) fn copied(&mut self, len: usize) -> Result<Vec<u8>, Errno> {
        if len > self.left() {
            return Err(Errno::INVALID);
        }
        let mut bytes = vec![0; len];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// The next string with a final NUL, which is left out.
    fn string(&mut self, len_max: usize) -> Result<Name, Errno> {
        let mut string = Name::new();
        let mut chunk = [0; 64];
        loop {
            let wanted = chunk.len().min(self.left());
            let got = self.cursor.clone().copy_to(&mut chunk[..wanted]);
            if got == 0 {
                return Err(Errno::INVALID);
            }
            let nul = chunk[..got].iter().position(|byte| *byte == 0);
            string.extend_from_slice(&chunk[..nul.unwrap_or(got)]);
            self.skip(nul.map_or(got, |nul| nul + 1));
            if string.len() > len_max {
                return Err(Errno(libc::ENAMETOOLONG));
            }
            if nul.is_some() {
                return Ok(string);
            }
        }
    }

    /// The next name of a directory entry, which may be "." or "..".
    pub(crate) fn lookup_name(&mut self) -> Result<Name, Errno> {
        let name = self.string(NAME_LEN_MAX)?;
        if name.is_empty() || name.contains(&b'/') {
            return Err(Errno::INVALID);
        }
        Ok(name)
    }

    /// The next name of a directory entry that is made, changed or removed.
    pub(crate) fn name(&mut self) -> Result<Name, Errno> {
        let name = self.lookup_name()?;
        if matches!(name.as_slice(), b"." | b"..") {
            return Err(Errno::INVALID);
        }
        Ok(name)
    }

    /// The name that TMPFILE carries and nobody uses.
    pub(crate) fn skip_name(&mut self) -> Result<(), Errno> {
        self.string(NAME_LEN_MAX).map(drop)
    }

    /// The next target of a symbolic link.
    pub(crate) fn target(&mut self) -> Result<Name, Errno> {
        let target = self.string(TARGET_LEN_MAX)?;
        if target.is_empty() { Err(Errno(libc::ENOENT)) } else { Ok(target) }
    }

    /// The next name of an extended attribute.
    pub(crate) fn xattr_name(&mut self) -> Result<Name, Errno> {
        let name = self.string(NAME_LEN_MAX).map_err(|errno| match errno {
            Errno(libc::ENAMETOOLONG) => Errno(libc::ERANGE),
            other => other,
        })?;
        if name.is_empty() { Err(Errno::INVALID) } else { Ok(name) }
    }

    /// Value of an attribute of the stated size.
    pub(crate) fn xattr_value(&mut self, size: u32) -> Result<Vec<u8>, Errno> {
        if size > XATTR_SIZE_MAX {
            return Err(Errno(libc::E2BIG));
        }
        self.copied(size as usize)
    }

    /// The extensions that end a request which makes an inode: everything that is left. Clients before
    /// protocol 7.38 send the security contexts without counting them in the header.
    pub(crate) fn extensions(mut self) -> Result<Extensions, Errno> {
        let mut extensions = Extensions::default();
        while self.left() > 0 {
            let header: fuse_ext_header = self.take()?;
            let body_len =
                (header.size as usize).checked_sub(size_of::<fuse_ext_header>()).ok_or(Errno::INVALID)?;
            let after =
                self.at.checked_add(body_len).filter(|after| *after <= self.end).ok_or(Errno::INVALID)?;
            let mut body = Args { bytes: self.bytes, cursor: self.cursor.clone(), at: self.at, end: after };
            match header.kind {
                count @ 0..=FUSE_MAX_NR_SECCTX => body.security_contexts(count, &mut extensions)?,
                FUSE_EXT_GROUPS => body.groups(&mut extensions)?,
                _ => return Err(Errno::INVALID),
            }
            self.skip(body_len);
        }
        Ok(extensions)
    }

    fn security_contexts(&mut self, count: u32, into: &mut Extensions) -> Result<(), Errno> {
        for _ in 0..count {
            let start = self.at;
            let context: fuse_secctx = self.take()?;
            let name = self.xattr_name()?;
            let len = context.size as usize;
            // In all extensions together: the file system looks for each of them among the others.
            let is_full = into.security.len() == FUSE_MAX_NR_SECCTX as usize;
            let is_double = into.security.iter().any(|(other, _)| *other == name);
            if len > SECURITY_CONTEXT_LEN_MAX || !name.starts_with(b"security.") || is_full || is_double {
                return Err(Errno::INVALID);
            }
            let value = self.copied(len)?;
            into.security.push((name, value));
            let padded = (self.at - start).next_multiple_of(FUSE_REC_ALIGN);
            self.skip((start + padded).min(self.end) - self.at);
        }
        Ok(())
    }

    /// Linux sends the one group that a set-group-id directory or an ACL may need.
    fn groups(&mut self, into: &mut Extensions) -> Result<(), Errno> {
        let count: u32 = self.take()?;
        if count as usize > self.left() / size_of::<u32>() {
            return Err(Errno::INVALID);
        }
        if count > 0 {
            into.group = Some(self.take()?);
        }
        Ok(())
    }
}

/// What a request that makes an inode brings along.
#[derive(Default)]
pub(crate) struct Extensions {
    /// Security attributes to set with it.
    pub(crate) security: SmallVec<[(Name, Vec<u8>); 1]>,
    /// A supplementary group of the caller.
    pub(crate) group: Option<u32>,
}

/// Checks that a range of a file does not leave what positions can express.
pub(crate) fn check_range(offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= OFFSET_MAX => Ok(()),
        _ if offset > OFFSET_MAX => Err(Errno::INVALID),
        _ => Err(Errno(libc::EFBIG)),
    }
}

/// How a READ goes to the device.
pub(crate) fn read_flags(args: &fuse_read_in) -> IoFlags {
    IoFlags { direct: open_flag(args.flags, libc::O_DIRECT), ..IoFlags::default() }
}

/// How a WRITE goes to the device. A client that caches writes knows the end of the file better than we do:
/// it has chosen the offset of what it appends, and pages that extend the file may still be with it.
pub(crate) fn write_flags(args: &fuse_write_in, client_caches_writes: bool) -> IoFlags {
    let from_cache = args.write_flags & FUSE_WRITE_CACHE != 0;
    IoFlags {
        direct: open_flag(args.flags, libc::O_DIRECT),
        append: !client_caches_writes && open_flag(args.flags, libc::O_APPEND),
        dsync: open_flag(args.flags, libc::O_DSYNC),
        sync: open_flag(args.flags, libc::O_SYNC),
        from_cache,
        kill_privileges: args.write_flags & FUSE_WRITE_KILL_SUIDGID != 0,
    }
}

/// Whether all bits of an `O_*` flag are set.
pub(crate) fn open_flag(flags: u32, flag: i32) -> bool {
    flags & flag.cast_unsigned() == flag.cast_unsigned()
}

/// What SETATTR changes.
pub(crate) fn set_attr(args: &fuse_setattr_in) -> Result<SetAttr, Errno> {
    let valid = SetattrValid::from_bits_truncate(args.valid);
    let has = |flag| valid.contains(flag);
    if has(SetattrValid::FATTR_SIZE) {
        check_range(args.size, 0)?;
    }
    let time = |at, now, seconds, nanoseconds| match (has(at), has(now)) {
        (_, true) => Ok(Some(SetTime::Now)),
        (true, false) => timestamp(seconds, nanoseconds).map(|time| Some(SetTime::At(time))),
        (false, false) => Ok(None),
    };
    let ctime = has(SetattrValid::FATTR_CTIME).then(|| timestamp(args.ctime, args.ctimensec)).transpose()?;
    Ok(SetAttr {
        mode: has(SetattrValid::FATTR_MODE).then_some(args.mode),
        uid: has(SetattrValid::FATTR_UID).then_some(args.uid),
        gid: has(SetattrValid::FATTR_GID).then_some(args.gid),
        size: has(SetattrValid::FATTR_SIZE).then_some(args.size),
        atime: time(SetattrValid::FATTR_ATIME, SetattrValid::FATTR_ATIME_NOW, args.atime, args.atimensec)?,
        mtime: time(SetattrValid::FATTR_MTIME, SetattrValid::FATTR_MTIME_NOW, args.mtime, args.mtimensec)?,
        ctime,
        kill_privileges: has(SetattrValid::FATTR_KILL_SUIDGID),
    })
}

fn timestamp(seconds: u64, nanoseconds: u32) -> Result<Timestamp, Errno> {
    if nanoseconds >= 1_000_000_000 {
        return Err(Errno::INVALID);
    }
    Ok(Timestamp { seconds: seconds.cast_signed(), nanoseconds })
}

/// How RENAME2 treats the target, and whether a whiteout stays at the source.
pub(crate) fn rename_mode(flags: u32) -> Result<(RenameMode, bool), Errno> {
    match flags {
        0 => Ok((RenameMode::Replace, false)),
        libc::RENAME_NOREPLACE => Ok((RenameMode::NoReplace, false)),
        libc::RENAME_EXCHANGE => Ok((RenameMode::Exchange, false)),
        libc::RENAME_WHITEOUT => Ok((RenameMode::Replace, true)),
        both if both == libc::RENAME_WHITEOUT | libc::RENAME_NOREPLACE => Ok((RenameMode::NoReplace, true)),
        _ => Err(Errno::INVALID),
    }
}

/// What FALLOCATE does.
pub(crate) fn fallocate_mode(mode: u32) -> Result<FallocateMode, Errno> {
    const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP_SIZE: i32 = ZERO | KEEP_SIZE;
    match mode.cast_signed() {
        0 => Ok(FallocateMode::Allocate { keep_size: false }),
        KEEP_SIZE => Ok(FallocateMode::Allocate { keep_size: true }),
        PUNCH_HOLE => Ok(FallocateMode::PunchHole),
        ZERO => Ok(FallocateMode::Zero { keep_size: false }),
        ZERO_KEEP_SIZE => Ok(FallocateMode::Zero { keep_size: true }),
        _ => Err(Errno(libc::EOPNOTSUPP)),
    }
}

/// What LSEEK looks for.
pub(crate) fn seek_target(whence: u32) -> Result<SeekTarget, Errno> {
    match whence.cast_signed() {
        libc::SEEK_DATA => Ok(SeekTarget::Data),
        libc::SEEK_HOLE => Ok(SeekTarget::Hole),
        _ => Err(Errno::INVALID),
    }
}

/// How SETXATTR treats an existing attribute.
pub(crate) fn xattr_mode(flags: u32) -> Result<XattrMode, Errno> {
    match flags.cast_signed() {
        0 => Ok(XattrMode::Set),
        libc::XATTR_CREATE => Ok(XattrMode::Create),
        libc::XATTR_REPLACE => Ok(XattrMode::Replace),
        _ => Err(Errno::INVALID),
    }
}
