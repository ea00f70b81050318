//! Repairs: what they leave, that they can be interrupted, and what they refuse.

use std::cell::RefCell;
use std::collections::HashSet;

use bdev::sim::{Effect, Fault, OpKind};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;
use crate::ondisk::Timestamp;

const ALL: RepairOptions =
    RepairOptions { consent: Consent::Everything, now: Timestamp { seconds: 7, nanoseconds: 0 } };
const CAREFUL: RepairOptions = RepairOptions { consent: Consent::NothingLost, ..ALL };

fn repair_with(disk: &Rc<SimDisk>, options: RepairOptions) -> Result<RepairReport, OpenError> {
    let bdev: Rc<dyn Bdev> = disk.clone();
    reactor().block_on(async move { super::super::repair(&bdev, options, &mut |_| ()).await })
}

/// A file of the sample as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// Inodes from the root's entry on.
    path: Vec<u64>,
    mode: u32,
    size: u64,
    content: Vec<u8>,
    xattr: Option<Vec<u8>>,
}

/// Names of everything in a sample.
fn names() -> Vec<String> {
    let fixed = ["dir", "dir/sub", "dir/sub/deep", "file", "dir/link", "soft", "dir/fifo"];
    let small = (0..100).map(|number| format!("dir/sub/small {number}"));
    fixed.into_iter().map(str::to_owned).chain(small).collect()
}

impl Mounted {
    /// What a path leads to, if it leads somewhere.
    fn see(&self, path: &str) -> Option<Seen> {
        let (mut inodes, mut attr) = (Vec::new(), None);
        for name in path.split('/') {
            let parent = inodes.last().map_or(InodeId::ROOT, |inode| InodeId(*inode));
            let (ctx, name) = (self.ctx, name.to_owned());
            let fs = self.fs.clone();
            let found = async move { fs.run(|fs| fs.lookup(&ctx, parent, name.as_bytes())).await };
            let entry = self.reactor.block_on(found).ok()?;
            inodes.push(entry.attr.inode.0);
            attr = Some(entry.attr);
        }
        let (attr, ctx) = (attr?, self.ctx);
        let inode = attr.inode;
        let content = match attr.mode & 0o170_000 {
            0o100_000 => self.content(inode, attr.size as usize),
            0o120_000 => self.run(move |fs| fs.read_link(&ctx, inode)),
            _ => Vec::new(),
        };
        let fs = self.fs.clone();
        let value = async move { fs.run(|fs| fs.get_xattr(&ctx, inode, b"user.a")).await };
        let xattr = match self.reactor.block_on(value) {
            Ok(crate::fs::XattrValue::Here(value)) => Some(value),
            _ => None,
        };
        // Of a directory it says how many entries there are, and those can be found to be damaged.
        let size = if attr.mode & 0o170_000 == 0o040_000 { 0 } else { attr.size };
        Some(Seen { path: inodes, mode: attr.mode, size, content, xattr })
    }

    fn content(&self, inode: InodeId, len: usize) -> Vec<u8> {
        let buf = Rc::new(AlignedBuf::zeroed(len.next_multiple_of(512).max(512), BLOCK as usize));
        let (fs, ctx, dst) = (self.fs.clone(), self.ctx, IoBuffers::from_aligned(&buf));
        let read = async move { fs.read(ctx, inode, 0, dst, IoFlags::default()).await };
        let count = self.reactor.block_on(read).unwrap();
        buf[..count].to_vec()
    }
}

/// Everything of a sample that can be found by its name.
fn seen(disk: &Rc<SimDisk>) -> BTreeMap<String, Seen> {
    let mounted = Mounted::new(disk, &reactor());
    let all = names().into_iter().filter_map(|name| mounted.see(&name).map(|seen| (name, seen))).collect();
    mounted.unmount();
    all
}

thread_local! {
    /// What an undamaged sample holds.
    static UNDAMAGED: RefCell<Option<BTreeMap<String, Seen>>> = const { RefCell::new(None) };
}

