//! The tree against a plain map, with all nodes in memory and with hardly any.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;
use crate::ondisk::node::Expected;

const NODE_SIZE: usize = 1024;
const UUID: [u8; 16] = [5; 16];

/// A tree and the device below it.
struct Bench {
    tree: Tree,
    plan: Plan,
    capacity: usize,
    pages: HashMap<u64, Vec<u8>>,
    next_addr: u64,
    generation: u64,
    reads: usize,
}

impl Bench {
    fn new(capacity: usize) -> Self {
        let tree = Tree::new(NODE_SIZE, capacity);
        let (plan, pages) = (Plan::default(), HashMap::new());
        Self { tree, plan, capacity, pages, next_addr: 1, generation: 0, reads: 0 }
    }

    /// Evicts what exceeds the capacity: an operation has ended.
    fn trim(&mut self) {
        self.tree.set_capacity(self.capacity);
    }

    /// Loads with as much room as that takes, as operations do that pin their nodes.
    fn load(&mut self, wanted: &[NodeRef]) {
        self.tree.nodes.set_capacity(usize::MAX);
        for node in wanted {
            if let Seek::Absent(place) = self.tree.seek(node) {
                let expected = Expected { ptr: place.ptr, level: place.level, uuid: UUID };
                let node = Node::decode(&self.pages[&place.ptr.addr], &expected).unwrap();
                self.tree.adopt(&place, node);
                self.reads += 1;
            }
        }
    }

    /// Plans changes of keys, and how many rounds of loading that took.
    fn plan(&mut self, keys: &[(Key, bool)]) -> usize {
        let mut pinned = Vec::new();
        for rounds in 0.. {
            self.tree.begin_plan(&mut self.plan);
            keys.iter().for_each(|(key, goes)| self.tree.plan(&mut self.plan, key, *goes));
            let planned = self.tree.end_plan(&mut self.plan);
            let Err(missing) = planned else {
                pinned.iter().for_each(|(slot, serial)| self.tree.unpin(*slot, *serial));
                return rounds;
            };
            self.load(&missing);
            for node in &missing {
                let Seek::Resident(slot) = self.tree.seek(node) else { panic!("{node:?} was loaded") };
                pinned.push((slot, self.tree.pin(slot)));
            }
        }
        unreachable!()
    }

    fn put(&mut self, key: &Key, value: &[u8]) {
        self.plan(&[(*key, false)]);
        self.tree.put(&mut self.plan, key, value).unwrap();
    }

    fn delete(&mut self, key: &Key) -> bool {
        self.plan(&[(*key, true)]);
        self.tree.delete(&mut self.plan, key).unwrap()
    }

    fn checkpoint(&mut self) {
        let (generation, first) = (self.generation + 1, self.next_addr);
        self.generation = generation;
        let mut next = first;
        let snapshot = self.tree.snapshot(generation, || {
            next += 1;
            BlockAddr(next - 1)
        });
        self.next_addr = next;
        assert_eq!(self.tree.dirty(), 0);
        let mut pointers: Vec<NodePtr> = Vec::new();
        for node in &snapshot.nodes {
            let place = |place: &ChildPlace| match place {
                ChildPlace::Fresh(index) => pointers[*index],
                ChildPlace::Durable(ptr) => *ptr,
            };
            let children: Vec<NodePtr> = node.children.iter().map(place).collect();
            let mut ptr = NodePtr { addr: node.addr.0, generation, crc: 0 };
            let mut page = vec![0; NODE_SIZE];
            ptr.crc = node.node.encode(ptr, UUID, &children, &mut page);
            self.pages.insert(ptr.addr, page);
            pointers.push(ptr);
        }
        for addr in &snapshot.dropped {
            assert!(self.pages.remove(&addr.0).is_some(), "{addr:?} was dropped twice");
        }
        self.tree.settle(snapshot, &pointers);
        assert_eq!(self.pages.len(), self.tree.live(), "places and nodes differ");
    }

    fn get(&mut self, key: &Key) -> Option<Vec<u8>> {
        self.trim();
        loop {
            match self.tree.get(key) {
                Ok(value) => return value.map(<[u8]>::to_vec),
                Err(missing) => self.load(&[missing]),
            }
        }
    }

    fn last_at_or_before(&mut self, key: &Key) -> Option<(Key, Vec<u8>)> {
        self.trim();
        loop {
            match self.tree.last_at_or_before(key, &KEY_MIN) {
                Ok(found) => return found.map(|(key, value)| (key, value.to_vec())),
                Err(missing) => self.load(&[missing]),
            }
        }
    }

    /// All items from `from` on, in pieces as misses cut them.
    fn items(&mut self, from: Key) -> Vec<(Key, Vec<u8>)> {
        let mut items: Vec<(Key, Vec<u8>)> = Vec::new();
        let end = Key::new(u64::MAX, Kind::Checksum, u64::MAX);
        let mut from = from;
        loop {
            self.trim();
            let start = from;
            let scanned = self.tree.scan(&start, &end, &mut |key, value| {
                items.push((*key, value.to_vec()));
                from = Key { offset: key.offset + 1, ..*key };
                ControlFlow::Continue(())
            });
            let mut missing = match scanned {
                Ok(_) => return items,
                Err(missing) => missing,
            };
            // One operation: it keeps what it loaded until it gives something.
            loop {
                self.load(&missing);
                let mut next = None;
                let scanned = self.tree.scan(&from, &end, &mut |key, value| {
                    items.push((*key, value.to_vec()));
                    next = Some(Key { offset: key.offset + 1, ..*key });
                    ControlFlow::Continue(())
                });
                if let Some(next) = next {
                    from = next;
                    break;
                }
                match scanned {
                    Ok(_) => return items,
                    Err(more) => missing = more,
                }
            }
        }
    }
}

