//! Metadata chunks: how much of the device they keep once the tree is small again.

use super::*;

/// A journal that no test here fills: what begins a checkpoint is not that.
const JOURNAL: u64 = 8 << 20;

fn roomy(seed: u64) -> (Rc<Reactor>, Rc<Store>) {
    let disk = SimDisk::new(32 << 20, BLOCK, seed);
    let reactor = reactor();
    let bdev: Rc<dyn Bdev> = disk.clone();
    let options = MkfsOptions { journal_size: JOURNAL, ..tiny() };
    reactor.block_on(async move { mkfs(&bdev, &options).await }).unwrap();
    let inner = reactor.clone();
    let store = reactor.block_on(async move { Store::open(disk, inner, OpenOptions::default()).await });
    (reactor, store.unwrap())
}

/// Puts or deletes the items of owners 100 to 100 + `count`, and syncs.
async fn change_many(store: &Rc<Store>, count: u64, deletes: bool) {
    for owner in 100..100 + count {
        let mut txn = Txn::new(Origin::default());
        let key = Key::new(owner, Kind::Dirent, 0);
        match deletes {
            true => txn.delete(key),
            false => txn.put(key, &[7; 200]),
        }
        commit(store, &txn).await.unwrap();
    }
    store.sync(store.last_seq()).await.unwrap();
}

/// The space of deleted items is shown as free by the time that what they started has ended, though nothing forces a
/// checkpoint: the journal is large, and few nodes are dirty.
#[test]
fn deletions_give_back_the_space_of_metadata_without_anybody_asking() {
    let (reactor, store) = roomy(1);
    let before = store.space().free;
    let inner = store.clone();
    reactor.block_on(async move {
        for _ in 0..3 {
            change_many(&inner, 10_000, false).await;
            inner.checkpoint().await.unwrap();
            change_many(&inner, 10_000, true).await;
        }
        inner.checkpoints.idle().await;
        inner.sync(inner.last_seq()).await.unwrap();
    });
    let kept = before - store.space().free;
    // What the tree of an empty store needs is there from the start.
    let most = 3 * u64::from(CHUNK_NODES) * store.superblock().node_blocks();
    assert!(kept <= most, "metadata keeps {kept} blocks more than at first, {most} at most");
}

/// Giving space back takes few checkpoints, however much is deleted.
#[test]
fn deletions_of_very_much_start_few_checkpoints() {
    let (reactor, store) = roomy(2);
    let inner = store.clone();
    let checkpoints = reactor.block_on(async move {
        change_many(&inner, 20_000, false).await;
        inner.checkpoint().await.unwrap();
        let before = inner.generation.get();
        change_many(&inner, 20_000, true).await;
        inner.checkpoints.idle().await;
        inner.generation.get() - before
    });
    assert!(checkpoints <= 20, "{checkpoints} checkpoints");
}
