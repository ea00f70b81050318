//! LOOKUP, and what makes, moves and removes names.

use blobfs::units::InodeId;
use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::{Export, op};

const S_IFMT: u32 = libc::S_IFMT;

#[test]
fn a_file_has_a_name_until_it_is_unlinked() {
    let (_world, client) = exclusive();
    let created = client.open_new(ROOT, "file", libc::O_EXCL, 0).unwrap();
    assert_eq!(created.entry.attr.mode, libc::S_IFREG | 0o644);
    assert_eq!(created.entry.attr.nlink, 1);
    assert_eq!(client.lookup(ROOT, "file").unwrap().nodeid, created.entry.nodeid);
    client.unlink(ROOT, "file").unwrap();
    assert_eq!(client.find(ROOT, "file"), Err(libc::ENOENT));
}

#[test]
fn an_exclusive_client_remembers_what_is_not_there() {
    let (world, client) = exclusive();
    let missing = client.lookup(ROOT, "missing").unwrap();
    assert_eq!((missing.nodeid, missing.entry_valid), (0, 24 * 60 * 60));
    let uncached = world.client(NO_CACHE);
    assert_eq!(uncached.lookup(ROOT, "missing").err(), Some(libc::ENOENT));
    client.file(ROOT, "there");
    assert_eq!(client.lookup(ROOT, "there").unwrap().entry_valid, 24 * 60 * 60);
    let entry = uncached.lookup(ROOT, "there").unwrap();
    assert_eq!((entry.entry_valid, entry.entry_valid_nsec, entry.attr_valid), (0, 0, 0));
}

#[test]
fn what_exists_is_not_made_again() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.mkdir(ROOT, "dir").unwrap();
    assert_eq!(client.mkdir(ROOT, "dir"), Err(libc::EEXIST));
    assert_eq!(client.mknod(ROOT, "file", libc::S_IFREG | 0o600, 0).err(), Some(libc::EEXIST));
    assert_eq!(client.symlink(ROOT, "file", "x"), Err(libc::EEXIST));
    assert_eq!(client.open_new(ROOT, "file", libc::O_EXCL, 0).err(), Some(libc::EEXIST));
    assert_eq!(client.link(file, ROOT, "dir").err(), Some(libc::EEXIST));
}

#[test]
fn what_is_missing_or_of_the_wrong_kind_is_refused() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let dir = client.mkdir(ROOT, "dir").unwrap();
    client.file(dir, "inner");
    client.mkdir(ROOT, "empty").unwrap();
    assert_eq!(client.unlink(ROOT, "missing"), Err(libc::ENOENT));
    assert_eq!(client.rmdir(ROOT, "missing"), Err(libc::ENOENT));
    assert_eq!(client.rename((ROOT, "missing"), (ROOT, "x"), 0), Err(libc::ENOENT));
    assert_eq!(client.find(file, "x"), Err(libc::ENOTDIR));
    assert_eq!(client.mkdir(file, "x"), Err(libc::ENOTDIR));
    assert_eq!(client.rmdir(ROOT, "file"), Err(libc::ENOTDIR));
    assert_eq!(client.unlink(ROOT, "dir"), Err(libc::EISDIR));
    assert_eq!(client.rmdir(ROOT, "dir"), Err(libc::ENOTEMPTY));
    assert_eq!(client.link(dir, ROOT, "x").err(), Some(libc::EPERM));
    assert_eq!(client.rename((ROOT, "file"), (ROOT, "empty"), 0), Err(libc::EISDIR));
    assert_eq!(client.rename((ROOT, "empty"), (ROOT, "file"), 0), Err(libc::ENOTDIR));
    assert_eq!(client.rename((ROOT, "empty"), (ROOT, "dir"), 0), Err(libc::ENOTEMPTY));
    assert_eq!(client.rename((ROOT, "dir"), (dir, "x"), 0), Err(libc::EINVAL));
    client.rename((ROOT, "dir"), (ROOT, "empty"), 0).unwrap();
    assert_eq!(client.find(ROOT, "empty"), Ok(dir));
}

