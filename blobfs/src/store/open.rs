//! Making and opening a file system.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bdev::{AlignedBuf, Bdev, BdevError, IoBuffers, Limits, WriteFlags};
use reactor::Reactor;
use reactor::sync::join_all;

use super::checkpoint::{Checkpoint, buffer_align, erase_superblocks, write_superblock};
use super::chunks::Chunks;
use super::image::{Image, choose_superblock, read_superblocks};
use super::journal::Journal;
use super::load::Loads;
use super::space::{Search, Space};
use super::tree::{Plan, Tree};
use super::{Rounds, Store, blocks, reserve_nodes};
use crate::error::FsError;
use crate::ondisk::Key;
use crate::ondisk::chunk_map::CHUNK_NODES;
use crate::ondisk::superblock::{
    INCOMPAT_DATA_SUMS, INCOMPAT_KNOWN, JournalTail, NodePtr, RESERVED_LEN, RO_COMPAT_KNOWN, Superblock,
    SuperblockError,
};
use crate::units::TxnSeq;

/// Numbers that a mount skips when the one before did not end cleanly: more than were ever handed out
/// without being in a durable transaction, because an open journal block holds far fewer.
pub(crate) const IDS_SKIPPED: u64 = 1 << 20;

/// What a new file system is like. Sizes of 0 are chosen by the device's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MkfsOptions {
    /// Bytes of the device to use; 0 for all of it.
    pub size: u64,
    /// Identity.
    pub uuid: [u8; 16],
    /// Key of the name hash; random, so that nobody can make names that collide.
    pub hash_key: [u64; 2],
    /// Name for people, at most 32 bytes.
    pub label: String,
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes of a tree node.
    pub node_size: u32,
    /// Blocks of an allocation group.
    pub group_blocks: u32,
    /// Bytes of the journal.
    pub journal_size: u64,
    /// Every block of file data gets a checksum.
    pub data_checksum: bool,
}

/// Bytes of a journal that are filled. Picked: four times the largest journal that is made unasked; what is behind them
/// is found when it is first used.
const FILLED_MAX: u64 = 256 << 20;

/// Length of a write of zeros, and how many are under way. Picked: long enough that a file system on the host finds few
/// extents for all of them.
const ZEROS_LEN: u64 = 1 << 20;
const ZEROS_AT_A_TIME: usize = 4;

impl Default for MkfsOptions {
    fn default() -> Self {
        let (first, second) = uuid::Uuid::new_v4().as_u64_pair();
        Self {
            size: 0,
            uuid: uuid::Uuid::new_v4().into_bytes(),
            hash_key: [first, second],
            label: String::new(),
            block_size: 4096,
            node_size: 0,
            group_blocks: 0,
            journal_size: 0,
            data_checksum: false,
        }
    }
}

impl MkfsOptions {
    /// The defaults for a device: blocks as large as its own, but not smaller than usual.
    pub fn for_device(limits: &Limits) -> Self {
        let usual = Self::default();
        Self { block_size: limits.block_size.max(usual.block_size), ..usual }
    }
}

/// Why no file system can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MkfsError {
    /// Sizes that contradict each other or the device.
    #[error("{0}")]
    Geometry(&'static str),
    /// Metadata would leave no room for data.
    #[error("the device is too small")]
    TooSmall,
    /// The label does not fit.
    #[error("the label is longer than 32 bytes")]
    LabelTooLong,
    /// The device failed.
    #[error(transparent)]
    Device(#[from] BdevError),
}

/// How a file system is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    /// Write nothing at all, not even what recovery would write.
    pub readonly: bool,
    /// Take the undamaged copy of the superblock although the other one is damaged and may have been the
    /// newer one. For recovery by an administrator only: what the newer one made durable may be lost.
    pub accept_older_superblock: bool,
    /// Bytes of changed nodes at which changes wait for a checkpoint; a quarter of the cache at most.
    pub dirty_bytes_max: usize,
    /// Memory for tree nodes; see [`Store::set_cache_bytes`].
    pub cache_bytes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            readonly: false,
            accept_older_superblock: false,
            dirty_bytes_max: 32 << 20,
            cache_bytes: 64 << 20,
        }
    }
}