fn undamaged() -> BTreeMap<String, Seen> {
    let known = UNDAMAGED.with_borrow(Option::clone);
    known.unwrap_or_else(|| {
        let all = seen(&Sample::new().disk);
        assert_eq!(all.len(), 107);
        UNDAMAGED.set(Some(all.clone()));
        all
    })
}

/// Inodes that findings name.
fn named(findings: impl IntoIterator<Item = Finding>) -> HashSet<u64> {
    let mut inodes = HashSet::new();
    for finding in findings {
        let fields = serde_json::to_value(&finding).unwrap();
        for field in ["inode", "other", "map", "owner"] {
            inodes.extend(fields.get(field).and_then(serde_json::Value::as_u64));
        }
    }
    inodes
}

/// Whether findings say that items are lost without saying which.
fn lose_items(findings: &[Finding]) -> bool {
    let loses = |finding: &Finding| {
        matches!(
            finding,
            Finding::Node { .. } | Finding::PlaceUsedTwice { .. } | Finding::SuperblockCopies { .. }
        )
    };
    findings.iter().any(loses)
}

/// A repair leaves a clean file system; what no finding names is as it was; and there is nothing to repair
/// afterwards.
#[track_caller]
pub(super) fn repairs(disk: &Rc<SimDisk>, findings: &[Finding]) {
    let report = repair_with(disk, ALL).unwrap();
    if findings.is_empty() {
        assert!(!report.changed && report.findings.is_empty(), "{report:?}");
        return;
    }
    assert_eq!(report.refused, None, "{findings:?}");
    assert!(report.changed);
    assert!(report.after.is_clean(), "{findings:?}: after {:#?}: {:#?}", report.findings, report.after);
    assert!(report.findings.iter().all(|repaired| repaired.action.is_some_and(|action| !action.is_empty())));
    let again = repair_with(disk, ALL).unwrap();
    assert!(!again.changed && again.findings.is_empty(), "{again:?}");
    let now = seen(disk);
    if !lose_items(findings) {
        let touched = named(report.findings.iter().map(|repaired| repaired.finding.clone()));
        for (name, was) in undamaged() {
            if was.path.iter().all(|inode| !touched.contains(inode)) {
                assert_eq!(now.get(&name), Some(&was), "{name}: {findings:#?}");
            }
        }
    }
    assert_eq!(report_of(disk).unwrap().findings, []);
}

/// Whatever is on the disk, a repair ends: with a clean file system that can be mounted, or with nothing changed
/// because there is nothing to begin with.
pub(super) fn ends(disk: &Rc<SimDisk>) {
    let before = disk.writes();
    let Ok(report) = repair_with(disk, ALL) else { return };
    let nothing_left =
        ["no copy of the superblock can be used", "there is no room to write the repaired tree"];
    match report.refused {
        Some(reason) => assert!(nothing_left.contains(&reason), "{report:#?}"),
        None => {
            assert!(report.after.is_clean(), "{report:#?}");
            assert_eq!(disk.writes() != before, report.changed);
            mount(disk).unwrap();
            assert_eq!(report_of(disk).unwrap().findings, []);
        }
    }
}

#[test]
fn a_lost_inner_node_costs_nothing() {
    for path in [&[][..], &[0], &[1]] {
        let sample = Sample::new();
        sample.patch_node(path, |page| page[0] ^= 1);
        let report = repair_with(&sample.disk, ALL).unwrap();
        assert!(report.changed && report.after.is_clean(), "{report:#?}");
        assert_eq!(report.findings.len(), 1, "{report:#?}");
        assert_eq!(seen(&sample.disk), undamaged());
    }
}

#[test]
fn a_lost_leaf_costs_only_what_it_held() {
    let mut kept = 0;
    for (node, leaf) in [(0, 1), (0, 2), (0, LAST), (1, 0), (1, 2), (1, 4), (1, LAST)] {
        let sample = Sample::new();
        sample.patch_node(&[node, leaf], |page| page[0] ^= 1);
        let report = repair_with(&sample.disk, ALL).unwrap();
        assert!(report.changed && report.after.is_clean(), "{report:#?}");
        let now = seen(&sample.disk);
        let all = undamaged();
        kept += now.iter().filter(|(name, seen)| all.get(*name) == Some(seen)).count();
    }
    // A leaf of a kilobyte holds a handful of inodes or entries.
    assert!(kept > 7 * 85, "{kept}");
}

