//! INIT, DESTROY, STATFS, and what open and close mean under each cache policy.

use blobfs::FsError;

use crate::Handled;
use crate::abi::*;
use crate::errno::Errno;
use crate::reply;
use crate::session::{CachePolicy, Call};

/// Clients before protocol 7.36 send the first part of the arguments only.
pub(crate) fn init(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let client: fuse_init_in = args.take()?;
    let extended = u64::from(client.flags) & InitFlags::FUSE_INIT_EXT.bits() != 0;
    let flags2 = if extended { args.take::<fuse_init_ext_in>()?.flags2 } else { 0 };
    let reply = call.session().init(&client, flags2)?;
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
    let uncached = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
    opened(call, InitFlags::FUSE_NO_OPEN_SUPPORT, [FOPEN_KEEP_CACHE, uncached], |kind| match kind {
        libc::S_IFDIR => Err(FsError::IsADirectory),
        _ => Ok(()),
    })
}

/// As [`open`], for directories.
pub(crate) fn opendir(call: &Call<'_>) -> Result<Handled, Errno> {
    let cached = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR;
    opened(call, InitFlags::FUSE_NO_OPENDIR_SUPPORT, [cached, 0], |kind| match kind {
        libc::S_IFDIR => Ok(()),
        _ => Err(FsError::NotADirectory),
    })
}

/// `open_flags`: those for an exclusive client, and those for one that caches nothing.
fn opened(
    call: &Call<'_>,
    unneeded: InitFlags,
    open_flags: [u32; 2],
    check_kind: fn(u32) -> Result<(), FsError>,
) -> Result<Handled, Errno> {
    if call.agreed(unneeded) {
        return Err(Errno(libc::ENOSYS));
    }
    call.args()?.take::<fuse_open_in>()?;
    let (ctx, inode) = (call.context(), call.node()?);
    let [exclusive, uncached] = open_flags;
    Ok(call.run(
        move |fs, _| Ok(check_kind(fs.get_attr(&ctx, inode)?.mode & libc::S_IFMT)?),
        move |reply, export, ()| {
            let open_flags = match export.cache {
                CachePolicy::Exclusive => exclusive,
                CachePolicy::None => uncached,
            };
            reply.value(&fuse_open_out { fh: 0, open_flags, backing_id: 0 })
        },
    ))
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