#[test]
fn nothing_is_made_in_a_removed_directory() {
    let (_world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let file = client.file(ROOT, "file");
    client.rmdir(ROOT, "dir").unwrap();
    assert_eq!(client.mkdir(dir, "x"), Err(libc::ENOENT));
    assert_eq!(client.link(file, dir, "x").err(), Some(libc::ENOENT));
    assert_eq!(client.rename((ROOT, "file"), (dir, "x"), 0), Err(libc::ENOENT));
}

/// Every request that carries a name of an entry, with that name.
fn naming(client: &Client, file: u64, name: &[u8]) -> Vec<(u32, Result<Vec<u8>, i32>)> {
    let mkdir = fuse_mkdir_in { mode: 0o755, umask: 0 };
    let mknod = fuse_mknod_in { mode: libc::S_IFIFO, rdev: 0, umask: 0, padding: 0 };
    let create = fuse_create_in { flags: 0, mode: 0o644, umask: 0, open_flags: 0 };
    let link = fuse_link_in { oldnodeid: file };
    let rename = fuse_rename_in { newdir: ROOT };
    let rename2 = fuse_rename2_in { newdir: ROOT, flags: 0, padding: 0 };
    let requests: [(u32, Vec<&[u8]>); 12] = [
        (op::FUSE_LOOKUP, vec![name]),
        (op::FUSE_MKDIR, vec![mkdir.as_bytes(), name]),
        (op::FUSE_MKNOD, vec![mknod.as_bytes(), name]),
        (op::FUSE_SYMLINK, vec![name, b"target\0"]),
        (op::FUSE_CREATE, vec![create.as_bytes(), name]),
        (op::FUSE_LINK, vec![link.as_bytes(), name]),
        (op::FUSE_UNLINK, vec![name]),
        (op::FUSE_RMDIR, vec![name]),
        (op::FUSE_RENAME, vec![rename.as_bytes(), name, b"new\0"]),
        (op::FUSE_RENAME, vec![rename.as_bytes(), b"file\0", name]),
        (op::FUSE_RENAME2, vec![rename2.as_bytes(), name, b"new\0"]),
        (op::FUSE_RENAME2, vec![rename2.as_bytes(), b"file\0", name]),
    ];
    requests.into_iter().map(|(opcode, args)| (opcode, client.call(opcode, ROOT, &args))).collect()
}

#[test]
fn names_that_cannot_be_are_refused_in_every_request() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for bad in [&b"\0"[..], b"a/b\0", b"/\0", b"a/\0"] {
        for (opcode, reply) in naming(&client, file, bad) {
            assert_eq!(reply, Err(libc::EINVAL), "{opcode} {bad:?}");
        }
    }
    for dots in [&b".\0"[..], b"..\0"] {
        for (opcode, reply) in naming(&client, file, dots) {
            if opcode != op::FUSE_LOOKUP {
                assert_eq!(reply, Err(libc::EINVAL), "{opcode} {dots:?}");
            }
        }
    }
    // Without the final NUL, where nothing follows that has one.
    for opcode in [op::FUSE_LOOKUP, op::FUSE_UNLINK, op::FUSE_RMDIR] {
        assert_eq!(client.call(opcode, ROOT, &[b"file"]), Err(libc::EINVAL));
    }
    let long = [&[b'x'; 256][..], b"\0"].concat();
    for (opcode, reply) in naming(&client, file, &long) {
        assert_eq!(reply, Err(libc::ENAMETOOLONG), "{opcode}");
    }
}

#[test]
fn the_longest_name_is_a_name() {
    let (_world, client) = exclusive();
    let name = "x".repeat(255);
    let file = client.file(ROOT, &name);
    assert_eq!(client.find(ROOT, &name), Ok(file));
    client.rename((ROOT, &name), (ROOT, &"y".repeat(255)), 0).unwrap();
    assert_eq!(client.find(ROOT, &name), Err(libc::ENOENT));
}

#[test]
fn a_name_ends_at_its_first_nul() {
    let (_world, client) = exclusive();
    let found: fuse_entry_out = client.get(op::FUSE_LOOKUP, ROOT, &[b"file\0hidden\0"]).unwrap();
    assert_eq!(found.nodeid, 0);
    let file = client.file(ROOT, "file");
    let found: fuse_entry_out = client.get(op::FUSE_LOOKUP, ROOT, &[b"file\0hidden\0"]).unwrap();
    assert_eq!(found.nodeid, file);
}

