//! Superblocks, journal, nodes, chunk map, bitmaps.

use super::*;

#[test]
fn damaged_superblocks_are_found() {
    let sample = Sample::new();
    let superblock = sample.superblock();
    let newest = (superblock.generation % 2) as usize;
    let older = 1 - newest;
    sample.disk.poke(SUPERBLOCK_OFFSETS[older] + 100, &[0xff; 4]);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Superblock { copy, .. }] if copy == older), "{found:?}");
    assert!(problem(&found[0]).contains("checksum"));
    sample.disk.poke(SUPERBLOCK_OFFSETS[newest] + 100, &[0xff; 4]);
    let report = report_of(&sample.disk).unwrap();
    assert_eq!(report.findings.len(), 2);
    assert!(!report.complete && !report.is_clean());

    let sample = Sample::new();
    let mut wrong = superblock.clone();
    wrong.node_size = 100;
    sample.disk.poke(SUPERBLOCK_OFFSETS[older], &wrong.encode());
    let found = findings_of(&sample.disk);
    assert!(problem(&found[0]).contains("node size"), "{found:?}");
}

#[test]
fn copies_of_the_superblock_that_contradict_each_other_are_found() {
    let change = |with: &dyn Fn(&mut Superblock)| {
        let sample = Sample::new();
        let newest = sample.superblock();
        let mut older = Superblock { generation: newest.generation - 1, ..newest };
        with(&mut older);
        sample.disk.poke(SUPERBLOCK_OFFSETS[(older.generation % 2) as usize], &older.encode());
        findings_of(&sample.disk)
    };
    assert_eq!(change(&|_| ()), []);
    let copies = |field| [Finding::SuperblockCopies { field }];
    assert_eq!(change(&|older| older.uuid[0] ^= 1), copies("the UUID"));
    assert_eq!(change(&|older| older.group_blocks = 256), copies("the group size"));
    assert_eq!(change(&|older| older.hash_key[0] += 1), copies("the hash key"));
    assert_eq!(change(&|older| older.node_size = 2048), copies("the node size"));
    // Twice the block is twice the journal in bytes, and half of its place.
    let block = |older: &mut Superblock| {
        (older.block_size, older.journal_blocks, older.tail.pos) = (1024, 128, 0);
    };
    let found = change(&block);
    assert!(found.contains(&copies("the block size")[0]), "{found:?}");
    assert_eq!(change(&|older| older.journal_blocks += 1), copies("the place of the journal"));
    assert_eq!(change(&|older| older.generation -= 2), copies("the generation by more than one"));

    let sample = Sample::new();
    let newest = sample.superblock();
    let place = Superblock { generation: newest.generation + 1, ..newest.clone() };
    let copy = (newest.generation % 2) as usize;
    sample.disk.poke(SUPERBLOCK_OFFSETS[copy], &place.encode());
    let found = findings_of(&sample.disk);
    assert!(found.contains(&Finding::SuperblockPlace { copy, generation: place.generation }), "{found:?}");
}

#[test]
fn a_counter_that_would_give_a_number_twice_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.next_id = 5);
    let used = sample.superblock().last_txn;
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::NextId { next_id: 5, used }] if used > 20), "{found:?} {used}");
}

#[test]
fn a_wrong_number_of_free_blocks_is_found() {
    let sample = Sample::new();
    let counted = sample.superblock().free_blocks;
    sample.set_superblock(|superblock| superblock.free_blocks -= 3);
    assert_eq!(findings_of(&sample.disk), [Finding::FreeBlocks { stated: counted - 3, counted }]);
}

#[test]
fn other_devices_are_not_checked() {
    let empty = SimDisk::new(DEVICE, BLOCK, 1);
    assert_eq!(report_of(&empty), Err(OpenError::NotAFileSystem));
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.incompat = 8);
    assert_eq!(report_of(&sample.disk), Err(OpenError::Incompatible { features: 8 }));
}

