//! The file system as it should be: a plain tree in memory, and what each operation does to it.
//!
//! A [`State`] is cheap to clone, so that a test keeps one for every operation of a workload. Each inode
//! remembers which operations last changed what a sync of it promises.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use blobfs::FsError;
use blobfs::fs::{FallocateMode, RenameMode, XattrMode};
use blobfs::ondisk::Timestamp;
use blobfs::units::InodeId;

use crate::operation::{NewKind, Operation, Target, pattern, symlink_target, xattr_name};

/// What a power cut does not tear.
pub(crate) const SECTOR: u64 = 512;

pub(crate) type Sector = [u8; SECTOR as usize];

pub(crate) const ZEROS: Sector = [0; SECTOR as usize];

const S_IFMT: u32 = 0o170_000;

/// Number of an inode that the file system has not made.
pub(crate) const UNKNOWN: InodeId = InodeId(u64::MAX);

/// Bytes of a file, sparse. Bytes behind the size are zero.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Content {
    pub(crate) size: u64,
    sectors: BTreeMap<u64, Rc<Sector>>,
}

impl Content {
    pub(crate) fn sector(&self, number: u64) -> &Sector {
        self.sectors.get(&number).map_or(&ZEROS, |sector| &**sector)
    }

    /// Numbers of the sectors that may hold something but zeros.
    pub(crate) fn stored(&self) -> impl Iterator<Item = u64> {
        self.sectors.keys().copied()
    }

    /// Changes bytes without changing the size.
    pub(crate) fn fill(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let inside = (at % SECTOR) as usize;
            let count = (SECTOR as usize - inside).min(bytes.len() - done);
            let sector = self.sectors.entry(at / SECTOR).or_insert_with(|| Rc::new(ZEROS));
            Rc::make_mut(sector)[inside..inside + count].copy_from_slice(&bytes[done..done + count]);
            done += count;
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.fill(offset, bytes);
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    pub(crate) fn zero(&mut self, from: u64, to: u64) {
        let to = to.min(self.size);
        let touched: Vec<u64> = self.sectors.range(from / SECTOR..).map(|(number, _)| *number).collect();
        for number in touched.into_iter().take_while(|number| from < to && number * SECTOR < to) {
            let start = from.max(number * SECTOR);
            let end = to.min((number + 1) * SECTOR);
            self.fill(start, &vec![0; (end - start) as usize]);
        }
    }

    pub(crate) fn resize(&mut self, size: u64) {
        self.zero(size, u64::MAX);
        self.sectors.retain(|number, _| number * SECTOR < size);
        self.size = size;
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    File(Content),
    Directory { entries: BTreeMap<Vec<u8>, InodeId>, parent: InodeId },
    Symlink(Vec<u8>),
    Special { rdev: u32 },
}

/// Operations (numbers of states) that last changed an inode.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Changes {
    /// Names or attributes: what a sync of the inode covers.
    pub(crate) metadata: usize,
    /// The same without permissions, owners and times: what a data sync covers.
    pub(crate) essential: usize,
    /// Changes of the size by truncation, with the new size.
    pub(crate) truncations: Vec<(usize, u64)>,
    /// The inode replaced another by a rename, which brings its data.
    pub(crate) settled: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Type and permissions.
    pub(crate) mode: u32,
    pub(crate) nlink: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Unknown once something may have read the file.
    pub(crate) atime: Option<Timestamp>,
    pub(crate) mtime: Timestamp,
    pub(crate) ctime: Timestamp,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) body: Body,
    pub(crate) changes: Changes,
}

impl Node {
    pub(crate) fn content(&self) -> Option<&Content> {
        match &self.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory { .. })
    }
}

/// What the oracle has to be told about an operation that was performed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Number of the state that follows.
    pub(crate) number: usize,
    pub(crate) now: Timestamp,
    /// The inode that it made.
    pub(crate) made: Option<InodeId>,
    /// Bytes that a write accepted.
    pub(crate) written: Option<usize>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<InodeId, Rc<Node>>,
    /// Inodes that the client goes on knowing.
    pub(crate) held: BTreeSet<InodeId>,
}

type Outcome<T = ()> = Result<T, FsError>;