/// Why a file system cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Neither copy of the superblock is there.
    #[error("not a blobfs file system")]
    NotAFileSystem,
    /// Neither copy can be used.
    #[error("superblock: {error}")]
    BadSuperblock {
        /// What is wrong with the first one.
        #[source]
        error: SuperblockError,
    },
    /// One copy is damaged, and it may have been the newer one.
    #[error("one copy of the superblock is damaged: {error}")]
    DamagedSuperblock {
        /// What is wrong with it.
        #[source]
        error: SuperblockError,
    },
    /// The copies belong to different file systems.
    #[error("the copies of the superblock belong to different file systems")]
    MixedSuperblocks,
    /// Features of a later version.
    #[error("unknown incompatible features {features:#x}")]
    Incompatible {
        /// Their bits.
        features: u64,
    },
    /// Features of a later version that allow reading.
    #[error("unknown features {features:#x} allow reading only")]
    ReadOnlyFeatures {
        /// Their bits.
        features: u64,
    },
    /// The device is smaller than the file system.
    #[error("the device has {device} bytes, the file system {file_system}")]
    Truncated {
        /// Bytes of the device.
        device: u64,
        /// Bytes of the file system.
        file_system: u64,
    },
    /// The device's blocks are larger than the file system's.
    #[error("the device's blocks of {device} bytes are larger than the file system's of {file_system}")]
    BlockSize {
        /// Bytes of the device's blocks.
        device: u32,
        /// Bytes of the file system's blocks.
        file_system: u32,
    },
    /// Reading or recovering failed.
    #[error(transparent)]
    Failed(#[from] FsError),
}

impl From<BdevError> for OpenError {
    fn from(error: BdevError) -> Self {
        Self::Failed(error.into())
    }
}

/// Picks what the options leave open. Small devices get small nodes, so that metadata leaves room for data.
fn geometry(size: u64, device_block: u32, options: &MkfsOptions) -> Result<Superblock, MkfsError> {
    let block_size = options.block_size;
    if !block_size.is_power_of_two() || block_size < device_block {
        return Err(MkfsError::Geometry("a block must be a power of two and no smaller than the device's"));
    }
    let small = size < 64 << 20;
    let node_size = match options.node_size {
        0 => block_size.max(if small { 4096 } else { 16_384 }),
        size => size,
    };
    let journal_size = match options.journal_size {
        0 => (size / 16).clamp(256 << 10, 64 << 20),
        size => size,
    };
    let mut label = [0; 32];
    let text = options.label.as_bytes();
    label.get_mut(..text.len()).ok_or(MkfsError::LabelTooLong)?.copy_from_slice(text);
    let block = u64::from(block_size);
    if RESERVED_LEN.checked_add(journal_size).is_none_or(|end| end >= size) {
        return Err(MkfsError::Geometry("the device is too small"));
    }
    let mut superblock = Superblock {
        compat: 0,
        ro_compat: 0,
        incompat: if options.data_checksum { INCOMPAT_DATA_SUMS } else { 0 },
        uuid: options.uuid,
        label,
        block_size,
        node_size,
        group_blocks: options.group_blocks,
        block_count: size / block,
        journal_start: RESERVED_LEN.div_ceil(block),
        journal_blocks: journal_size / block,
        hash_key: options.hash_key,
        generation: 1,
        epoch: 0,
        clean: true,
        root_level: 0,
        root: NodePtr::default(),
        chunk_map: NodePtr::default(),
        tail: JournalTail { pos: 0, seq: 1, previous_crc: 0 },
        next_id: 2,
        last_txn: 0,
        free_blocks: 0,
    };
    if superblock.group_blocks == 0 && superblock.node_size >= 1024 {
        superblock.group_blocks = superblock.group_blocks_max();
    }
    superblock.check_geometry().map_err(MkfsError::Geometry)?;
    Ok(superblock)
}