/// A journal block that follows the newest checkpoint.
pub(super) fn append_block(sample: &Sample, skip: u64, txn: u64, records: &[Record<'_>]) -> u64 {
    let superblock = sample.superblock();
    let mut block = vec![0; JOURNAL_HEADER_LEN];
    let header = TxnHeader {
        len: 0.into(),
        count: 0.into(),
        seq: (superblock.last_txn + txn).into(),
        session: 0.into(),
        request: 0.into(),
        next_id: superblock.next_id.into(),
    };
    append_txn(&mut block, header, records.iter().copied());
    let id = BlockId {
        uuid: superblock.uuid,
        epoch: superblock.epoch,
        seq: superblock.tail.seq + skip,
        previous_crc: superblock.tail.previous_crc,
    };
    seal_block(&mut block, &id);
    let start = superblock.journal_start * u64::from(BLOCK) + superblock.tail.pos;
    sample.disk.poke(start + skip * u64::from(BLOCK), &block);
    superblock.journal_start + superblock.tail.pos / u64::from(BLOCK)
}

#[test]
fn journal_blocks_that_cannot_be_applied_are_found() {
    let far = BlockRange::new(BlockAddr(1 << 40), 1);
    let superblocks = BlockRange::new(BlockAddr(8), 1);
    let key = Key::new(999, Kind::Dirent, 0);
    let cases: [(u64, Record<'_>, &str); 8] = [
        (1, Record::GiveBack { start: 3000, nodes: 1 }, "gives back a chunk that is used or does not exist"),
        (1, Record::Delete(key), "deletes an item that does not exist"),
        (1, Record::Alloc(far), "no data blocks"),
        (1, Record::Free(superblocks), "no data blocks"),
        (1, Record::Free(BlockRange::new(BlockAddr(2000), 1)), "frees blocks that are free"),
        (1, Record::Put(key, &[0; 400]), "too long"),
        (1, Record::Put(Key::group(0), &[0; 64]), "bitmap"),
        (2, Record::Delete(key), "not in sequence"),
    ];
    for (txn, record, expected) in cases {
        let sample = Sample::new();
        sample.set_superblock(|superblock| superblock.clean = false);
        let block = append_block(&sample, 0, txn, &[record]);
        let found = findings_of(&sample.disk);
        let Finding::Journal { block: at, problem, .. } = &found[0] else { panic!("{found:?}") };
        // A chunk is given back to the map and to the bitmaps.
        let count = if matches!(record, Record::GiveBack { .. }) { 2 } else { 1 };
        assert_eq!((*at, found.len()), (block, count), "{found:?}");
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn logged_data_that_no_block_is_there_for_is_found() {
    let block = u64::from(BLOCK);
    let far = Record::Log { inode: InodeId(0), offset: 1000 * block, bytes: &[1; 2 * BLOCK as usize] };
    let cases: [(Record<'_>, Option<u64>); 3] = [
        (far, Some(2 * block)),
        (Record::Log { inode: InodeId(0), offset: 0, bytes: &[1; BLOCK as usize] }, None),
        (Record::Settle { inode: InodeId(0), start: 0, end: block }, None),
    ];
    for (record, missing) in cases {
        let sample = Sample::new();
        let record = match record {
            Record::Log { offset, bytes, .. } => Record::Log { inode: sample.file, offset, bytes },
            Record::Settle { start, end, .. } => Record::Settle { inode: sample.file, start, end },
            other => other,
        };
        sample.set_superblock(|superblock| superblock.clean = false);
        append_block(&sample, 0, 1, &[record]);
        let expected = missing.map(|bytes| Finding::LoggedData { inode: sample.file.0, bytes });
        assert_eq!(findings_of(&sample.disk), Vec::from_iter(expected));
    }
}

#[test]
fn logged_data_of_orphans_and_of_nobody_means_nothing() {
    for inode in [InodeId(77_777), InodeId::ROOT] {
        let sample = Sample::new();
        sample.set_superblock(|superblock| superblock.clean = false);
        append_block(&sample, 0, 1, &[Record::Log { inode, offset: 0, bytes: &[1; BLOCK as usize] }]);
        let found = findings_of(&sample.disk);
        assert_eq!(found.is_empty(), inode != InodeId::ROOT, "{found:?}");
    }
}

#[test]
fn logged_parts_of_blocks_are_found() {
    for record in [
        Record::Log { inode: InodeId(5), offset: 1, bytes: &[1; BLOCK as usize] },
        Record::Log { inode: InodeId(5), offset: 0, bytes: &[1; 100] },
        Record::Settle { inode: InodeId(5), start: 100, end: 512 },
    ] {
        let sample = Sample::new();
        sample.set_superblock(|superblock| superblock.clean = false);
        append_block(&sample, 0, 1, &[record]);
        let found = findings_of(&sample.disk);
        assert!(
            matches!(&found[..], [Finding::Journal { problem, .. }] if problem.contains("part of a block")),
            "{found:?}"
        );
        assert!(
            matches!(mount(&sample.disk), Err(OpenError::Failed(FsError::Corrupt(_)))),
            "a mount refuses it"
        );
    }
}

#[test]
fn a_journal_block_that_makes_no_sense_is_found() {
    let spoil = |with: &dyn Fn(&mut [u8])| {
        let sample = Sample::new();
        sample.set_superblock(|superblock| superblock.clean = false);
        let at = append_block(&sample, 0, 1, &[]) * u64::from(BLOCK);
        let mut block = vec![0; JOURNAL_HEADER_LEN + RECORD_HEADER_LEN];
        sample.disk.peek(at, &mut block);
        let (id, _) = block_header(&block).unwrap();
        with(&mut block);
        seal_block(&mut block, &id);
        sample.disk.poke(at, &block);
        let found = findings_of(&sample.disk);
        assert_eq!(found.len(), 1, "{found:?}");
        problem(&found[0])
    };
    // The record begins with its length; its last word is the next number.
    assert_eq!(spoil(&|block| block[JOURNAL_HEADER_LEN] += 1), "malformed record");
    let counter = spoil(&|block| block[JOURNAL_HEADER_LEN + 32..].fill(0xff));
    assert_eq!(counter, "a number beyond what its counter can reach");
}

#[test]
fn an_alloc_of_blocks_in_use_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.clean = false);
    let used = {
        let store = open(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1), &sample.reactor);
        Items(store).extents(sample.file)[&0].addr
    };
    append_block(&sample, 0, 1, &[Record::Alloc(BlockRange::new(used, 1))]);
    let found = findings_of(&sample.disk);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(problem(&found[0]), "uses blocks that are used already");
}

#[test]
fn a_superblock_that_cannot_be_read_is_found() {
    let sample = Sample::new();
    let older = 1 - sample.superblock().generation % 2;
    let start = SUPERBLOCK_OFFSETS[older as usize];
    sample.disk.fail_reads(start..start + 512);
    let found = report_of(&sample.disk).unwrap().findings;
    assert!(matches!(found[..], [Finding::Superblock { copy, .. }] if copy as u64 == older), "{found:?}");
    assert!(problem(&found[0]).contains("device error"), "{found:?}");
    // Written, it can be read.
    repair::repairs(&sample.disk, &found);
}

#[test]
fn a_claim_of_blocks_in_use_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.clean = false);
    let used = {
        let store = open(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1), &sample.reactor);
        Items(store).extents(sample.file)[&0].addr.0
    };
    append_block(&sample, 0, 1, &[Record::Claim { start: used, nodes: 1 }]);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[0], Finding::BlocksUsedTwice { start, .. } if start == used), "{found:?}");
    assert!(matches!(found[1], Finding::Journal { .. }), "{found:?}");
    append_block(&sample, 0, 1, &[Record::Claim { start: 2, nodes: 1 }]);
    let found = findings_of(&sample.disk);
    assert_eq!(found[0], Finding::Chunk { block: 2, problem: "lies outside the data area" });
}

