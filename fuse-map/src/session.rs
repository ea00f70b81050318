//! A client: what it negotiated, which nodes it knows, and the way of its requests.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bdev::IoBuffers;
use blobfs::fs::types::{Context, SessionId};
use blobfs::store::Pins;
use blobfs::units::InodeId;
use blobfs::{Fs, FsError, Stop, Try};

use crate::abi::*;
use crate::decode::{self, Args};
use crate::errno::Errno;
use crate::op::{self, Op};
use crate::reply::{self, Reply};
use crate::{Handled, Request};

/// Largest WRITE and READ in bytes; the client's limit of pages follows from it.
pub(crate) const TRANSFER_MAX: u32 = 1 << 20;
/// Pages of 4 KiB in [`TRANSFER_MAX`].
const PAGES_MAX: u16 = 256;
/// Requests in the background (read-ahead, write-back) that a client may have under way. The kernel's
/// default of 12 would starve the device.
const BACKGROUND_MAX: u16 = 256;
/// From here on the client's kernel calls its background busy: the kernel's usual three quarters.
const BACKGROUND_CONGESTED: u16 = 192;
/// How long an exclusive client may rely on what it knows; nobody else changes it.
const EXCLUSIVE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Who caches an export's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CachePolicy {
    /// The client alone uses the tree: it caches without asking, writes back late, and does not tell of
    /// open and close.
    Exclusive,
    /// Nothing is cached by the client: every read, write and look comes here.
    None,
}

/// A part of a file system that a client sees.
#[derive(Debug, Clone, Copy)]
pub struct Export {
    /// Its root directory, the client's node 1.
    pub root: InodeId,
    /// Whether the client may change nothing.
    pub readonly: bool,
    /// What the client caches.
    pub cache: CachePolicy,
}

impl Export {
    /// The client's number for an inode.
    pub(crate) fn nodeid(&self, inode: InodeId) -> u64 {
        if inode == self.root { FUSE_ROOT_ID } else { inode.0 }
    }

    /// How long the client may rely on entries and attributes.
    pub(crate) fn timeout(&self) -> Duration {
        match self.cache {
            CachePolicy::Exclusive => EXCLUSIVE_TIMEOUT,
            CachePolicy::None => Duration::ZERO,
        }
    }

    /// What is taken of the client's offer.
    fn accepted(&self, offered: InitFlags) -> InitFlags {
        let always = InitFlags::all()
            .difference(Self::exclusive_flags())
            .difference(InitFlags::FUSE_AUTO_INVAL_DATA | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        let by_policy = match self.cache {
            CachePolicy::Exclusive => Self::exclusive_flags(),
            CachePolicy::None => InitFlags::FUSE_AUTO_INVAL_DATA | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        };
        offered & (always | by_policy)
    }

    fn exclusive_flags() -> InitFlags {
        InitFlags::FUSE_WRITEBACK_CACHE
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_CACHE_SYMLINKS
    }
}

/// A client's session over an export. It begins anew with each INIT, DESTROY and reset.
pub struct Session {
    fs: Rc<Fs>,
    export: Export,
    id: Cell<SessionId>,
    /// Grows with each new beginning: futures of earlier ones notice.
    generation: Cell<u64>,
    /// What INIT agreed on; `None` before.
    agreed: Cell<Option<InitFlags>>,
}

impl Session {
    /// A session of one client.
    pub fn new(fs: Rc<Fs>, export: Export) -> Rc<Self> {
        let id = Cell::new(fs.open_session());
        Rc::new(Self { fs, export, id, generation: Cell::new(0), agreed: Cell::new(None) })
    }