#[test]
fn what_has_no_name_any_more_is_in_lost_and_found() {
    let sample = Sample::new();
    sample.damage(|items, txn| {
        txn.delete(items.entry(sample.dir, "sub"));
        txn.delete(items.entry(InodeId::ROOT, "soft"));
    });
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.after.is_clean(), "{report:#?}");
    let mounted = Mounted::new(&sample.disk, &reactor());
    let all = undamaged();
    let soft = mounted.see(&format!("lost+found/#{}", sample.soft.0)).unwrap();
    assert_eq!(soft.content, all["soft"].content);
    for number in [0, 50, 99] {
        let path = format!("lost+found/#{}/small {number}", sample.sub.0);
        assert_eq!(mounted.see(&path).unwrap().content, all[&format!("dir/sub/small {number}")].content);
    }
    assert_eq!(mounted.see("lost+found").unwrap().mode, 0o040_700);
    // The next repair uses the same directory.
    mounted.create(InodeId::ROOT, "more", FILE);
    mounted.unmount();
    sample.damage(|items, txn| txn.delete(items.entry(InodeId::ROOT, "more")));
    assert!(repair_with(&sample.disk, ALL).unwrap().after.is_clean());
    assert_eq!(report_of(&sample.disk).unwrap().counts.directories, 5);
}

#[test]
fn a_lost_and_found_that_is_no_directory_is_left_alone() {
    let sample = Sample::new();
    let mounted = Mounted::new(&sample.disk, &reactor());
    mounted.create(InodeId::ROOT, "lost+found", FILE);
    mounted.unmount();
    sample.damage(|items, txn| txn.delete(items.entry(InodeId::ROOT, "soft")));
    assert!(repair_with(&sample.disk, ALL).unwrap().after.is_clean());
    let mounted = Mounted::new(&sample.disk, &reactor());
    assert_eq!(mounted.see("lost+found").unwrap().mode & 0o170_000, 0o100_000);
    assert!(mounted.see(&format!("lost+found_/#{}", sample.soft.0)).is_some());
}

#[test]
fn content_whose_inode_is_lost_gets_a_new_one() {
    let sample = Sample::new();
    sample.damage(|_, txn| {
        txn.delete(Key::inode(sample.file));
        txn.delete(Key::inode(sample.sub));
    });
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.after.is_clean(), "{report:#?}");
    let (now, all) = (seen(&sample.disk), undamaged());
    assert_eq!(now["file"].content, all["file"].content);
    assert_eq!(now["file"].xattr, all["file"].xattr);
    assert_eq!(now["file"].mode, 0o100_600);
    assert_eq!(now["dir/sub"].mode, 0o040_700);
    assert_eq!(now["dir/sub/small 7"], all["dir/sub/small 7"]);
}

#[test]
fn of_two_users_of_the_same_blocks_both_keep_them() {
    let sample = Sample::new();
    let other = sample.soft.0 + 2;
    sample.damage(|items, txn| {
        let item = items.extents(sample.file)[&0];
        txn.put(Key::extent(MapId(other), 0), &item.encode());
        items.change(txn, InodeId(other), |inode| {
            (inode.blocks, inode.size) = (u64::from(item.blocks), 8192);
        });
    });
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.after.is_clean(), "{report:#?}");
    let mounted = Mounted::new(&sample.disk, &reactor());
    let expected = pattern(sample.file, 0, 8192);
    assert!(mounted.content(sample.file, 40_000).starts_with(&expected));
    assert_eq!(mounted.content(InodeId(other), 8192), expected);
}

