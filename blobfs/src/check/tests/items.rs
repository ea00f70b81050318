//! Items by themselves, and those of one owner: inodes, content, extended attributes.

use super::*;

#[test]
fn items_that_cannot_be_are_found() {
    let item = |key: Key| {
        let sample = Sample::new();
        let found = sample.found(|_, txn| txn.put(key, &[]));
        let [Finding::Item { owner, offset, problem, .. }] = found[..] else { panic!("{found:?}") };
        assert_eq!((owner, offset), (key.owner, key.offset));
        problem
    };
    for kind in [Kind::Volume, Kind::RefCount, Kind::Quota] {
        assert_eq!(item(Key::new(0, kind, 1)), "a kind that this version does not have");
    }
    assert_eq!(item(Key::new(3, Kind::Orphan, 3)), "the owner is wrong for this kind");
    assert_eq!(item(Key::new(0, Kind::Xattr, 300)), "the owner is wrong for this kind");
    assert_eq!(item(Key::new(3, Kind::Inode, 7)), "the offset is not 0");
    let problem = "the owner is a number that is never given away";
    assert_eq!(item(Key::new(1 << 62, Kind::Extent, 7)), problem);
}

#[test]
fn intents_that_cannot_be_are_found() {
    let intent = |inode, problem| Finding::Intent { inode, problem };
    let sample = Sample::new();
    let file = sample.file;
    let found = sample.found(move |_, txn| txn.put(Key::intent(file), &[0; 7]));
    assert_eq!(found, [intent(file.0, "has the wrong length")]);
    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::intent(InodeId(77_777)), &[0; 8]));
    assert!(found.contains(&intent(77_777, "does not exist")), "{found:?}");
}

#[test]
fn wrong_extents_are_found() {
    let sample = Sample::new();
    let map = sample.file.0;
    let extent = |file_block, problem| Finding::Extent { map, file_block, problem };
    let found = sample.found(|_, txn| txn.put(Key::extent(MapId(map), 500), &[0; 24]));
    assert_eq!(found, [extent(500, "malformed")]);

    // Two file blocks in the same device blocks, and no count of blocks for it.
    let sample = Sample::new();
    let mut device = BlockRange::new(BlockAddr(0), 0);
    let found = sample.found(|items, txn| {
        let item = items.extents(sample.file)[&0];
        device = item.device_range();
        txn.put(Key::extent(MapId(map), 500), &item.encode());
        items.change(txn, sample.file, |inode| inode.blocks += u64::from(device.count));
    });
    let (start, end) = (device.start.0, device.end().0);
    assert_eq!(found, [Finding::BlocksUsedTwice { map, file_block: 500, start, end }]);

    let wrong = |file_block: u64, change: fn(&mut ExtentItem), expected: &'static str| {
        let sample = Sample::new();
        let found = sample.found(|items, txn| {
            let range = items.free_blocks(2);
            let mut item = ExtentItem::plain(range, ExtentFlags::empty());
            change(&mut item);
            txn.put(Key::extent(MapId(map), file_block), &item.encode());
        });
        assert!(found.contains(&extent(file_block, expected)), "{found:?}");
    };
    wrong(1, |_| (), "overlaps the one before it");
    wrong(1 << 60, |_| (), "lies behind the largest file");
    wrong(500, |item| item.addr = BlockAddr(5), "lies outside the data area");
    wrong(500, |item| item.addr = BlockAddr(1 << 50), "lies outside the data area");
    wrong(500, |item| item.flags = ExtentFlags::from_bits_retain(0x40), "has unknown flags");
}

