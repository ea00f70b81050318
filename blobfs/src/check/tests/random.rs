//! Damage at random places, and none at all.

use super::*;

#[test]
fn random_damage_is_no_panic_and_what_is_called_clean_mounts() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let sample = Sample::new();
    let image = sample.disk.snapshot();
    let mut rng = SmallRng::seed_from_u64(3);
    for _ in 0..300 {
        let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(4096..DEVICE - 64);
            disk.poke(at, &[rng.random(); 5]);
        }
        let clean = report_of(&disk).is_ok_and(|report| report.is_clean());
        let opened = mount(&disk);
        assert!(opened.is_ok() || !clean, "clean, but {opened:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Pages and superblocks with arbitrary content and right checksums.
    #[test]
    fn hostile_content_with_right_checksums_is_no_panic(
        path in prop::collection::vec(0..2_usize, 0..3),
        at in 0..NODE,
        bytes in prop::collection::vec(any::<u8>(), 1..40),
        field in 12..SUPERBLOCK_LEN,
    ) {
        let sample = Sample::new();
        sample.patch_node(&path, |page| {
            let end = (at + bytes.len()).min(NODE);
            page[at..end].copy_from_slice(&bytes[..end - at]);
        });
        let _ = report_of(&sample.disk);
        let _ = mount(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1));
        repair::ends(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1));

        let copy = SUPERBLOCK_OFFSETS[(sample.superblock().generation % 2) as usize];
        let mut block = [0; SUPERBLOCK_LEN];
        sample.disk.peek(copy, &mut block);
        let end = (field + bytes.len()).min(SUPERBLOCK_LEN);
        block[field..end].copy_from_slice(&bytes[..end - field]);
        let crc = crate::ondisk::crc32c(&block[12..]);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        sample.disk.poke(copy, &block);
        let _ = report_of(&sample.disk);
        repair::ends(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1));
        let _ = mount(&sample.disk);
    }

    /// Items that contradict each other in any way.
    #[test]
    fn contradicting_items_are_repaired(seed in any::<u64>(), count in 1..12_usize) {
        let sample = if seed % 2 == 0 { Sample::new() } else { Sample::with_sums() };
        sample.damage(|items, txn| contradict(items, txn, seed, count));
        repair::ends(&sample.disk);
    }

    /// Whatever the file system does, its image is clean: closed, and after a power cut.
    #[test]
    fn an_image_of_the_file_system_is_clean_at_any_time(seed in any::<u64>(), steps in 1..60_usize) {
        let reactor = reactor();
        let options = MkfsOptions { data_checksum: seed % 2 == 1, ..small_geometry() };
        let disk = made_disk(&reactor, &options);
        let mounted = Mounted::new(&disk, &reactor);
        random_operations(&mounted, seed, steps);
        mounted.sync();
        random_operations(&mounted, seed ^ 1, steps);
        for choice in [CrashChoice::Nothing, CrashChoice::Everything, CrashChoice::Random { seed }] {
            let report = report_of(&disk.crash(choice)).unwrap();
            prop_assert_eq!(report.findings, []);
        }
        mounted.unmount();
        prop_assert_eq!(findings_of(&disk), []);
    }
}

