//! READDIR and READDIRPLUS.

use std::collections::BTreeSet;

use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::op;

struct Listed {
    name: String,
    ino: u64,
    cookie: u64,
    kind: u32,
    /// Node id that READDIRPLUS tells of.
    known_as: Option<u64>,
}

/// One request for the entries behind a cookie.
fn list(client: &Client, dir: u64, plus: bool, offset: u64, size: u32) -> Result<Vec<Listed>, i32> {
    let opcode = if plus { op::FUSE_READDIRPLUS } else { op::FUSE_READDIR };
    let args = fuse_read_in { offset, size, ..fuse_read_in::new_zeroed() };
    let body = client.finish(client.send(opcode, dir, args.as_bytes(), 16 + size as usize))?;
    assert!(body.len() <= size as usize);
    let mut rest = &body[..];
    let mut listed = Vec::new();
    while !rest.is_empty() {
        let known_as = plus.then(|| {
            let entry: fuse_entry_out = read(rest);
            rest = &rest[size_of::<fuse_entry_out>()..];
            entry.nodeid
        });
        let dirent: fuse_dirent = read(rest);
        let name = rest[24..24 + dirent.namelen as usize].to_vec();
        rest = &rest[(24 + name.len()).next_multiple_of(8)..];
        listed.push(Listed {
            name: String::from_utf8(name).unwrap(),
            ino: dirent.ino,
            cookie: dirent.off,
            kind: dirent.kind,
            known_as,
        });
    }
    Ok(listed)
}

/// All entries, `size` bytes at a time.
fn list_all(client: &Client, dir: u64, plus: bool, size: u32) -> Vec<Listed> {
    let mut all: Vec<Listed> = Vec::new();
    loop {
        let cookie = all.last().map_or(0, |last| last.cookie);
        let part = list(client, dir, plus, cookie, size).unwrap();
        if part.is_empty() {
            return all;
        }
        all.extend(part);
    }
}

fn names(listed: &[Listed]) -> BTreeSet<&str> {
    listed.iter().map(|entry| entry.name.as_str()).collect()
}

#[test]
fn every_entry_is_listed_once_whatever_the_size_of_the_buffer() {
    let (_world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let mut expected: BTreeSet<String> = (0..300).map(|i| format!("{}{i}", "n".repeat(i % 200))).collect();
    for name in &expected {
        client.file(dir, name);
    }
    expected.extend([".".to_owned(), "..".to_owned()]);
    for plus in [false, true] {
        for size in [400, 4096, 1 << 20] {
            let listed = list_all(&client, dir, plus, size);
            assert_eq!(listed.len(), expected.len(), "{plus} {size}");
            assert_eq!(names(&listed), expected.iter().map(String::as_str).collect());
        }
    }
}

#[test]
fn entries_show_inode_and_kind() {
    let (_world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let file = client.file(dir, "file");
    let sub = client.mkdir(dir, "sub").unwrap();
    let link = client.symlink(dir, "link", "x").unwrap();
    let listed = list_all(&client, dir, false, 4096);
    let find = |name: &str| {
        let entry = listed.iter().find(|entry| entry.name == name).unwrap();
        (entry.ino, entry.kind)
    };
    assert_eq!(find("."), (dir, u32::from(libc::DT_DIR)));
    assert_eq!(find(".."), (ROOT, u32::from(libc::DT_DIR)));
    assert_eq!(find("file"), (file, u32::from(libc::DT_REG)));
    assert_eq!(find("sub"), (sub, u32::from(libc::DT_DIR)));
    assert_eq!(find("link"), (link, u32::from(libc::DT_LNK)));
    assert!(listed.iter().all(|entry| entry.cookie <= i64::MAX as u64 && entry.cookie > 0));
    let root = list_all(&client, ROOT, false, 4096);
    assert!(root.iter().filter(|entry| entry.name.starts_with('.')).all(|entry| entry.ino == ROOT));
}

#[test]
fn readdirplus_counts_a_lookup_of_what_it_tells_of_and_of_nothing_else() {
    let (world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    for i in 0..20 {
        client.file(dir, &format!("file{i}"));
    }
    let reader = world.client(EXCLUSIVE);
    assert_eq!(reader.find(ROOT, "dir"), Ok(dir));
    let mut told = BTreeSet::new();
    let mut all = BTreeSet::new();
    for entry in list(&reader, dir, true, 0, 1000).unwrap() {
        let node = entry.known_as.unwrap();
        match entry.name.as_str() {
            "." | ".." => assert_eq!(node, 0),
            _ => assert!(node == entry.ino && told.insert(node)),
        }
    }
    for entry in list_all(&client, dir, false, 4096) {
        if !entry.name.starts_with('.') {
            all.insert(entry.ino);
        }
    }
    assert!(told.len() < all.len(), "the buffer is too small for all");
    for node in &all {
        assert_eq!(reader.getattr(*node).is_ok(), told.contains(node));
        reader.forget(*node, 1);
        assert_eq!(reader.getattr(*node).err(), Some(libc::ESTALE));
    }
    assert!(reader.getattr(dir).is_ok());
}

#[test]
fn a_buffer_that_no_entry_fits_is_refused() {
    let (_world, client) = exclusive();
    client.file(ROOT, &"x".repeat(255));
    assert_eq!(list(&client, ROOT, false, 0, 24).err(), Some(libc::EINVAL));
    assert_eq!(list(&client, ROOT, true, 0, 128 + 24).err(), Some(libc::EINVAL));
    assert_eq!(list(&client, ROOT, false, 0, 0).err(), Some(libc::EINVAL));
    let first = list(&client, ROOT, false, 0, 100).unwrap();
    assert_eq!(names(&first), BTreeSet::from([".", ".."]));
    assert_eq!(list(&client, ROOT, false, first[1].cookie, 272).err(), Some(libc::EINVAL));
    assert_eq!(list(&client, ROOT, false, first[1].cookie, 280).unwrap().len(), 1);
}

#[test]
fn a_scan_goes_on_behind_entries_that_went() {
    let (_world, client) = exclusive();
    let mut expected = BTreeSet::new();
    for i in 0..50 {
        expected.insert(format!("file{i}"));
        client.file(ROOT, &format!("file{i}"));
    }
    let mut cookie = 0;
    let mut seen = BTreeSet::new();
    loop {
        let part = list(&client, ROOT, true, cookie, 1000).unwrap();
        let Some(last) = part.last() else { break };
        cookie = last.cookie;
        for entry in part.iter().filter(|entry| !entry.name.starts_with('.')) {
            client.unlink(ROOT, &entry.name).unwrap();
            assert!(seen.insert(entry.name.clone()));
        }
    }
    assert_eq!(seen, expected);
    client.mkdir(ROOT, "dir").unwrap();
}

#[test]
fn only_directories_are_listed() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for plus in [false, true] {
        assert_eq!(list(&client, file, plus, 0, 4096).err(), Some(libc::ENOTDIR));
        assert_eq!(list(&client, ROOT, plus, 1 << 63, 4096).err(), Some(libc::EINVAL));
        assert_eq!(list(&client, ROOT, plus, i64::MAX as u64, 4096).unwrap().len(), 0);
    }
}