#[test]
fn a_journal_that_goes_on_behind_a_clean_superblock_is_found() {
    let sample = Sample::new();
    append_block(&sample, 0, 1, &[]);
    assert_eq!(findings_of(&sample.disk), [Finding::CleanWithJournal { blocks: 1 }]);
}

#[test]
fn a_hole_in_the_journal_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.clean = false);
    append_block(&sample, 3, 4, &[]);
    let expected = sample.superblock().tail.seq;
    assert_eq!(findings_of(&sample.disk), [Finding::JournalGap { expected, found: expected + 3 }]);
}

#[test]
fn damaged_nodes_are_found_and_named() {
    type Patch = fn(&mut [u8]);
    let overlap: Patch = |page| {
        let slots = usize::from(u16::from_le_bytes([page[42], page[43]]));
        let long: Vec<usize> = (0..slots).filter(|slot| page[64 + slot * 24 + 12] > 2).collect();
        let at = value_at(page, long[1]) as u16 + 1;
        page[64 + long[0] * 24 + 10..][..2].copy_from_slice(&at.to_le_bytes());
    };
    let cases: [(&[usize], Patch, &str); 12] = [
        (&[LAST, LAST], overlap, "values overlap"),
        (&[LAST, LAST], |page| page[42..44].fill(0), "is empty"),
        (&[LAST], |page| page[64 + 12] = 23, "child 0 is no pointer"),
        (&[], |page| page[0] ^= 1, "magic"),
        (&[LAST], |page| page[8] ^= 1, "block"),
        (&[LAST, LAST], |page| page[16] ^= 1, "another file system"),
        (&[LAST, 0], |page| page[32] ^= 1, "generation"),
        (&[LAST], |page| page[40] += 1, "level"),
        (&[LAST, LAST], |page| page[42..44].fill(0xff), "slots do not fit"),
        (&[LAST, LAST], |page| page[64 + 8] = 0xee, "unknown kind"),
        (&[LAST, LAST], |page| page[64 + 10..64 + 12].fill(0xff), "value of slot 0"),
        (&[1], |page| page[42..44].fill(0), "inner node without children"),
    ];
    for (path, with, expected) in cases {
        let sample = Sample::new();

        let block = sample.patch_node(path, with);
        let report = report_of(&sample.disk).unwrap();
        let found = &report.findings;
        assert!(matches!(found[..], [Finding::Node { block: at, .. }] if at == block), "{found:?}");
        assert!(problem(&found[0]).contains(expected), "{found:?}");
        assert!(!report.complete);
    }
}

