//! LOOKUP, FORGET, and everything that makes, moves or removes a name.

use std::rc::Rc;

use blobfs::fs::types::{Attr, Context, CreateSpec, Entry, NewNode, SetAttr};
use blobfs::units::InodeId;
use blobfs::{Fs, FsError, Stop, Try};
use smallvec::SmallVec;
use zerocopy::FromZeros;

use crate::Handled;
use crate::abi::*;
use crate::decode::{self, Extensions, Name};
use crate::errno::Errno;
use crate::reply::{self, Reply};
use crate::session::{CachePolicy, Call, Export, no_body};

/// A name that does not exist is an answer too, which an exclusive client remembers.
pub(crate) fn lookup(call: &Call<'_>) -> Result<Handled, Errno> {
    let name = call.args()?.lookup_name()?;
    match name.as_slice() {
        b"." => return lookup_self(call),
        b".." => return lookup_parent(call),
        _ => {}
    }
    let (ctx, parent) = (call.context(), call.node()?);
    Ok(call.run(
        move |fs, export| match fs.lookup(&ctx, parent, &name) {
            Ok(entry) => Ok(Some(entry)),
            Err(Stop::Fail(FsError::NotFound)) if export.cache == CachePolicy::Exclusive => Ok(None),
            Err(stop) => Err(stop),
        },
        |reply, export, entry| match entry {
            Some(entry) => entry_out(reply, export, entry),
            None => no_entry_out(reply, export),
        },
    ))
}

/// "." finds an inode of any kind by its number: a client that opens a file handle may have forgotten the
/// node meanwhile. What the client does not know must lie in the export, which of anything but a directory
/// can be told only when the export is the whole file system.
fn lookup_self(call: &Call<'_>) -> Result<Handled, Errno> {
    let (ctx, inode, known) = (call.context(), call.named_inode(), call.node().is_ok());
    let attempt = move |fs: &Rc<Fs>, export: Export| {
        if !known && !fs.is_inside(inode, export.root)? {
            return Err(FsError::Stale.into());
        }
        fs.lookup_inode(&ctx, inode)
    };
    Ok(call.run(attempt, entry_out))
}

/// ".." stops at the export's root; a directory that was moved out of the export has no parent for the client.
fn lookup_parent(call: &Call<'_>) -> Result<Handled, Errno> {
    let (ctx, inode) = (call.context(), call.node()?);
    let attempt = move |fs: &Rc<Fs>, export: Export| {
        if inode == export.root || !fs.is_inside(inode, export.root)? {
            return Err(FsError::Stale.into());
        }
        fs.lookup(&ctx, inode, b"..")
    };
    Ok(call.run(attempt, entry_out))
}

pub(crate) fn forget(call: &Call<'_>) {
    let args = call.args().and_then(|mut args| args.take::<fuse_forget_in>());
    if let Ok(args) = args {
        call.forget_node(args.nlookup);
    }
}

pub(crate) fn batch_forget(call: &Call<'_>) {
    let Ok(mut args) = call.args() else { return };
    let Ok(batch) = args.take::<fuse_batch_forget_in>() else { return };
    let here = args.left() / size_of::<fuse_forget_one>();
    for _ in 0..here.min(batch.count as usize) {
        let Ok(one) = args.take::<fuse_forget_one>() else { return };
        call.forget(one.nodeid, one.nlookup);
    }
}

pub(crate) fn readlink(call: &Call<'_>) -> Result<Handled, Errno> {
    let (ctx, inode) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.read_link(&ctx, inode), |reply, _, target| reply.bytes(&target)))
}

/// A new inode as the client asked for it, owned.
struct NewInode {
    ctx: Context,
    parent: InodeId,
    name: Name,
    kind: Kind,
    mode: u32,
    umask: u32,
    extensions: Extensions,
}

enum Kind {
    File,
    Directory,
    Symlink(Name),
    Special { file_type: u32, rdev: u32 },
}

