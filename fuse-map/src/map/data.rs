//! READ, WRITE, FSYNC, FSYNCDIR, SYNCFS, FALLOCATE, LSEEK.
//!
//! The client's memory itself is the source and the destination of data.

use std::rc::Rc;

use bdev::IoBuffers;
use blobfs::FsError;
use blobfs::fs::{Context, Fs, IoFlags};
use blobfs::units::InodeId;

use crate::Handled;
use crate::abi::*;
use crate::decode;
use crate::errno::Errno;
use crate::reply::{HEADER_LEN, Reply};
use crate::session::{Call, Export, TRANSFER_MAX, no_body};

pub(crate) fn read(call: &Call<'_>) -> Result<Handled, Errno> {
    let args: fuse_read_in = call.args()?.take()?;
    let len = args.size as usize;
    if args.size > TRANSFER_MAX || len > call.reply.room() {
        return Err(Errno::INVALID);
    }
    decode::check_range(args.offset, 0)?;
    let (ctx, inode, flags) = (call.context(), call.node()?, decode::read_flags(&args));
    let dst = call.reply.writable.slice(HEADER_LEN, len);
    match call.fs().try_read(&ctx, inode, args.offset, &dst, flags) {
        Some(result) => Ok(Handled::Done(call.reply.body_in_place(result?))),
        None => {
            if let Some(read) = call.fs().begin_direct_read(inode, args.offset, &dst, flags) {
                return match read.try_result() {
                    Some(result) => Ok(Handled::Done(call.reply.body_in_place(result?))),
                    None => Ok(call.answer_later(read.finish(), |reply, _, len| reply.body_in_place(len))),
                };
            }
            let fs = call.fs().clone();
            let operation = async move { fs.read(ctx, inode, args.offset, dst, flags).await };
            Ok(call.answer_later(operation, |reply, _, len| reply.body_in_place(len)))
        }
    }
}

pub(crate) fn write(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut arguments = call.args()?;
    let args: fuse_write_in = arguments.take()?;
    if args.size > TRANSFER_MAX {
        return Err(Errno::INVALID);
    }
    let src = arguments.data(args.size as usize)?;
    decode::check_range(args.offset, u64::from(args.size))?;
    let (ctx, inode) = (call.context(), call.node()?);
    let flags = decode::write_flags(&args, call.agreed(InitFlags::FUSE_WRITEBACK_CACHE));
    match call.fs().try_write(&ctx, inode, args.offset, &src, flags) {
        Some(result) => Ok(Handled::Done(written(call.reply, call.export(), result?))),
        None => {
            let fs = call.fs().clone();
            let operation = async move { write_as_wanted(&fs, ctx, inode, args.offset, &src, flags).await };
            Ok(call.answer_later(operation, written))
        }
    }
}

/// Writes, and goes on behind a short write to what has made it short: Linux takes fewer bytes than it sent for an I/O
/// error. After a direct write that fails it truncates the file to what it was.
async fn write_as_wanted(
    fs: &Rc<Fs>,
    ctx: Context,
    inode: InodeId,
    offset: u64,
    src: &IoBuffers,
    flags: IoFlags,
) -> Result<usize, FsError> {
    let mut done = fs.write(ctx, inode, offset, src.clone(), flags).await?;
    while done < src.len() {
        let rest = src.slice(done, src.len() - done);
        match fs.write(ctx, inode, offset + done as u64, rest, flags).await? {
            0 => break,
            more => done += more,
        }
    }
    Ok(done)
}

fn written(reply: Reply<'_>, _export: Export, len: usize) -> usize {
    reply.value(&fuse_write_out { size: len as u32, padding: 0 })
}

/// FSYNC and FSYNCDIR.
pub(crate) fn fsync(call: &Call<'_>) -> Result<Handled, Errno> {
    let args: fuse_fsync_in = call.args()?.take()?;
    let data_only = args.fsync_flags & FUSE_FSYNC_FDATASYNC != 0;
    let (fs, inode) = (call.fs().clone(), call.node()?);
    Ok(call.answer_later(async move { fs.sync_inode(inode, data_only).await }, no_body))
}

pub(crate) fn syncfs(call: &Call<'_>) -> Result<Handled, Errno> {
    let fs = call.fs().clone();
    Ok(call.answer_later(async move { fs.sync_all().await }, no_body))
}

pub(crate) fn fallocate(call: &Call<'_>) -> Result<Handled, Errno> {
    let args: fuse_fallocate_in = call.args()?.take()?;
    let mode = decode::fallocate_mode(args.mode)?;
    if args.length == 0 {
        return Err(Errno::INVALID);
    }
    decode::check_range(args.offset, args.length)?;
    let (fs, ctx, inode) = (call.fs().clone(), call.context(), call.node()?);
    let operation = async move { fs.fallocate(ctx, inode, mode, args.offset, args.length).await };
    Ok(call.answer_later(operation, no_body))
}

/// A client that caches writes asks without writing back first: what is a hole here may be data in its cache.
/// It is told to stop asking, and takes the whole file for data.
pub(crate) fn lseek(call: &Call<'_>) -> Result<Handled, Errno> {
    if call.agreed(InitFlags::FUSE_WRITEBACK_CACHE) {
        return Err(Errno(libc::ENOSYS));
    }
    let args: fuse_lseek_in = call.args()?.take()?;
    let target = decode::seek_target(args.whence)?;
    decode::check_range(args.offset, 0).map_err(|_| Errno::from(FsError::NoData))?;
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(
        move |fs, _| fs.seek(&ctx, inode, args.offset, target),
        |reply, _, offset| reply.value(&fuse_lseek_out { offset }),
    ))
}
