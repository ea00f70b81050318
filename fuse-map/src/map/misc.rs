//! INIT, DESTROY, STATFS, and what open and close mean under each cache policy.

use crate::Handled;
use crate::abi::*;
use crate::errno::Errno;
use crate::reply;
use crate::session::{CachePolicy, Call};

pub(crate) fn init(call: &Call<'_>) -> Result<Handled, Errno> {
    let reply = call.session().init(&call.args()?.take()?)?;
    Ok(Handled::Done(call.reply.value(&reply)))
}

pub(crate) fn destroy(call: &Call<'_>) -> Result<Handled, Errno> {
    call.session().reset();
    done(call)
}

pub(crate) fn statfs(call: &Call<'_>) -> Result<Handled, Errno> {
    call.node()?;
    Ok(Handled::Done(call.reply.value(&reply::statfs(&call.fs().stat_fs()))))
}

/// Nothing is kept for an open file: an exclusive client is told to stop asking.
pub(crate) fn open(call: &Call<'_>) -> Result<Handled, Errno> {
    opened(call, InitFlags::FUSE_NO_OPEN_SUPPORT, FOPEN_KEEP_CACHE)
}

/// As [`open`], for directories.
pub(crate) fn opendir(call: &Call<'_>) -> Result<Handled, Errno> {
    opened(call, InitFlags::FUSE_NO_OPENDIR_SUPPORT, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR)
}

fn opened(call: &Call<'_>, unneeded: InitFlags, exclusive_flags: u32) -> Result<Handled, Errno> {
    if call.agreed(unneeded) {
        return Err(Errno(libc::ENOSYS));
    }
    call.args()?.take::<fuse_open_in>()?;
    call.node()?;
    let open_flags = match call.export().cache {
        CachePolicy::Exclusive => exclusive_flags,
        CachePolicy::None => no_cache_flags(unneeded),
    };
    Ok(Handled::Done(call.reply.value(&fuse_open_out { fh: 0, open_flags, backing_id: 0 })))
}

/// Files bypass the client's cache; a directory has no such flag.
fn no_cache_flags(unneeded: InitFlags) -> u32 {
    if unneeded == InitFlags::FUSE_NO_OPEN_SUPPORT {
        FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
    } else {
        0
    }
}

/// An exclusive client has nothing to flush at close: it is told to stop asking.
pub(crate) fn flush(call: &Call<'_>) -> Result<Handled, Errno> {
    match call.export().cache {
        CachePolicy::Exclusive => Err(Errno(libc::ENOSYS)),
        CachePolicy::None => done(call),
    }
}

/// Success without doing anything.
pub(crate) fn done(call: &Call<'_>) -> Result<Handled, Errno> {
    Ok(Handled::Done(call.reply.body_in_place(0)))
}