#[test]
fn an_extent_that_cannot_be_copied_is_given_up() {
    let sample = Sample::new();
    let other = sample.soft.0 + 2;
    let mut range = BlockRange::new(BlockAddr(0), 0);
    sample.damage(|items, txn| {
        let item = items.extents(sample.file)[&0];
        range = item.device_range();
        txn.put(Key::extent(MapId(other), 0), &item.encode());
        items.change(txn, InodeId(other), |inode| (inode.blocks, inode.size) = (16, 8192));
    });
    let start = range.start.0 * u64::from(BLOCK);
    sample.disk.fail_reads(start..start + 512);
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.changed && report.after.is_clean(), "{report:#?}");
    let given_up = |repaired: &Repaired| {
        matches!(repaired.finding, Finding::BlocksUsedTwice { .. })
            && repaired.action == Some("the extent was removed: it cannot be copied")
    };
    assert!(report.findings.iter().any(given_up), "{report:#?}");
    sample.disk.clear_faults();
    assert_eq!(seen(&sample.disk)["file"], undamaged()["file"]);
}

#[test]
fn without_room_nothing_is_changed() {
    let sample = Sample::new();
    // All that says where there is room is lost: the tree's root with the map of what else is a node.
    sample.set_superblock(|superblock| {
        (superblock.root.addr, superblock.chunk_map.addr) = (1 << 40, 1 << 40);
    });
    let writes = sample.disk.writes();
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert_eq!(report.refused, Some("there is no room to write the repaired tree"));
    assert_eq!(sample.disk.writes(), writes);
}

#[test]
fn a_careful_repair_gives_nothing_up() {
    let sample = Sample::new();
    sample.damage(|items, txn| items.change(txn, sample.file, |item| item.nlink = 7));
    let report = repair_with(&sample.disk, CAREFUL).unwrap();
    assert!(report.changed && report.after.is_clean());
    assert_eq!(seen(&sample.disk), undamaged());

    sample.damage(|items, txn| txn.delete(items.entry(InodeId::ROOT, "soft")));
    let writes = sample.disk.writes();
    let report = repair_with(&sample.disk, CAREFUL).unwrap();
    assert_eq!(report.refused, Some("something would be lost"));
    assert!(!report.changed && !report.after.is_clean());
    assert_eq!(sample.disk.writes(), writes);

    // What is to be given up comes to light only when something else is repaired.
    let sample = Sample::new();
    sample.damage(|items, txn| {
        txn.delete(items.entry(InodeId::ROOT, "soft"));
        txn.put(Key::orphan(sample.soft), &[]);
        items.change(txn, InodeId::ROOT, |item| item.size -= 1);
    });
    let report = repair_with(&sample.disk, CAREFUL).unwrap();
    assert_eq!(report.refused, Some("something would be lost"));
    let found: Vec<_> = report.findings.into_iter().map(|repaired| repaired.finding).collect();
    let inode = sample.soft.0;
    let expected = [Finding::Orphan { inode, problem: "has links" }, Finding::Unreachable { inode }];
    assert_eq!(found, expected);
}

#[test]
fn a_damaged_superblock_is_written_anew_from_the_other() {
    for offset in SUPERBLOCK_OFFSETS {
        let sample = Sample::new();
        sample.disk.poke(offset, &[0xff; 512]);
        assert!(mount(&sample.disk).is_err());
        let report = repair_with(&sample.disk, ALL).unwrap();
        assert!(report.changed && report.after.is_clean(), "{report:#?}");
        assert_eq!(seen(&sample.disk), undamaged());
    }
}

#[test]
fn without_any_superblock_nothing_is_repaired() {
    let sample = Sample::new();
    SUPERBLOCK_OFFSETS.iter().for_each(|offset| sample.disk.poke(*offset + 60, &[0xff; 8]));
    let writes = sample.disk.writes();
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert_eq!(report.refused, Some("no copy of the superblock can be used"));
    assert!(!report.changed && report.findings.iter().all(|repaired| repaired.action.is_none()));
    assert_eq!(sample.disk.writes(), writes);
}