    /// Handles one request. Never blocks, and never panics whatever the client sent.
    pub fn handle(self: &Rc<Self>, request: Request) -> Handled {
        let Request { readable, writable } = &request;
        let Some(header) = decode::header(readable) else { return request.refuse(libc::EINVAL) };
        let reply = Reply { writable, unique: header.unique };
        let call = Call { session: self, header, readable, reply };
        let op = op::find(header.opcode);
        if let Op::OneWay(run) = op {
            run(&call);
            return Handled::NoReply;
        }
        if writable.len() < reply::HEADER_LEN {
            return Handled::Unanswerable;
        }
        call.serve(op).unwrap_or_else(|errno| Handled::Done(reply.error(errno)))
    }

    /// Drops what the client holds: lookups, pins, what INIT agreed on. Requests under way get no reply any
    /// more; see the crate's invariants for what becomes of them.
    pub fn reset(&self) {
        self.generation.set(self.generation.get() + 1);
        self.agreed.set(None);
        let before = self.id.replace(self.fs.open_session());
        self.fs.close_session(before);
    }

    /// INIT: begins anew, and agrees on the protocol.
    pub(crate) fn init(&self, client: &fuse_init_in, flags2: u32) -> Result<fuse_init_out, Errno> {
        if client.major < FUSE_KERNEL_VERSION
            || (client.major == FUSE_KERNEL_VERSION && client.minor < MINOR_VERSION_MIN)
        {
            return Err(Errno(libc::EPROTO));
        }
        if self.agreed.get().is_some() {
            self.reset();
        }
        if client.major > FUSE_KERNEL_VERSION {
            // The client answers with an INIT of our version; no other field counts.
            return Ok(init_out(client, InitFlags::empty()));
        }
        let offered = InitFlags::from_bits_truncate(u64::from(client.flags) | u64::from(flags2) << 32);
        let accepted = self.export.accepted(offered);
        self.agreed.set(Some(accepted));
        Ok(init_out(client, accepted))
    }

    fn check_generation(&self, generation: u64) -> bool {
        self.generation.get() == generation
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.fs.close_session(self.id.get());
    }
}

fn init_out(client: &fuse_init_in, flags: InitFlags) -> fuse_init_out {
    fuse_init_out {
        major: FUSE_KERNEL_VERSION,
        minor: FUSE_KERNEL_MINOR_VERSION,
        max_readahead: client.max_readahead,
        flags: flags.bits() as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: BACKGROUND_CONGESTED,
        max_write: TRANSFER_MAX,
        time_gran: 1,
        max_pages: PAGES_MAX,
        map_alignment: 0,
        flags2: (flags.bits() >> 32) as u32,
        unused: [0; 7],
    }
}

/// One request on its way.
pub(crate) struct Call<'a> {
    session: &'a Rc<Session>,
    header: fuse_in_header,
    readable: &'a IoBuffers,
    /// Where the reply goes.
    pub(crate) reply: Reply<'a>,
}

impl<'a> Call<'a> {
    fn serve(&self, op: Op) -> Result<Handled, Errno> {
        let (run, room, changes) = match op {
            Op::Answered { run, room, changes } => (run, room, changes),
            Op::Refused(errno) => return Err(Errno(errno)),
            Op::OneWay(_) => return Ok(Handled::NoReply),
        };
        if self.session.agreed.get().is_none()
            && !matches!(self.header.opcode, op::FUSE_INIT | op::FUSE_DESTROY)
        {
            return Err(Errno(libc::EIO));
        }
        if self.reply.room() < room {
            return Err(Errno::INVALID);
        }
        if changes && self.session.export.readonly {
            return Err(Errno(libc::EROFS));
        }
        run(self)
    }

