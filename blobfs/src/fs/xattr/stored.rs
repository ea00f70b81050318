//! Values that fit no item: in extents of a map of their own.
//!
//! A value is never changed in place. To set one:
//!
//! 1. the value is written to free blocks: a crash leaves them free;
//! 2. one transaction maps the blocks, points the attribute at them, and frees those of the value before: a
//!    crash leaves the one or the other. What made it durable has flushed the device before
//!    (`Store::sync`), so no attribute ever points at blocks that were not written.
//!
//! The blocks of a value do not count among those of the inode.

use std::ops::ControlFlow;
use std::rc::Rc;

use bdev::{AlignedBuf, IoBuffers, WriteFlags};

use super::{Found, XATTR_SIZE_MAX, XattrMode, check_xattr, damaged, stays_in_item, xattr_flags};
use crate::data::ReadBlocks;
use crate::error::{FsError, Stop, Try};
use crate::fs::{Context, Fs};
use crate::ondisk::{ExtentFlags, ExtentItem, Key, encode_xattr_stored};
use crate::store::{Allocation, Demand};
use crate::txn::Txn;
use crate::units::{InodeId, MapId};

/// Alignment of buffers: enough for any device's direct I/O.
const BUFFER_ALIGN: usize = 4096;

/// Where a value is.
#[derive(Clone, Copy)]
pub(super) struct StoredValue {
    map: MapId,
    size: u32,
}

impl StoredValue {
    /// A value that an item names; `None` when no value is that large.
    pub(super) fn new(map: MapId, size: u32) -> Option<Self> {
        (1..=XATTR_SIZE_MAX).contains(&(size as usize)).then_some(Self { map, size })
    }

    /// Bytes of the value.
    pub(super) fn len(&self) -> usize {
        self.size as usize
    }
}

/// What has to be read to have a value.
enum Located {
    Here(Vec<u8>),
    Stored(StoredValue, Vec<(Key, ExtentItem)>, Vec<u32>),
}

/// A value on the device that no item names yet.
struct Written {
    allocations: Vec<Allocation>,
    /// Checksums of its blocks, if the file system has such.
    sums: Vec<u32>,
}

impl Fs {
    /// The value of an attribute, from wherever it is.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`], the device's, corruption.
    pub async fn read_xattr(
        self: &Rc<Self>,
        _ctx: Context,
        inode: InodeId,
        name: &[u8],
    ) -> Result<Vec<u8>, FsError> {
        // Before the lookup, so that the blocks are not used again while they are read.
        let _io = self.store.begin_io();
        let found = self.run(|fs| match fs.xattr(inode, name)?.ok_or(FsError::NoAttribute)? {
            Found::Here(value) => Ok(Located::Here(value)),
            Found::Stored(stored) => {
                let sums = fs.sums(stored.map, &(0..fs.value_blocks(&stored)))?;
                Ok(Located::Stored(stored, fs.stored_extents(&stored)?, sums))
            }
        });
        let (stored, extents, sums) = match found.await? {
            Located::Here(value) => return Ok(value),
            Located::Stored(stored, extents, sums) => (stored, extents, sums),
        };
        let mut value = Vec::with_capacity(stored.len());
        for (key, extent) in extents {
            let bytes = extent.device_range().bytes(self.store.block_size());
            let buf = Rc::new(AlignedBuf::zeroed((bytes.end - bytes.start) as usize, BUFFER_ALIGN));
            self.store.bdev().read(bytes.start, IoBuffers::from_aligned(&buf)).await?;
            let sums = sums.get(key.offset as usize..).unwrap_or_default();
            let addr = extent.device_range().start;
            self.verify(&ReadBlocks { inode, xattr: true, start: key.offset, addr, sums }, &buf)?;
            value.extend_from_slice(&buf);
        }
        value.truncate(stored.len());
        Ok(value)
    }