#[test]
fn copies_of_different_file_systems_are_decided_by_the_tree() {
    let sample = Sample::new();
    let stranger = Superblock { uuid: [9; 16], generation: 1001, ..sample.superblock() };
    sample.disk.poke(SUPERBLOCK_OFFSETS[1], &stranger.encode());
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.changed && report.after.is_clean(), "{report:#?}");
    assert_eq!(seen(&sample.disk), undamaged());
}

#[test]
fn a_lost_chunk_map_is_made_anew() {
    let sample = Sample::new();
    let block = sample.superblock().chunk_map.addr;
    sample.disk.poke(block * u64::from(BLOCK), &[0xee; NODE]);
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.changed && report.after.is_clean(), "{report:#?}");
    assert_eq!(seen(&sample.disk), undamaged());
}

#[test]
fn a_damaged_journal_ends_at_the_damage() {
    let reactor = reactor();
    let (mounted, sample) = Sample::fill(empty_disk(&reactor), reactor);
    mounted.sync();
    mounted.create(InodeId::ROOT, "last", FILE);
    mounted.sync();
    let disk = sample.disk.crash(CrashChoice::Nothing);
    // The last transaction contradicts itself: its block is sealed anew.
    let superblock = newest(&disk);
    let start = superblock.journal_start * u64::from(BLOCK);
    let mut area = vec![0; superblock.journal_bytes() as usize];
    disk.peek(start, &mut area);
    let (at, id, len) = (0..area.len())
        .step_by(BLOCK as usize)
        .filter_map(|at| {
            let (id, len) = crate::ondisk::journal::block_header(&area[at..])?;
            (id.epoch == superblock.epoch && id.uuid == superblock.uuid).then_some((at, id, len))
        })
        .max_by_key(|(_, id, _)| id.seq)
        .unwrap();
    let block = &mut area[at..at + len];
    block[JOURNAL_HEADER_LEN + 8] ^= 1;
    seal_block(block, &id);
    disk.poke(start + at as u64, block);
    let found = report_of(&disk).unwrap();
    assert!(matches!(found.findings[..], [Finding::Journal { .. }]), "{found:#?}");
    assert_eq!(repair_with(&disk, CAREFUL).unwrap().refused, Some("something would be lost"));
    let report = repair_with(&disk, ALL).unwrap();
    assert!(report.changed && report.after.is_clean(), "{report:#?}");
    assert_eq!(seen(&disk), undamaged());
    assert!(Mounted::new(&disk, &self::reactor()).see("last").is_none());
}

#[test]
fn logged_data_is_brought_home() {
    for repaired in [false, true] {
        let sample = Sample::new();
        sample.set_superblock(|superblock| superblock.clean = false);
        let record = Record::Log { inode: sample.file, offset: 512, bytes: &[9; BLOCK as usize] };
        super::structure::append_block(&sample, 0, 1, &[record]);
        if repaired {
            sample.set_superblock(|superblock| superblock.free_blocks -= 1);
            let report = repair_with(&sample.disk, CAREFUL).unwrap();
            assert!(report.changed && report.after.is_clean(), "{report:#?}");
            assert_eq!(report.after.counts.journal_blocks, 0);
        }
        let mut expected = undamaged();
        for name in ["file", "dir/link"] {
            expected.get_mut(name).unwrap().content[512..1024].fill(9);
        }
        assert_eq!(seen(&sample.disk), expected, "repaired: {repaired}");
    }
}

#[test]
fn a_journal_that_cannot_be_read_ends_there() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.clean = false);
    let superblock = sample.superblock();
    let start = superblock.journal_start * u64::from(BLOCK);
    sample.disk.fail_reads(start..start + superblock.journal_bytes());
    let found = report_of(&sample.disk).unwrap();
    assert!(matches!(found.findings[..], [Finding::Journal { .. }]), "{found:#?}");
    assert!(repair_with(&sample.disk, ALL).unwrap().changed);
    assert_eq!(seen(&sample.disk), undamaged());
}