    /// The arguments.
    pub(crate) fn args(&self) -> Result<Args<'a>, Errno> {
        Args::new(self.readable, &self.header)
    }

    /// The session.
    pub(crate) fn session(&self) -> &Session {
        self.session
    }

    /// The file system.
    pub(crate) fn fs(&self) -> &'a Rc<Fs> {
        &self.session.fs
    }

    /// The export.
    pub(crate) fn export(&self) -> Export {
        self.session.export
    }

    /// Whether INIT agreed on this.
    pub(crate) fn agreed(&self, flags: InitFlags) -> bool {
        self.session.agreed.get().is_some_and(|agreed| agreed.contains(flags))
    }

    /// Who calls.
    pub(crate) fn context(&self) -> Context {
        let fuse_in_header { unique, uid, gid, pid, .. } = self.header;
        Context { session: self.session.id.get(), request: unique, uid, gid, pid, supplementary_gid: None }
    }

    /// The inode that the request is about.
    pub(crate) fn node(&self) -> Result<InodeId, Errno> {
        self.resolve(self.header.nodeid)
    }

    /// The inode behind a node id that the client must know.
    pub(crate) fn resolve(&self, nodeid: u64) -> Result<InodeId, Errno> {
        let inode = self.inode(nodeid);
        if nodeid != FUSE_ROOT_ID {
            self.fs().check_known(self.session.id.get(), inode)?;
        }
        Ok(inode)
    }

    /// The client gives back lookups of a node.
    pub(crate) fn forget(&self, nodeid: u64, nlookup: u64) {
        self.fs().forget(self.session.id.get(), self.inode(nodeid), nlookup);
    }

    /// FORGET of the node that the request is about.
    pub(crate) fn forget_node(&self, nlookup: u64) {
        self.forget(self.header.nodeid, nlookup);
    }

    /// The inode that the request names, whether the client may know it or not.
    pub(crate) fn named_inode(&self) -> InodeId {
        self.inode(self.header.nodeid)
    }

    fn inode(&self, nodeid: u64) -> InodeId {
        if nodeid == FUSE_ROOT_ID { self.session.export.root } else { InodeId(nodeid) }
    }

    /// Answers with what `attempt` gives: at once when it does not wait, else from a future that satisfies
    /// its waits and calls it again.
    pub(crate) fn run<T: 'static>(
        &self,
        mut attempt: impl FnMut(&Rc<Fs>, Export) -> Try<T> + 'static,
        encode: impl FnOnce(Reply<'_>, Export, T) -> usize + 'static,
    ) -> Handled {
        let export = self.export();
        let mut wait = match attempt(self.fs(), export) {
            Ok(value) => return Handled::Done(encode(self.reply, export, value)),
            Err(Stop::Fail(error)) => return Handled::Done(self.reply.error(error.into())),
            Err(Stop::Wait(wait)) => wait,
        };
        let fs = self.fs().clone();
        let session = self.session.clone();
        let generation = session.generation.get();
        self.answer_later(
            async move {
                let mut pins = Pins::default();
                loop {
                    fs.wait_pinned(wait, &mut pins).await?;
                    if !session.check_generation(generation) {
                        return Err(FsError::Interrupted);
                    }
                    match attempt(&fs, export) {
                        Ok(value) => return Ok(value),
                        Err(Stop::Fail(error)) => return Err(error),
                        Err(Stop::Wait(next)) => wait = next,
                    }
                }
            },
            encode,
        )
    }

    /// Answers from a future with what `operation` gives.
    pub(crate) fn answer_later<T: 'static>(
        &self,
        operation: impl Future<Output = Result<T, FsError>> + 'static,
        encode: impl FnOnce(Reply<'_>, Export, T) -> usize + 'static,
    ) -> Handled {
        let session = self.session.clone();
        let generation = session.generation.get();
        let writable = self.reply.writable.clone();
        let unique = self.reply.unique;
        Handled::Pending(Box::pin(async move {
            let result = operation.await;
            if !session.check_generation(generation) {
                return 0;
            }
            let reply = Reply { writable: &writable, unique };
            match result {
                Ok(value) => encode(reply, session.export, value),
                Err(error) => reply.error(error.into()),
            }
        }))
    }
}

/// Encodes a reply without a body.
pub(crate) fn no_body<T>(reply: Reply<'_>, _export: Export, _value: T) -> usize {
    reply.body_in_place(0)
}
