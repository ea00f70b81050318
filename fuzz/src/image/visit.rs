//! Using a mounted file system: reading all of it, and changing some of it.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::rc::Rc;

use blobfs::fs::{
    Context, CreateSpec, FallocateMode, IoFlags, NewNode, RenameMode, SeekTarget, SetAttr, XattrMode,
    XattrValue,
};
use blobfs::units::InodeId;
use blobfs::{Fs, FsError};

use crate::disk::private;

/// Inodes that are looked at, and entries of a directory: more than a base image has.
const INODES_MAX: usize = 400;

/// Bytes that are read of a file, at its beginning, its end and around its holes.
const PART: usize = 8 << 10;

/// Holes of a file that are looked for.
const HOLES_MAX: usize = 8;

/// What was found.
pub(super) struct Seen {
    ctx: Context,
    /// Names in the root directory, of directories or of anything else.
    root: Vec<(Vec<u8>, InodeId, u32)>,
    files: Vec<(InodeId, u64)>,
}

/// Reads names, attributes, targets, content and extended attributes of everything.
pub(super) async fn read_everything(fs: &Rc<Fs>) -> Result<Seen, FsError> {
    let session = fs.open_session();
    let ctx = Context { session, request: 1, uid: 0, gid: 0, pid: 1, supplementary_gid: None };
    let mut seen = Seen { ctx, root: Vec::new(), files: Vec::new() };
    let (mut todo, mut known) = (vec![InodeId::ROOT], BTreeSet::from([InodeId::ROOT]));
    while let Some(id) = todo.pop() {
        let attr = fs.run(|fs| fs.get_attr(&ctx, id)).await?;
        read_xattrs(fs, ctx, id).await?;
        match attr.mode & 0o170_000 {
            0o040_000 => {
                for (name, inode) in entries(fs, ctx, id).await? {
                    let entry = fs.run(|fs| fs.lookup(&ctx, id, &name)).await?;
                    assert_eq!(entry.attr.inode, inode, "a scan and a lookup disagree");
                    if id == InodeId::ROOT {
                        seen.root.push((name, inode, entry.attr.mode & 0o170_000));
                    }
                    if known.len() < INODES_MAX && known.insert(inode) {
                        todo.push(inode);
                    }
                }
            }
            0o100_000 => {
                read_file(fs, ctx, id, attr.size).await?;
                seen.files.push((id, attr.size));
            }
            0o120_000 => drop(fs.run(|fs| fs.read_link(&ctx, id)).await?),
            _ => {}
        }
    }
    Ok(seen)
}

/// Names and inodes of a directory, without "." and "..".
async fn entries(fs: &Rc<Fs>, ctx: Context, dir: InodeId) -> Result<Vec<(Vec<u8>, InodeId)>, FsError> {
    let (mut found, mut cookie) = (Vec::new(), 0);
    loop {
        let before = cookie;
        // What a call that waits gave before is given again.
        let (count, start) = (found.len(), cookie);
        fs.run(|fs| {
            found.truncate(count);
            cookie = start;
            fs.read_dir(&ctx, dir, start, &mut |entry| {
                assert!(entry.cookie > cookie && entry.cookie < 1 << 63, "a cookie that does not ascend");
                cookie = entry.cookie;
                if !matches!(entry.name, b"." | b"..") {
                    found.push((entry.name.to_vec(), entry.inode));
                }
                ControlFlow::Continue(())
            })
        })
        .await?;
        if cookie == before || found.len() > INODES_MAX {
            return Ok(found);
        }
    }
}

async fn read_xattrs(fs: &Rc<Fs>, ctx: Context, id: InodeId) -> Result<(), FsError> {
    let names = fs.run(|fs| fs.list_xattr(&ctx, id)).await?;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let value = fs.run(|fs| fs.get_xattr(&ctx, id, name)).await?;
        if let XattrValue::Stored(_) = value {
            fs.read_xattr(ctx, id, name).await?;
        }
    }
    Ok(())
}

