//! Checksums of file data that do not belong to the blocks of a file.

use super::*;
use crate::ondisk::{SUM_GROUP_BLOCKS, SumGroup};

/// The group of the sample's file that begins at file block 64 has the checksums of its second extent.
const GROUP: u64 = SUM_GROUP_BLOCKS;

fn checksums(sample: &Sample, file_block: u64, problem: &'static str) -> Finding {
    Finding::Checksums { map: sample.file.0, file_block, problem }
}

/// What is found in a sample with checksums after a change of those of a group.
#[track_caller]
fn found(sample: &Sample, change: impl FnOnce(&mut SumGroup)) -> Vec<Finding> {
    let key = Key::sums(MapId(sample.file.0), GROUP);
    sample.found(|items, txn| {
        let mut group = SumGroup::decode(&items.value(key)).unwrap();
        change(&mut group);
        txn.put(key, &group.encode());
    })
}

#[test]
fn checksums_on_a_file_system_without_are_found() {
    let sample = Sample::new();
    let key = Key::sums(MapId(sample.file.0), 0);
    let found = sample.found(|_, txn| txn.put(key, &[1; 8]));
    assert_eq!(found, [checksums(&sample, 0, "on a file system without checksums")]);
}

#[test]
fn checksums_that_are_missing_are_found() {
    let sample = Sample::with_sums();
    let key = Key::sums(MapId(sample.file.0), GROUP);
    let missing = sample.found(|_, txn| txn.delete(key));
    assert_eq!(missing, [checksums(&sample, GROUP, "are missing")]);

    let sample = Sample::with_sums();
    let lacking = found(&sample, |group| group.0[1..3].fill(0));
    assert_eq!(lacking, [checksums(&sample, GROUP, "some blocks have none")]);
    let sample = Sample::with_sums();
    let short = found(&sample, |group| group.0[7] = 0);
    assert_eq!(short, [checksums(&sample, GROUP, "some blocks have none")]);
}

#[test]
fn checksums_of_what_is_no_data_are_found() {
    let extra = "of blocks that hold no data";
    let sample = Sample::with_sums();
    assert_eq!(found(&sample, |group| group.0[20] = 9), [checksums(&sample, GROUP, extra)]);

    // At the largest key that is the begin of a group.
    let sample = Sample::with_sums();
    let far = u64::MAX - (SUM_GROUP_BLOCKS - 1);
    let behind = sample.found(|_, txn| txn.put(Key::sums(MapId(sample.file.0), far), &[1; 8]));
    assert_eq!(behind, [checksums(&sample, far, "lie behind the end of the largest file")]);

    // A group without any block, and a map that nobody has.
    let sample = Sample::with_sums();
    let empty = sample.found(|_, txn| txn.put(Key::sums(MapId(sample.file.0), 640), &[1; 8]));
    assert_eq!(empty, [checksums(&sample, 640, extra)]);
    let sample = Sample::with_sums();
    let ownerless = sample.found(|_, txn| txn.put(Key::sums(MapId(90), 0), &[1; 8]));
    assert_eq!(ownerless, [Finding::Checksums { map: 90, file_block: 0, problem: extra }]);

    // Blocks that were allocated ahead have none.
    let sample = Sample::with_sums();
    let found = sample.found(|items, txn| {
        let range = items.free_blocks(2);
        txn.alloc(range);
        txn.put(
            Key::extent(MapId(sample.file.0), 640),
            &ExtentItem::plain(range, ExtentFlags::UNWRITTEN).encode(),
        );
        txn.put(Key::sums(MapId(sample.file.0), 640), &[1; 8]);
        items.change(txn, sample.file, |inode| inode.blocks += 2);
    });
    assert_eq!(found, [checksums(&sample, 640, extra)]);
}

#[test]
fn malformed_checksums_are_found() {
    for value in [&[][..], &[1; 7], &[0; 8], &[1; 260]] {
        let sample = Sample::with_sums();
        let key = Key::sums(MapId(sample.file.0), GROUP);
        let found = sample.found(|_, txn| txn.put(key, value));
        assert_eq!(found, [checksums(&sample, GROUP, "malformed")], "{} bytes", value.len());
    }
    let sample = Sample::with_sums();
    let found = sample.found(|_, txn| txn.put(Key::sums(MapId(sample.file.0), 3), &[1; 8]));
    assert_eq!(found, [checksums(&sample, 3, "do not begin with a group")]);
}

/// A repair that drops extents drops their checksums in the same round.
#[test]
fn a_lost_extent_takes_its_checksums_along() {
    let sample = Sample::with_sums();
    let map = sample.file.0;
    let found = sample.found(|_, txn| txn.put(Key::extent(MapId(map), 64), &[0; 24]));
    let extent = Finding::Extent { map, file_block: 64, problem: "malformed" };
    assert!(found.contains(&extent), "{found:?}");
    assert!(found.contains(&checksums(&sample, GROUP, "of blocks that hold no data")), "{found:?}");
}

/// The check reads no data; what a block holds is the scrub's business.
#[test]
fn a_checksum_of_other_bytes_is_none_of_the_checks_business() {
    let sample = Sample::with_sums();
    sample.damage(|items, txn| {
        let key = Key::sums(MapId(sample.file.0), GROUP);
        let mut group = SumGroup::decode(&items.value(key)).unwrap();
        group.0[3] ^= 1;
        txn.put(key, &group.encode());
    });
    assert!(report_of(&sample.disk).unwrap().is_clean());
    let bdev: Rc<dyn Bdev> = sample.disk.clone();
    let report = reactor().block_on(async move { super::super::scrub(&bdev, &mut |_| ()).await }).unwrap();
    let [bad] = &report.unreadable[..] else { panic!("{report:?}") };
    assert_eq!((bad.inode, bad.offset, bad.len), (sample.file.0, 67 * 512, 512));
}

#[test]
fn data_in_the_journal_of_a_file_system_with_checksums_is_damage() {
    let sample = Sample::with_sums();
    let store = open(&sample.disk, &sample.reactor);
    let mut txn = Txn::new(Origin::default());
    txn.log(sample.file, 0, 512, |bytes| bytes.fill(1));
    store.commit(&txn).unwrap();
    let inner = store.clone();
    sample.reactor.block_on(async move { inner.sync(inner.last_seq()).await }).unwrap();
    let crashed = sample.disk.crash(CrashChoice::Nothing);
    let found = findings_of(&crashed);
    assert!(matches!(found[..], [Finding::Journal { .. }]), "{found:?}");
    assert!(mount(&crashed).is_err());
}
