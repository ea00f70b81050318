//! Commit and checkpoint rounds: when what becomes durable.
//!
//! Both kinds run as tasks of their own, one of each kind at a time. A *commit* round writes the open journal
//! block, a flush of the device goes with it when somebody needs one. A *checkpoint* round writes the dirty
//! nodes and empties the journal.
//!
//! **Flushes.** Data that was written to the device is durable after the next flush that begins behind the
//! write's end. [`Flushes`] numbers flushes, and a [`DataStamp`] says which one a write needs, so nobody
//! flushes twice for the same data, and whoever has nothing unflushed does not flush at all: a sync is then one
//! journal block with FUA.
//!
//! **Logged data.** Before a checkpoint is cut, what is in the journal only ([`crate::txn::Change::Log`]) is
//! written to the files' blocks by [`LoggedData`], and nothing is logged meanwhile. So nothing behind the cut
//! needs a journal block in front of it, and the flush of the checkpoint makes those blocks durable before
//! its superblock lets the journal go.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use bdev::{BdevError, IoBuffers, WriteFlags};
use reactor::sync::Notify;

use super::checkpoint::Checkpoint;
use super::journal::{Room, SealedBlock};
use super::load::Pins;
use super::{SURPLUS_MIN, Store, surplus_max};
use crate::error::{FsError, Stop, Wait};
use crate::ondisk::chunk_map::ChunkEntry;
use crate::ondisk::journal::Record;
use crate::ondisk::superblock::Superblock;
use crate::units::TxnSeq;

/// Room in the journal for the record of a chunk.
pub(super) const CHUNK_RECORD_LEN: usize = 64;

/// Rounds of a task that runs once at a time and that many may wait for.
#[derive(Default)]
pub(super) struct Rounds {
    started: Cell<u64>,
    finished: Cell<u64>,
    pub(super) changed: Notify,
}

impl Rounds {
    pub(super) fn is_running(&self) -> bool {
        self.started.get() != self.finished.get()
    }

    pub(super) fn start(&self) -> u64 {
        debug_assert!(!self.is_running());
        self.started.set(self.started.get() + 1);
        self.started.get()
    }

    pub(super) fn finish(&self) {
        self.finished.set(self.started.get());
        self.changed.notify_all();
    }

    /// Waits until nothing runs.
    pub(super) async fn idle(&self) {
        while self.is_running() {
            self.changed.notified().await;
        }
    }
}

/// Which flush makes data durable: any with a higher number. Of data that was never written: 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct DataStamp(u64);

/// The device's flushes.
#[derive(Default)]
pub(super) struct Flushes {
    started: Cell<u64>,
    finished: Cell<u64>,
    /// Stamp of the last data.
    written: Cell<DataStamp>,
    /// Somebody needs a flush in the next round.
    wanted: Cell<bool>,
}

impl Flushes {
    /// A write of data has ended.
    pub(super) fn note_written(&self) -> DataStamp {
        let stamp = DataStamp(self.started.get() + 1);
        self.written.set(stamp);
        stamp
    }

    fn is_durable(&self, stamp: DataStamp) -> bool {
        self.finished.get() >= stamp.0
    }
}

/// Who knows the data that is in the journal only.
pub(crate) trait LoggedData {
    /// Writes it to the blocks of its files. May not wait for a checkpoint.
    fn write_home(self: Rc<Self>) -> Pin<Box<dyn Future<Output = Result<(), FsError>>>>;
}

/// Commit rounds.
impl Store {
    /// Waits until every transaction up to `seq` is durable, together with all data whose writes completed
    /// before the call. Concurrent calls share a commit.
    ///
    /// # Errors
    /// The device's error; from then on the store is read-only.
    pub async fn sync(self: &Rc<Self>, seq: TxnSeq) -> Result<(), FsError> {
        self.sync_data(seq, self.flushes.written.get()).await
    }

