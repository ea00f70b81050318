//! GETATTR, SETATTR, STATX.

use blobfs::fs::types::Attr;

use crate::Handled;
use crate::abi::*;
use crate::decode;
use crate::errno::Errno;
use crate::reply::{self, Reply};
use crate::session::{Call, Export};

pub(crate) fn getattr(call: &Call<'_>) -> Result<Handled, Errno> {
    call.args()?.take::<fuse_getattr_in>()?;
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.get_attr(&ctx, inode), attr_out))
}

pub(crate) fn setattr(call: &Call<'_>) -> Result<Handled, Errno> {
    let change = decode::set_attr(&call.args()?.take()?)?;
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.set_attr(&ctx, inode, &change), attr_out))
}

pub(crate) fn statx(call: &Call<'_>) -> Result<Handled, Errno> {
    call.args()?.take::<fuse_statx_in>()?;
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.get_attr(&ctx, inode), statx_out))
}

fn attr_out(reply: Reply<'_>, export: Export, attr: Attr) -> usize {
    let timeout = export.timeout();
    reply.value(&fuse_attr_out {
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        dummy: 0,
        attr: reply::attr(export.nodeid(attr.inode), &attr),
    })
}

fn statx_out(reply: Reply<'_>, export: Export, attr: Attr) -> usize {
    let timeout = export.timeout();
    reply.value(&fuse_statx_out {
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        flags: 0,
        spare: [0; 2],
        stat: reply::statx(export.nodeid(attr.inode), &attr),
    })
}
