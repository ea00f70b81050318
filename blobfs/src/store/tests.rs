//! The store against a plain map: on tiny geometries, with reopening, power cuts and failing devices.

mod chunks;
mod pins;
mod waits;

use std::collections::{BTreeMap, BTreeSet};

use bdev::sim::{CrashChoice, Effect, Fault, OpKind, SimDisk};
use bdev::{AlignedBuf, IoBuffers, WriteFlags};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use reactor::VirtualClock;

use super::*;
use crate::error::Stop;
use crate::ondisk::{ExtentFlags, ExtentItem, Kind};
use crate::txn::Origin;

const BLOCK: u32 = 512;
const DEVICE: u64 = 1 << 20;

/// Everything below this owner is free for small items; extents have owners from here on.
const EXTENT_OWNER: u64 = 1 << 32;

type Items = BTreeMap<Key, Vec<u8>>;

fn reactor() -> Rc<Reactor> {
    Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1))))
}

fn tiny() -> MkfsOptions {
    MkfsOptions {
        uuid: [9; 16],
        hash_key: [1, 2],
        label: "tiny".to_owned(),
        block_size: BLOCK,
        node_size: 1024,
        group_blocks: 512,
        journal_size: 64 * 1024,
        ..MkfsOptions::default()
    }
}

fn make(disk: &Rc<SimDisk>, reactor: &Rc<Reactor>) {
    let bdev: Rc<dyn Bdev> = disk.clone();
    reactor.block_on(async move { mkfs(&bdev, &tiny()).await }).unwrap();
}

fn open(disk: &Rc<SimDisk>, reactor: &Rc<Reactor>) -> Result<Rc<Store>, OpenError> {
    let options = OpenOptions { dirty_bytes_max: 100 * 1024, ..OpenOptions::default() };
    let (disk, inner) = (disk.clone(), reactor.clone());
    reactor.block_on(async move { Store::open(disk, inner, options).await })
}

fn fresh(seed: u64) -> (Rc<SimDisk>, Rc<Reactor>, Rc<Store>) {
    let disk = SimDisk::new(DEVICE, BLOCK, seed);
    let reactor = reactor();
    make(&disk, &reactor);
    let store = open(&disk, &reactor).unwrap();
    (disk, reactor, store)
}

/// Makes a call again until it has all its nodes.
fn settled<T>(store: &Store, mut call: impl FnMut() -> Try<T>) -> Result<T, FsError> {
    loop {
        match call() {
            Ok(value) => return Ok(value),
            Err(Stop::Fail(error)) => return Err(error),
            Err(Stop::Wait(wait)) => {
                let this = store.this.upgrade().unwrap();
                store.reactor.block_on(async move { this.wait(&wait).await.map(drop) })?;
            }
        }
    }
}

/// All items but the bitmaps, in pieces as misses cut them.
fn try_items(store: &Store) -> Result<Items, FsError> {
    let mut items = Items::new();
    let end = Key::new(u64::MAX, Kind::Checksum, u64::MAX);
    let mut from = tree::KEY_MIN;
    settled(store, || {
        store.scan(&from.clone(), &end, |key, value| {
            if key.kind != Kind::Group {
                items.insert(*key, value.to_vec());
            }
            from = Key { offset: key.offset + 1, ..*key };
            ControlFlow::Continue(())
        })
    })?;
    Ok(items)
}

fn items(store: &Store) -> Items {
    try_items(store).unwrap()
}

/// Commits, with the waits that it asks for.
async fn commit(store: &Rc<Store>, txn: &Txn) -> Result<TxnSeq, FsError> {
    loop {
        match store.commit(txn) {
            Ok(seq) => return Ok(seq),
            Err(Stop::Fail(error)) => return Err(error),
            Err(Stop::Wait(wait)) => {
                store.wait(&wait).await?;
            }
        }
    }
}

fn of(blocks: u64) -> Demand {
    Demand { holes: blocks, pieces: 1, ..Demand::NONE }
}

