//! Scrubs: what cannot be read is named.

use super::*;

fn scrub_of(disk: &Rc<SimDisk>) -> ScrubReport {
    let bdev: Rc<dyn Bdev> = disk.clone();
    let writes = disk.writes();
    let report = reactor().block_on(async move { super::super::scrub(&bdev, &mut |_| ()).await });
    assert_eq!(disk.writes(), writes, "a scrub writes nothing");
    report.unwrap()
}

#[test]
fn a_sound_file_system_is_read_and_clean() {
    let report = scrub_of(&Sample::new().disk);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.data_bytes, 8192 + 4096);
    assert!(report.check.counts.files > 100);
}

#[test]
fn unreadable_data_is_named_by_file_and_offset() {
    let sample = Sample::new();
    let store = open(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1), &sample.reactor);
    let extents = Items(store).extents(sample.file);
    let block = |file_block: u64, at: u64| extents[&file_block].device_range().start.0 + at;
    let bytes = |block: u64, count: u64| block * u64::from(BLOCK)..(block + count) * u64::from(BLOCK);
    sample.disk.fail_reads(bytes(block(0, 3), 2));
    sample.disk.fail_reads(bytes(block(64, 7), 1));
    let report = scrub_of(&sample.disk);
    assert!(report.check.is_clean() && !report.is_clean());
    let mut places: Vec<_> = report.unreadable.iter().map(|bad| (bad.offset, bad.len, bad.block)).collect();
    places.sort_unstable();
    assert_eq!(places, [(3 * 512, 1024, block(0, 3)), (71 * 512, 512, block(64, 7))]);
    for bad in &report.unreadable {
        let path = bad.path.as_deref().unwrap();
        assert!(path == "/file" || path == "/dir/link", "{path}");
        assert!(bad.inode == sample.file.0 && !bad.xattr && bad.error.contains("device error"));
    }
}

#[test]
fn an_unreadable_value_of_an_attribute_is_named_by_its_file() {
    let sample = Sample::new();
    let mounted = Mounted::new(&sample.disk, &reactor());
    let (fs, ctx, deep) = (mounted.fs.clone(), mounted.ctx, sample.deep);
    let value = vec![7; 2000];
    let store = async move { fs.store_xattr(ctx, deep, b"user.large", &value, XattrMode::Set).await };
    mounted.reactor.block_on(store).unwrap();
    mounted.unmount();
    let before = scrub_of(&sample.disk);
    assert!(before.is_clean() && before.data_bytes == 8192 + 4096 + 2048, "{before:?}");
    // All data: that of the file, too.
    let superblock = sample.superblock();
    let data = superblock.first_data_block() * u64::from(BLOCK)..DEVICE;
    let copy = SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1);
    let store = open(&copy, &self::reactor());
    let items = Items(store);
    let mut blocks = Vec::new();
    let all = (Key::extent(MapId(1), 0), Key::new(u64::MAX, Kind::Checksum, u64::MAX));
    items
        .0
        .scan(&all.0, &all.1, |key, value| {
            if key.kind == Kind::Extent {
                blocks.push(ExtentItem::decode(value).unwrap().device_range());
            }
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    for range in blocks {
        let start = range.start.0 * u64::from(BLOCK);
        assert!(data.contains(&start));
        sample.disk.fail_reads(start..start + u64::from(range.count) * u64::from(BLOCK));
    }
    let report = scrub_of(&sample.disk);
    let value = report.unreadable.iter().find(|bad| bad.xattr).unwrap();
    assert_eq!((value.inode, value.offset, value.len), (sample.deep.0, 0, 2048));
    assert_eq!(value.path.as_deref(), Some("/dir/sub/deep"));
    assert_eq!(report.unreadable.iter().map(|bad| bad.len).sum::<u64>(), 8192 + 4096 + 2048);
}

#[test]
fn what_a_check_finds_a_scrub_finds() {
    let sample = Sample::new();
    sample.damage(|items, txn| items.change(txn, sample.file, |item| item.nlink = 7));
    let report = scrub_of(&sample.disk);
    assert_eq!(report.check.findings, [Finding::LinkCount { inode: sample.file.0, nlink: 7, expected: 2 }]);
    assert!(report.unreadable.is_empty() && !report.is_clean());
}

#[test]
fn blocks_of_two_files_are_read_once() {
    let sample = Sample::new();
    sample.damage(|items, txn| {
        let item = items.extents(sample.file)[&0];
        txn.put(Key::extent(MapId(sample.soft.0 + 2), 0), &item.encode());
    });
    let report = scrub_of(&sample.disk);
    let is_double = |finding: &Finding| matches!(finding, Finding::BlocksUsedTwice { .. });
    assert!(report.check.findings.iter().any(is_double));
    assert_eq!(report.data_bytes, 8192 + 4096);
}

#[test]
fn a_damaged_tree_is_scrubbed_as_far_as_it_goes() {
    let sample = Sample::new();
    sample.patch_node(&[LAST, LAST], |page| page[0] ^= 1);
    let report = scrub_of(&sample.disk);
    assert!(!report.check.complete);
    assert_eq!(report.data_bytes, 8192 + 4096);
}

#[test]
fn extents_behind_the_largest_file_are_left_to_the_check() {
    let sample = Sample::new();
    let item = Items(open(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1), &reactor()))
        .extents(sample.file)[&0];
    sample.damage(|_, txn| {
        // The last key there is, one from which the next extent would begin at 0, and one within the numbers.
        for file_block in [u64::MAX, u64::MAX - u64::from(item.device_range().count) + 1, 1 << 60] {
            txn.put(Key::extent(MapId(sample.soft.0 + 2), file_block), &item.encode());
        }
    });
    let report = scrub_of(&sample.disk);
    assert!(!report.check.is_clean());
    assert!(report.unreadable.is_empty(), "{:?}", report.unreadable);
    assert_eq!(report.data_bytes, 8192 + 4096);
}
