//! Extended attributes.
//!
//! An attribute is one item at (hash of the name, slot), like a directory entry. A value that fits no item
//! lies in extents of a map of its own (`stored`). ACLs are attributes whose value the file system
//! understands (`acl`); they, capabilities and the security attributes of a new inode always lie in the
//! item, so that no change of a mode and no creation waits for the device.

mod acl;
mod stored;

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use super::mount::libc_mode::{S_IFDIR, S_IFLNK, S_IFMT, S_ISGID};
use super::{Context, CreateSpec, Fs, Inode, SetAttr, XattrMode};
use crate::error::{Corruption, FsError, Try};
use crate::ondisk::{InodeFlags, InodeItem, Key, SLOT_BITS, XattrRef, encode_xattr_inline};
use crate::txn::Txn;
use crate::units::InodeId;
use acl::Acl;
use stored::StoredValue;

/// Longest name in bytes (`XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;
/// Longest value in bytes (`XATTR_SIZE_MAX`).
pub(crate) const XATTR_SIZE_MAX: usize = 64 << 10;
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

/// The value of an attribute, or where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum XattrValue {
    /// The value.
    Here(Vec<u8>),
    /// A value of this many bytes, on the device: [`Fs::read_xattr`].
    Stored(usize),
}

/// Fails for names outside the name spaces that Linux file systems have.
pub(crate) fn check_name_space(name: &[u8]) -> Result<(), FsError> {
    if name.is_empty() || name.len() > XATTR_NAME_MAX {
        return Err(FsError::Range);
    }
    let prefix = [&b"user."[..], b"trusted.", b"security."].into_iter().find(|p| name.starts_with(p));
    match prefix {
        Some(prefix) if prefix.len() == name.len() => Err(FsError::Invalid),
        Some(_) => Ok(()),
        None if name == ACL_ACCESS || name == ACL_DEFAULT => Ok(()),
        None => Err(FsError::NotSupported),
    }
}

/// Whether the value of an attribute must lie in its item.
pub(crate) fn stays_in_item(name: &[u8]) -> bool {
    name == ACL_ACCESS || name == ACL_DEFAULT || name == CAPABILITY
}

/// An attribute's value as the tree has it.
enum Found {
    Here(Vec<u8>),
    Stored(StoredValue),
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

    /// The value of an attribute, or its size when it has to be read from the device.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`], [`FsError::NotSupported`] for an unknown name space.
    pub fn get_xattr(&self, _ctx: &Context, inode: InodeId, name: &[u8]) -> Try<XattrValue> {
        check_name_space(name)?;
        let flags = self.inode(inode)?.live.borrow().flags;
        if !flags.contains(xattr_flags(name)) {
            return Err(FsError::NoAttribute.into());
        }
        match self.xattr(inode, name)?.ok_or(FsError::NoAttribute)? {
            Found::Here(value) => Ok(XattrValue::Here(value)),
            Found::Stored(stored) => Ok(XattrValue::Stored(stored.len())),
        }
    }

    fn xattr(&self, inode: InodeId, name: &[u8]) -> Try<Option<Found>> {
        match self.find_xattr(inode, name)? {
            Place::Found(key) => self.xattr_at(inode, &key).map(Some),
            Place::Free(_) => Ok(None),
        }
    }

    fn xattr_at(&self, inode: InodeId, key: &Key) -> Try<Found> {
        let found = self.store.get(key, |value| match value.and_then(XattrRef::decode)? {
            XattrRef::Inline { value, .. } => Some(Found::Here(value.to_vec())),
            XattrRef::Stored { map, size, .. } => StoredValue::new(map, size).map(Found::Stored),
        })?;
        found.ok_or_else(|| damaged("extended attribute", inode).into())
    }

    /// The value of an attribute that must lie in its item.
    fn xattr_in_item(&self, inode: InodeId, name: &[u8]) -> Try<Option<Vec<u8>>> {
        match self.xattr(inode, name)? {
            Some(Found::Here(value)) => Ok(Some(value)),
            Some(Found::Stored(_)) => Err(damaged("extended attribute", inode).into()),
            None => Ok(None),
        }
    }

    /// Adds the removal of the attribute at `key`, with the extents of its value, to `txn`.
    pub(super) fn drop_xattr(&self, txn: &mut Txn, inode: InodeId, key: Key) -> Try<()> {
        self.drop_stored(txn, inode, &key)?;
        txn.delete(key);
        Ok(())
    }

