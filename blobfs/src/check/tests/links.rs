//! Inodes and the names that lead to them.

use super::*;

#[test]
fn wrong_counts_are_found() {
    let sample = Sample::new();
    let (file, dir) = (sample.file, sample.dir);
    let found = sample.found(|items, txn| items.change(txn, file, |item| item.nlink = 7));
    assert_eq!(found, [Finding::LinkCount { inode: file.0, nlink: 7, expected: 2 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, dir, |item| item.nlink = 2));
    assert_eq!(found, [Finding::LinkCount { inode: dir.0, nlink: 2, expected: 3 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, dir, |item| item.size = 40));
    assert_eq!(found, [Finding::Size { inode: dir.0, size: 40, expected: 3 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, file, |item| item.blocks += 1));
    assert_eq!(found, [Finding::Blocks { inode: file.0, blocks: 25, expected: 24 }]);
}

#[test]
fn wrong_parents_are_found() {
    let sample = Sample::new();
    let (dir, sub) = (sample.dir.0, sample.sub.0);
    let found = sample.found(|items, txn| items.change(txn, sample.sub, |item| item.parent = InodeId::ROOT));
    assert_eq!(found, [Finding::Parent { inode: sub, parent: 1, expected: dir }]);

    let sample = Sample::new();
    let found =
        sample.found(|items, txn| items.change(txn, InodeId::ROOT, |item| item.parent = InodeId(dir)));
    assert_eq!(found, [Finding::Parent { inode: 1, parent: dir, expected: 1 }]);
}

#[test]
fn what_no_name_leads_to_is_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(items.entry(InodeId::ROOT, "soft"));
        items.change(txn, InodeId::ROOT, |item| item.size -= 1);
    });
    assert_eq!(found, [Finding::Unreachable { inode: sample.soft.0 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(items.entry(sample.sub, "deep"));
        items.change(txn, sample.sub, |item| (item.size, item.nlink) = (item.size - 1, 2));
    });
    assert_eq!(found, [Finding::Unreachable { inode: sample.deep.0 }]);
}

#[test]
fn directories_below_themselves_are_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        // "sub" moves from "dir" into "deep", which is below it.
        txn.delete(items.entry(sample.dir, "sub"));
        items.change(txn, sample.dir, |item| (item.size, item.nlink) = (item.size - 1, 2));
        let entry = DirentRef { inode: sample.sub, file_type: 4, name: b"sub" };
        txn.put_with(items.entry(sample.deep, "sub"), |out| encode_dirent(entry, out));
        items.change(txn, sample.deep, |item| (item.size, item.nlink) = (1, 3));
        items.change(txn, sample.sub, |item| item.parent = sample.deep);
    });
    let expected = [sample.sub, sample.deep].map(|inode| Finding::Disconnected { inode: inode.0 });
    assert_eq!(found, expected);
}

#[test]
fn a_missing_root_is_found() {
    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.delete(Key::inode(InodeId::ROOT)));
    assert!(found.contains(&Finding::NoRoot), "{found:?}");

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, InodeId::ROOT, |item| item.mode = 0o100_644));
    assert!(found.contains(&Finding::Inode { inode: 1, problem: "the root is no directory" }), "{found:?}");

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        items.put_entry(txn, sample.deep, "root", InodeId::ROOT, 4);
        items.change(txn, sample.deep, |item| (item.size, item.nlink) = (1, 3));
    });
    assert_eq!(found, [Finding::DirectoryNames { inode: 1, names: 1 }]);
}

#[test]
fn a_directory_with_two_names_is_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| items.put_entry(txn, sample.deep, "again", sample.dir, 4));
    assert!(found.contains(&Finding::DirectoryNames { inode: sample.dir.0, names: 2 }), "{found:?}");
}