async fn reserve(store: &Rc<Store>, blocks: u64) -> Result<Reservation, FsError> {
    loop {
        match store.reserve(of(blocks)) {
            Ok(reservation) => return Ok(reservation),
            Err(Stop::Fail(error)) => return Err(error),
            Err(Stop::Wait(wait)) => {
                store.wait(&wait).await?;
            }
        }
    }
}

/// An extent's item: where it is, and the number that fills its blocks.
fn extent_value(range: BlockRange, tag: u64) -> Vec<u8> {
    let mut value = ExtentItem::plain(range, ExtentFlags::empty()).encode().to_vec();
    value.extend_from_slice(&tag.to_le_bytes());
    value
}

fn extent_of(value: &[u8]) -> (BlockRange, u64) {
    let (item, tag) = value.split_at(ExtentItem::SIZE);
    (ExtentItem::decode(item).unwrap().device_range(), u64::from_le_bytes(tag.try_into().unwrap()))
}

fn filled(len: usize, tag: u64) -> Rc<AlignedBuf> {
    let mut buf = AlignedBuf::zeroed(len, 512);
    for word in buf.chunks_exact_mut(8) {
        word.copy_from_slice(&tag.to_le_bytes());
    }
    Rc::new(buf)
}

/// A random workload and what it must leave behind.
struct Workload {
    store: Rc<Store>,
    rng: SmallRng,
    model: Items,
    /// The items after each transaction.
    history: BTreeMap<u64, Items>,
    tag: u64,
}

impl Workload {
    fn new(store: &Rc<Store>, seed: u64) -> Self {
        let history = BTreeMap::from([(store.last_seq().0, items(store))]);
        let model = items(store);
        Self { store: store.clone(), rng: SmallRng::seed_from_u64(seed), model, history, tag: seed << 32 }
    }

    /// One transaction; `NoSpace` is a result like any other.
    async fn step(&mut self) {
        let mut txn = Txn::new(Origin { session: 1, request: self.tag });
        let mut after = self.model.clone();
        let mut allocation = None;
        match self.rng.random_range(0..10) {
            0..=2 => allocation = self.write_extent(&mut txn, &mut after).await,
            3 | 4 => self.delete_extent(&mut txn, &mut after),
            _ => self.change_items(&mut txn, &mut after),
        }
        if txn.is_empty() {
            return;
        }
        match commit(&self.store, &txn).await {
            Ok(seq) => {
                self.model = after;
                self.history.insert(seq.0, self.model.clone());
                allocation.into_iter().for_each(Allocation::committed);
            }
            Err(FsError::NoSpace) => {}
            Err(error) => panic!("commit: {error}"),
        }
    }

    async fn write_extent(&mut self, txn: &mut Txn, after: &mut Items) -> Option<Allocation> {
        let blocks = self.rng.random_range(1..=12);
        let mut reservation = match reserve(&self.store, blocks).await {
            Ok(reservation) => reservation,
            Err(FsError::NoSpace) => return None,
            Err(error) => panic!("reserve: {error}"),
        };
        let allocation = loop {
            match self.store.allocate(&mut reservation, None, blocks as u32) {
                Ok(allocation) => break allocation,
                Err(Stop::Fail(error)) => panic!("allocate: {error}"),
                Err(Stop::Wait(wait)) => drop(self.store.wait(&wait).await.unwrap()),
            }
        };
        let range = allocation.range();
        self.tag += 1;
        let buf = filled(range.count as usize * BLOCK as usize, self.tag);
        let io = self.store.begin_write();
        let offset = range.bytes(BLOCK).start;
        self.store.bdev().write(offset, IoBuffers::from_aligned(&buf), WriteFlags::NONE).await.unwrap();
        io.end();
        let key = Key::new(EXTENT_OWNER + self.rng.random_range(0..40), Kind::Extent, self.tag);
        let value = extent_value(range, self.tag);
        txn.alloc(range);
        txn.put(key, &value);
        after.insert(key, value);
        Some(allocation)
    }