impl NewInode {
    fn with_spec<T>(&self, create: impl FnOnce(&CreateSpec<'_>) -> T) -> T {
        let security: SmallVec<[(&[u8], &[u8]); 1]> = self
            .extensions
            .security
            .iter()
            .map(|(name, value)| (name.as_slice(), value.as_slice()))
            .collect();
        let node = match &self.kind {
            Kind::File => NewNode::File,
            Kind::Directory => NewNode::Directory,
            Kind::Symlink(target) => NewNode::Symlink(target),
            Kind::Special { file_type, rdev } => NewNode::Special { file_type: *file_type, rdev: *rdev },
        };
        create(&CreateSpec { node, mode: self.mode, umask: self.umask, security: &security })
    }

    fn create(&self, fs: &Rc<Fs>) -> Try<Entry> {
        self.with_spec(|spec| fs.create(&self.ctx, self.parent, &self.name, spec))
    }
}

/// Who creates: the group that the client sent along counts as one of the caller's.
fn creator(call: &Call<'_>, extensions: &Extensions) -> Context {
    Context { supplementary_gid: extensions.group, ..call.context() }
}

fn permissions(mode: u32) -> u32 {
    mode & !libc::S_IFMT
}

fn make(call: &Call<'_>, new: NewInode) -> Handled {
    call.run(move |fs, _| new.create(fs), entry_out)
}

pub(crate) fn symlink(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let name = args.name()?;
    let kind = Kind::Symlink(args.target()?);
    let extensions = args.extensions()?;
    let (ctx, parent) = (creator(call, &extensions), call.node()?);
    Ok(make(call, NewInode { ctx, parent, name, kind, mode: 0o777, umask: 0, extensions }))
}

pub(crate) fn mknod(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let fuse_mknod_in { mode, rdev, umask, .. } = args.take()?;
    let name = args.name()?;
    let extensions = args.extensions()?;
    let kind = match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => Kind::File,
        file_type @ (libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK) => {
            Kind::Special { file_type, rdev }
        }
        _ => return Err(Errno::INVALID),
    };
    let (ctx, parent) = (creator(call, &extensions), call.node()?);
    Ok(make(call, NewInode { ctx, parent, name, kind, mode: permissions(mode), umask, extensions }))
}

pub(crate) fn mkdir(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let fuse_mkdir_in { mode, umask } = args.take()?;
    let name = args.name()?;
    let extensions = args.extensions()?;
    let (ctx, parent, kind) = (creator(call, &extensions), call.node()?, Kind::Directory);
    Ok(make(call, NewInode { ctx, parent, name, kind, mode: permissions(mode), umask, extensions }))
}

/// Creates and opens. Without `O_EXCL` a file that exists by now is opened instead.
pub(crate) fn create(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let fuse_create_in { flags, mode, umask, open_flags } = args.take()?;
    let name = args.name()?;
    let extensions = args.extensions()?;
    let (ctx, parent, kind) = (creator(call, &extensions), call.node()?, Kind::File);
    let new = NewInode { ctx, parent, name, kind, mode: permissions(mode), umask, extensions };
    let exclusive = decode::open_flag(flags, libc::O_EXCL);
    let truncation = decode::open_flag(flags, libc::O_TRUNC).then(|| SetAttr {
        size: Some(0),
        kill_privileges: open_flags & FUSE_OPEN_KILL_SUIDGID != 0,
        ..SetAttr::default()
    });
    let attempt = move |fs: &Rc<Fs>, _| match new.create(fs) {
        Err(Stop::Fail(FsError::Exists)) if !exclusive => open_existing(fs, &new, truncation.as_ref()),
        other => other,
    };
    Ok(call.run(attempt, create_out))
}

/// CREATE on a name that was there. Its lookup counts only when the client is told of it: a truncation that
/// has to wait gives it back and starts anew.
fn open_existing(fs: &Rc<Fs>, new: &NewInode, truncation: Option<&SetAttr>) -> Try<Entry> {
    let entry = fs.lookup(&new.ctx, new.parent, &new.name)?;
    let inode = entry.attr.inode;
    let opened = match (entry.attr.mode & libc::S_IFMT, truncation) {
        (libc::S_IFREG, None) => Ok(entry),
        (libc::S_IFREG, Some(change)) => fs.set_attr(&new.ctx, inode, change).map(|attr| Entry { attr }),
        (libc::S_IFDIR, _) => Err(FsError::IsADirectory.into()),
        // The client looks again and then follows the link or opens the device itself.
        _ => Err(FsError::Exists.into()),
    };
    if opened.is_err() {
        fs.forget(new.ctx.session, inode, 1);
    }
    opened
}