#[test]
fn wrong_entries_are_found() {
    let sample = Sample::new();
    let directory = sample.deep.0;
    let put = |name: &'static [u8], key: &dyn Fn(&Items) -> Key| {
        let sample = Sample::new();
        sample.found(|items, txn| {
            let entry = DirentRef { inode: sample.soft, file_type: 10, name };
            txn.put_with(key(items), |out| encode_dirent(entry, out));
            items.change(txn, sample.deep, |item| item.size = 1);
            items.change(txn, sample.soft, |item| item.nlink = 2);
        })
    };
    let own_hash = |name: &'static [u8]| {
        move |items: &Items| Key::dirent(InodeId(directory), items.0.name_hash(name) << SLOT_BITS)
    };
    let offset = |name: &[u8]| name_hash([1, 2], name) << SLOT_BITS;
    assert_eq!(put(b"fine", &own_hash(b"fine")), []);
    for name in [&b"a/b"[..], b"..", b"nul\0"] {
        let problem = "a name that no entry can have";
        assert_eq!(put(name, &own_hash(name)), [Finding::Entry { directory, offset: offset(name), problem }]);
    }
    let found = put(b"name", &own_hash(b"other"));
    let problem = "the offset is not the hash of the name";
    assert_eq!(found, [Finding::Entry { directory, offset: offset(b"other"), problem }]);

    let found = sample.found(|items, txn| {
        for slot in 0..2 {
            let entry = DirentRef { inode: sample.soft, file_type: 10, name: b"twice" };
            let mut key = items.entry(sample.deep, "twice");
            key.offset += slot;
            txn.put_with(key, |out| encode_dirent(entry, out));
        }
        items.change(txn, sample.deep, |item| item.size = 2);
        items.change(txn, sample.soft, |item| item.nlink = 3);
    });
    let (offset, problem) = (offset(b"twice") + 1, "the name is there twice");
    assert_eq!(found, [Finding::Entry { directory, offset, problem }]);

    let sample = Sample::new();
    let mut key = Key::dirent(sample.deep, 0);
    let found = sample.found(|items, txn| {
        key = items.entry(sample.deep, "short");
        txn.put(key, b"short");
        items.change(txn, sample.deep, |item| item.size = 1);
    });
    assert_eq!(found, [Finding::Entry { directory, offset: key.offset, problem: "malformed" }]);
}

#[test]
fn entries_that_lead_nowhere_or_to_another_kind_are_found() {
    let sample = Sample::new();
    let directory = sample.deep.0;
    let offset = name_hash([1, 2], b"lost") << SLOT_BITS;
    let found = sample.found(|items, txn| items.put_entry(txn, sample.deep, "lost", InodeId(7777), 8));
    assert_eq!(found, [Finding::EntryDangling { directory, offset, inode: 7777 }]);

    let sample = Sample::new();
    let mut key = Key::dirent(sample.dir, 0);
    let found = sample.found(|items, txn| {
        key = items.entry(InodeId::ROOT, "soft");
        let entry = DirentRef { inode: sample.soft, file_type: 8, name: b"soft" };
        txn.put_with(key, |out| encode_dirent(entry, out));
    });
    let (inode, offset) = (sample.soft.0, key.offset);
    assert_eq!(found, [Finding::EntryType { directory: 1, offset, inode, file_type: 8, expected: 10 }]);

    // Of two names only the second one has the wrong type.
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        key = items.entry(sample.dir, "link");
        let entry = DirentRef { inode: sample.file, file_type: 10, name: b"link" };
        txn.put_with(key, |out| encode_dirent(entry, out));
    });
    let (directory, inode, offset) = (sample.dir.0, sample.file.0, key.offset);
    assert_eq!(found, [Finding::EntryType { directory, offset, inode, file_type: 10, expected: 8 }]);
}

#[test]
fn items_of_a_missing_inode_are_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        let id = items.0.next_id();
        let entry = DirentRef { inode: sample.soft, file_type: 10, name: b"x" };
        txn.put_with(items.entry(InodeId(id), "x"), |out| encode_dirent(entry, out));
        txn.put_with(items.xattr(InodeId(id), "user.x"), |out| encode_xattr_inline(b"user.x", b"", out));
        items.change(txn, sample.soft, |item| item.nlink = 2);
    });
    let problems: Vec<_> = found
        .iter()
        .map(|finding| match finding {
            Finding::Inode { problem, .. } => *problem,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(
        problems,
        ["does not exist, but has directory entries", "does not exist, but has extended attributes"]
    );
}

#[test]
fn wrong_orphans_are_found() {
    let sample = Sample::new();
    let orphan = |inode: InodeId, problem| Finding::Orphan { inode: inode.0, problem };
    let found = sample.found(|_, txn| txn.put(Key::orphan(sample.soft), &[]));
    assert_eq!(found, [orphan(sample.soft, "has links"), orphan(sample.soft, "has a name")]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::orphan(InodeId(9999)), &[]));
    assert_eq!(found, [orphan(InodeId(9999), "does not exist")]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::orphan(InodeId(9999)), b"x"));
    assert_eq!(found[0], orphan(InodeId(9999), "the item is not empty"));

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(items.entry(sample.dir, "sub"));
        txn.put(Key::orphan(sample.sub), &[]);
        items.change(txn, sample.dir, |item| (item.size, item.nlink) = (item.size - 1, 2));
        items.change(txn, sample.sub, |item| item.nlink = 0);
    });
    assert_eq!(found, [orphan(sample.sub, "is a directory with entries")]);

    // An orphan that is not called one.
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(items.entry(InodeId::ROOT, "soft"));
        items.change(txn, InodeId::ROOT, |item| item.size -= 1);
        items.change(txn, sample.soft, |item| item.nlink = 0);
    });
    assert_eq!(found, [Finding::Unreachable { inode: sample.soft.0 }]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::orphan(InodeId::ROOT), &[]));
    assert_eq!(found, [orphan(InodeId::ROOT, "is the root")]);
}
