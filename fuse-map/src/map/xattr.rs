//! SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR.

use blobfs::Stop;
use blobfs::fs::XattrValue;

use crate::Handled;
use crate::abi::*;
use crate::decode;
use crate::errno::Errno;
use crate::reply::Reply;
use crate::session::{Call, no_body};

pub(crate) fn set(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut arguments = call.args()?;
    let args = if call.agreed(InitFlags::FUSE_SETXATTR_EXT) {
        arguments.take::<fuse_setxattr_in>()?
    } else {
        let fuse_setxattr_compat_in { size, flags } = arguments.take()?;
        fuse_setxattr_in { size, flags, setxattr_flags: 0, padding: 0 }
    };
    let mode = decode::xattr_mode(args.flags)?;
    let kill_sgid = args.setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID != 0;
    let name = arguments.xattr_name()?;
    let value = arguments.xattr_value(args.size)?;
    let (ctx, inode) = (call.context(), call.node()?);
    if !call.fs().xattr_fits(&name, &value) {
        let fs = call.fs().clone();
        let operation = async move { fs.store_xattr(ctx, inode, &name, &value, mode).await };
        return Ok(call.answer_later(operation, no_body));
    }
    Ok(call.run(move |fs, _| fs.set_xattr(&ctx, inode, &name, &value, mode, kill_sgid), no_body))
}

pub(crate) fn get(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut arguments = call.args()?;
    let size = wanted(call, arguments.take()?)?;
    let name = arguments.xattr_name()?;
    let (ctx, inode) = (call.context(), call.node()?);
    match call.fs().get_xattr(&ctx, inode, &name) {
        Ok(XattrValue::Here(value)) => Ok(Handled::Done(sized(call.reply, size, &value))),
        Ok(XattrValue::Stored(len)) if len > size => Ok(Handled::Done(no_room(call.reply, size, len))),
        Err(Stop::Fail(error)) => Err(error.into()),
        Ok(XattrValue::Stored(_)) | Err(Stop::Wait(_)) => {
            let fs = call.fs().clone();
            let operation = async move { fs.read_xattr(ctx, inode, &name).await };
            Ok(call.answer_later(operation, move |reply, _, value| sized(reply, size, &value)))
        }
    }
}

pub(crate) fn list(call: &Call<'_>) -> Result<Handled, Errno> {
    let size = wanted(call, call.args()?.take()?)?;
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.list_xattr(&ctx, inode), move |reply, _, names| sized(reply, size, &names)))
}

pub(crate) fn remove(call: &Call<'_>) -> Result<Handled, Errno> {
    let name = call.args()?.xattr_name()?;
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.remove_xattr(&ctx, inode, &name), no_body))
}

/// The size of the client's buffer; 0 when it only asks for the length.
fn wanted(call: &Call<'_>, args: fuse_getxattr_in) -> Result<usize, Errno> {
    let size = args.size as usize;
    let room = if size == 0 { size_of::<fuse_getxattr_out>() } else { size };
    if call.reply.room() < room { Err(Errno::INVALID) } else { Ok(size) }
}

/// The value, or only its length when `size` is 0.
fn sized(reply: Reply<'_>, size: usize, value: &[u8]) -> usize {
    if size == 0 || value.len() > size { no_room(reply, size, value.len()) } else { reply.bytes(value) }
}

/// The length of a value for which the client has no buffer, or only too small a one.
fn no_room(reply: Reply<'_>, size: usize, len: usize) -> usize {
    match size {
        0 => reply.value(&fuse_getxattr_out { size: len as u32, padding: 0 }),
        _ => reply.error(Errno(libc::ERANGE)),
    }
}
