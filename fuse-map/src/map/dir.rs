//! READDIR and READDIRPLUS.
//!
//! Both scan into private memory as many entries as the client's buffer takes; READDIRPLUS then looks each
//! of them up. What was given before a wait is answered, and the client comes again behind it.

use std::ops::ControlFlow;
use std::rc::Rc;

use blobfs::fs::types::{Context, DirEntry};
use blobfs::units::InodeId;
use blobfs::{Fs, Stop, Try};
use zerocopy::{FromZeros, IntoBytes};

use crate::Handled;
use crate::abi::*;
use crate::decode::{self, Name};
use crate::errno::Errno;
use crate::map::name;
use crate::session::{Call, Export, TRANSFER_MAX};

/// A scan that the client asked for.
#[derive(Clone, Copy)]
struct Scan {
    ctx: Context,
    dir: InodeId,
    cookie: u64,
    /// Bytes of the client's buffer.
    room: usize,
}

impl Scan {
    fn new(call: &Call<'_>) -> Result<Self, Errno> {
        let args: fuse_read_in = call.args()?.take()?;
        decode::check_range(args.offset, 0)?;
        let room = call.reply.room().min(args.size as usize).min(TRANSFER_MAX as usize);
        Ok(Self { ctx: call.context(), dir: call.node()?, cookie: args.offset, room })
    }

    /// The inode that the client sees: the export's root is its own parent.
    fn inode(&self, export: Export, entry: &DirEntry<'_>) -> InodeId {
        if entry.name == b".." && self.dir == export.root { export.root } else { entry.inode }
    }
}

pub(crate) fn readdir(call: &Call<'_>) -> Result<Handled, Errno> {
    let scan = Scan::new(call)?;
    Ok(call.run(move |fs, export| list(fs, export, &scan), |reply, _, entries| reply.bytes(&entries)))
}

pub(crate) fn readdirplus(call: &Call<'_>) -> Result<Handled, Errno> {
    let scan = Scan::new(call)?;
    Ok(call.run(move |fs, export| list_plus(fs, export, &scan), |reply, _, entries| reply.bytes(&entries)))
}

fn list(fs: &Rc<Fs>, export: Export, scan: &Scan) -> Try<Vec<u8>> {
    let mut out = Vec::new();
    let mut full = false;
    fs.read_dir(&scan.ctx, scan.dir, scan.cookie, &mut |entry| {
        full = out.len() + dirent_len(entry.name) > scan.room;
        if full {
            return ControlFlow::Break(());
        }
        let nodeid = export.nodeid(scan.inode(export, &entry));
        push_dirent(&mut out, nodeid, entry.cookie, entry.file_type, entry.name);
        ControlFlow::Continue(())
    })?;
    not_too_small(out, full)
}

/// An empty answer means the end: a buffer that the next entry does not fit is refused instead.
fn not_too_small(out: Vec<u8>, full: bool) -> Try<Vec<u8>> {
    if out.is_empty() && full { Err(blobfs::FsError::Invalid.into()) } else { Ok(out) }
}

/// An entry between its scan and its lookup.
struct Found {
    nodeid: u64,
    file_type: u8,
    cookie: u64,
    name: Name,
}

fn list_plus(fs: &Rc<Fs>, export: Export, scan: &Scan) -> Try<Vec<u8>> {
    let (found, full) = collect(fs, export, scan)?;
    let mut out = Vec::with_capacity(scan.room.min(found.len() * 256));
    for entry in &found {
        let attributes = match look_up(fs, export, scan, entry) {
            Ok(attributes) => attributes,
            Err(stop) if out.is_empty() => return Err(stop),
            Err(_) => break,
        };
        out.extend_from_slice(attributes.as_bytes());
        push_dirent(&mut out, entry.nodeid, entry.cookie, entry.file_type, &entry.name);
    }
    not_too_small(out, full)
}

fn collect(fs: &Rc<Fs>, export: Export, scan: &Scan) -> Try<(Vec<Found>, bool)> {
    let mut found = Vec::new();
    let (mut len, mut full) = (0, false);
    fs.read_dir(&scan.ctx, scan.dir, scan.cookie, &mut |entry| {
        len += size_of::<fuse_entry_out>() + dirent_len(entry.name);
        full = len > scan.room;
        if full {
            return ControlFlow::Break(());
        }
        found.push(Found {
            nodeid: export.nodeid(scan.inode(export, &entry)),
            file_type: entry.file_type,
            cookie: entry.cookie,
            name: Name::from_slice(entry.name),
        });
        ControlFlow::Continue(())
    })?;
    Ok((found, full))
}

/// "." and "..", and an entry whose inode cannot be read, have node 0: the client looks them up itself.
fn look_up(fs: &Rc<Fs>, export: Export, scan: &Scan, found: &Found) -> Try<fuse_entry_out> {
    if matches!(found.name.as_slice(), b"." | b"..") {
        return Ok(fuse_entry_out::new_zeroed());
    }
    match fs.lookup(&scan.ctx, scan.dir, &found.name) {
        Ok(entry) => Ok(name::entry(export, &entry.attr)),
        Err(Stop::Fail(_)) => Ok(fuse_entry_out::new_zeroed()),
        Err(wait) => Err(wait),
    }
}

fn dirent_len(name: &[u8]) -> usize {
    (size_of::<fuse_dirent>() + name.len()).next_multiple_of(FUSE_REC_ALIGN)
}

fn push_dirent(out: &mut Vec<u8>, nodeid: u64, cookie: u64, file_type: u8, name: &[u8]) {
    let end = out.len() + dirent_len(name);
    let dirent =
        fuse_dirent { ino: nodeid, off: cookie, namelen: name.len() as u32, kind: u32::from(file_type) };
    out.extend_from_slice(dirent.as_bytes());
    out.extend_from_slice(name);
    out.resize(end, 0);
}