/// Makes an empty file system on a device, whatever was there before.
///
/// Order, and what each step prevents:
///
/// 1. both places of a superblock become zero, durably: a power cut later never finds superblocks of an older
///    file system whose nodes are overwritten already;
/// 2. on a device that finds storage when a block is first written, zeros over the journal: else each commit of the
///    first round through it would wait for that;
/// 3. nodes and chunk map, FLUSH, the first superblock, durably;
/// 4. the second one, durably. A power cut before leaves one valid copy, which is refused.
///
/// # Errors
/// See [`MkfsError`].
pub async fn mkfs(bdev: &Rc<dyn Bdev>, options: &MkfsOptions) -> Result<Superblock, MkfsError> {
    let size = match options.size {
        0 => bdev.limits().size,
        size if size > bdev.limits().size => return Err(MkfsError::TooSmall),
        size => size,
    };
    let superblock = geometry(size, bdev.limits().block_size, options)?;
    let mut tree = Tree::new(superblock.node_size as usize, usize::MAX);
    let mut chunks = Chunks::new(superblock.node_blocks());
    let mut plan = Plan::default();
    plan_groups(&tree, &superblock, &mut plan, 0, superblock.first_data_block());
    blocks::mark_bits(&mut tree, &superblock, &mut plan, 0, superblock.first_data_block(), true)
        .map_err(MkfsError::Geometry)?;
    let mut space = Space::new(&superblock, superblock.block_count - superblock.first_data_block(), false);
    let wanted = 2 * reserve_nodes(&superblock);
    while chunks.total() < wanted {
        let count = u64::from(CHUNK_NODES) * superblock.node_blocks();
        let start = match space.take_exact(count) {
            Search::Taken(range) => range.start.0,
            Search::Nothing => return Err(MkfsError::TooSmall),
            Search::Group(group) => {
                let bits = tree.get(&Key::group(group)).ok().flatten();
                let runs = blocks::free_runs(&superblock, &chunks, group, bits);
                let learned = runs.and_then(|runs| space.learn(group, runs));
                learned.map_err(|_| MkfsError::Geometry("the groups contradict the device"))?;
                continue;
            }
        };
        plan_groups(&tree, &superblock, &mut plan, start, count);
        blocks::claim(&mut tree, &mut chunks, &superblock, &mut plan, start, CHUNK_NODES)
            .map_err(MkfsError::Geometry)?;
    }
    if space.free() < superblock.node_blocks() * wanted as u64 / 2 {
        return Err(MkfsError::TooSmall);
    }
    if chunks.free() < tree.dirty() + 1 {
        return Err(MkfsError::Geometry("the nodes are too small for the device"));
    }
    let superblock = Superblock { free_blocks: space.free(), ..superblock };
    erase_superblocks(bdev).await?;
    if bdev.limits().sparse {
        fill_journal(bdev, &superblock).await?;
    }
    let checkpoint = Checkpoint::cut(&mut tree, &mut chunks, &mut Vec::new(), superblock);
    let superblock = checkpoint.write(bdev, || bdev.flush()).await?.superblock;
    let second = Superblock { generation: superblock.generation + 1, ..superblock };
    write_superblock(bdev, &second).await?;
    Ok(second)
}