/// The checker looked at the blocks that an extent maps, the mount at all that it calls stored: a file was sound for the
/// one and damaged for the other.
#[test]
fn an_extent_may_call_more_stored_than_it_maps() {
    let sample = Sample::new();
    let (file, map) = (sample.file, sample.file.0);
    let found = sample.found(|items, txn| {
        let item = items.extents(file)[&0];
        let item = ExtentItem { stored_blocks: u32::MAX, ..item };
        txn.put(Key::extent(MapId(map), 0), &item.encode());
    });
    assert_eq!(found, []);
    let mounted = Mounted::new(&sample.disk, &sample.reactor);
    let (fs, ctx) = (mounted.fs.clone(), mounted.ctx);
    let room = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(8192, BLOCK as usize)));
    let dst = room.clone();
    let read = sample.reactor.block_on(async move { fs.read(ctx, file, 0, dst, IoFlags::default()).await });
    assert_eq!(read, Ok(8192));
    let mut bytes = vec![0; 8192];
    room.copy_to(0, &mut bytes);
    assert_eq!(bytes, pattern(file, 0, 8192));
    mounted.unmount();
}

#[test]
fn maps_without_an_owner_or_with_two_are_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        let map = items.0.next_id();
        txn.put(Key::inline(MapId(map)), b"content");
    });
    assert!(matches!(found[..], [Finding::MapUnowned { .. }]), "{found:?}");

    let sample = Sample::new();
    let (map, other) = (sample.file.0, sample.soft.0 + 2);
    let found = sample.found(|items, txn| {
        items.change(txn, InodeId(other), |item| item.map = MapId(map));
    });
    assert_eq!(found, [Finding::MapOwnedTwice { map, inode: map, other }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        let map = MapId(items.0.next_id());
        for inode in [other, other + 1] {
            items.change(txn, InodeId(inode), |item| item.map = map);
        }
    });
    let [Finding::MapOwnedTwice { inode, other: second, .. }] = found[..] else { panic!("{found:?}") };
    assert_eq!((inode, second), (other, other + 1));
}

#[test]
fn a_map_of_another_number_is_checked_like_any_other() {
    let sample = Sample::new();
    sample.damage(|items, txn| {
        let map = MapId(items.0.next_id());
        txn.delete(Key::inline(MapId(sample.soft.0)));
        txn.put(Key::inline(map), b"dir/sub");
        items.change(txn, sample.soft, |item| item.map = map);
    });
    assert_eq!(findings_of(&sample.disk), []);
    let found = sample.found(|items, txn| items.change(txn, sample.soft, |item| item.size = 3));
    assert_eq!(found, [Finding::Size { inode: sample.soft.0, size: 3, expected: 7 }]);
}

#[test]
fn wrong_inodes_are_found() {
    let wrong = |inode: fn(&Sample) -> InodeId, with: fn(&mut InodeItem), expected: &str| {
        let sample = Sample::new();
        let inode = inode(&sample);
        let found = sample.found(|items, txn| items.change(txn, inode, with));
        let named = found.iter().any(
            |finding| matches!(finding, Finding::Inode { inode: at, problem } if *at == inode.0 && *problem == expected),
        );
        assert!(named, "{expected}: {found:?}");
    };
    type Pick = fn(&Sample) -> InodeId;
    let (file, dir, soft): (Pick, Pick, Pick) =
        (|sample| sample.file, |sample| sample.dir, |sample| sample.soft);
    wrong(file, |item| item.mode = 0o030_644, "the mode is of no kind");
    wrong(file, |item| item.mode |= 1 << 20, "the mode is of no kind");
    wrong(file, |item| item.flags |= InodeFlags::from_bits_retain(1 << 30), "has unknown flags");
    wrong(file, |item| item.size = u64::MAX, "the size is impossible");
    wrong(file, |item| item.map = MapId(0), "has no map");
    wrong(file, |item| item.parent_map = MapId(4), "has a parent map, which this version does not have");
    wrong(file, |item| item.project = 9, "has a project, which this version does not have");
    wrong(file, |item| item.map = MapId(1 << 62), "has no map");
    wrong(file, |item| item.parent = InodeId(1), "has a parent, but is no directory");
    wrong(file, |item| item.flags = InodeFlags::empty(), "the flags deny an extended attribute");
    wrong(file, |item| item.flags |= InodeFlags::INLINE, "lacks its inline content");
    wrong(file, |item| item.mode = 0o060_644, "has extents, but is no file or has inline content");
    wrong(dir, |item| item.mode = 0o100_755, "has directory entries, but is no directory");
    wrong(soft, |item| item.flags = InodeFlags::empty(), "has inline content, but no flag for it");
    wrong(
        soft,
        |item| item.mode = 0o010_777,
        "has inline content, but is neither a file nor a symbolic link",
    );

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(Key::inline(MapId(sample.soft.0)));
        items.change(txn, sample.soft, |item| item.flags = InodeFlags::empty());
    });
    let problem = "is a symbolic link without a target";
    assert_eq!(found, [Finding::Inode { inode: sample.soft.0, problem }]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::inode(sample.file), &[1; 20]));
    assert_eq!(found, [Finding::Inode { inode: sample.file.0, problem: "malformed" }]);
}