#[test]
fn a_node_with_a_wrong_checksum_is_found() {
    let sample = Sample::new();
    let block = sample.patch_node(&[LAST, LAST], |_| ());
    sample.disk.poke(block * u64::from(BLOCK) + 700, &[0xaa; 8]);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Node { block: at, level: 0, .. }] if at == block), "{found:?}");
    assert!(problem(&found[0]).contains("checksum"), "{found:?}");
}

#[test]
fn a_node_that_cannot_be_read_is_found() {
    let sample = Sample::new();
    let block = sample.patch_node(&[LAST, LAST], |_| ());
    let start = block * u64::from(BLOCK);
    sample.disk.fail_reads(start..start + NODE as u64);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Node { block: at, level: 0, .. }] if at == block), "{found:?}");
    assert!(problem(&found[0]).contains("device error"), "{found:?}");
}

#[test]
fn keys_out_of_order_or_outside_their_node_are_found() {
    let sample = Sample::new();
    // Exchanges the first two keys of an inner node.
    sample.patch_node(&[], |page| {
        let (first, second) = page[64..112].split_at_mut(24);
        first[..9].swap_with_slice(&mut second[..9]);
        first[16..].swap_with_slice(&mut second[16..]);
    });
    assert!(problem(&findings_of(&sample.disk)[0]).contains("out of order"));

    let sample = Sample::new();
    let block = sample.patch_node(&[LAST, LAST], |page| page[64..72].fill(0));
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Node { block: at, .. }] if at == block), "{found:?}");
    assert!(problem(&found[0]).contains("outside the range"), "{found:?}");
}

#[test]
fn pointers_into_nowhere_are_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.root.addr = u64::MAX);
    let found = findings_of(&sample.disk);
    assert!(found.iter().any(|finding| matches!(finding, Finding::Node { block: u64::MAX, .. })));
    sample.set_superblock(|superblock| superblock.chunk_map.addr = 1 << 40);
    let found = report_of(&sample.disk).unwrap().findings;
    assert!(matches!(found[0], Finding::ChunkMap { .. }), "{found:?}");
    assert!(problem(&found[0]).contains("outside"), "{found:?}");
}

#[test]
fn a_node_with_two_parents_is_found() {
    let sample = Sample::new();
    let mut twice = 0;
    sample.patch_node(&[0], |page| {
        let (first, second) = (value_at(page, 0), value_at(page, 1));
        page.copy_within(first..first + 24, second);
        twice = u64::from_le_bytes(page[first..first + 8].try_into().unwrap());
    });
    assert_eq!(findings_of(&sample.disk), [Finding::PlaceUsedTwice { block: twice }]);
}

#[test]
fn a_node_of_a_later_generation_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.root.generation += 100);
    assert!(problem(&findings_of(&sample.disk)[0]).contains("newer"));
}

