//! Extended attributes and POSIX ACLs.
//!
//! An attribute is one item at (hash of the name, slot), like a directory entry. ACLs are attributes whose
//! value the file system understands: an access ACL and the mode bits say the same thing twice, so each
//! follows the other, and a default ACL shapes the ACLs and mode of what is created in its directory.

use std::ops::ControlFlow;

use super::mount::libc_mode::{S_IFDIR, S_IFLNK, S_IFMT, S_ISGID};
use super::{Context, CreateSpec, Fs, Inode, SetAttr, XattrMode};
use crate::error::{Corruption, FsError, Try};
use crate::ondisk::{InodeFlags, InodeItem, Key, SLOT_BITS, XattrRef, encode_xattr_inline};
use crate::txn::Txn;
use crate::units::InodeId;

/// Longest name in bytes (`XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;
/// Longest value in bytes (`XATTR_SIZE_MAX`).
const XATTR_SIZE_MAX: usize = 64 << 10;
/// Longest list of names in bytes (`XATTR_LIST_MAX`).
const XATTR_LIST_MAX: usize = 64 << 10;

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";

pub(super) fn damaged(structure: &'static str, inode: InodeId) -> FsError {
    Corruption { structure, offset: inode.0, problem: "malformed".into() }.into()
}

/// Where an attribute is, or could be.
enum Place {
    Found(Key),
    Free(Option<Key>),
}

/// What an inode's flags say when it has an attribute of that name.
pub(crate) fn xattr_flags(name: &[u8]) -> InodeFlags {
    InodeFlags::XATTRS
        | match name {
            ACL_ACCESS | ACL_DEFAULT => InodeFlags::ACL,
            CAPABILITY => InodeFlags::CAPABILITY,
            _ => InodeFlags::empty(),
        }
}

impl Fs {
    fn find_xattr(&self, inode: InodeId, name: &[u8]) -> Try<Place> {
        let base = self.store.name_hash(name) << SLOT_BITS;
        let end = base + (1 << SLOT_BITS);
        let mut free = base;
        let mut found = None;
        self.store.scan(&Key::xattr(inode, base), &Key::xattr(inode, end), |key, value| {
            if XattrRef::decode(value).is_some_and(|xattr| xattr.name() == name) {
                found = Some(*key);
                return ControlFlow::Break(());
            }
            if key.offset == free {
                free += 1;
            }
            ControlFlow::Continue(())
        })?;
        let free = (free < end).then(|| Key::xattr(inode, free));
        Ok(found.map_or(Place::Free(free), Place::Found))
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`].
    pub fn get_xattr(&self, _ctx: &Context, inode: InodeId, name: &[u8]) -> Try<Vec<u8>> {
        let flags = self.inode(inode)?.live.borrow().flags;
        if !flags.contains(xattr_flags(name)) {
            return Err(FsError::NoAttribute.into());
        }
        self.xattr_value(inode, name)?.ok_or(FsError::NoAttribute.into())
    }

    fn xattr_value(&self, inode: InodeId, name: &[u8]) -> Try<Option<Vec<u8>>> {
        let Place::Found(key) = self.find_xattr(inode, name)? else { return Ok(None) };
        let value = self.store.get(&key, |value| match value.and_then(XattrRef::decode) {
            Some(XattrRef::Inline { value, .. }) => Some(value.to_vec()),
            _ => None,
        })?;
        value.map(Some).ok_or_else(|| damaged("extended attribute", inode).into())
    }

    /// Names of all attributes, each ended by a NUL.
    ///
    /// # Errors
    /// [`FsError::TooBig`] when they are longer than 64 KiB.
    pub fn list_xattr(&self, _ctx: &Context, inode: InodeId) -> Try<Vec<u8>> {
        let mut names = Vec::new();
        if !self.inode(inode)?.live.borrow().flags.contains(InodeFlags::XATTRS) {
            return Ok(names);
        }
        self.store.scan(&Key::xattr(inode, 0), &Key::xattr(inode, u64::MAX), |_, value| {
            if let Some(xattr) = XattrRef::decode(value) {
                names.extend_from_slice(xattr.name());
                names.push(0);
            }
            ControlFlow::Continue(())
        })?;
        if names.len() > XATTR_LIST_MAX { Err(FsError::TooBig.into()) } else { Ok(names) }
    }

    /// Sets an attribute. An access ACL sets the mode bits too; with `kill_sgid` that drops set-group-id.
    ///
    /// # Errors
    /// [`FsError::Exists`] and [`FsError::NoAttribute`] by `mode`, [`FsError::Range`] for the name's length,
    /// [`FsError::TooBig`] for a value above 64 KiB, [`FsError::NoSpace`] for one that fits no item,
    /// [`FsError::Invalid`] for a malformed ACL, [`FsError::ReadOnly`].
    pub fn set_xattr(
        &self,
        ctx: &Context,
        inode: InodeId,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
        kill_sgid: bool,
    ) -> Try<()> {
        self.check_writable()?;
        self.check_xattr(name, value)?;
        let target = self.inode(inode)?;
        let key = match (self.find_xattr(inode, name)?, mode) {
            (Place::Found(_), XattrMode::Create) => return Err(FsError::Exists.into()),
            (Place::Free(_), XattrMode::Replace) => return Err(FsError::NoAttribute.into()),
            (Place::Found(key), _) | (Place::Free(Some(key)), _) => key,
            (Place::Free(None), _) => return Err(FsError::NoSpace.into()),
        };
        let mut txn = self.begin(ctx);
        let mut item = target.stored_item();
        if name == ACL_ACCESS || name == ACL_DEFAULT {
            let acl = Acl::decode(value).ok_or(FsError::Invalid)?;
            check_acl_holder(name, item.mode)?;
            if name == ACL_ACCESS {
                item.mode = acl.set_mode(item.mode);
                if kill_sgid {
                    item.mode &= !S_ISGID;
                }
            }
        }
        item.flags |= xattr_flags(name);
        item.ctime = self.now();
        txn.put_with(key, |out| encode_xattr_inline(name, value, out));
        txn.put_inode(inode, &item);
        self.store.commit(&txn)?;
        target.settle(item);
        Ok(())
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`], [`FsError::ReadOnly`].
    pub fn remove_xattr(&self, ctx: &Context, inode: InodeId, name: &[u8]) -> Try<()> {
        self.check_writable()?;
        let target = self.inode(inode)?;
        let Place::Found(key) = self.find_xattr(inode, name)? else {
            return Err(FsError::NoAttribute.into());
        };
        let mut item = target.stored_item();
        item.ctime = self.now();
        let mut txn = self.begin(ctx);
        txn.delete(key);
        txn.put_inode(inode, &item);
        self.store.commit(&txn)?;
        target.settle(item);
        Ok(())
    }