#[test]
fn impossible_times_cost_only_themselves() {
    let sample = Sample::new();
    sample.damage(|items, txn| {
        let mut value = items.value(Key::inode(sample.file));
        // Nanoseconds of the first time, behind eight words of 4 bytes, two of 8 and the seconds.
        value[32 + 16 + 8..][..4].fill(0xff);
        txn.put(Key::inode(sample.file), &value);
    });
    let found = report_of(&sample.disk).unwrap().findings;
    assert!(found.contains(&Finding::Inode { inode: sample.file.0, problem: "malformed" }), "{found:?}");
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.after.is_clean(), "{report:#?}");
    assert_eq!(seen(&sample.disk), undamaged());
}

/// Damage of several kinds at once.
fn damaged() -> Sample {
    let sample = Sample::new();
    sample.damage(|items, txn| {
        txn.delete(items.entry(InodeId::ROOT, "soft"));
        items.change(txn, sample.file, |item| item.nlink = 7);
        items.change(txn, sample.dir, |item| item.size = 70);
    });
    sample.patch_node(&[0], |page| page[0] ^= 1);
    sample
}

#[test]
fn a_repair_that_is_interrupted_can_be_done_again() {
    let sample = damaged();
    let image = sample.disk.snapshot();
    let findings = report_of(&sample.disk).unwrap().findings;
    let disk = SimDisk::from_image(image, BLOCK, 1);
    disk.record();
    assert!(repair_with(&disk, ALL).unwrap().after.is_clean());
    let mut history = disk.take_history();
    let wanted = seen(&disk);
    assert!(history.last_point() > 10);
    let mut switched = 0;
    for point in 0..=history.last_point() {
        let random = CrashChoice::Random { seed: point as u64 };
        for choice in [CrashChoice::Nothing, CrashChoice::Everything, random] {
            let crashed = SimDisk::from_image(history.state_at(point, choice), BLOCK, 1);
            let left = report_of(&crashed).unwrap().findings;
            if left != findings {
                switched += 1;
            }
            let report = repair_with(&crashed, ALL).unwrap();
            assert!(report.after.is_clean(), "{point} {choice:?}: {report:#?}");
            assert_eq!(seen(&crashed), wanted, "{point} {choice:?}");
        }
    }
    assert!(switched > 0);
}

#[test]
fn a_device_that_fails_during_a_repair_leaves_it_to_be_done_again() {
    let sample = damaged();
    let image = sample.disk.snapshot();
    let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
    repair_with(&disk, ALL).unwrap();
    let wanted = seen(&disk);
    let writes = disk.writes();
    for number in 0..writes {
        let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
        disk.inject(Fault::nth(OpKind::Write, number, Effect::Error { errno: 5 }));
        // The write of the second superblock fails when the first one counts already.
        let failed = repair_with(&disk, ALL);
        disk.clear_faults();
        let again = repair_with(&disk, ALL).unwrap();
        assert!(failed.is_err() || again.findings.is_empty());
        assert!(again.after.is_clean(), "{number}: {again:#?}");
        assert_eq!(seen(&disk), wanted, "{number}");
    }
}

/// Writes over random bytes of the metadata of a disk. Gives the inodes that lose items by that.
fn damage_at_random(disk: &Rc<SimDisk>, superblock: &Superblock, rng: &mut SmallRng) -> HashSet<u64> {
    let mut lost = HashSet::new();
    for _ in 0..rng.random_range(1..4) {
        let nodes = nodes_of(disk, superblock);
        // Without a root there is nothing more that could be found.
        let Some((block, inodes)) = nodes.choose(rng) else { break };
        let at = block * u64::from(BLOCK) + rng.random_range(0..NODE as u64 - 16);
        disk.poke(at, &rng.random::<[u8; 16]>());
        lost.extend(inodes.iter().copied());
    }
    lost
}

