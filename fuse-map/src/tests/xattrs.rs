//! Extended attributes and ACLs.

use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::op;

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Names of the attributes, sorted.
fn list(client: &Client, nodeid: u64) -> Vec<String> {
    let body = list_into(client, nodeid, 65_536).unwrap();
    let mut names: Vec<_> =
        body.split(|byte| *byte == 0).map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
    assert_eq!(names.pop(), Some(String::new()), "the last name ends with NUL, too");
    names.sort();
    names
}

fn list_into(client: &Client, nodeid: u64, size: u32) -> Result<Vec<u8>, i32> {
    let args = fuse_getxattr_in { size, padding: 0 };
    let room = 16 + (size as usize).max(8);
    client.finish(client.send(op::FUSE_LISTXATTR, nodeid, args.as_bytes(), room))
}

#[test]
fn attributes_are_set_shown_listed_and_removed() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    assert_eq!(list_into(&client, file, 100).unwrap(), b"");
    client.setxattr(file, "user.a", b"value", 0).unwrap();
    client.setxattr(file, "trusted.b", b"", 0).unwrap();
    client.setxattr(file, "security.c", &[0, 255], 0).unwrap();
    assert_eq!(client.getxattr(file, "user.a", 100).unwrap(), b"value");
    assert_eq!(client.getxattr(file, "trusted.b", 100).unwrap(), b"");
    assert_eq!(client.getxattr(file, "security.c", 2).unwrap(), [0, 255]);
    assert_eq!(list(&client, file), ["security.c", "trusted.b", "user.a"]);
    client.removexattr(file, "user.a").unwrap();
    assert_eq!(client.getxattr(file, "user.a", 100), Err(libc::ENODATA));
    assert_eq!(client.removexattr(file, "user.a"), Err(libc::ENODATA));
    assert_eq!(list(&client, file), ["security.c", "trusted.b"]);
}

#[test]
fn flags_tell_a_new_attribute_from_an_old_one() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let large = vec![1; 20_000];
    for (name, value) in [("user.small", &b"x"[..]), ("user.large", &large)] {
        assert_eq!(client.setxattr(file, name, value, libc::XATTR_REPLACE), Err(libc::ENODATA));
        client.setxattr(file, name, value, libc::XATTR_CREATE).unwrap();
        assert_eq!(client.setxattr(file, name, value, libc::XATTR_CREATE), Err(libc::EEXIST));
        client.setxattr(file, name, value, libc::XATTR_REPLACE).unwrap();
        assert_eq!(client.setxattr(file, name, value, 4), Err(libc::EINVAL));
    }
}

#[test]
fn names_are_those_of_linux() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for name in ["foo", "system.foo", "system.nfs4_acl", "USER.a", "usera"] {
        assert_eq!(client.setxattr(file, name, b"x", 0), Err(libc::EOPNOTSUPP), "{name}");
        assert_eq!(client.getxattr(file, name, 100), Err(libc::EOPNOTSUPP), "{name}");
        assert_eq!(client.removexattr(file, name), Err(libc::EOPNOTSUPP), "{name}");
    }
    for name in ["", "user.", "trusted.", "security."] {
        assert_eq!(client.setxattr(file, name, b"x", 0), Err(libc::EINVAL), "{name}");
    }
    let longest = format!("user.{}", "x".repeat(250));
    client.setxattr(file, &longest, b"x", 0).unwrap();
    assert_eq!(client.getxattr(file, &longest, 100).unwrap(), b"x");
    let too_long = format!("{longest}x");
    assert_eq!(client.setxattr(file, &too_long, b"x", 0), Err(libc::ERANGE));
    assert_eq!(client.getxattr(file, &too_long, 100), Err(libc::ERANGE));
    client.setxattr(file, "user.a/b", b"x", 0).unwrap();
}

