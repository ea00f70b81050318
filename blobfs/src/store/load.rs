//! Nodes that are missing: read, checked, and kept in memory for the operation that asked.
//!
//! A node is believed only when its checksum, address, generation, UUID, level and keys are what the pointer
//! and the place that led to it promise, and when the chunk map calls its place used. Damage fails the
//! operations that need the node and nothing else.
//!
//! **Memory.** An operation collects its nodes in [`Pins`], over all its waits, so that it has them all
//! together in the end whatever others do meanwhile. Pinned nodes together keep to a quarter of the cache
//! (dirty nodes have another one, the copies of a checkpoint a third): who would exceed it waits until others
//! have ended. So that those who wait with pins cannot wait for each other, one operation at a time may take
//! as many as it needs.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use bdev::{AlignedBuf, Bdev, IoBuffers};
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use reactor::sync::{Notify, join_all};

use super::Store;
use super::checkpoint::buffer_align;
use super::chunks::Chunks;
use super::tree::{NodeRef, Seek, Tree, Vacancy};
use crate::error::{Corruption, FsError};
use crate::ondisk::node::{Expected, Node};
use crate::ondisk::superblock::Superblock;
use crate::units::BlockAddr;

/// Damaged nodes that are logged; whoever reads them again and again must not fill the log.
const DAMAGE_LOGGED_MAX: u32 = 32;

/// One pinned node.
struct Pin {
    store: Weak<Store>,
    slot: u32,
    serial: u64,
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.tree.borrow().unpin(self.slot, self.serial);
            store.loads.unpinned.notify_all();
        }
    }
}

/// The right to pin more than the others leave.
struct Permit(Weak<Store>);

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(store) = self.0.upgrade() {
            store.loads.permit_taken.set(false);
            store.loads.unpinned.notify_all();
        }
    }
}

/// Keeps what the waits of an operation brought into memory there until the operation ends.
#[derive(Default)]
pub struct Pins {
    nodes: Vec<Rc<Pin>>,
    permit: Option<Permit>,
}

impl Pins {
    /// Lets everything go: before a wait for anything but nodes, which may itself need nodes.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.permit = None;
    }
}

/// The result of a load: the node, unless it was not where it was looked for.
type Loaded = Result<Option<Rc<Pin>>, FsError>;

/// A load under way, shared by all who need the node.
#[derive(Default)]
struct Load {
    result: RefCell<Option<Loaded>>,
    ended: Notify,
}

/// The loads of a store.
#[derive(Default)]
pub(super) struct Loads {
    running: RefCell<HashMap<u64, Rc<Load>, RandomState>>,
    unpinned: Notify,
    permit_taken: Cell<bool>,
    logged: Cell<u32>,
}

