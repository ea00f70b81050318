//! Operations that keep many nodes in memory at the same time: together they keep to their share of the cache,
//! and none of them waits for ever.

use super::*;

/// Owners with one item each; two of them seldom share a leaf.
const OWNERS: u64 = 1600;

fn key(owner: u64) -> Key {
    Key::new(1 + owner % OWNERS, Kind::Dirent, 0)
}

/// A store with many more nodes than its cache holds, on a device that takes time.
fn large() -> (Rc<Reactor>, Rc<Store>) {
    let disk = SimDisk::new(8 << 20, BLOCK, 1);
    let reactor = reactor();
    make(&disk, &reactor);
    let store = open(&disk, &reactor).unwrap();
    let inner = store.clone();
    reactor.block_on(async move {
        for owner in 0..OWNERS {
            let mut txn = Txn::new(Origin::default());
            txn.put(key(owner), &[owner as u8; 250]);
            commit(&inner, &txn).await.unwrap();
        }
        inner.close().await.unwrap();
    });
    drop(store);
    let store = open(&disk, &reactor).unwrap();
    store.set_cache_bytes(0);
    disk.set_latency(&reactor, Duration::from_micros(50)..Duration::from_micros(500));
    assert!(store.tree.borrow().live() > 2 * CACHE_NODES_MIN);
    (reactor, store)
}

fn pinned(store: &Store) -> usize {
    store.tree.borrow().pinned()
}

/// What an operation misses that needs so many leaves at the same time.
fn missing(store: &Store, leaves: &std::ops::Range<u64>) -> Option<Wait> {
    leaves.clone().find_map(|leaf| match store.get(&key(leaf * 5), |item| assert!(item.is_some())) {
        Ok(()) => None,
        Err(Stop::Wait(wait)) => Some(wait),
        Err(Stop::Fail(error)) => panic!("{error}"),
    })
}

/// Such an operation; gives what keeps its nodes.
async fn hold(store: Rc<Store>, leaves: std::ops::Range<u64>) -> Pins {
    let mut pins = Pins::default();
    while let Some(wait) = missing(&store, &leaves) {
        store.wait_pinned(&wait, &mut pins).await.unwrap();
    }
    pins
}

#[test]
fn many_operations_that_need_more_than_the_cache_holds_all_end() {
    const OPERATIONS: u64 = 20;
    const LEAVES: u64 = 40;
    let (reactor, store) = large();
    let highest = Rc::new(Cell::new(0));
    let operations = (0..OPERATIONS).map(|number| {
        let (store, highest) = (store.clone(), highest.clone());
        let leaves = number * 13..number * 13 + LEAVES;
        async move {
            let mut pins = Pins::default();
            while let Some(wait) = missing(&store, &leaves) {
                store.wait_pinned(&wait, &mut pins).await.unwrap();
                highest.set(highest.get().max(pinned(&store)));
            }
        }
    });
    reactor.block_on(join(operations.collect()));
    // One of them may exceed the share: by its leaves and the nodes above them.
    let most = store.pinned_max.get() + 2 * LEAVES as usize;
    assert!(highest.get() > store.pinned_max.get() / 2, "only {} nodes were pinned", highest.get());
    assert!(highest.get() <= most, "{} nodes were pinned, expected {most} at most", highest.get());
    assert_eq!(pinned(&store), 0);
}

async fn join<F: Future<Output = ()>>(operations: Vec<F>) {
    reactor::sync::join_all(operations).await;
}

#[test]
fn who_would_exceed_the_share_waits_but_for_one_at_a_time() {
    let (reactor, store) = large();
    let share = store.pinned_max.get() as u64;
    // The first operation takes what there is, and one that needs more is let in.
    let first = reactor.block_on(hold(store.clone(), 0..share * 3 / 4));
    let second = reactor.block_on(hold(store.clone(), 100..100 + share));
    assert!(pinned(&store) as u64 > share);
    let later = |leaves| {
        let store = store.clone();
        reactor.spawn(async move { drop(hold(store, leaves).await) })
    };
    let (third, fourth) = (later(250..260), later(270..280));
    let settle = || reactor.block_on(reactor.sleep(Duration::from_secs(1)));
    settle();
    assert!(!third.is_finished() && !fourth.is_finished());
    drop(second);
    settle();
    assert!(third.is_finished() && fourth.is_finished());
    drop(first);
    assert_eq!(pinned(&store), 0);
}