impl State {
    pub(crate) fn node(&self, id: InodeId) -> &Node {
        &self.nodes[&id]
    }

    pub(crate) fn node_mut(&mut self, id: InodeId) -> &mut Node {
        Rc::make_mut(self.nodes.get_mut(&id).expect("an inode that is there"))
    }

    /// Everything that has content has been read, which changes the time of access now or later.
    pub(crate) fn was_read(&mut self) {
        for node in self.nodes.values_mut().filter(|node| !matches!(node.body, Body::Special { .. })) {
            Rc::make_mut(node).atime = None;
        }
    }

    /// Files without a name, in order.
    pub(crate) fn nameless(&self) -> Vec<InodeId> {
        self.nodes.iter().filter(|(_, node)| node.nlink == 0).map(|(id, _)| *id).collect()
    }

    /// Paths of everything of a kind, by depth first.
    pub(crate) fn paths(&self, what: impl Fn(&Body) -> bool) -> Vec<String> {
        let mut paths = Vec::new();
        let mut todo = vec![(String::new(), InodeId::ROOT)];
        while let Some((path, id)) = todo.pop() {
            let body = &self.node(id).body;
            if let Body::Directory { entries, .. } = body {
                for (name, inode) in entries.iter().rev() {
                    let name = String::from_utf8_lossy(name);
                    let below = if path.is_empty() { name.into_owned() } else { format!("{path}/{name}") };
                    todo.push((below, *inode));
                }
            }
            if what(body) {
                paths.push(path);
            }
        }
        paths
    }

    fn entries(&self, directory: InodeId) -> Outcome<&BTreeMap<Vec<u8>, InodeId>> {
        match &self.node(directory).body {
            Body::Directory { entries, .. } => Ok(entries),
            _ => Err(FsError::NotADirectory),
        }
    }

    fn entry(&self, directory: InodeId, name: &[u8]) -> Outcome<Option<InodeId>> {
        Ok(self.entries(directory)?.get(name).copied())
    }