#[test]
fn a_client_asks_for_the_size_first() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.setxattr(file, "user.a", b"12345", 0).unwrap();
    client.setxattr(file, "user.large", &vec![1; 65_536], 0).unwrap();
    for (name, len) in [("user.a", 5), ("user.large", 65_536)] {
        let out: fuse_getxattr_out = read(&client.getxattr(file, name, 0).unwrap());
        assert_eq!(out.size, len);
        assert_eq!(client.getxattr(file, name, len - 1), Err(libc::ERANGE));
        assert_eq!(client.getxattr(file, name, len).unwrap().len(), len as usize);
    }
    let out: fuse_getxattr_out = read(&list_into(&client, file, 0).unwrap());
    assert_eq!(out.size, 7 + 11);
    assert_eq!(list_into(&client, file, 17), Err(libc::ERANGE));
    assert_eq!(list_into(&client, file, 18).unwrap().len(), 18);
    // A size for which the reply has no room.
    let args = fuse_getxattr_in { size: 100, padding: 0 };
    let body = [args.as_bytes(), b"user.a\0"].concat();
    assert_eq!(client.finish(client.send(op::FUSE_GETXATTR, file, &body, 16 + 99)), Err(libc::EINVAL));
}

#[test]
fn values_up_to_64_kib_are_kept() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for len in [1, 5000, 5400, 6000, 16_384, 65_535, 65_536, 100, 0] {
        let value: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
        client.setxattr(file, "user.a", &value, 0).unwrap();
        assert!(client.getxattr(file, "user.a", 65_536).unwrap() == value, "{len}");
        assert_eq!(list(&client, file), ["user.a"]);
    }
    assert_eq!(client.getattr(file).unwrap().blocks, 0);
    let args = fuse_setxattr_in { size: 65_537, ..fuse_setxattr_in::new_zeroed() };
    let reply = client.done(op::FUSE_SETXATTR, file, &[args.as_bytes(), b"user.a\0", &vec![0; 65_537]]);
    assert_eq!(reply, Err(libc::E2BIG));
    let lie = fuse_setxattr_in { size: 6, ..args };
    let reply = client.done(op::FUSE_SETXATTR, file, &[lie.as_bytes(), b"user.a\0", b"12345"]);
    assert_eq!(reply, Err(libc::EINVAL));
}

#[test]
fn a_list_above_64_kib_is_too_big() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for i in 0..256 {
        client.setxattr(file, &format!("user.{i:0250}"), b"", 0).unwrap();
    }
    assert_eq!(list_into(&client, file, 65_536).unwrap().len(), 65_536);
    client.setxattr(file, "user.x", b"", 0).unwrap();
    assert_eq!(list_into(&client, file, 65_536), Err(libc::E2BIG));
}

#[test]
fn clients_before_setxattr_ext_send_a_shorter_struct() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    client.init(InitFlags::all() - InitFlags::FUSE_SETXATTR_EXT).unwrap();
    let file = client.file(ROOT, "file");
    let args = fuse_setxattr_compat_in { size: 5, flags: 0 };
    client.done(op::FUSE_SETXATTR, file, &[args.as_bytes(), b"user.a\0", b"value"]).unwrap();
    assert_eq!(client.getxattr(file, "user.a", 100).unwrap(), b"value");
}

/// An ACL's value: entries of tag, permissions, id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

const NONE: u32 = u32::MAX;
/// `user::rwx, user:7:rwx, group::r-x, mask::rwx, other::---`
const NAMED: [(u16, u16, u32); 5] = [(1, 7, NONE), (2, 7, 7), (4, 5, NONE), (16, 7, NONE), (32, 0, NONE)];

fn mode(client: &Client, nodeid: u64) -> u32 {
    client.getattr(nodeid).unwrap().mode & 0o7777
}

#[test]
fn an_access_acl_sets_the_mode_and_follows_it() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.setxattr(file, ACCESS, &acl(&NAMED), 0).unwrap();
    assert_eq!(mode(&client, file), 0o770);
    let change = fuse_setattr_in { mode: 0o640, ..fuse_setattr_in::new_zeroed() };
    client.setattr(file, SetattrValid::FATTR_MODE, change).unwrap();
    let masked = [(1, 6, NONE), (2, 7, 7), (4, 5, NONE), (16, 4, NONE), (32, 0, NONE)];
    assert_eq!(client.getxattr(file, ACCESS, 100).unwrap(), acl(&masked));
}