/// Writes zeros over the journal, or as much of it as takes no time that somebody would have to be told about.
async fn fill_journal(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> Result<(), BdevError> {
    let unit = u64::from(superblock.block_size);
    let start = superblock.journal_start * unit;
    let end = start + superblock.journal_bytes().min(FILLED_MAX);
    let piece = ZEROS_LEN.min(bdev.limits().max_transfer as u64).max(unit) / unit * unit;
    let zeros = Rc::new(AlignedBuf::zeroed(piece as usize, buffer_align(bdev)));
    let zeros = IoBuffers::from_aligned(&zeros);
    let mut at = start;
    while at < end {
        let pieces = (at..end).step_by(piece as usize).take(ZEROS_AT_A_TIME);
        let writes = pieces.map(|at| {
            let len = piece.min(end - at) as usize;
            bdev.write(at, zeros.slice(0, len), WriteFlags::NONE)
        });
        join_all(writes).await.into_iter().collect::<Result<(), _>>()?;
        at += piece * ZEROS_AT_A_TIME as u64;
    }
    Ok(())
}

fn plan_groups(tree: &Tree, superblock: &Superblock, plan: &mut Plan, start: u64, count: u64) {
    tree.begin_plan(plan);
    for (key, _) in blocks::groups(superblock, start, count) {
        tree.plan(plan, &key, false);
    }
}

/// Whether code of this version may use a file system.
pub(crate) fn check_features(
    superblock: &Superblock,
    bdev: &Rc<dyn Bdev>,
    readonly: bool,
) -> Result<(), OpenError> {
    let features = superblock.incompat & !INCOMPAT_KNOWN;
    if features != 0 {
        return Err(OpenError::Incompatible { features });
    }
    let features = superblock.ro_compat & !RO_COMPAT_KNOWN;
    if features != 0 && !readonly {
        return Err(OpenError::ReadOnlyFeatures { features });
    }
    let limits = bdev.limits();
    let file_system = superblock.block_count * u64::from(superblock.block_size);
    if file_system > limits.size {
        return Err(OpenError::Truncated { device: limits.size, file_system });
    }
    if limits.block_size > superblock.block_size {
        return Err(OpenError::BlockSize { device: limits.block_size, file_system: superblock.block_size });
    }
    Ok(())
}

/// Loads what the device holds, journal included, without writing.
async fn load(bdev: &Rc<dyn Bdev>, options: &OpenOptions) -> Result<Image, OpenError> {
    let copies = read_superblocks(bdev).await?;
    let superblock = choose_superblock(copies, options.accept_older_superblock)?;
    check_features(&superblock, bdev, options.readonly)?;
    Image::load(bdev, superblock).await
}

impl Store {
    /// Opens the file system on a device: the newest checkpoint, then the journal.
    ///
    /// Order of recovery, and what each step prevents:
    ///
    /// 1. the whole valid journal is applied in memory;
    /// 2. FLUSH: what was read may still be in the device's cache; nothing that the journal freed may be
    ///    overwritten before the journal itself is durable;
    /// 3. logged data is written to the blocks that its files have at the journal's end. They may belong to
    ///    others in the checkpoint, but from step 2 on nobody goes back to that: whoever recovers after another power
    ///    cut reads the same journal and writes the same bytes;
    /// 4. a checkpoint with a new epoch, to places that are free in the checkpoint before. Its FLUSH makes the
    ///    data of step 3 durable before its superblock lets the journal go. Only then is the
    ///    first journal block of this mount appended, so blocks of earlier mounts never fit behind it.
    ///
    /// A read-only mount does the first step only, and lays the logged data over what it reads.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(
        bdev: Rc<dyn Bdev>,
        reactor: Rc<Reactor>,
        options: OpenOptions,
    ) -> Result<Rc<Self>, OpenError> {
        let image = load(&bdev, &options).await?;
        let store = Self::from_image(bdev, reactor, options, image);
        if !options.readonly {
            if store.bdev.limits().volatile_cache {
                store.bdev.flush().await?;
            }
            if store.slack() < 0 {
                return Err(FsError::NoSpace.into());
            }
            store.write_logged(&store.logged.take()).await?;
            store.write_checkpoint(store.cut_checkpoint(false)).await?;
        }
        Ok(store)
    }

    fn from_image(bdev: Rc<dyn Bdev>, reactor: Rc<Reactor>, options: OpenOptions, image: Image) -> Rc<Self> {
        let Image {
            mut superblock,
            tree,
            chunks,
            map_pages,
            journal_end,
            last_txn,
            next_id,
            free_blocks,
            replayed,
            logged,
        } = image;
        let clean = superblock.clean && replayed.blocks == 0;
        if replayed.blocks > 0 {
            tracing::info!(blocks = replayed.blocks, transactions = replayed.txns, "journal replayed");
        }
        // A newer superblock that was lost may have had the next epochs.
        superblock.epoch += if options.accept_older_superblock { 1 << 20 } else { 1 };
        superblock.last_txn = last_txn;
        let limits = bdev.limits();
        let align = limits.dma_align.max(limits.block_size) as usize;
        let journal = Journal::new(&superblock, journal_end, limits.max_transfer, align);
        let space = Space::new(&superblock, free_blocks, limits.discard);
        let store = Rc::new_cyclic(|this| Self {
            this: this.clone(),
            tree: RefCell::new(tree),
            chunks: RefCell::new(chunks),
            map_pages: RefCell::new(map_pages),
            space: RefCell::new(space),
            promised_pieces: Cell::new(0),
            refused: Cell::new(None),
            journal: RefCell::new(journal),
            next_id: Cell::new(if clean { next_id } else { next_id + IDS_SKIPPED }),
            seq: Cell::new(last_txn),
            durable: Cell::new(TxnSeq(last_txn)),
            generation: Cell::new(superblock.generation),
            reserve_nodes: reserve_nodes(&superblock),
            dirty_bytes_max: options.dirty_bytes_max,
            dirty_max: Cell::new(0),
            pinned_max: Cell::new(0),
            loads: Loads::default(),
            plan: RefCell::default(),
            free_blocks: Cell::new(free_blocks),
            checkpointed: Cell::new(0),
            discarding: Rounds::default(),
            surplus_max: Cell::new(super::SURPLUS_MIN),
            readonly: options.readonly,
            closed: Cell::new(false),
            failed: RefCell::new(None),
            commits: Rounds::default(),
            checkpoints: Rounds::default(),
            flushes: Rc::default(),
            logged_data: RefCell::new(None),
            logged: RefCell::new(logged),
            log_closed: Cell::new(false),
            timer_armed: Cell::new(false),
            futile_wait: Cell::new(None),
            superblock,
            bdev,
            reactor,
        });
        store.set_cache_bytes(options.cache_bytes);
        store
    }

    /// A new, empty file system on a device whose operations complete in the call
    /// ([`bdev::memory::Memory`]): it ends with the device.
    ///
    /// # Panics
    /// When the device is too small, or its operations do not complete in the call.
    pub fn volatile(bdev: Rc<dyn Bdev>, reactor: Rc<Reactor>) -> Rc<Self> {
        let made = pin!(async move {
            mkfs(&bdev, &MkfsOptions::default()).await.expect("a device that is large enough");
            Self::open(bdev, reactor, OpenOptions::default()).await.expect("what was just made opens")
        });
        match made.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(store) => store,
            Poll::Pending => panic!("the device's operations do not complete in the call"),
        }
    }
}