#[test]
fn every_kind_of_node_can_be_made() {
    let (_world, client) = exclusive();
    let device = (8 << 8) | 1;
    for (name, kind, rdev) in [
        ("regular", libc::S_IFREG, 0),
        ("block", libc::S_IFBLK, device),
        ("character", libc::S_IFCHR, device),
        ("fifo", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
    ] {
        let attr = client.mknod(ROOT, name, kind | 0o666, rdev).unwrap().attr;
        assert_eq!((attr.mode, attr.rdev), (kind | 0o644, rdev), "{name}");
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFMT] {
        assert_eq!(client.mknod(ROOT, "x", kind | 0o666, 0).err(), Some(libc::EINVAL));
    }
    let attr = client.getattr(client.mkdir(ROOT, "dir").unwrap()).unwrap();
    assert_eq!((attr.mode, attr.nlink), (libc::S_IFDIR | 0o755, 2));
    assert_eq!(client.getattr(ROOT).unwrap().nlink, 3);
}

#[test]
fn a_symbolic_link_holds_its_target() {
    let (_world, client) = exclusive();
    let target = "a/".repeat(2047);
    let link = client.symlink(ROOT, "link", &target).unwrap();
    assert_eq!(client.call(op::FUSE_READLINK, link, &[]), Ok(target.clone().into_bytes()));
    let attr = client.getattr(link).unwrap();
    assert_eq!((attr.mode, attr.size), (libc::S_IFLNK | 0o777, target.len() as u64));
    assert_eq!(client.symlink(ROOT, "empty", ""), Err(libc::ENOENT));
    assert_eq!(client.symlink(ROOT, "long", &"x".repeat(4096)), Err(libc::ENAMETOOLONG));
    let file = client.file(ROOT, "file");
    assert_eq!(client.call(op::FUSE_READLINK, file, &[]), Err(libc::EINVAL));
    // A target that the client has no room for is an error, not a part of it.
    let small = client.send(op::FUSE_READLINK, link, b"", 16 + 100);
    assert_eq!(client.finish(small), Err(libc::EINVAL));
}

#[test]
fn renames_replace_exchange_and_refuse_by_their_flags() {
    let (_world, client) = exclusive();
    let (a, b) = (client.file(ROOT, "a"), client.file(ROOT, "b"));
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let rename = |flags| client.rename((ROOT, "a"), (ROOT, "b"), flags);
    assert_eq!(rename(libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    rename(libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((client.find(ROOT, "a"), client.find(ROOT, "b")), (Ok(b), Ok(a)));
    for bad in
        [8, libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT]
    {
        assert_eq!(rename(bad), Err(libc::EINVAL), "{bad}");
    }
    client.rename((ROOT, "a"), (dir, "c"), libc::RENAME_NOREPLACE).unwrap();
    assert_eq!((client.find(ROOT, "a"), client.find(dir, "c")), (Err(libc::ENOENT), Ok(b)));
    assert_eq!(client.rename((ROOT, "a"), (dir, "c"), libc::RENAME_EXCHANGE), Err(libc::ENOENT));
    client.rename((ROOT, "b"), (dir, "c"), libc::RENAME_WHITEOUT).unwrap();
    assert_eq!(client.find(dir, "c"), Ok(a));
    let whiteout = client.lookup(ROOT, "b").unwrap().attr;
    assert_eq!((whiteout.mode & S_IFMT, whiteout.rdev), (libc::S_IFCHR, 0));
    assert_eq!(client.getattr(b).unwrap().nlink, 0);
    // The first form of the request, without flags.
    let args = fuse_rename_in { newdir: ROOT };
    client.done(op::FUSE_RENAME, dir, &[args.as_bytes(), b"c\0", b"d\0"]).unwrap();
    assert_eq!(client.find(ROOT, "d"), Ok(a));
}

#[test]
fn links_share_an_inode() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let linked = client.link(file, dir, "link").unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (file, 2));
    client.write(file, 0, b"shared").unwrap();
    client.unlink(ROOT, "file").unwrap();
    assert_eq!(client.read(linked.nodeid, 0, 100).unwrap(), b"shared");
    assert_eq!(client.getattr(file).unwrap().nlink, 1);
}

#[test]
fn a_temporary_file_lives_without_a_name_and_can_get_one() {
    let (world, client) = exclusive();
    let args = fuse_create_in { flags: 0, mode: 0o100_600, umask: 0, open_flags: 0 };
    let tmpfile = || -> u64 {
        let out: fuse_create_out = client.get(op::FUSE_TMPFILE, ROOT, &[args.as_bytes(), b"/\0"]).unwrap();
        assert_eq!(out.entry.attr.nlink, 0);
        out.entry.nodeid
    };
    let kept = tmpfile();
    client.write(kept, 0, b"kept").unwrap();
    assert_eq!(client.link(kept, ROOT, "kept").unwrap().attr.nlink, 1);
    let dropped = tmpfile();
    client.forget(kept, 2);
    client.forget(dropped, 1);
    world.settle();
    let found = client.find(ROOT, "kept").unwrap();
    assert_eq!(client.read(found, 0, 100).unwrap(), b"kept");
    assert_eq!(client.getattr(dropped).err(), Some(libc::ESTALE));
}

#[test]
fn create_opens_what_exists() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.write(file, 0, b"content").unwrap();
    let set_id = fuse_setattr_in { mode: 0o6755, ..fuse_setattr_in::new_zeroed() };
    client.setattr(file, SetattrValid::FATTR_MODE, set_id).unwrap();
    let opened = client.open_new(ROOT, "file", 0, 0).unwrap().entry;
    assert_eq!((opened.nodeid, opened.attr.size), (file, 7));
    let truncated = client.open_new(ROOT, "file", libc::O_TRUNC, 0).unwrap().entry;
    assert_eq!((truncated.attr.size, truncated.attr.mode & 0o7777), (0, 0o6755));
    let killed = client.open_new(ROOT, "file", libc::O_TRUNC, FUSE_OPEN_KILL_SUIDGID).unwrap().entry;
    assert_eq!(killed.attr.mode & 0o7777, 0o755);
    // One lookup for each of the four.
    client.forget(file, 3);
    assert!(client.getattr(file).is_ok());
    client.forget(file, 1);
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE));
}