/// `ls` would show a file as having an ACL that has none.
#[test]
fn an_acl_that_says_no_more_than_the_mode_is_not_kept() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.setxattr(file, ACCESS, &acl(&NAMED), 0).unwrap();
    client.setxattr(file, ACCESS, &acl(&[(1, 6, NONE), (4, 4, NONE), (32, 4, NONE)]), 0).unwrap();
    assert_eq!(mode(&client, file), 0o644);
    assert_eq!(client.getxattr(file, ACCESS, 100), Err(libc::ENODATA));
    let dir = client.mkdir(ROOT, "dir").unwrap();
    client.setxattr(dir, DEFAULT, &acl(&NAMED), 0).unwrap();
    client.setxattr(dir, DEFAULT, &acl(&[]), 0).unwrap();
    assert_eq!(client.getxattr(dir, DEFAULT, 100), Err(libc::ENODATA));
    client.setxattr(dir, DEFAULT, &acl(&[]), 0).unwrap();
}

#[test]
fn an_acl_drops_set_group_id_when_the_client_says_so() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let change = fuse_setattr_in { mode: 0o2770, ..fuse_setattr_in::new_zeroed() };
    client.setattr(file, SetattrValid::FATTR_MODE, change).unwrap();
    let value = acl(&NAMED);
    for (setxattr_flags, expected) in [(0, 0o2770), (FUSE_SETXATTR_ACL_KILL_SGID, 0o770)] {
        let args = fuse_setxattr_in { size: value.len() as u32, flags: 0, setxattr_flags, padding: 0 };
        client.done(op::FUSE_SETXATTR, file, &[args.as_bytes(), &c(ACCESS), &value]).unwrap();
        assert_eq!(mode(&client, file), expected);
    }
}

#[test]
fn malformed_acls_and_wrong_holders_are_refused() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let link = client.symlink(ROOT, "link", "x").unwrap();
    let whole = acl(&NAMED);
    for bad in [&b""[..], b"\x02\0\0", &whole[..whole.len() - 1], &acl(&[(1, 8, NONE)]), &acl(&NAMED[..4])] {
        assert_eq!(client.setxattr(file, ACCESS, bad, 0), Err(libc::EINVAL), "{bad:?}");
    }
    assert_eq!(client.setxattr(file, DEFAULT, &whole, 0), Err(libc::EACCES));
    assert_eq!(client.setxattr(link, ACCESS, &whole, 0), Err(libc::EOPNOTSUPP));
    // More entries than an item holds.
    let mut long: Vec<_> = (0..2000).map(|id| (2, 7, id)).collect();
    long.extend([(1, 7, NONE), (4, 5, NONE), (16, 7, NONE), (32, 0, NONE)]);
    assert_eq!(client.setxattr(file, ACCESS, &acl(&long), 0), Err(libc::ENOSPC));
}

#[test]
fn a_default_acl_shapes_what_is_made_and_the_umask_does_not() {
    let (_world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    client.setxattr(dir, DEFAULT, &acl(&NAMED), 0).unwrap();
    let args = fuse_mknod_in { mode: libc::S_IFREG | 0o666, rdev: 0, umask: 0o077, padding: 0 };
    let make = |parent| {
        let out: fuse_entry_out = client.get(op::FUSE_MKNOD, parent, &[args.as_bytes(), b"file\0"]).unwrap();
        out.nodeid
    };
    let file = make(dir);
    assert_eq!(mode(&client, file), 0o660);
    let inherited = [(1, 6, NONE), (2, 7, 7), (4, 5, NONE), (16, 6, NONE), (32, 0, NONE)];
    assert_eq!(client.getxattr(file, ACCESS, 100).unwrap(), acl(&inherited));
    assert_eq!(client.getxattr(file, DEFAULT, 100), Err(libc::ENODATA));
    let sub = client.mkdir(dir, "sub").unwrap();
    assert_eq!(client.getxattr(sub, DEFAULT, 100).unwrap(), acl(&NAMED));
    assert_eq!(mode(&client, sub), 0o750);
    let link = client.symlink(dir, "link", "x").unwrap();
    assert_eq!(mode(&client, link), 0o777);
    let plain = make(ROOT);
    assert_eq!(mode(&client, plain), 0o600, "without a default ACL the umask counts");
}