fn key() -> impl Strategy<Value = Key> {
    (0..40_u64, prop_oneof![Just(Kind::Group), Just(Kind::Dirent), Just(Kind::Extent)], 0..30_u64)
        .prop_map(|(owner, kind, offset)| Key::new(owner, kind, offset))
}

fn change() -> impl Strategy<Value = (Key, Option<Vec<u8>>)> {
    (
        key(),
        prop_oneof![
            3 => prop::collection::vec(any::<u8>(), 0..=296).prop_map(Some),
            2 => Just(None),
        ],
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn a_tree_is_an_ordered_map(
        changes in prop::collection::vec(change(), 1..600),
        probes in prop::collection::vec(key(), 20),
        capacity in prop_oneof![Just(usize::MAX), 1..12_usize],
    ) {
        let mut bench = Bench::new(capacity);
        let mut model = BTreeMap::new();
        for (number, (key, value)) in changes.into_iter().enumerate() {
            match value {
                Some(value) => {
                    bench.put(&key, &value);
                    model.insert(key, value);
                }
                None => prop_assert_eq!(bench.delete(&key), model.remove(&key).is_some()),
            }
            if number % 20 == 19 {
                bench.checkpoint();
            }
            bench.trim();
            let stays = bench.tree.dirty() + bench.tree.height();
            prop_assert!(bench.tree.pages() <= capacity.max(stays), "{} pages", bench.tree.pages());
        }
        let expected: Vec<_> = model.iter().map(|(key, value)| (*key, value.clone())).collect();
        prop_assert_eq!(bench.items(KEY_MIN), expected);
        for probe in probes {
            prop_assert_eq!(bench.get(&probe), model.get(&probe).cloned());
            let before = model.range(..=probe).next_back().map(|(key, value)| (*key, value.clone()));
            prop_assert_eq!(bench.last_at_or_before(&probe), before);
            let first = model.range(probe..).next().map(|(key, value)| (*key, value.clone()));
            prop_assert_eq!(bench.items(probe).first().cloned(), first);
        }
        let keys: Vec<Key> = model.keys().copied().collect();
        for key in keys {
            prop_assert!(bench.delete(&key));
            bench.trim();
        }
        prop_assert_eq!((bench.tree.live(), bench.tree.height()), (1, 1));
    }
}

#[test]
fn a_snapshot_does_not_see_later_changes() {
    let mut bench = Bench::new(usize::MAX);
    bench.put(&KEY_MIN, b"old");
    let snapshot = bench.tree.snapshot(1, || BlockAddr(1));
    bench.put(&KEY_MIN, b"new");
    assert_eq!(snapshot.nodes[0].node.value(0), b"old");
    assert_eq!(bench.get(&KEY_MIN).as_deref(), Some(&b"new"[..]));
    assert_eq!((bench.tree.dirty(), bench.tree.pages()), (1, 2));
    bench.tree.settle(snapshot, &[NodePtr { addr: 1, generation: 1, crc: 0 }]);
    assert_eq!(bench.tree.pages(), 1);
}

/// A tree with `count` items of a quarter node each, on the device.
fn filled(count: u64, capacity: usize) -> Bench {
    let mut bench = Bench::new(usize::MAX);
    for offset in 0..count {
        bench.put(&Key::new(1, Kind::Dirent, offset), &[7; 200]);
    }
    bench.checkpoint();
    bench.capacity = capacity;
    bench.trim();
    bench
}

#[test]
fn pinned_nodes_stay() {
    let mut bench = filled(400, 8);
    let key = |offset| Key::new(1, Kind::Dirent, offset);
    let missing = bench.tree.get(&key(200)).unwrap_err();
    bench.get(&key(200));
    let Seek::Resident(slot) = bench.tree.seek(&NodeRef { level: 0, ..missing }) else { panic!("not there") };
    let serial = bench.tree.pin(slot);
    assert_eq!(bench.tree.pinned(), 1);
    for offset in 0..400 {
        assert!(bench.get(&key(offset)).is_some());
    }
    assert!(bench.tree.get(&key(200)).is_ok());
    bench.tree.unpin(slot, serial);
    for offset in 0..190 {
        assert!(bench.get(&key(offset)).is_some());
    }
    assert!(bench.tree.get(&key(200)).is_err());
    assert_eq!(bench.tree.pinned(), 0);
}

#[test]
fn what_is_used_stays_while_others_pass() {
    let mut bench = filled(400, 24);
    let key = |offset| Key::new(1, Kind::Dirent, offset);
    bench.get(&key(200));
    let before = bench.reads;
    for offset in 0..100 {
        assert!(bench.get(&key(offset)).is_some());
        assert!(bench.tree.get(&key(200)).is_ok(), "evicted at {offset}");
    }
    assert!(bench.reads > before + 20);
}

#[test]
fn a_plan_names_all_that_is_missing_and_changes_nothing() {
    let mut bench = filled(400, 4);
    let keys = [10, 150, 300].map(|offset| Key::new(1, Kind::Dirent, offset));
    let rounds = bench.plan(&keys.map(|key| (key, true)));
    assert_eq!(bench.tree.dirty(), 0);
    assert!(rounds <= bench.tree.height(), "{rounds} rounds");
    for key in keys {
        assert!(bench.tree.delete(&mut bench.plan, &key).unwrap());
    }
}