async fn read_file(fs: &Rc<Fs>, ctx: Context, id: InodeId, size: u64) -> Result<(), FsError> {
    let mut places = vec![0, size.saturating_sub(PART as u64)];
    let (mut at, mut target) = (0, SeekTarget::Hole);
    for _ in 0..HOLES_MAX {
        match fs.run(|fs| fs.seek(&ctx, id, at, target)).await {
            Ok(found) => {
                assert!((at..=size).contains(&found), "a seek from {at} leads to {found} of {size}");
                at = found;
            }
            Err(FsError::NoData) => break,
            Err(error) => return Err(error),
        }
        places.push(at.saturating_sub(PART as u64 / 2));
        target = match target {
            SeekTarget::Hole => SeekTarget::Data,
            SeekTarget::Data => SeekTarget::Hole,
        };
    }
    for (number, offset) in places.into_iter().enumerate() {
        let flags = IoFlags { direct: number % 2 == 1, ..IoFlags::default() };
        let there = size.saturating_sub(offset).min(PART as u64);
        let read = fs.read(ctx, id, offset, private(&vec![0; PART]), flags).await? as u64;
        if read < there {
            // Damage behind what was read: whoever goes on meets it.
            let room = private(&vec![0; PART]);
            let more = fs.read(ctx, id, offset + read, room, flags).await?;
            panic!("{read} bytes of {there} at {offset} were read, and then {more} without an error");
        }
    }
    Ok(())
}

/// Changes files and names. A full device is no reason to stop.
pub(super) async fn change_something(fs: &Rc<Fs>, seen: &Seen) -> Result<(), FsError> {
    let ctx = seen.ctx;
    for (file, size) in seen.files.iter().take(4) {
        let bytes = private(&[b'y'; 5000]);
        allow(fs.write(ctx, *file, 700, bytes, IoFlags::default()).await)?;
        allow(fs.fallocate(ctx, *file, FallocateMode::PunchHole, 512, 3000).await)?;
        let change = SetAttr { size: Some(size / 2), ..SetAttr::default() };
        allow(fs.run(|fs| fs.set_attr(&ctx, *file, &change)).await)?;
        allow(fs.run(|fs| fs.set_xattr(&ctx, *file, b"user.added", b"value", XattrMode::Set, false)).await)?;
    }
    let directory = CreateSpec { node: NewNode::Directory, mode: 0o755, umask: 0, security: &[] };
    let made = allow(fs.run(|fs| fs.create(&ctx, InodeId::ROOT, b"made here", &directory)).await)?;
    for (number, (name, _, kind)) in seen.root.iter().enumerate().take(8) {
        match (number % 2, &made, *kind) {
            (0, Some(made), _) => {
                let to = (made.attr.inode, name.as_slice());
                let from = (InodeId::ROOT, name.as_slice());
                allow(fs.run(|fs| fs.rename(&ctx, from, to, RenameMode::Replace, false)).await)?;
            }
            (_, _, 0o040_000) => drop(allow(fs.run(|fs| fs.rmdir(&ctx, InodeId::ROOT, name)).await)?),
            _ => drop(allow(fs.run(|fs| fs.unlink(&ctx, InodeId::ROOT, name)).await)?),
        }
    }
    let file = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
    if let Some(new) = allow(fs.run(|fs| fs.create(&ctx, InodeId::ROOT, b"new file", &file)).await)? {
        allow(fs.write(ctx, new.attr.inode, 0, private(&[b'z'; 20_000]), IoFlags::default()).await)?;
    }
    allow(fs.sync_all().await)?;
    Ok(())
}

/// Goes on after errors that the state of a sound file system may be the reason of.
fn allow<T>(result: Result<T, FsError>) -> Result<Option<T>, FsError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(
            FsError::NoSpace
            | FsError::NotEmpty
            | FsError::Exists
            | FsError::FileTooLarge
            | FsError::TooManyLinks
            | FsError::IsADirectory
            | FsError::NotADirectory
            | FsError::NotFound
            | FsError::Invalid,
        ) => Ok(None),
        Err(error) => Err(error),
    }
}