#[test]
fn create_opens_no_directory_and_no_link_and_leaves_no_lookup_behind() {
    let (_world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let link = client.symlink(ROOT, "link", "dir").unwrap();
    for flags in [0, libc::O_TRUNC] {
        assert_eq!(client.open_new(ROOT, "dir", flags, 0).err(), Some(libc::EISDIR));
        assert_eq!(client.open_new(ROOT, "link", flags, 0).err(), Some(libc::EEXIST));
    }
    for node in [dir, link] {
        client.forget(node, 1);
        assert_eq!(client.getattr(node).err(), Some(libc::ESTALE));
    }
}

#[test]
fn a_client_opens_a_handle_of_what_it_forgot() {
    let (world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let file = client.file(dir, "file");
    assert_eq!(client.find(file, "."), Ok(file));
    client.forget(file, 2);
    client.forget(dir, 1);
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE));
    assert_eq!(client.find(file, "."), Ok(file));
    assert_eq!(client.find(dir, "."), Ok(dir));
    assert_eq!(client.find(dir, ".."), Ok(ROOT));
    assert_eq!(client.find(ROOT, "."), Ok(ROOT));
    // Nobody finds what has no name any more.
    client.unlink(dir, "file").unwrap();
    assert_eq!(client.find(file, "."), Ok(file));
    let other = world.client(EXCLUSIVE);
    assert_eq!(other.find(file, "."), Err(libc::ESTALE));
    for guess in [0, file + 1000, u64::MAX] {
        assert_eq!(client.find(guess, "."), Err(libc::ESTALE));
    }
}

/// A client whose root is a directory, with one that sees everything.
fn subtree() -> (World, Client, Client, u64) {
    let (world, outer) = exclusive();
    let root = outer.mkdir(ROOT, "export").unwrap();
    let inner = world.client(Export { root: InodeId(root), ..EXCLUSIVE });
    (world, outer, inner, root)
}

#[test]
fn an_export_ends_at_its_root() {
    let (_world, outer, inner, root) = subtree();
    let secret = outer.file(ROOT, "secret");
    let outside = outer.mkdir(ROOT, "outside").unwrap();
    assert_eq!(inner.find(ROOT, ".."), Err(libc::ESTALE));
    assert_eq!(inner.find(ROOT, "."), Ok(ROOT));
    for node in [secret, outside] {
        assert_eq!(inner.find(node, "."), Err(libc::ESTALE));
        assert_eq!(inner.find(node, ".."), Err(libc::ESTALE));
        assert_eq!(inner.getattr(node).err(), Some(libc::ESTALE));
    }
    let dir = inner.mkdir(ROOT, "dir").unwrap();
    assert_eq!(inner.find(dir, ".."), Ok(ROOT));
    inner.forget(dir, u64::MAX);
    assert_eq!(inner.find(dir, "."), Ok(dir), "a directory is seen to lie inside");
    assert_eq!(inner.getattr(ROOT).unwrap().ino, ROOT);
    assert_eq!(outer.find(root, "dir"), Ok(dir));
}