    /// Waits until every transaction up to `seq` is durable, together with the data of `stamp` and earlier
    /// ones.
    ///
    /// # Errors
    /// As [`Store::sync`].
    pub async fn sync_data(self: &Rc<Self>, seq: TxnSeq, stamp: DataStamp) -> Result<(), FsError> {
        if self.readonly {
            return Ok(());
        }
        loop {
            self.check_failed()?;
            let unflushed = !self.is_durable(stamp);
            if seq <= self.durable.get() && !unflushed {
                return Ok(());
            }
            if unflushed {
                self.flushes.wanted.set(true);
            }
            if self.commits.is_running() {
                self.commits.changed.notified().await;
            } else {
                self.start_commit();
            }
        }
    }

    /// Stamp of all data that was written by now.
    pub(crate) fn last_written(&self) -> DataStamp {
        self.flushes.written.get()
    }

    /// Whether data of a stamp is durable. A device without a volatile cache has nothing else.
    pub(crate) fn is_durable(&self, stamp: DataStamp) -> bool {
        !self.bdev.limits().volatile_cache || self.flushes.is_durable(stamp)
    }

    /// Seals the open block now and writes it in a task.
    pub(super) fn start_commit(self: &Rc<Self>) {
        self.commits.start();
        let sealed = self.journal.borrow_mut().seal();
        let flush = self.flushes.wanted.take();
        let store = self.clone();
        drop(self.reactor.spawn(async move {
            if let Err(error) = store.write_block(sealed, flush).await {
                store.fail(error);
            }
            store.commits.finish();
        }));
    }

    /// Makes the block durable, and with `flush` all data that was written by now. Where the block shows data
    /// that may be in the device's cache only, in this order:
    ///
    /// 1. FLUSH: the data;
    /// 2. the block with FUA: only now may anybody be told that its transactions are durable.
    ///
    /// Otherwise a FLUSH behind the block serves both, if one is needed at all.
    async fn write_block(&self, sealed: Option<SealedBlock>, flush: bool) -> Result<(), FsError> {
        self.check_failed()?;
        let unflushed = !self.is_durable(self.flushes.written.get());
        let flush_before = unflushed && sealed.as_ref().is_some_and(|block| block.shows_data);
        let flush_behind = unflushed && flush && !flush_before;
        if flush_before {
            self.flush().await?;
        }
        if let Some(block) = &sealed {
            let flags = if flush_behind { WriteFlags::NONE } else { WriteFlags::FUA };
            self.bdev.write(block.offset, IoBuffers::from_aligned(&block.bytes), flags).await?;
        }
        if flush_behind {
            self.flush().await?;
        }
        if let Some(block) = sealed {
            self.durable.set(block.last_txn);
            self.release_space();
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), BdevError> {
        let number = self.flushes.started.get() + 1;
        self.flushes.started.set(number);
        self.bdev.flush().await?;
        // One of a commit and one of a checkpoint may be under way together, and end in any order.
        self.flushes.finished.set(self.flushes.finished.get().max(number));
        Ok(())
    }
}

/// Checkpoint rounds.
impl Store {
    /// Names who is asked for the data that is in the journal only.
    pub(crate) fn set_logged_data(&self, data: std::rc::Weak<dyn LoggedData>) {
        self.logged_data.replace(Some(data));
    }

    /// Whether `len` bytes of data may be logged now.
    pub(crate) fn can_log(&self, len: usize) -> bool {
        !self.log_closed.get() && self.journal.borrow().has_room_to_log(len)
    }

    /// Whether a replay would find what transaction `seq` logged.
    pub(crate) fn is_logged(&self, seq: TxnSeq) -> bool {
        seq.0 > self.checkpointed.get()
    }

    /// Writes all nodes that were changed by now, and empties the journal.
    pub(super) async fn checkpoint(self: &Rc<Self>) -> Result<(), FsError> {
        // A round that runs already was cut before the caller's transactions.
        let wanted = self.checkpoints.started.get() + 1;
        loop {
            self.check_failed()?;
            if self.checkpoints.finished.get() >= wanted {
                return Ok(());
            }
            if self.checkpoints.is_running() {
                self.checkpoints.changed.notified().await;
            } else {
                self.start_checkpoint(false);
            }
        }
    }