/// Changes some items at random: to another one's value, to one with a byte changed, under another key.
fn contradict(items: &Items, txn: &mut Txn, seed: u64, count: usize) {
    use rand::rngs::SmallRng;
    use rand::seq::{IndexedMutRandom, IndexedRandom};
    use rand::{Rng, SeedableRng};
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut all = Vec::new();
    let to = Key::new(u64::MAX, Kind::Checksum, u64::MAX);
    let each = |key: &Key, value: &[u8]| {
        if key.kind != Kind::Group {
            all.push((*key, value.to_vec()));
        }
        std::ops::ControlFlow::Continue(())
    };
    items.0.scan(&Key::group(0), &to, each).unwrap();
    let kinds = [
        Kind::Orphan,
        Kind::Intent,
        Kind::Inode,
        Kind::Inline,
        Kind::Dirent,
        Kind::Xattr,
        Kind::Extent,
        Kind::Checksum,
    ];
    for _ in 0..count {
        let (key, value) = all.choose(&mut rng).unwrap().clone();
        let (other, other_value) = all.choose(&mut rng).unwrap().clone();
        match rng.random_range(0..7) {
            0 => txn.delete(key),
            1 => txn.put(Key { owner: other.owner, ..key }, &value),
            2 => txn.put(Key { offset: rng.random_range(0..200), ..key }, &value),
            3 => txn.put(Key::new(other.owner, *kinds.choose(&mut rng).unwrap(), other.offset), &value),
            4 => txn.put(Key::new(rng.random_range(0..130), key.kind, key.offset), &other_value),
            5 if key.kind == other.kind => txn.put(key, &other_value),
            _ => {
                let mut value = value;
                if let Some(byte) = value.choose_mut(&mut rng) {
                    *byte ^= 1 << rng.random_range(0..8);
                }
                txn.put(key, &value);
            }
        }
        // A key may be deleted once in a transaction only, and not when it was put.
        all.retain(|(known, _)| *known != key);
    }
}

/// Operations on a few names, whether they succeed or not.
fn random_operations(mounted: &Mounted, seed: u64, steps: usize) {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..steps {
        let (kind, a, b) = (rng.random_range(0..10), rng.random_range(0..6_u8), rng.random_range(0..6_u8));
        let (offset, len) = (rng.random_range(0..30_000), rng.random_range(1..9_000));
        let (fs, ctx) = (mounted.fs.clone(), mounted.ctx);
        let operation = async move { random_operation(&fs, ctx, kind, [a, b], offset, len).await };
        // A name that exists, or does not: all the same.
        let _ = mounted.reactor.block_on(operation);
    }
}

async fn random_operation(
    fs: &Rc<Fs>,
    ctx: Context,
    kind: u8,
    names: [u8; 2],
    offset: u64,
    len: usize,
) -> Result<(), FsError> {
    let [name, other] = names.map(|name| [b'a' + name]);
    let root = InodeId::ROOT;
    let parent = match fs.run(|fs| fs.lookup(&ctx, root, &other)).await {
        Ok(entry) if entry.attr.mode & 0o170_000 == 0o040_000 => entry.attr.inode,
        _ => root,
    };
    let found = fs.run(|fs| fs.lookup(&ctx, parent, &name)).await.map(|entry| entry.attr.inode);
    match kind {
        0 => fs.run(|fs| fs.create(&ctx, root, &name, &DIRECTORY)).await.map(drop),
        1 => fs.run(|fs| fs.create(&ctx, parent, &name, &FILE)).await.map(drop),
        2 => fs.run(|fs| fs.unlink(&ctx, parent, &name)).await,
        3 => fs.run(|fs| fs.rmdir(&ctx, parent, &name)).await,
        4 => {
            let call = |fs: &Rc<Fs>| {
                fs.rename(
                    &ctx,
                    (parent, &name),
                    (root, &other),
                    crate::fs::RenameMode::Replace,
                    len.is_multiple_of(2),
                )
            };
            fs.run(call).await
        }
        5 => {
            let inode = found?;
            fs.run(|fs| fs.link(&ctx, inode, root, &other)).await.map(drop)
        }
        6 => {
            let inode = found?;
            let change = SetAttr { size: Some(offset), ..SetAttr::default() };
            fs.run(|fs| fs.set_attr(&ctx, inode, &change)).await.map(drop)
        }
        7 => {
            let inode = found?;
            let name = [b"user.", &other[..]].concat();
            let value = vec![b'v'; offset as usize % 3000];
            if fs.xattr_fits(&name, &value) {
                fs.run(|fs| fs.set_xattr(&ctx, inode, &name, &value, XattrMode::Set, false)).await
            } else {
                fs.store_xattr(ctx, inode, &name, &value, XattrMode::Set).await
            }
        }
        8 => fs.fallocate(ctx, found?, FallocateMode::PunchHole, offset, len as u64).await,
        _ => {
            let src = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(len, BLOCK as usize)));
            fs.write(ctx, found?, offset, src, IoFlags::default()).await.map(drop)
        }
    }
}