    /// Sets an attribute whose value fits no item. The order of the writes is at the top of this file.
    ///
    /// # Errors
    /// As [`Fs::set_xattr`], and the device's.
    pub async fn store_xattr(
        self: &Rc<Self>,
        ctx: Context,
        inode: InodeId,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        check_xattr(name, value)?;
        if stays_in_item(name) {
            return Err(FsError::NoSpace);
        }
        // What cannot be set is not worth writing.
        self.run(|fs| fs.place_for_xattr(inode, name, mode)).await?;
        let written = self.write_value(value).await?;
        let map = MapId(self.store.next_id());
        let committed = self
            .run(|fs| {
                let target = fs.inode(inode)?;
                let (key, exists) = fs.place_for_xattr(inode, name, mode)?;
                let mut txn = fs.begin(&ctx);
                if exists {
                    fs.drop_stored(&mut txn, inode, &key)?;
                }
                map_value(&mut txn, map, &written.allocations);
                fs.put_sums(&mut txn, map, std::iter::once((0, written.sums.as_slice())))?;
                txn.put_with(key, |out| encode_xattr_stored(name, map, value.len() as u32, out));
                let mut item = target.stored_item();
                item.flags |= xattr_flags(name);
                fs.commit_xattr(&target, item, txn)
            })
            .await;
        // On a tiny geometry a value in many pieces may fit no transaction.
        committed.map_err(|error| if error == FsError::TooBig { FsError::NoSpace } else { error })?;
        written.allocations.into_iter().for_each(Allocation::committed);
        Ok(())
    }

    /// Writes a value to free blocks, which stay free if they are not mapped.
    async fn write_value(self: &Rc<Self>, value: &[u8]) -> Result<Written, FsError> {
        let block = self.store.block_size() as usize;
        let blocks = value.len().div_ceil(block);
        let mut buf = AlignedBuf::zeroed(blocks * block, BUFFER_ALIGN);
        buf[..value.len()].copy_from_slice(value);
        let src = IoBuffers::from_aligned(&Rc::new(buf));
        let demand = Demand::of_holes(&(0..blocks as u64), self.store.has_data_sums());
        let mut reservation = match self.run(|fs| fs.store.reserve(demand)).await {
            Err(FsError::NoSpace) if self.store.has_promises() => {
                self.redeem().await;
                self.run(|fs| fs.store.reserve(demand)).await?
            }
            reserved => reserved?,
        };
        let mut allocations = Vec::new();
        let mut done = 0;
        while done < src.len() {
            let want = ((src.len() - done) / block) as u32;
            let allocation = loop {
                match self.store.allocate(&mut reservation, None, want) {
                    Ok(allocation) => break allocation,
                    Err(Stop::Fail(error)) => return Err(error),
                    Err(Stop::Wait(wait)) => self.wait(wait).await?,
                }
            };
            let bytes = allocation.range().bytes(self.store.block_size());
            let len = (bytes.end - bytes.start) as usize;
            let io = self.store.begin_write();
            self.store.bdev().write(bytes.start, src.slice(done, len), WriteFlags::NONE).await?;
            drop(io);
            allocations.push(allocation);
            done += len;
        }
        Ok(Written { allocations, sums: self.sums_of(&src) })
    }

    fn value_blocks(&self, stored: &StoredValue) -> u64 {
        u64::from(stored.size).div_ceil(u64::from(self.store.block_size()))
    }

    /// The extents of a value: without gaps, and as long as it.
    pub(super) fn stored_extents(&self, stored: &StoredValue) -> Try<Vec<(Key, ExtentItem)>> {
        let blocks = self.value_blocks(stored);
        let mut extents = Vec::new();
        let mut end = 0;
        let mut damage = false;
        let (from, to) = (Key::extent(stored.map, 0), Key::extent(stored.map, u64::MAX));
        self.store.scan(&from, &to, |key, value| {
            let item = self.store.extent(key.offset, value).filter(|item| {
                key.offset == end && item.flags.is_empty() && u64::from(item.blocks) <= blocks - end
            });
            let Some(item) = item else {
                damage = true;
                return ControlFlow::Break(());
            };
            end += u64::from(item.blocks);
            extents.push((*key, item));
            ControlFlow::Continue(())
        })?;
        if damage || end != blocks {
            return Err(damaged("extended attribute value", InodeId(stored.map.0)).into());
        }
        Ok(extents)
    }

    /// Adds the removal of a value's extents and checksums to `txn`.
    pub(super) fn free_stored(&self, txn: &mut Txn, stored: &StoredValue) -> Try<()> {
        for (key, extent) in self.stored_extents(stored)? {
            txn.delete(key);
            txn.free(extent.device_range());
        }
        self.clear_sums(txn, stored.map, &(0..u64::MAX))
    }
}

fn map_value(txn: &mut Txn, map: MapId, written: &[Allocation]) {
    let mut at = 0;
    for allocation in written {
        let range = allocation.range();
        txn.alloc(range);
        txn.put(Key::extent(map, at), &ExtentItem::plain(range, ExtentFlags::empty()).encode());
        at += u64::from(range.count);
    }
}