    fn check_xattr(&self, name: &[u8], value: &[u8]) -> Result<(), FsError> {
        if name.is_empty() || name.len() > XATTR_NAME_MAX {
            return Err(FsError::Range);
        }
        if value.len() > XATTR_SIZE_MAX {
            return Err(FsError::TooBig);
        }
        if 2 + name.len() + value.len() > self.store.item_len_max() {
            return Err(FsError::NoSpace);
        }
        Ok(())
    }

    /// Adds an attribute of a new inode to `txn`. The names must differ.
    pub(super) fn put_new_xattr(
        &self,
        txn: &mut Txn,
        inode: InodeId,
        item: &mut InodeItem,
        name: &[u8],
        value: &[u8],
    ) -> Result<(), FsError> {
        self.check_xattr(name, value)?;
        let mut key = Key::xattr(inode, self.store.name_hash(name) << SLOT_BITS);
        let taken = |key: &Key| {
            txn.changes()
                .iter()
                .any(|change| matches!(change, crate::txn::Change::Put { key: put, .. } if put == key))
        };
        while taken(&key) {
            key.offset += 1;
        }
        txn.put_with(key, |out| encode_xattr_inline(name, value, out));
        item.flags |= xattr_flags(name);
        Ok(())
    }

    /// The access ACL follows a changed mode; a capability goes with the other privileges.
    pub(super) fn follow_mode(
        &self,
        txn: &mut Txn,
        inode: &Inode,
        item: &mut InodeItem,
        change: &SetAttr,
    ) -> Try<()> {
        if change.mode.is_some()
            && item.flags.contains(InodeFlags::ACL)
            && let Place::Found(key) = self.find_xattr(inode.id, ACL_ACCESS)?
        {
            let value = self.xattr_value(inode.id, ACL_ACCESS)?.unwrap_or_default();
            let mut acl = Acl::decode(&value).ok_or_else(|| damaged("ACL", inode.id))?;
            acl.follow(item.mode);
            txn.put_with(key, |out| encode_xattr_inline(ACL_ACCESS, &acl.encode(), out));
        }
        if change.kill_privileges && item.flags.contains(InodeFlags::CAPABILITY) {
            if let Place::Found(key) = self.find_xattr(inode.id, CAPABILITY)? {
                txn.delete(key);
            }
            item.flags -= InodeFlags::CAPABILITY;
        }
        Ok(())
    }

