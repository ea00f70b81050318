//! POSIX ACLs: the value of two attributes that the file system understands.
//!
//! An access ACL and the mode bits say the same thing twice, so each follows the other; a default ACL shapes
//! the ACLs and mode of what is created in its directory.

/// A POSIX ACL as its attribute holds it: version 2, then entries of tag, permissions and id, little-endian
/// (Linux, `posix_acl_xattr.h`).
pub(super) struct Acl(Vec<AclEntry>);

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
    /// Whether an attribute's value is an ACL without entries: how clients remove one.
    pub(super) fn is_empty(bytes: &[u8]) -> bool {
        bytes == ACL_VERSION.to_le_bytes()
    }

    /// The ACL in an attribute's value; `None` when it is malformed.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
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

    /// The attribute's value.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = ACL_VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            out.extend_from_slice(&entry.tag.to_le_bytes());
            out.extend_from_slice(&entry.permissions.to_le_bytes());
            out.extend_from_slice(&entry.id.to_le_bytes());
        }
        out
    }

    /// Whether the mode bits say the same.
    pub(super) fn is_mode_only(&self) -> bool {
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
    pub(super) fn set_mode(&self, mode: u32) -> u32 {
        let bits = self.permissions(USER_OBJ) << 6
            | self.permissions(self.group_class()) << 3
            | self.permissions(OTHER);
        mode & !0o777 | bits
    }

    /// The ACL gets the permission bits of `mode`.
    pub(super) fn follow(&mut self, mode: u32) {
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
    pub(super) fn restrict(&mut self, mode: u32) -> u32 {
        let both = self.set_mode(mode) & (mode | !0o777);
        self.follow(both);
        both
    }
}