    fn delete_extent(&mut self, txn: &mut Txn, after: &mut Items) {
        let owner = EXTENT_OWNER + self.rng.random_range(0..40);
        let end = Key::new(u64::MAX, Kind::Extent, 0);
        let found = after.range(Key::new(owner, Kind::Extent, 0)..end).next();
        if let Some((key, value)) = found.map(|(key, value)| (*key, value.clone())) {
            txn.delete(key);
            txn.free(extent_of(&value).0);
            after.remove(&key);
        }
    }

    fn change_items(&mut self, txn: &mut Txn, after: &mut Items) {
        for _ in 0..self.rng.random_range(1..6) {
            let key = Key::new(self.rng.random_range(1..60), Kind::Dirent, self.rng.random_range(0..5));
            if after.contains_key(&key) && self.rng.random_bool(0.5) {
                txn.delete(key);
                after.remove(&key);
            } else {
                let len = self.rng.random_range(0..=self.store.item_len_max());
                let value = vec![self.rng.random(); len];
                txn.put(key, &value);
                after.insert(key, value);
            }
        }
    }
}

/// Checks everything that must hold of a store whose items are `expected`: the items, the content of the
/// extents, and that bitmaps and free map say exactly what is used.
fn check(store: &Rc<Store>, reactor: &Rc<Reactor>, expected: &Items) {
    assert!(items(store) == *expected, "items differ at transaction {:?}", store.last_seq());
    let mut used: BTreeSet<u64> = (0..store.superblock.first_data_block()).collect();
    for chunk in store.chunks.borrow().entries() {
        let count = u64::from(chunk.nodes) * store.superblock.node_blocks();
        assert!((chunk.start..chunk.start + count).all(|block| used.insert(block)));
    }
    for value in expected.iter().filter(|(key, _)| key.kind == Kind::Extent).map(|(_, value)| value) {
        let (range, tag) = extent_of(value);
        assert!((range.start.0..range.end().0).all(|block| used.insert(block)), "{range:?} is used twice");
        let bytes = range.bytes(BLOCK);
        let buf = Rc::new(AlignedBuf::zeroed((bytes.end - bytes.start) as usize, 512));
        let read = store.bdev().read(bytes.start, IoBuffers::from_aligned(&buf));
        reactor.block_on(read).unwrap();
        assert_eq!(buf[..], filled(buf.len(), tag)[..], "content of {range:?}");
    }
    let free: BTreeSet<u64> = free_map_of(store).into_iter().flatten().collect();
    assert!(free.is_disjoint(&used));
    assert_eq!(free.len() + used.len(), store.superblock.block_count as usize);
    assert_eq!(store.free_blocks.get(), free.len() as u64);
}

fn free_map_of(store: &Store) -> Vec<std::ops::Range<u64>> {
    let groups = store.superblock.block_count.div_ceil(u64::from(store.superblock.group_blocks));
    let runs = |group| {
        let key = Key::group(group);
        let runs = |bits: Option<&[u8]>| {
            blocks::free_runs(&store.superblock, &store.chunks.borrow(), group, bits).unwrap()
        };
        settled(store, || store.get(&key, runs)).unwrap()
    };
    (0..groups).flat_map(runs).collect()
}