/// What can be found of an undamaged sample although some inodes have lost items.
fn assert_kept(disk: &Rc<SimDisk>, lost: &HashSet<u64>, what: &str) {
    let now = seen(disk);
    for (name, was) in &undamaged() {
        // Entries are items of the directory: their node may be another one than the inode's.
        let mut parents = std::iter::once(1).chain(was.path.iter().copied());
        if parents.all(|inode| !lost.contains(&inode)) {
            assert_eq!(now.get(name), Some(was), "{what}: {name}");
        }
    }
}

#[test]
fn random_damage_of_metadata_is_repaired() {
    let sample = Sample::new();
    let image = sample.disk.snapshot();
    let superblock = sample.superblock();
    let mut rng = SmallRng::seed_from_u64(11);
    for round in 0..150 {
        let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
        let lost = damage_at_random(&disk, &superblock, &mut rng);
        let report = repair_with(&disk, ALL).unwrap();
        assert!(report.changed && report.after.is_clean(), "{round}: {report:#?}");
        assert_kept(&disk, &lost, &format!("{round}: {report:#?}"));
    }
}

#[test]
fn random_damage_under_a_journal_is_repaired() {
    // Everything of a sample is in a checkpoint; the journal makes and deletes more.
    let sample = Sample::new();
    let mounted = Mounted::new(&sample.disk, &reactor());
    let (ctx, sub) = (mounted.ctx, sample.sub);
    for number in 0..20 {
        mounted.create(sub, &format!("more {number}"), FILE);
    }
    let file = mounted.create(sample.dir, "written", FILE);
    mounted.write(file, 0, 5000);
    mounted.run(move |fs| fs.unlink(&ctx, sub, b"more 3"));
    mounted.sync();
    let image = sample.disk.crash(CrashChoice::Nothing).snapshot();
    let superblock = newest(&SimDisk::from_image(image.clone(), BLOCK, 1));
    let mut rng = SmallRng::seed_from_u64(12);
    for round in 0..100 {
        let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
        let lost = damage_at_random(&disk, &superblock, &mut rng);
        let report = repair_with(&disk, ALL).unwrap();
        assert!(report.changed && report.after.is_clean(), "{round}: {report:#?}");
        assert_kept(&disk, &lost, &format!("{round}: {report:#?}"));
        if [1, sample.dir.0, file.0].iter().all(|inode| !lost.contains(inode)) {
            let mounted = Mounted::new(&disk, &reactor());
            assert_eq!(mounted.see("dir/written").unwrap().content, pattern(file, 0, 5000));
        }
    }
}

#[test]
fn a_repair_of_random_damage_can_be_interrupted_anywhere() {
    let sample = Sample::new();
    let image = sample.disk.snapshot();
    let superblock = sample.superblock();
    let mut rng = SmallRng::seed_from_u64(13);
    for round in 0..40 {
        let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
        let lost = damage_at_random(&disk, &superblock, &mut rng);
        disk.record();
        assert!(repair_with(&disk, ALL).unwrap().after.is_clean());
        let mut history = disk.take_history();
        let wanted = seen(&disk);
        for _ in 0..4 {
            let point = rng.random_range(0..=history.last_point());
            let choice = CrashChoice::Random { seed: rng.random() };
            let crashed = SimDisk::from_image(history.state_at(point, choice), BLOCK, 1);
            let report = repair_with(&crashed, ALL).unwrap();
            assert!(report.after.is_clean(), "{round} {point} {choice:?}: {report:#?}");
            assert_eq!(seen(&crashed), wanted, "{round} {point} {choice:?}");
        }
        assert_kept(&disk, &lost, &format!("{round}"));
    }
}

#[test]
fn a_full_device_can_be_repaired() {
    let sample = Sample::new();
    let mounted = Mounted::new(&sample.disk, &reactor());
    let file = mounted.create(InodeId::ROOT, "filler", FILE);
    let mut offset = 0;
    for len in [65_536, 4096, 512] {
        loop {
            let src = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(len, BLOCK as usize)));
            let (fs, ctx) = (mounted.fs.clone(), mounted.ctx);
            let write = async move { fs.write(ctx, file, offset, src, IoFlags::default()).await };
            match mounted.reactor.block_on(write) {
                Ok(count) => offset += count as u64,
                Err(error) => break assert_eq!(error, FsError::NoSpace),
            }
        }
    }
    mounted.unmount();
    sample.damage(|items, txn| items.change(txn, sample.file, |item| item.nlink = 7));
    sample.patch_node(&[0], |page| page[0] ^= 1);
    let report = repair_with(&sample.disk, ALL).unwrap();
    assert!(report.changed && report.after.is_clean(), "{report:#?}");
    assert_eq!(seen(&sample.disk), undamaged());
}