    /// Adds the removal of the extents of the attribute at `key` to `txn`, if it has any.
    fn drop_stored(&self, txn: &mut Txn, inode: InodeId, key: &Key) -> Try<()> {
        match self.xattr_at(inode, key)? {
            Found::Here(_) => Ok(()),
            Found::Stored(stored) => self.free_stored(txn, &stored),
        }
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
            if names.len() > XATTR_LIST_MAX { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if names.len() > XATTR_LIST_MAX { Err(FsError::TooBig.into()) } else { Ok(names) }
    }

    /// Whether an attribute fits an item: then [`Fs::set_xattr`] sets it, else [`Fs::store_xattr`].
    pub fn xattr_fits(&self, name: &[u8], value: &[u8]) -> bool {
        2 + name.len() + value.len() <= self.store.item_len_max()
    }

    /// Sets an attribute. An access ACL sets the mode bits too; with `kill_sgid` that drops set-group-id. An
    /// ACL that says no more than the mode bits, and an empty one, are not kept.
    ///
    /// # Errors
    /// [`FsError::Exists`] and [`FsError::NoAttribute`] by `mode`, [`FsError::Range`] for the name's length,
    /// [`FsError::NotSupported`] for an unknown name space, [`FsError::TooBig`] for a value above 64 KiB,
    /// [`FsError::NoSpace`] for one that fits no item, [`FsError::Invalid`] for a malformed ACL,
    /// [`FsError::ReadOnly`].
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
        check_xattr(name, value)?;
        if !self.xattr_fits(name, value) {
            return Err(FsError::NoSpace.into());
        }
        let target = self.inode(inode)?;
        let mut txn = self.begin(ctx);
        let mut item = target.stored_item();
        let keep = match name {
            ACL_ACCESS | ACL_DEFAULT => apply_acl(&mut item, name, value, kill_sgid)?,
            _ => true,
        };
        let (key, exists) = self.place_for_xattr(inode, name, mode)?;
        match (keep, exists) {
            (false, false) => {}
            (false, true) => self.drop_xattr(&mut txn, inode, key)?,
            (true, _) => {
                if exists {
                    self.drop_stored(&mut txn, inode, &key)?;
                }
                txn.put_with(key, |out| encode_xattr_inline(name, value, out));
                item.flags |= xattr_flags(name);
            }
        }
        self.commit_xattr(&target, item, txn)
    }

    /// The key that an attribute has or will have, and whether it exists; fails by `mode`.
    fn place_for_xattr(&self, inode: InodeId, name: &[u8], mode: XattrMode) -> Try<(Key, bool)> {
        match (self.find_xattr(inode, name)?, mode) {
            (Place::Found(_), XattrMode::Create) => Err(FsError::Exists.into()),
            (Place::Free(_), XattrMode::Replace) => Err(FsError::NoAttribute.into()),
            (Place::Found(key), _) => Ok((key, true)),
            (Place::Free(Some(key)), _) => Ok((key, false)),
            (Place::Free(None), _) => Err(FsError::NoSpace.into()),
        }
    }

    fn commit_xattr(&self, target: &Inode, mut item: InodeItem, mut txn: Txn) -> Try<()> {
        item.ctime = self.now();
        txn.put_inode(target.id, &item);
        self.store.commit(&txn)?;
        target.settle(item);
        Ok(())
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`], [`FsError::NotSupported`] for an unknown name space, [`FsError::ReadOnly`].
    pub fn remove_xattr(&self, ctx: &Context, inode: InodeId, name: &[u8]) -> Try<()> {
        self.check_writable()?;
        check_name_space(name)?;
        let target = self.inode(inode)?;
        let Place::Found(key) = self.find_xattr(inode, name)? else {
            return Err(FsError::NoAttribute.into());
        };
        let mut txn = self.begin(ctx);
        self.drop_xattr(&mut txn, inode, key)?;
        self.commit_xattr(&target, target.stored_item(), txn)
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
        check_xattr(name, value)?;
        if !self.xattr_fits(name, value) {
            return Err(FsError::NoSpace);
        }
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
            let value = self.xattr_in_item(inode.id, ACL_ACCESS)?.unwrap_or_default();
            let mut acl = Acl::decode(&value).ok_or_else(|| damaged("ACL", inode.id))?;
            acl.follow(item.mode);
            txn.put_with(key, |out| encode_xattr_inline(ACL_ACCESS, &acl.encode(), out));
        }
        if change.kill_privileges && item.flags.contains(InodeFlags::CAPABILITY) {
            if let Place::Found(key) = self.find_xattr(inode.id, CAPABILITY)? {
                self.drop_xattr(txn, inode.id, key)?;
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
            true => self.xattr_in_item(directory.id, ACL_DEFAULT)?,
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

fn check_xattr(name: &[u8], value: &[u8]) -> Result<(), FsError> {
    check_name_space(name)?;
    if value.len() > XATTR_SIZE_MAX { Err(FsError::TooBig) } else { Ok(()) }
}

/// Lets the mode follow an access ACL; false when the ACL says nothing that is worth keeping.
fn apply_acl(item: &mut InodeItem, name: &[u8], value: &[u8], kill_sgid: bool) -> Result<bool, FsError> {
    check_acl_holder(name, item.mode)?;
    if Acl::is_empty(value) {
        return Ok(false);
    }
    let acl = Acl::decode(value).ok_or(FsError::Invalid)?;
    if name == ACL_DEFAULT {
        return Ok(true);
    }
    item.mode = acl.set_mode(item.mode);
    if kill_sgid {
        item.mode &= !S_ISGID;
    }
    Ok(!acl.is_mode_only())
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
