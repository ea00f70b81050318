//! A store without free space: whoever needs some waits as long as some is under way, and is refused when none is.

use super::*;

/// Blocks of an extent; long enough to be discarded.
const EXTENT: u64 = 2 * DISCARD_LEN_MIN / BLOCK as u64;

/// Extents and their keys.
type Extents = Vec<(Key, BlockRange)>;

/// A transaction that deletes an extent.
fn deletion(key: Key, range: BlockRange) -> Txn {
    let mut txn = Txn::new(Origin::default());
    txn.delete(key);
    txn.free(range);
    txn
}

/// Takes a reserved extent into the tree.
async fn add_extent(store: &Rc<Store>, key: Key, mut reservation: Reservation) -> BlockRange {
    let blocks = reservation.blocks() as u32;
    let allocation = loop {
        match store.allocate(&mut reservation, None, blocks) {
            Ok(allocation) => break allocation,
            Err(Stop::Fail(error)) => panic!("allocate: {error}"),
            Err(Stop::Wait(wait)) => drop(store.wait(&wait).await.unwrap()),
        }
    };
    let range = allocation.range();
    let mut txn = Txn::new(Origin::default());
    txn.alloc(range);
    txn.put(key, &extent_value(range, 0));
    commit(store, &txn).await.unwrap();
    allocation.committed();
    range
}

/// A store in which no extent finds room any more, and those in it that are as long as wanted; everything is durable.
fn full(seed: u64) -> (Rc<SimDisk>, Rc<Reactor>, Rc<Store>, Extents) {
    let (disk, reactor, store) = fresh(seed);
    let inner = store.clone();
    let extents = reactor.block_on(async move {
        let mut extents = Extents::new();
        for number in 0.. {
            match reserve(&inner, EXTENT).await {
                Ok(reservation) => {
                    let key = Key::new(EXTENT_OWNER + number, Kind::Extent, 0);
                    extents.push((key, add_extent(&inner, key, reservation).await));
                }
                Err(error) => {
                    assert_eq!(error, FsError::NoSpace);
                    break;
                }
            }
        }
        inner.sync(inner.last_seq()).await.unwrap();
        // The end of a group is shorter.
        extents.retain(|(_, range)| u64::from(range.count) == EXTENT);
        extents
    });
    assert!(extents.len() > 3);
    (disk, reactor, store, extents)
}

/// Whether a reservation would have to wait for space.
fn waits_for_space(store: &Rc<Store>) -> bool {
    matches!(store.reserve(of(EXTENT)), Err(Stop::Wait(Wait::Space)))
}

#[test]
fn space_that_a_commit_frees_is_waited_for() {
    let (_disk, reactor, store, extents) = full(1);
    reactor.block_on(async move {
        let [(key, range), (other, _), ..] = extents[..] else { unreachable!() };
        commit(&store, &deletion(key, range)).await.unwrap();
        assert!(waits_for_space(&store));
        let reservation = reserve(&store, EXTENT).await.unwrap();
        add_extent(&store, key, reservation).await;
        // All is used again.
        assert_eq!(reserve(&store, EXTENT).await.err(), Some(FsError::NoSpace));
        assert!(store.get(&other, |item| item.is_some()).unwrap());
    });
}

#[test]
fn space_that_is_being_discarded_is_waited_for() {
    let (disk, reactor, store, extents) = full(2);
    disk.set_latency(&reactor, Duration::from_millis(3)..Duration::from_millis(5));
    reactor.block_on(async move {
        let (key, range) = extents[1];
        let seq = commit(&store, &deletion(key, range)).await.unwrap();
        store.sync(seq).await.unwrap();
        assert!(store.discarding.is_running());
        assert!(waits_for_space(&store));
        drop(reserve(&store, EXTENT).await.unwrap());
    });
}

#[test]
fn space_that_an_operation_of_the_device_holds_back_is_waited_for() {
    let (_disk, reactor, store, extents) = full(3);
    let at = reactor.clone();
    reactor.block_on(async move {
        let (key, range) = extents[2];
        let reading = store.begin_io();
        commit(&store, &deletion(key, range)).await.unwrap();
        drop(at.spawn({
            let sleep = at.sleep(SPACE_PATIENCE / 2);
            async move {
                sleep.await;
                drop(reading);
            }
        }));
        drop(reserve(&store, EXTENT).await.unwrap());
    });
}

#[test]
fn space_that_an_operation_holds_back_for_too_long_counts_as_none() {
    let (_disk, reactor, store, extents) = full(4);
    reactor.block_on(async move {
        let (key, range) = extents[2];
        let reading = store.begin_io();
        commit(&store, &deletion(key, range)).await.unwrap();
        assert_eq!(reserve(&store, EXTENT).await.err(), Some(FsError::NoSpace));
        // At once, the second time: the wait was in vain.
        assert!(!waits_for_space(&store));
        drop(reading);
        drop(reserve(&store, EXTENT).await.unwrap());
    });
}

#[test]
fn space_that_nobody_frees_is_refused_after_a_commit_and_a_checkpoint() {
    let (_disk, reactor, store, _) = full(5);
    reactor.block_on(async move {
        let mut txn = Txn::new(Origin::default());
        txn.put(Key::new(5, Kind::Dirent, 0), b"not in a checkpoint yet");
        commit(&store, &txn).await.unwrap();
        assert!(matches!(store.reserve(of(EXTENT)), Err(Stop::Wait(Wait::Checkpoint))));
        assert_eq!(reserve(&store, EXTENT).await.err(), Some(FsError::NoSpace));
        assert_eq!(store.checkpointed.get(), store.seq.get());
    });
}

#[test]
fn metadata_finds_the_space_that_data_has_just_given_up() {
    let (_disk, reactor, store, extents) = full(6);
    reactor.block_on(async move {
        let mut owner = 100;
        let mut add = async || {
            let mut txn = Txn::new(Origin::default());
            txn.put(Key::new(owner, Kind::Dirent, 0), &[7; 250]);
            owner += 1;
            commit(&store, &txn).await
        };
        let refused = loop {
            if let Err(error) = add().await {
                break error;
            }
        };
        assert_eq!(refused, FsError::NoSpace);
        for (key, range) in extents {
            commit(&store, &deletion(key, range)).await.unwrap();
        }
        for _ in 0..100 {
            add().await.unwrap();
        }
    });
}