/// The leaves of a tree, with the inodes whose items are in them, and the inner nodes.
fn nodes_of(disk: &Rc<SimDisk>, superblock: &Superblock) -> Vec<(u64, HashSet<u64>)> {
    let mut nodes = Vec::new();
    let mut below = vec![superblock.root.addr];
    while let Some(block) = below.pop() {
        let mut page = vec![0; NODE];
        disk.peek(block * u64::from(BLOCK), &mut page);
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        let count = usize::from(u16::from_le_bytes([page[42], page[43]])).min(40);
        if page[..4] != *b"NODE" {
            continue;
        }
        match page[40] {
            0 => nodes.push((block, (0..count).map(|slot| word(64 + slot * 24)).collect())),
            _ => {
                let inside = |slot: &usize| value_at(&page, *slot) + 24 <= NODE;
                below.extend((0..count).filter(inside).map(|slot| word(value_at(&page, slot))));
                below.retain(|block| *block < superblock.block_count);
                nodes.push((block, HashSet::new()));
            }
        }
        if nodes.len() > 1000 {
            break;
        }
    }
    nodes
}

/// With their generations exchanged, the older copy seems to be the newer one. The epoch behind its own is that of the
/// journal which followed the other: a superblock with it brought those blocks back.
#[test]
fn a_repair_of_copies_in_each_others_place_replays_nothing_of_the_journal_behind_them() {
    let sample = Sample::new();
    let mounted = Mounted::new(&sample.disk, &sample.reactor);
    mounted.create(InodeId::ROOT, "new", DIRECTORY);
    mounted.sync();
    let disk = sample.disk.crash(CrashChoice::Nothing);
    assert!(report_of(&disk).unwrap().counts.journal_blocks > 0);
    for offset in SUPERBLOCK_OFFSETS {
        let mut bytes = [0; SUPERBLOCK_LEN];
        disk.peek(offset, &mut bytes);
        let superblock = Superblock::decode(&bytes).unwrap();
        let generation = superblock.generation ^ 1;
        disk.poke(offset, &Superblock { generation, ..superblock }.encode());
    }
    let found = findings_of(&disk);
    assert!(found.iter().any(|finding| matches!(finding, Finding::SuperblockPlace { .. })), "{found:?}");
}

/// The epoch of the superblock that counts is an earlier one: the blocks of the journal are of one of the next.
#[test]
fn a_repair_of_an_epoch_that_went_back_replays_nothing_of_the_journal_behind_it() {
    for back in 1..4 {
        let sample = Sample::new();
        let mut disk = sample.disk.crash(CrashChoice::Nothing);
        for _ in 0..3 {
            Mounted::new(&disk, &reactor()).unmount();
        }
        let mounted = Mounted::new(&disk, &sample.reactor);
        mounted.create(InodeId::ROOT, "new", DIRECTORY);
        mounted.sync();
        disk = disk.crash(CrashChoice::Nothing);
        let superblock = newest(&disk);
        let offset = SUPERBLOCK_OFFSETS[superblock.generation as usize % 2];
        // Something to repair: the copies disagree.
        let (epoch, compat) = (superblock.epoch - back, superblock.compat ^ 1 << 20);
        disk.poke(offset, &Superblock { epoch, compat, ..superblock.clone() }.encode());
        let report = repair_with(&disk, ALL).unwrap();
        assert!(report.changed && report.after.is_clean(), "{back}: {report:#?}");
        // Later mounts have later ones.
        assert!(newest(&disk).epoch > superblock.epoch, "{back}");
    }
}