    /// Mode and ACLs of a new inode, by the directory's default ACL or else the umask.
    pub(super) fn inherited_acls(
        &self,
        directory: &Inode,
        spec: &CreateSpec<'_>,
        file_type: u32,
    ) -> Try<Inherited> {
        let mode = spec.mode & 0o7777;
        if file_type == S_IFLNK {
            return Ok(Inherited { mode: 0o777, access: None, default: None });
        }
        let flags = directory.live.borrow().flags;
        let default = match flags.contains(InodeFlags::ACL) {
            true => self.xattr_value(directory.id, ACL_DEFAULT)?,
            false => None,
        };
        let Some(default) = default else {
            return Ok(Inherited { mode: mode & !spec.umask, access: None, default: None });
        };
        let mut acl = Acl::decode(&default).ok_or_else(|| damaged("ACL", directory.id))?;
        let mode = acl.restrict(mode);
        let access = (!acl.is_mode_only()).then(|| acl.encode());
        Ok(Inherited { mode, access, default: (file_type == S_IFDIR).then_some(default) })
    }
}

fn check_acl_holder(name: &[u8], mode: u32) -> Result<(), FsError> {
    match mode & S_IFMT {
        S_IFLNK => Err(FsError::NotSupported),
        S_IFDIR => Ok(()),
        _ if name == ACL_DEFAULT => Err(FsError::AccessDenied),
        _ => Ok(()),
    }
}

/// What a new inode gets from its directory.
pub(super) struct Inherited {
    pub(super) mode: u32,
    access: Option<Vec<u8>>,
    default: Option<Vec<u8>>,
}

impl Inherited {
    pub(super) fn store(
        self,
        fs: &Fs,
        txn: &mut Txn,
        inode: InodeId,
        item: &mut InodeItem,
    ) -> Result<(), FsError> {
        for (name, value) in [(ACL_ACCESS, self.access), (ACL_DEFAULT, self.default)] {
            if let Some(value) = value {
                fs.put_new_xattr(txn, inode, item, name, &value)?;
            }
        }
        Ok(())
    }
}

/// A POSIX ACL as its attribute holds it: version 2, then entries of tag, permissions and id, little-endian
/// (Linux, `posix_acl_xattr.h`).
struct Acl(Vec<AclEntry>);

#[derive(Clone, Copy)]
struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

const ACL_VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

impl Acl {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, mut rest) = bytes.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*version) != ACL_VERSION {
            return None;
        }
        let mut entries = Vec::new();
        while let Some((entry, next)) = rest.split_first_chunk::<8>() {
            let [t0, t1, p0, p1, i0, i1, i2, i3] = *entry;
            let entry = AclEntry {
                tag: u16::from_le_bytes([t0, t1]),
                permissions: u16::from_le_bytes([p0, p1]),
                id: u32::from_le_bytes([i0, i1, i2, i3]),
            };
            let known = matches!(entry.tag, USER_OBJ | USER | GROUP_OBJ | GROUP | MASK | OTHER);
            if !known || entry.permissions > 7 {
                return None;
            }
            entries.push(entry);
            rest = next;
        }
        let acl = Self(entries);
        let once = |tag| acl.0.iter().filter(|entry| entry.tag == tag).count() == 1;
        let named = acl.0.iter().any(|entry| matches!(entry.tag, USER | GROUP));
        let whole = once(USER_OBJ) && once(GROUP_OBJ) && once(OTHER) && (!named || once(MASK));
        (rest.is_empty() && whole).then_some(acl)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = ACL_VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            out.extend_from_slice(&entry.tag.to_le_bytes());
            out.extend_from_slice(&entry.permissions.to_le_bytes());
            out.extend_from_slice(&entry.id.to_le_bytes());
        }
        out
    }

    fn is_mode_only(&self) -> bool {
        self.0.iter().all(|entry| matches!(entry.tag, USER_OBJ | GROUP_OBJ | OTHER))
    }

    /// The entry that the group bits of a mode stand for: the mask, or the group's own.
    fn group_class(&self) -> u16 {
        if self.0.iter().any(|entry| entry.tag == MASK) { MASK } else { GROUP_OBJ }
    }

    fn permissions(&self, tag: u16) -> u32 {
        self.0.iter().find(|entry| entry.tag == tag).map_or(0, |entry| u32::from(entry.permissions))
    }

    /// `mode` with the permission bits that this ACL stands for.
    fn set_mode(&self, mode: u32) -> u32 {
        let bits = self.permissions(USER_OBJ) << 6
            | self.permissions(self.group_class()) << 3
            | self.permissions(OTHER);
        mode & !0o777 | bits
    }

    /// The ACL gets the permission bits of `mode`.
    fn follow(&mut self, mode: u32) {
        let class = self.group_class();
        for entry in &mut self.0 {
            let shift = match entry.tag {
                USER_OBJ => 6,
                OTHER => 0,
                tag if tag == class => 3,
                _ => continue,
            };
            entry.permissions = ((mode >> shift) & 7) as u16;
        }
    }

    /// The ACL of a new inode that asks for `mode`: both are cut to what they have in common; gives the mode.
    fn restrict(&mut self, mode: u32) -> u32 {
        let both = self.set_mode(mode) & (mode | !0o777);
        self.follow(both);
        both
    }
}