/// A file without a name; the one that the request carries means nothing.
pub(crate) fn tmpfile(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let fuse_create_in { mode, umask, .. } = args.take()?;
    args.skip_name()?;
    let extensions = args.extensions()?;
    let (ctx, parent, kind) = (creator(call, &extensions), call.node()?, Kind::File);
    let new = NewInode { ctx, parent, name: Name::new(), kind, mode: permissions(mode), umask, extensions };
    let attempt = move |fs: &Rc<Fs>, _| new.with_spec(|spec| fs.create_tmpfile(&ctx, parent, spec));
    Ok(call.run(attempt, create_out))
}

pub(crate) fn link(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let inode = call.resolve(args.take::<fuse_link_in>()?.oldnodeid)?;
    let name = args.name()?;
    let (ctx, parent) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.link(&ctx, inode, parent, &name), entry_out))
}

pub(crate) fn unlink(call: &Call<'_>) -> Result<Handled, Errno> {
    let name = call.args()?.name()?;
    let (ctx, parent) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.unlink(&ctx, parent, &name), no_body))
}

pub(crate) fn rmdir(call: &Call<'_>) -> Result<Handled, Errno> {
    let name = call.args()?.name()?;
    let (ctx, parent) = (call.context(), call.node()?);
    Ok(call.run(move |fs, _| fs.rmdir(&ctx, parent, &name), no_body))
}

pub(crate) fn rename(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let fuse_rename_in { newdir } = args.take()?;
    move_name(call, args, newdir, 0)
}

pub(crate) fn rename2(call: &Call<'_>) -> Result<Handled, Errno> {
    let mut args = call.args()?;
    let fuse_rename2_in { newdir, flags, .. } = args.take()?;
    move_name(call, args, newdir, flags)
}

fn move_name(call: &Call<'_>, mut args: decode::Args<'_>, newdir: u64, flags: u32) -> Result<Handled, Errno> {
    let (mode, whiteout) = decode::rename_mode(flags)?;
    let (name, new_name) = (args.name()?, args.name()?);
    let (ctx, parent, new_parent) = (call.context(), call.node()?, call.resolve(newdir)?);
    Ok(call
        .run(move |fs, _| fs.rename(&ctx, (parent, &name), (new_parent, &new_name), mode, whiteout), no_body))
}

/// `struct fuse_entry_out` of an inode that the client now knows.
pub(crate) fn entry(export: Export, attr: &Attr) -> fuse_entry_out {
    let timeout = export.timeout();
    let nodeid = export.nodeid(attr.inode);
    fuse_entry_out {
        nodeid,
        generation: 0,
        entry_valid: timeout.as_secs(),
        attr_valid: timeout.as_secs(),
        entry_valid_nsec: timeout.subsec_nanos(),
        attr_valid_nsec: timeout.subsec_nanos(),
        attr: reply::attr(nodeid, attr),
    }
}

fn entry_out(reply: Reply<'_>, export: Export, new: Entry) -> usize {
    reply.value(&entry(export, &new.attr))
}

/// Node 0: there is no such entry, and that stays so for the timeout.
fn no_entry_out(reply: Reply<'_>, export: Export) -> usize {
    let timeout = export.timeout();
    reply.value(&fuse_entry_out {
        entry_valid: timeout.as_secs(),
        entry_valid_nsec: timeout.subsec_nanos(),
        ..fuse_entry_out::new_zeroed()
    })
}

fn create_out(reply: Reply<'_>, export: Export, new: Entry) -> usize {
    let open_flags = match export.cache {
        CachePolicy::Exclusive => FOPEN_KEEP_CACHE,
        CachePolicy::None => FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
    };
    let open = fuse_open_out { fh: 0, open_flags, backing_id: 0 };
    reply.value(&fuse_create_out { entry: entry(export, &new.attr), open })
}