#[test]
fn wrong_chunk_maps_are_found() {
    // Entries begin at byte 64: first block, used bits, places; of those that the first chunk in use has some are.
    let sample = Sample::new();
    let number = |page: &[u8], at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let in_use = |page: &[u8]| (64..).step_by(24).find(|at| number(page, at + 8) != 0).unwrap();
    let mut leaked = 0;
    sample.patch_map(|page| {
        let at = in_use(page);
        let (start, used) = (number(page, at), number(page, at + 8));
        let place = (!used).trailing_zeros();
        leaked = start + u64::from(place) * 2;
        page[at + 8..at + 16].copy_from_slice(&(used | 1 << place).to_le_bytes());
    });
    assert_eq!(findings_of(&sample.disk), [Finding::PlaceLeaked { block: leaked }]);

    let sample = Sample::new();
    let mut lost = 0;
    sample.patch_map(|page| {
        let at = in_use(page);
        let (start, used) = (number(page, at), number(page, at + 8));
        let place = used.trailing_zeros();
        lost = start + u64::from(place) * 2;
        page[at + 8..at + 16].copy_from_slice(&(used & !(1 << place)).to_le_bytes());
    });
    assert_eq!(findings_of(&sample.disk), [Finding::PlaceNotMarked { block: lost }]);

    let sample = Sample::new();
    let block = sample.patch_map(|page| page[80] = 99);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[0], Finding::ChunkMap { block: at, .. } if at == block), "{found:?}");

    let sample = Sample::new();
    sample.patch_map(|page| page[64..72].fill(0));
    let found = findings_of(&sample.disk);
    assert_eq!(found[0], Finding::Chunk { block: 0, problem: "lies outside the data area" });

    let sample = Sample::new();
    let mut first = 0;
    sample.patch_map(|page| {
        page.copy_within(64..88, 88);
        first = u64::from_le_bytes(page[64..72].try_into().unwrap());
    });
    let found = findings_of(&sample.disk);
    assert_eq!(found[0], Finding::Chunk { block: first, problem: "overlaps another chunk" });

    // A page that names itself as the next one.
    let sample = Sample::new();
    let ptr = sample.superblock().chunk_map;
    sample.patch_map(|page| page[44..52].copy_from_slice(&ptr.addr.to_le_bytes()));
    let found = findings_of(&sample.disk);
    assert_eq!(found, [Finding::PlaceUsedTwice { block: ptr.addr }]);
}

#[test]
fn bitmaps_that_disagree_with_what_is_used_are_found() {
    let sample = Sample::new();
    let mut range = BlockRange::new(BlockAddr(0), 0);
    let found = sample.found(|items, txn| {
        range = items.free_blocks(3);
        txn.alloc(range);
    });
    assert_eq!(found, [Finding::BlocksLeaked { start: range.start.0, end: range.end().0 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        range = items.extents(sample.file)[&0].device_range();
        txn.free(range);
    });
    assert_eq!(found, [Finding::BlocksNotMarked { start: range.start.0, end: range.end().0 }]);
}

#[test]
fn bits_behind_the_last_block_are_found() {
    let reactor = reactor();
    let disk = SimDisk::new(DEVICE, BLOCK, 1);
    let blocks = DEVICE / u64::from(BLOCK);
    // The last group has a hundred blocks fewer than the others.
    let size = DEVICE - 100 * u64::from(BLOCK);
    let options = MkfsOptions { size, ..small_geometry() };
    let bdev: Rc<dyn Bdev> = disk.clone();
    reactor.block_on(async move { mkfs(&bdev, &options).await }).unwrap();
    let (mounted, sample) = Sample::fill(disk, reactor);
    mounted.unmount();
    let group = Key::group(blocks / 512 - 1);
    let found = sample.found(|items, txn| {
        let bits = items.0.get(&group, |value| value.map(<[u8]>::to_vec)).unwrap();
        let mut bits = bits.unwrap_or_else(|| vec![0; 64]);
        bits[63] |= 0x80;
        txn.put(group, &bits);
    });
    assert!(found.contains(&Finding::BlocksLeaked { start: blocks - 1, end: blocks }), "{found:?}");
}

#[test]
fn malformed_bitmaps_are_found() {
    let sample = Sample::new();
    let group = DEVICE / u64::from(BLOCK) / 512;
    let found = sample.found(|_, txn| txn.put(Key::group(group), &[0; 64]));
    assert_eq!(found, [Finding::Group { group, problem: "lies behind the end of the device" }]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::group(3), &[0; 7]));
    assert_eq!(found[0], Finding::Group { group: 3, problem: "has the wrong length" });
}

#[test]
fn a_gap_in_the_tree_is_not_reported_as_everything_that_may_be_missing() {
    for child in [0, 1, 2, LAST] {
        let sample = Sample::new();
        sample.patch_node(&[1, child], |page| page[0] ^= 1);
        let report = report_of(&sample.disk).unwrap();
        assert!(!report.complete);
        assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    }
}

#[test]
fn findings_are_limited_but_counted() {
    let mut findings = Findings::limited();
    for block in 0..10_100 {
        findings.push(Finding::PlaceLeaked { block }, remedy::Remedy::default());
    }
    assert_eq!((findings.list.len(), findings.left_out), (10_000, 100));
}