    pub(crate) fn resolve(&self, path: &str) -> Outcome<InodeId> {
        let mut at = InodeId::ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            at = self.entry(at, name.as_bytes())?.ok_or(FsError::NotFound)?;
        }
        Ok(at)
    }

    fn place(&self, path: &str) -> Outcome<(InodeId, Vec<u8>)> {
        let (directory, name) = split(path);
        let directory = self.resolve(directory)?;
        self.entries(directory)?;
        Ok((directory, name.as_bytes().to_vec()))
    }

    /// The inode that a target is.
    pub(crate) fn target(&self, target: &Target) -> Outcome<InodeId> {
        match target {
            Target::Path(path) => self.resolve(path),
            Target::Nameless(number) => {
                let nameless = self.nameless();
                nameless.get(number % nameless.len().max(1)).copied().ok_or(FsError::NotFound)
            }
        }
    }

    fn file(&self, target: &Target) -> Outcome<InodeId> {
        let id = self.target(target)?;
        match self.node(id).body {
            Body::File(_) => Ok(id),
            Body::Directory { .. } => Err(FsError::IsADirectory),
            _ => Err(FsError::Invalid),
        }
    }

    /// Does what the operation should do, or says how it should fail.
    pub(crate) fn apply(&mut self, operation: &Operation, step: &Step) -> Outcome {
        match operation {
            Operation::Create { path, kind, mode } => self.create(path, *kind, *mode, step),
            Operation::Tmpfile { directory } => self.tmpfile(directory, step),
            Operation::Link { target, path } => self.link(target, path, step),
            Operation::Unlink { path, hold } => self.unlink(path, *hold, step),
            Operation::Rmdir { path } => self.rmdir(path, step),
            Operation::Rename { from, to, mode: RenameMode::Exchange, whiteout } => {
                self.exchange(from, to, *whiteout, step)
            }
            Operation::Rename { from, to, mode, whiteout } => self.rename(from, to, *mode, *whiteout, step),
            Operation::Chmod { target, mode } => {
                self.set_attr(target, step, |node| node.mode = node.mode & S_IFMT | mode)
            }
            Operation::Chown { target, uid, gid } => {
                self.set_attr(target, step, |node| (node.uid, node.gid) = (*uid, *gid))
            }
            Operation::Utimes { target, seconds } => {
                let time = Timestamp { seconds: *seconds, nanoseconds: 1 };
                self.set_attr(target, step, |node| (node.atime, node.mtime) = (Some(time), time))
            }
            Operation::Truncate { target, size } => self.truncate(target, *size, step),
            Operation::Write { target, offset, len, tag, append, from_cache, .. } => {
                let id = self.file(target)?;
                let written = step.written.unwrap_or(*len);
                if !from_cache {
                    let node = self.node_mut(id);
                    (node.mtime, node.ctime) = (step.now, step.now);
                }
                self.write(id, (!append).then_some(*offset), written, *tag);
                Ok(())
            }
            Operation::Fallocate { target, mode, offset, len } => {
                self.fallocate(target, *mode, *offset, *len, step)
            }
            Operation::SetXattr { target, name, len, tag, mode } => {
                let id = self.target(target)?;
                self.set_xattr(id, xattr_name(*name), pattern(*tag, 0, *len), *mode, step)
            }
            Operation::RemoveXattr { target, name } => {
                let id = self.target(target)?;
                let removed = self.node_mut(id).xattrs.remove(&xattr_name(*name));
                removed.ok_or(FsError::NoAttribute)?;
                self.changed(id, step);
                Ok(())
            }
            Operation::Fsync { target, .. } => self.target(target).map(drop),
            Operation::Forget { nameless } => {
                if let Ok(id) = self.target(&Target::Nameless(*nameless)) {
                    self.held.remove(&id);
                    self.nodes.remove(&id);
                }
                Ok(())
            }
            Operation::Syncfs | Operation::Sleep { .. } => Ok(()),
        }
    }

    /// Names or attributes of an inode change.
    fn changed(&mut self, id: InodeId, step: &Step) {
        let node = self.node_mut(id);
        node.ctime = step.now;
        node.changes.metadata = step.number;
        node.changes.essential = step.number;
    }

    fn changed_entries(&mut self, directory: InodeId, step: &Step) {
        self.changed(directory, step);
        self.node_mut(directory).mtime = step.now;
    }

    /// Puts `id` under a name, or takes the name away.
    fn set_entry(&mut self, directory: InodeId, name: &[u8], id: Option<InodeId>, step: &Step) {
        let Body::Directory { entries, .. } = &mut self.node_mut(directory).body else {
            unreachable!("checked before")
        };
        match id {
            Some(id) => drop(entries.insert(name.to_vec(), id)),
            None => drop(entries.remove(name)),
        }
        self.changed_entries(directory, step);
        if let Some(id) = id
            && let Body::Directory { parent, .. } = &mut self.node_mut(id).body
        {
            *parent = directory;
        }
        let subdirectories = self.entries(directory).expect("a directory").values();
        let subdirectories = subdirectories.filter(|id| self.nodes[id].is_directory()).count();
        self.node_mut(directory).nlink = 2 + subdirectories as u32;
    }

    fn new_node(mode: u32, body: Body, step: &Step) -> Node {
        Node {
            mode,
            nlink: if matches!(body, Body::Directory { .. }) { 2 } else { 1 },
            uid: crate::world::UID,
            gid: crate::world::GID,
            atime: Some(step.now),
            mtime: step.now,
            ctime: step.now,
            xattrs: BTreeMap::new(),
            body,
            changes: Changes { metadata: step.number, essential: step.number, ..Changes::default() },
        }
    }

    fn create(&mut self, path: &str, kind: NewKind, mode: u32, step: &Step) -> Outcome {
        let (directory, name) = self.place(path)?;
        if self.entry(directory, &name)?.is_some() {
            return Err(FsError::Exists);
        }
        let (file_type, body) = match kind {
            NewKind::File => (0o100_000, Body::File(Content::default())),
            NewKind::Directory => {
                (0o040_000, Body::Directory { entries: BTreeMap::new(), parent: directory })
            }
            NewKind::Symlink { target_len } => (0o120_000, Body::Symlink(symlink_target(target_len))),
            NewKind::Fifo => (0o010_000, Body::Special { rdev: 0 }),
            NewKind::CharDevice { rdev } => (0o020_000, Body::Special { rdev }),
        };
        let mode = if matches!(body, Body::Symlink(_)) { 0o777 } else { mode };
        let id = step.made.unwrap_or(UNKNOWN);
        self.nodes.insert(id, Rc::new(Self::new_node(file_type | mode, body, step)));
        self.set_entry(directory, &name, Some(id), step);
        Ok(())
    }

    fn tmpfile(&mut self, directory: &str, step: &Step) -> Outcome {
        let directory = self.resolve(directory)?;
        self.entries(directory)?;
        let node = Self::new_node(0o100_600, Body::File(Content::default()), step);
        let id = step.made.unwrap_or(UNKNOWN);
        self.nodes.insert(id, Rc::new(Node { nlink: 0, ..node }));
        self.held.insert(id);
        Ok(())
    }

    fn link(&mut self, target: &Target, path: &str, step: &Step) -> Outcome {
        let id = self.target(target)?;
        let (directory, name) = self.place(path)?;
        if self.node(id).is_directory() {
            return Err(FsError::NotPermitted);
        }
        if self.entry(directory, &name)?.is_some() {
            return Err(FsError::Exists);
        }
        self.node_mut(id).nlink += 1;
        self.changed(id, step);
        self.set_entry(directory, &name, Some(id), step);
        Ok(())
    }

    /// An inode loses a name.
    fn lose_name(&mut self, id: InodeId, step: &Step) {
        self.changed(id, step);
        let node = self.node_mut(id);
        node.nlink = if node.is_directory() { 0 } else { node.nlink - 1 };
        if node.nlink == 0 && !self.held.contains(&id) {
            self.nodes.remove(&id);
        }
    }

    fn unlink(&mut self, path: &str, hold: bool, step: &Step) -> Outcome {
        let (directory, name) = self.place(path)?;
        let id = self.entry(directory, &name)?.ok_or(FsError::NotFound)?;
        if self.node(id).is_directory() {
            return Err(FsError::IsADirectory);
        }
        if hold && self.node(id).nlink == 1 {
            self.held.insert(id);
        }
        self.set_entry(directory, &name, None, step);
        self.lose_name(id, step);
        Ok(())
    }

    fn is_empty(&self, directory: InodeId) -> bool {
        self.entries(directory).is_ok_and(BTreeMap::is_empty)
    }

    fn rmdir(&mut self, path: &str, step: &Step) -> Outcome {
        let (directory, name) = self.place(path)?;
        let id = self.entry(directory, &name)?.ok_or(FsError::NotFound)?;
        if !self.node(id).is_directory() {
            return Err(FsError::NotADirectory);
        }
        if !self.is_empty(id) {
            return Err(FsError::NotEmpty);
        }
        self.set_entry(directory, &name, None, step);
        self.lose_name(id, step);
        Ok(())
    }

    /// Whether `below` is `directory` or lies in it.
    fn is_below(&self, directory: InodeId, below: InodeId) -> bool {
        let mut at = below;
        loop {
            if at == directory {
                return true;
            }
            match self.node(at).body {
                Body::Directory { parent, .. } if parent != at => at = parent,
                _ => return false,
            }
        }
    }

    fn rename(&mut self, from: &str, to: &str, mode: RenameMode, whiteout: bool, step: &Step) -> Outcome {
        let (old, old_name) = self.place(from)?;
        let (new, new_name) = self.place(to)?;
        let id = self.entry(old, &old_name)?.ok_or(FsError::NotFound)?;
        let moves_directory = self.node(id).is_directory();
        if moves_directory && self.is_below(id, new) {
            return Err(FsError::Invalid);
        }
        let replaced = self.entry(new, &new_name)?;
        if let Some(replaced) = replaced {
            if mode == RenameMode::NoReplace {
                return Err(FsError::Exists);
            }
            if replaced == id {
                return Ok(());
            }
            match (moves_directory, self.node(replaced).is_directory()) {
                (true, false) => return Err(FsError::NotADirectory),
                (false, true) => return Err(FsError::IsADirectory),
                (true, true) if !self.is_empty(replaced) => return Err(FsError::NotEmpty),
                _ => {}
            }
        }
        self.set_entry(old, &old_name, None, step);
        self.set_entry(new, &new_name, Some(id), step);
        self.changed(id, step);
        if let Some(replaced) = replaced {
            self.lose_name(replaced, step);
            self.node_mut(id).changes.settled = step.number;
        }
        if whiteout {
            let made = step.made.unwrap_or(UNKNOWN);
            let node = Self::new_node(0o020_000, Body::Special { rdev: 0 }, step);
            self.nodes.insert(made, Rc::new(node));
            self.set_entry(old, &old_name, Some(made), step);
        }
        Ok(())
    }

    fn exchange(&mut self, a: &str, b: &str, whiteout: bool, step: &Step) -> Outcome {
        let (a_dir, a_name) = self.place(a)?;
        let (b_dir, b_name) = self.place(b)?;
        if whiteout {
            return Err(FsError::Invalid);
        }
        let a_id = self.entry(a_dir, &a_name)?.ok_or(FsError::NotFound)?;
        let b_id = self.entry(b_dir, &b_name)?.ok_or(FsError::NotFound)?;
        if a_id == b_id {
            return Ok(());
        }
        let into_itself = |id, other| self.node(id).is_directory() && self.is_below(id, other);
        if into_itself(a_id, b_dir) || into_itself(b_id, a_dir) {
            return Err(FsError::Invalid);
        }
        self.set_entry(a_dir, &a_name, Some(b_id), step);
        self.set_entry(b_dir, &b_name, Some(a_id), step);
        self.changed(a_id, step);
        self.changed(b_id, step);
        Ok(())
    }

    fn set_attr(&mut self, target: &Target, step: &Step, change: impl FnOnce(&mut Node)) -> Outcome {
        let id = self.target(target)?;
        let node = self.node_mut(id);
        change(node);
        node.ctime = step.now;
        node.changes.metadata = step.number;
        Ok(())
    }

    fn truncate(&mut self, target: &Target, size: u64, step: &Step) -> Outcome {
        let id = self.file(target)?;
        self.changed(id, step);
        let node = self.node_mut(id);
        node.mtime = step.now;
        node.changes.truncations.push((step.number, size));
        if let Body::File(content) = &mut node.body {
            content.resize(size);
        }
        Ok(())
    }

    /// Writes at `offset`, or at the end.
    fn write(&mut self, id: InodeId, offset: Option<u64>, len: usize, tag: u64) {
        let node = self.node_mut(id);
        if let Body::File(content) = &mut node.body {
            let offset = offset.unwrap_or(content.size);
            content.write(offset, &pattern(tag, offset, len));
        }
    }

    fn fallocate(
        &mut self,
        target: &Target,
        mode: FallocateMode,
        offset: u64,
        len: u64,
        step: &Step,
    ) -> Outcome {
        let id = self.file(target)?;
        let node = self.node_mut(id);
        (node.mtime, node.ctime) = (step.now, step.now);
        let Body::File(content) = &mut node.body else { unreachable!("a file") };
        match mode {
            FallocateMode::PunchHole => content.zero(offset, offset + len),
            FallocateMode::Zero { keep_size } => {
                content.zero(offset, offset + len);
                if !keep_size {
                    content.size = content.size.max(offset + len);
                }
            }
            FallocateMode::Allocate { keep_size: false } => content.size = content.size.max(offset + len),
            FallocateMode::Allocate { keep_size: true } => {}
        }
        Ok(())
    }

    fn set_xattr(
        &mut self,
        id: InodeId,
        name: Vec<u8>,
        value: Vec<u8>,
        mode: XattrMode,
        step: &Step,
    ) -> Outcome {
        let exists = self.node(id).xattrs.contains_key(&name);
        match mode {
            XattrMode::Create if exists => return Err(FsError::Exists),
            XattrMode::Replace if !exists => return Err(FsError::NoAttribute),
            _ => {}
        }
        self.node_mut(id).xattrs.insert(name, value);
        self.changed(id, step);
        Ok(())
    }
}

/// Directory and name of a path.
pub(crate) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}