#[test]
fn a_directory_that_was_moved_out_has_no_parent_for_the_export() {
    let (_world, outer, inner, root) = subtree();
    let dir = inner.mkdir(ROOT, "dir").unwrap();
    let deep = inner.mkdir(dir, "deep").unwrap();
    outer.rename((root, "dir"), (ROOT, "dir"), 0).unwrap();
    assert_eq!(inner.find(dir, ".."), Err(libc::ESTALE));
    assert_eq!(inner.find(deep, ".."), Err(libc::ESTALE));
    inner.forget(dir, u64::MAX);
    assert_eq!(inner.find(dir, "."), Err(libc::ESTALE));
    outer.rename((ROOT, "dir"), (root, "dir"), 0).unwrap();
    assert_eq!(inner.find(deep, ".."), Ok(dir));
}

#[test]
fn a_read_only_export_changes_nothing() {
    let (world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let reader = world.client(Export { readonly: true, ..EXCLUSIVE });
    assert_eq!(reader.find(ROOT, "file"), Ok(file));
    for (opcode, reply) in naming(&reader, file, b"x\0") {
        let expected = if opcode == op::FUSE_LOOKUP { 0 } else { libc::EROFS };
        assert_eq!(reply.err().unwrap_or(0), expected, "{opcode}");
    }
    assert_eq!(reader.write(file, 0, b"x"), Err(libc::EROFS));
    assert_eq!(reader.fallocate(file, 0, 0, 10), Err(libc::EROFS));
    assert_eq!(reader.setxattr(file, "user.x", b"x", 0), Err(libc::EROFS));
    assert_eq!(reader.removexattr(file, "user.x"), Err(libc::EROFS));
    let mode = fuse_setattr_in::new_zeroed();
    assert_eq!(reader.setattr(file, SetattrValid::FATTR_MODE, mode).err(), Some(libc::EROFS));
    assert_eq!(reader.fsync(file), Ok(()));
}

/// The extension that carries a supplementary group.
fn groups(group: u32) -> Vec<u8> {
    [24_u32, FUSE_EXT_GROUPS, 1, group, 0, 0].as_bytes().to_vec()
}

fn make_in(client: &Client, parent: u64, name: &str, mode: u32, extensions: &[u8]) -> fuse_attr {
    let args = fuse_mknod_in { mode: libc::S_IFREG | mode, rdev: 0, umask: 0, padding: 0 };
    let body = [args.as_bytes(), &c(name), extensions].concat();
    let header = client.header(op::FUSE_MKNOD, parent, body.len());
    let header = fuse_in_header { total_extlen: (extensions.len() / 8) as u16, ..header };
    let sent = client.send_bytes(&[header.as_bytes(), &body].concat(), header.unique, 1000);
    read::<fuse_entry_out>(&client.finish(sent).unwrap()).attr
}

#[test]
fn a_new_inode_belongs_to_the_callers_group_or_to_that_of_a_set_group_id_directory() {
    let (_world, client) = exclusive();
    let change = |mode, gid| fuse_setattr_in { mode, gid, ..fuse_setattr_in::new_zeroed() };
    let valid = SetattrValid::FATTR_MODE | SetattrValid::FATTR_GID;
    let plain = client.mkdir(ROOT, "plain").unwrap();
    client.setattr(plain, valid, change(0o777, 500)).unwrap();
    let set_gid = client.mkdir(ROOT, "set-gid").unwrap();
    client.setattr(set_gid, valid, change(0o2777, 500)).unwrap();
    client.uid.set(1000);
    client.gid.set(100);
    // Linux names the directory's group when the caller is in it. That makes the caller no owner.
    assert_eq!(make_in(&client, plain, "member", 0o644, &groups(500)).gid, 100);
    assert_eq!(make_in(&client, plain, "stranger", 0o644, b"").gid, 100);
    assert_eq!(make_in(&client, set_gid, "inherits", 0o644, b"").gid, 500);
    let dir = client.getattr(client.mkdir(set_gid, "dir").unwrap()).unwrap();
    assert_eq!((dir.gid, dir.mode & 0o7777), (500, 0o2755));
    // A program for the group comes from a member only.
    assert_eq!(make_in(&client, set_gid, "p1", 0o2775, &groups(500)).mode & 0o7777, 0o2775);
    assert_eq!(make_in(&client, set_gid, "p2", 0o2775, b"").mode & 0o7777, 0o775);
    assert_eq!(make_in(&client, set_gid, "p3", 0o2765, b"").mode & 0o7777, 0o2765);
}

#[test]
fn a_security_context_comes_with_the_inode() {
    let (_world, client) = exclusive();
    let label = b"system_u:object_r:usr_t:s0\0";
    let mut context = [label.len() as u32, 0].as_bytes().to_vec();
    context.extend_from_slice(b"security.selinux\0");
    context.extend_from_slice(label);
    context.resize(context.len().next_multiple_of(8), 0);
    let extension = [[context.len() as u32 + 8, 1].as_bytes(), &context].concat();
    for (name, counted) in [("new", true), ("old", false)] {
        let args = fuse_create_in { flags: 0, mode: 0o644, umask: 0, open_flags: 0 };
        let body = [args.as_bytes(), &c(name), &extension].concat();
        let mut header = client.header(op::FUSE_CREATE, ROOT, body.len());
        // Before protocol 7.38 the header did not count it.
        header.total_extlen = if counted { (extension.len() / 8) as u16 } else { 0 };
        let sent = client.send_bytes(&[header.as_bytes(), &body].concat(), header.unique, 1000);
        let created: fuse_create_out = read(&client.finish(sent).unwrap());
        assert_eq!(client.getxattr(created.entry.nodeid, "security.selinux", 100).unwrap(), label);
    }
}

#[test]
fn node_ids_that_the_client_was_never_told_are_stale_in_every_request() {
    let (world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let other = world.client(NO_CACHE);
    let bodies: [(u32, usize); 26] = [
        (op::FUSE_GETATTR, 16),
        (op::FUSE_SETATTR, 88),
        (op::FUSE_READLINK, 0),
        (op::FUSE_OPEN, 8),
        (op::FUSE_OPENDIR, 8),
        (op::FUSE_READ, 40),
        (op::FUSE_WRITE, 40),
        (op::FUSE_STATFS, 0),
        (op::FUSE_FSYNC, 16),
        (op::FUSE_FSYNCDIR, 16),
        (op::FUSE_LISTXATTR, 8),
        (op::FUSE_READDIR, 40),
        (op::FUSE_READDIRPLUS, 40),
        (op::FUSE_LSEEK, 24),
        (op::FUSE_STATX, 24),
        (op::FUSE_FALLOCATE, 32),
        (op::FUSE_LOOKUP, 0),
        (op::FUSE_MKDIR, 8),
        (op::FUSE_MKNOD, 16),
        (op::FUSE_CREATE, 16),
        (op::FUSE_TMPFILE, 16),
        (op::FUSE_UNLINK, 0),
        (op::FUSE_RMDIR, 0),
        (op::FUSE_SETXATTR, 16),
        (op::FUSE_GETXATTR, 8),
        (op::FUSE_REMOVEXATTR, 0),
    ];
    for nodeid in [file, file + 1, 0, 2, u64::MAX] {
        for (opcode, len) in bodies {
            let mut args = vec![0; len];
            match opcode {
                op::FUSE_LSEEK => args[16] = 3,
                op::FUSE_FALLOCATE => args[16] = 1,
                _ => {}
            }
            let reply = other.call(opcode, nodeid, &[&args, b"user.x\0"]);
            assert_eq!(reply.err(), Some(libc::ESTALE), "{opcode} {nodeid}");
        }
        assert_eq!(other.link(nodeid, ROOT, "x").err(), Some(libc::ESTALE));
        assert_eq!(other.rename((ROOT, "file"), (nodeid, "x"), 0), Err(libc::ESTALE));
        assert_eq!(other.rename((nodeid, "x"), (ROOT, "x"), 0), Err(libc::ESTALE));
        assert_eq!(other.symlink(nodeid, "x", "y"), Err(libc::ESTALE));
    }
}