    pub(super) fn start_checkpoint(self: &Rc<Self>, clean: bool) {
        self.checkpoints.start();
        let store = self.clone();
        drop(self.reactor.spawn(async move {
            if let Err(error) = store.checkpoint_round(clean).await {
                store.fail(error);
            }
            store.log_closed.set(false);
            store.checkpoints.finish();
        }));
    }

    /// One checkpoint. The open block is sealed and the dirty nodes are taken in one step, so the
    /// checkpoint stands exactly at the end of a journal block.
    async fn checkpoint_round(self: &Rc<Self>, clean: bool) -> Result<(), FsError> {
        self.log_closed.set(true);
        let logged = self.logged_data.borrow().as_ref().and_then(std::rc::Weak::upgrade);
        if let Some(logged) = logged {
            logged.write_home().await?;
        }
        self.commits.idle().await;
        self.check_failed()?;
        self.start_commit();
        let cut = self.cut_checkpoint(clean);
        self.log_closed.set(false);
        self.commits.idle().await;
        self.check_failed()?;
        self.write_checkpoint(cut).await?;
        if !clean {
            self.give_back_chunks().await?;
            self.surplus_max.set(surplus_max(self.surplus()));
        }
        Ok(())
    }

    /// Makes empty chunks free blocks again, as long as more places are left than are soon needed.
    async fn give_back_chunks(self: &Rc<Self>) -> Result<(), FsError> {
        let mut pins = Pins::default();
        loop {
            let Some(ChunkEntry { start, nodes, .. }) = self.chunks.borrow().empty() else { return Ok(()) };
            if self.slack() < (self.kept_nodes() + SURPLUS_MIN) as i64 || self.check_writable().is_err() {
                return Ok(());
            }
            if self.journal.borrow().room(CHUNK_RECORD_LEN) != Room::Enough {
                return Ok(());
            }
            match self.log_chunk(0, Record::GiveBack { start, nodes }) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(Stop::Wait(Wait::Nodes(missing))) => self.load_nodes(&missing, &mut pins).await?,
                Err(Stop::Wait(_)) => return Ok(()),
                Err(Stop::Fail(error)) => return Err(error),
            }
        }
    }

    /// Cuts a checkpoint at the end of the last sealed block; the open block must be empty.
    pub(super) fn cut_checkpoint(&self, clean: bool) -> (Checkpoint, u64) {
        debug_assert!(!self.journal.borrow().is_open());
        let (tail, position) = self.journal.borrow_mut().cut();
        let superblock = Superblock {
            generation: self.generation.get() + 1,
            clean,
            tail,
            next_id: self.next_id.get(),
            last_txn: self.seq.get(),
            free_blocks: self.free_blocks.get(),
            ..self.superblock.clone()
        };
        let (mut tree, mut chunks) = (self.tree.borrow_mut(), self.chunks.borrow_mut());
        let checkpoint =
            Checkpoint::cut(&mut tree, &mut chunks, &mut self.map_pages.borrow_mut(), superblock);
        (checkpoint, position)
    }

    pub(super) async fn write_checkpoint(
        &self,
        (checkpoint, position): (Checkpoint, u64),
    ) -> Result<(), FsError> {
        let written = checkpoint.write(&self.bdev, || self.flush()).await?;
        self.generation.set(written.superblock.generation);
        self.checkpointed.set(written.superblock.last_txn);
        written.settle(&mut self.tree.borrow_mut(), &mut self.chunks.borrow_mut());
        self.journal.borrow_mut().free_up_to(position);
        Ok(())
    }

    /// Makes everything durable, writes a last checkpoint and marks the file system as clean. Afterwards
    /// every change is refused.
    ///
    /// # Errors
    /// The device's error.
    pub async fn close(self: &Rc<Self>) -> Result<(), FsError> {
        if self.readonly || self.closed.replace(true) {
            return Ok(());
        }
        self.checkpoints.idle().await;
        self.check_failed()?;
        self.start_checkpoint(true);
        self.checkpoints.idle().await;
        self.check_failed()
    }
}