fn run(reactor: &Rc<Reactor>, mut workload: Workload, steps: usize) -> Workload {
    reactor.block_on(async move {
        for _ in 0..steps {
            workload.step().await;
        }
        workload
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_store_is_a_map_that_survives_reopening(seed in any::<u32>(), rounds in 1..5_usize, closed in any::<bool>()) {
        let (disk, reactor, mut store) = fresh(1);
        for round in 0..rounds {
            let workload = run(&reactor, Workload::new(&store, u64::from(seed) + round as u64), 150);
            check(&store, &reactor, &workload.model);
            let model = workload.model.clone();
            drop(workload);
            let last = store.clone();
            reactor.block_on(async move {
                if closed { last.close().await } else { last.sync(last.last_seq()).await }
            }).unwrap();
            drop(store);
            store = open(&disk, &reactor).unwrap();
            check(&store, &reactor, &model);
        }
    }
}

/// Cuts the power at every device operation of a workload, and again during the recovery that follows.
fn crash(seed: u64, latency: bool) {
    let (disk, reactor, store) = fresh(seed);
    let mut workload = Workload::new(&store, seed);
    if latency {
        disk.set_latency(&reactor, Duration::from_micros(1)..Duration::from_micros(300));
    }
    disk.record();
    let watched = disk.clone();
    let (history, promises) = reactor.block_on(async move {
        let mut promises = vec![(0, workload.store.last_seq().0)];
        for step in 0..260 {
            workload.step().await;
            if step % 7 == 6 {
                let seq = workload.store.last_seq();
                workload.store.sync(seq).await.unwrap();
                promises.push((watched.position(), seq.0));
            }
        }
        (workload.history, promises)
    });
    drop(store);
    let mut cuts = disk.take_history();
    let step = (cuts.last_point() / 160).max(1);
    for point in (0..=cuts.last_point()).step_by(step) {
        let promised = promises.iter().rev().find(|(at, _)| *at <= point).unwrap().1;
        let choice = match point % 5 {
            0 => CrashChoice::Nothing,
            1 => CrashChoice::Everything,
            _ => CrashChoice::Random { seed: point as u64 },
        };
        let found = SimDisk::from_image(cuts.state_at(point, choice), BLOCK, seed);
        found.record();
        check_recovered(&found, &history, promised, &format!("seed {seed}, point {point}"));
        let mut again = found.take_history();
        let point = again.last_point() * (point % 7) / 7;
        let twice = again.state_at(point, CrashChoice::Random { seed: point as u64 });
        let found = SimDisk::from_image(twice, BLOCK, seed);
        check_recovered(&found, &history, promised, &format!("seed {seed}, recovery cut at {point}"));
    }
}

fn check_recovered(disk: &Rc<SimDisk>, history: &BTreeMap<u64, Items>, promised: u64, what: &str) {
    let reactor = reactor();
    let store = open(disk, &reactor).unwrap_or_else(|error| panic!("{what}: {error}"));
    let last = store.last_seq().0;
    assert!(last >= promised, "{what}: transaction {promised} was promised, {last} is the last one");
    // Claims of chunks are transactions of their own and change no items.
    let expected = history.range(..=last).next_back().unwrap().1;
    check(&store, &reactor, expected);
}

#[test]
fn a_power_cut_leaves_what_was_promised_and_a_prefix_of_the_rest() {
    for seed in 1..=4 {
        crash(seed, false);
    }
}

#[test]
fn a_power_cut_while_operations_overlap_leaves_a_prefix_too() {
    for seed in 11..=14 {
        crash(seed, true);
    }
}

#[test]
fn a_full_device_refuses_data_but_can_be_emptied() {
    let (_disk, reactor, store) = fresh(3);
    let before = store.space().available;
    let mut workload = Workload::new(&store, 5);
    let mut workload = reactor.block_on(async move {
        loop {
            let (mut txn, mut after) = (Txn::new(Origin::default()), workload.model.clone());
            let Some(allocation) = workload.write_extent(&mut txn, &mut after).await else { break };
            if commit(&workload.store, &txn).await.is_err() {
                break;
            }
            allocation.committed();
            workload.model = after;
        }
        // Metadata goes on until it is refused, too.
        for owner in 100.. {
            let mut txn = Txn::new(Origin::default());
            let key = Key::new(owner, Kind::Dirent, 0);
            txn.put(key, &[7; 250]);
            match commit(&workload.store, &txn).await {
                Ok(_) => drop(workload.model.insert(key, vec![7; 250])),
                Err(error) => {
                    assert_eq!(error, FsError::NoSpace);
                    break;
                }
            }
        }
        workload
    });
    check(&store, &reactor, &workload.model);
    let inner = store.clone();
    let keys = std::mem::take(&mut workload.model);
    reactor.block_on(async move {
        for (key, value) in keys {
            let mut txn = Txn::new(Origin::default());
            txn.delete(key);
            if key.kind == Kind::Extent {
                txn.free(extent_of(&value).0);
            }
            commit(&inner, &txn).await.unwrap();
        }
        inner.checkpoint().await.unwrap();
    });
    check(&store, &reactor, &Items::new());
    assert!(store.space().available > before / 2);
}

#[test]
fn any_failed_write_or_flush_ends_in_a_read_only_store_and_loses_nothing_promised() {
    for nth in 0..60 {
        let (disk, reactor, store) = fresh(8);
        let mut workload = Workload::new(&store, 21);
        let kind = if nth % 3 == 0 { OpKind::Flush } else { OpKind::Write };
        disk.inject(Fault::nth(kind, nth / 2, Effect::Error { errno: 5 }));
        let (history, promised) = reactor.block_on(async move {
            let mut promised = workload.store.last_seq();
            for round in 0.. {
                let mut txn = Txn::new(Origin::default());
                let mut after = workload.model.clone();
                workload.change_items(&mut txn, &mut after);
                match commit(&workload.store, &txn).await {
                    Ok(seq) => {
                        workload.history.insert(seq.0, after.clone());
                        workload.model = after;
                    }
                    Err(_) => break,
                }
                if round % 3 == 2 {
                    let seq = workload.store.last_seq();
                    match workload.store.sync(seq).await {
                        Ok(()) => promised = seq,
                        Err(error) => {
                            assert!(matches!(error, FsError::Device(_)));
                            break;
                        }
                    }
                }
            }
            assert_eq!(workload.store.check_writable(), Err(FsError::ReadOnly));
            (workload.history, promised)
        });
        let writes = disk.writes();
        let inner = store.clone();
        assert!(reactor.block_on(async move { inner.close().await }).is_err());
        assert_eq!(disk.writes(), writes, "nothing is written after a failure");
        drop(store);
        disk.clear_faults();
        // The failed write may have hit a superblock; then an administrator has to agree.
        let options = OpenOptions { accept_older_superblock: true, ..OpenOptions::default() };
        let (bdev, inner) = (disk.clone(), reactor.clone());
        let store = reactor.block_on(async move { Store::open(bdev, inner, options).await }).unwrap();
        let last = store.last_seq().0;
        assert!(last >= promised.0);
        check(&store, &reactor, history.range(..=last).next_back().unwrap().1);
    }
}

#[test]
fn transactions_become_durable_by_themselves_after_a_while() {
    let (disk, reactor, store) = fresh(2);
    let mut txn = Txn::new(Origin::default());
    let key = Key::new(5, Kind::Dirent, 1);
    txn.put(key, b"value");
    store.commit(&txn).unwrap();
    let found = |disk: &SimDisk| {
        let reactor = self::reactor();
        let store = open(&disk.crash(CrashChoice::Nothing), &reactor).unwrap();
        items(&store).contains_key(&key)
    };
    assert!(!found(&disk));
    let sleep = reactor.sleep(COMMIT_INTERVAL * 2);
    reactor.block_on(sleep);
    assert!(found(&disk));
}

#[test]
fn concurrent_syncs_share_a_commit() {
    let (disk, reactor, store) = fresh(2);
    disk.set_latency(&reactor, Duration::from_millis(1)..Duration::from_millis(2));
    let before = disk.writes();
    let handles: Vec<_> = (0..20)
        .map(|owner| {
            let store = store.clone();
            reactor.spawn(async move {
                let mut txn = Txn::new(Origin::default());
                txn.put(Key::new(1 + owner, Kind::Dirent, 0), b"x");
                let seq = store.commit(&txn).unwrap();
                store.sync(seq).await.unwrap();
            })
        })
        .collect();
    reactor.block_on(async move { reactor::sync::join_all(handles).await });
    // Two rounds at most: the first one takes what was there when it began.
    assert!(disk.writes() - before <= 4, "{} operations", disk.writes() - before);
    assert_eq!(store.durable.get(), store.last_seq());
}

#[test]
fn a_sync_needs_no_flush_for_what_a_checkpoint_has_flushed() {
    let (disk, reactor, store) = fresh(2);
    let flushes =
        |disk: &SimDisk| disk.take_trace().iter().filter(|asked| asked.kind == OpKind::Flush).count();
    let sync = |stamp| {
        let inner = store.clone();
        reactor.block_on(async move { inner.sync_data(inner.last_seq(), stamp).await }).unwrap();
    };
    let write = || {
        let token = store.begin_write();
        let block = IoBuffers::from_aligned(&filled(BLOCK as usize, 1));
        let last = DEVICE - u64::from(BLOCK);
        reactor.block_on(disk.write(last, block, WriteFlags::NONE)).unwrap();
        token.end()
    };
    for (checkpoints, expected) in [(false, 1), (true, 0)] {
        let stamp = write();
        if checkpoints {
            let inner = store.clone();
            reactor.block_on(async move { inner.checkpoint().await }).unwrap();
        }
        disk.trace();
        sync(stamp);
        assert_eq!(flushes(&disk), expected, "behind a checkpoint: {checkpoints}");
    }
}

#[test]
fn a_new_journal_has_storage_behind_it_where_that_is_found_late() {
    let disk = SimDisk::new(DEVICE, BLOCK, 1);
    disk.trace();
    make(&disk, &reactor());
    let superblock = geometry_of(&disk);
    let unit = u64::from(superblock.block_size);
    let journal =
        superblock.journal_start * unit..superblock.journal_start * unit + superblock.journal_bytes();
    let written = disk.take_trace().into_iter().filter(|asked| {
        asked.kind == OpKind::Write && journal.start <= asked.range.start && asked.range.end <= journal.end
    });
    assert_eq!(
        written.map(|asked| asked.range.end - asked.range.start).sum::<u64>(),
        superblock.journal_bytes()
    );
}

/// What the superblock of a sound file system says.
fn geometry_of(disk: &Rc<SimDisk>) -> Superblock {
    let (bdev, reactor): (Rc<dyn Bdev>, _) = (disk.clone(), reactor());
    let copies = reactor.block_on(async move { read_superblocks(&bdev).await }).unwrap();
    choose_superblock(copies, false).unwrap()
}

#[test]
fn a_readonly_store_writes_nothing_and_shows_the_journal() {
    let (disk, reactor, store) = fresh(2);
    let workload = run(&reactor, Workload::new(&store, 3), 40);
    let inner = store.clone();
    reactor.block_on(async move { inner.sync(inner.last_seq()).await }).unwrap();
    let crashed = disk.crash(CrashChoice::Nothing);
    let options = OpenOptions { readonly: true, ..OpenOptions::default() };
    let (bdev, inner) = (crashed.clone(), reactor.clone());
    let readonly = reactor.block_on(async move { Store::open(bdev, inner, options).await }).unwrap();
    check(&readonly, &reactor, &workload.model);
    assert_eq!(readonly.commit(&Txn::new(Origin::default())), Err(FsError::ReadOnly.into()));
    let inner = readonly.clone();
    reactor.block_on(async move { inner.close().await }).unwrap();
    assert_eq!(crashed.writes(), 0);
}

/// The number of blocks in the journal, and the position behind the last one.
fn journal_of(disk: &Rc<SimDisk>) -> (u64, u64) {
    let (bdev, superblock): (Rc<dyn Bdev>, _) = (disk.clone(), geometry_of(disk));
    reactor().block_on(async move {
        let (mut reader, mut end, mut blocks) = (JournalReader::new(&bdev, &superblock), superblock.tail, 0);
        while let Some((_, next)) = reader.next(end).await.unwrap() {
            (end, blocks) = (next, blocks + 1);
        }
        (blocks, end.pos)
    })
}

/// A disk tries for seconds to read a bad sector.
#[test]
fn a_bad_sector_behind_the_journal_is_met_once() {
    let (disk, reactor, store) = fresh(2);
    let mut workload = Workload::new(&store, 3);
    for _ in 0..20 {
        workload = run(&reactor, workload, 1);
        let inner = store.clone();
        reactor.block_on(async move { inner.sync(inner.last_seq()).await }).unwrap();
    }
    let crashed = disk.crash(CrashChoice::Nothing);
    let (blocks, end) = journal_of(&crashed);
    assert!(blocks > 8, "{blocks}");
    // Not the next block, which has to be read.
    let at = end + 2 * u64::from(BLOCK);
    let superblock = geometry_of(&crashed);
    assert!(at + u64::from(BLOCK) <= superblock.journal_bytes());
    let bad = superblock.journal_start * u64::from(BLOCK) + at;
    crashed.fail_reads(bad..bad + u64::from(BLOCK));
    crashed.trace();
    let opened = open(&crashed, &reactor).unwrap();
    let trace = crashed.take_trace();
    let met = trace.iter().filter(|asked| asked.kind == OpKind::Read && asked.range.contains(&bad));
    assert_eq!(met.count(), 1, "reading ahead meets it, and no more");
    check(&opened, &reactor, &workload.model);
}

#[test]
fn numbers_are_never_given_twice() {
    let (disk, reactor, store) = fresh(2);
    let given = (0..100).map(|_| store.next_id()).max().unwrap();
    let store = open(&disk.crash(CrashChoice::Nothing), &reactor).unwrap();
    assert!(store.next_id() > given);
}

#[test]
fn damage_is_found_and_never_a_panic() {
    let (disk, reactor, store) = fresh(2);
    let workload = run(&reactor, Workload::new(&store, 4), 200);
    let inner = store.clone();
    reactor.block_on(async move { inner.close().await }).unwrap();
    drop(store);
    let image = disk.snapshot();
    let mut rng = SmallRng::seed_from_u64(7);
    for _ in 0..400 {
        let damaged = SimDisk::from_image(image.clone(), BLOCK, 1);
        let at = rng.random_range(4096..DEVICE - 64);
        damaged.poke(at, &[rng.random(); 33]);
        let reactor = self::reactor();
        if let Ok(found) = open(&damaged, &reactor).map(|store| try_items(&store)) {
            // The damage hit something unused, or file data; or a node, which is noticed when it is read.
            assert!(found.is_err() || found == Ok(workload.model.clone()));
        }
    }
}

#[test]
fn wrong_devices_are_told_apart() {
    let reactor = reactor();
    let empty = SimDisk::new(DEVICE, BLOCK, 1);
    assert_eq!(open(&empty, &reactor).err(), Some(OpenError::NotAFileSystem));
    make(&empty, &reactor);
    empty.poke(4100, &[1; 40]);
    assert!(matches!(open(&empty, &reactor), Err(OpenError::DamagedSuperblock { .. })));
    let small = SimDisk::new(64 * 1024, BLOCK, 1);
    let bdev: Rc<dyn Bdev> = small;
    let made = reactor.block_on(async move { mkfs(&bdev, &tiny()).await });
    assert!(matches!(made, Err(MkfsError::Geometry(_))));
}

#[test]
fn an_extent_in_a_metadata_chunk_is_none() {
    let (_disk, reactor, store) = fresh(1);
    let (at, mut txn) = (store.clone(), Txn::new(Origin::default()));
    txn.put(Key::new(1, Kind::Inode, 0), b"makes a node");
    reactor.block_on(async move { commit(&at, &txn).await }).unwrap();
    let chunk = store.chunks.borrow().entries().next().unwrap();
    let extent = |start: u64| {
        let range = BlockRange::new(BlockAddr(start), 1);
        store.extent(0, &ExtentItem::plain(range, ExtentFlags::empty()).encode())
    };
    assert_eq!(extent(chunk.start), None);
    let allocation = settled(&store, || store.allocate(&mut store.reserve(of(1))?, None, 1)).unwrap();
    assert!(extent(allocation.range().start.0).is_some());
    assert_eq!(extent(store.superblock.block_count), None);
}