#[test]
fn wrong_extended_attributes_are_found() {
    let sample = Sample::new();
    let inode = sample.file.0;
    let xattr = |key: Key, problem| Finding::Xattr { inode, offset: key.offset, problem };
    let mut key = Key::xattr(sample.file, 0);
    let found = sample.found(|items, txn| {
        key = items.xattr(sample.file, "user.b");
        txn.put(key, &[9, 9]);
    });
    assert_eq!(found, [xattr(key, "malformed")]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put_with(key, |out| encode_xattr_inline(b"user.c", b"", out)));
    assert_eq!(found, [xattr(key, "the offset is not the hash of the name")]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        key = items.xattr(sample.file, "user.a");
        key.offset += 3;
        txn.put_with(key, |out| encode_xattr_inline(b"user.a", b"", out));
    });
    assert_eq!(found, [xattr(key, "the name is there twice")]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        key = items.xattr(sample.file, "system.posix_acl_access");
        txn.put_with(key, |out| encode_xattr_inline(b"system.posix_acl_access", b"", out));
    });
    assert_eq!(found, [Finding::Inode { inode, problem: "the flags deny an extended attribute" }]);
}

#[test]
fn values_of_attributes_outside_their_item_are_checked() {
    let store_value = |name: &str, flags: ExtentFlags, size: u32| {
        let sample = Sample::new();
        let file = sample.file;
        sample.found(|items, txn| {
            let (map, range) = (MapId(items.0.next_id()), items.free_blocks(4));
            txn.alloc(range);
            txn.put(Key::extent(map, 0), &ExtentItem::plain(range, flags).encode());
            txn.put_with(items.xattr(file, name), |out| {
                encode_xattr_stored(name.as_bytes(), map, size, out);
            });
            items.change(txn, file, |item| item.flags |= InodeFlags::all() - InodeFlags::INLINE);
        })
    };
    let problems = |name: &str, flags, size| {
        let found = store_value(name, flags, size);
        let problem = |finding: &Finding| match finding {
            Finding::Xattr { problem, .. } => *problem,
            other => panic!("{other}"),
        };
        found.iter().map(problem).collect::<Vec<_>>()
    };
    let plain = ExtentFlags::empty();
    assert_eq!(problems("user.large", plain, 4 * BLOCK - 7), [""; 0]);
    let wrong_size = "its map does not hold a value of its size";
    assert_eq!(problems("user.large", plain, 4 * BLOCK + 1), [wrong_size]);
    assert_eq!(problems("user.large", ExtentFlags::UNWRITTEN, 4 * BLOCK), [wrong_size]);
    let misplaced = "a value that cannot be there";
    assert_eq!(problems("user.large", plain, 0), [misplaced, wrong_size]);
    assert_eq!(problems("user.large", plain, 65_537), [misplaced, wrong_size]);
    assert_eq!(problems("system.posix_acl_access", plain, 4 * BLOCK), [misplaced]);
    assert_eq!(problems("other.large", plain, 4 * BLOCK), ["a name that no attribute can have"]);
}