/// Memory for one node.
fn page_buffer(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> Rc<AlignedBuf> {
    Rc::new(AlignedBuf::zeroed(superblock.node_size as usize, buffer_align(bdev)))
}

fn corrupt(superblock: &Superblock, addr: u64, problem: String) -> FsError {
    let offset = addr.saturating_mul(u64::from(superblock.block_size));
    Corruption { structure: "node", offset, problem }.into()
}

/// Fails for a place where no node can be.
pub(super) fn check_place(superblock: &Superblock, chunks: &Chunks, addr: BlockAddr) -> Result<(), FsError> {
    match chunks.is_used(addr) {
        true => Ok(()),
        false => {
            let problem = "lies in no metadata chunk, or the chunk map calls it free".to_owned();
            Err(corrupt(superblock, addr.0, problem))
        }
    }
}

/// Takes the page of a node into the tree, if it belongs there.
fn take(tree: &mut Tree, superblock: &Superblock, place: &Vacancy, page: &[u8]) -> Result<u32, FsError> {
    let problem = |what: String| corrupt(superblock, place.ptr.addr, what);
    let expected = Expected { ptr: place.ptr, level: place.level, uuid: superblock.uuid };
    let node = Node::decode(page, &expected).map_err(problem)?;
    let Some(last) = node.count().checked_sub(1) else {
        return Err(problem("is empty".to_owned()));
    };
    let (from, to) = place.bounds;
    if node.key(0) < from || to.is_some_and(|to| node.key(last) >= to) {
        return Err(problem("keys lie outside the range of its parent's slot".to_owned()));
    }
    Ok(tree.adopt(place, node))
}

/// Reads missing nodes into a tree that nobody else uses.
pub(super) async fn fetch(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    chunks: &Chunks,
    tree: &mut Tree,
    wanted: &[NodeRef],
) -> Result<(), FsError> {
    /// Nodes that are read at a time.
    const AT_A_TIME: usize = 64;
    for batch in wanted.chunks(AT_A_TIME) {
        let mut pages = Vec::with_capacity(batch.len());
        let mut reads = Vec::with_capacity(batch.len());
        for node in batch {
            check_place(superblock, chunks, node.addr)?;
            let page = page_buffer(bdev, superblock);
            let offset = node.addr.0 * u64::from(superblock.block_size);
            reads.push(bdev.read(offset, IoBuffers::from_aligned(&page)));
            pages.push(page);
        }
        join_all(reads).await.into_iter().collect::<Result<(), _>>()?;
        for (node, page) in batch.iter().zip(pages) {
            if let Seek::Absent(place) = tree.seek(node) {
                take(tree, superblock, &place, &page)?;
            }
        }
    }
    Ok(())
}

impl Store {
    /// Brings nodes into memory and keeps them there for whoever holds `pins`.
    pub(super) async fn load_nodes(
        self: &Rc<Self>,
        wanted: &[NodeRef],
        pins: &mut Pins,
    ) -> Result<(), FsError> {
        self.admit_pins(wanted.len(), pins).await;
        let loads = wanted.iter().map(|node| self.load_node(*node));
        for loaded in join_all(loads).await {
            pins.nodes.extend(loaded?);
        }
        Ok(())
    }

    /// Waits until so many more nodes may be pinned.
    async fn admit_pins(&self, count: usize, pins: &mut Pins) {
        loop {
            let pinned = self.tree.borrow().pinned() + self.loads.running.borrow().len();
            if pins.permit.is_some() || pinned + count <= self.pinned_max.get() {
                return;
            }
            if !self.loads.permit_taken.replace(true) {
                pins.permit = Some(Permit(self.this.clone()));
                return;
            }
            self.loads.unpinned.notified().await;
        }
    }

    fn pin(&self, slot: u32) -> Rc<Pin> {
        let serial = self.tree.borrow().pin(slot);
        Rc::new(Pin { store: self.this.clone(), slot, serial })
    }

    async fn load_node(self: &Rc<Self>, wanted: NodeRef) -> Loaded {
        let sought = self.tree.borrow().seek(&wanted);
        match sought {
            Seek::Resident(slot) => return Ok(Some(self.pin(slot))),
            Seek::Elsewhere => return Ok(None),
            Seek::Absent(_) => {}
        }
        let shared = self.loads.running.borrow().get(&wanted.addr.0).cloned();
        let load = match shared {
            Some(load) => load,
            None => match self.start_load(wanted)? {
                Started::Running(load) => load,
                Started::Ended(loaded) => return loaded,
            },
        };
        loop {
            if let Some(result) = &*load.result.borrow() {
                return result.clone();
            }
            load.ended.notified().await;
        }
    }

    /// Reads a node, in a task of its own when the device does not answer in the call: whoever waits for it
    /// may go away.
    fn start_load(self: &Rc<Self>, wanted: NodeRef) -> Result<Started, FsError> {
        self.noted(check_place(&self.superblock, &self.chunks.borrow(), wanted.addr))?;
        let page = page_buffer(&self.bdev, &self.superblock);
        let offset = wanted.addr.0 * u64::from(self.superblock.block_size);
        let read = self.bdev.read(offset, IoBuffers::from_aligned(&page));
        if let Some(result) = read.try_result() {
            return Ok(Started::Ended(self.finish_load(&wanted, result, &page)));
        }
        let load = Rc::new(Load::default());
        self.loads.running.borrow_mut().insert(wanted.addr.0, load.clone());
        let (store, shared) = (self.clone(), load.clone());
        drop(self.reactor.spawn(async move {
            let result = read.await;
            let loaded = store.finish_load(&wanted, result, &page);
            store.loads.running.borrow_mut().remove(&wanted.addr.0);
            *shared.result.borrow_mut() = Some(loaded);
            shared.ended.notify_all();
        }));
        Ok(Started::Running(load))
    }

    fn finish_load(&self, wanted: &NodeRef, result: Result<(), bdev::BdevError>, page: &[u8]) -> Loaded {
        result?;
        let slot = {
            let mut tree = self.tree.borrow_mut();
            match tree.seek(wanted) {
                Seek::Elsewhere => return Ok(None),
                Seek::Resident(slot) => slot,
                Seek::Absent(place) => self.noted(take(&mut tree, &self.superblock, &place, page))?,
            }
        };
        Ok(Some(self.pin(slot)))
    }

    /// Logs damage.
    fn noted<T>(&self, result: Result<T, FsError>) -> Result<T, FsError> {
        if let Err(error) = &result {
            let logged = self.loads.logged.get();
            if logged < DAMAGE_LOGGED_MAX {
                self.loads.logged.set(logged + 1);
                tracing::error!(%error, "metadata is damaged: what needs it fails");
            }
        }
        result
    }
}

/// A load that was begun.
enum Started {
    Running(Rc<Load>),
    Ended(Loaded),
}
