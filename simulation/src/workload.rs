//! Operations performed on a file system and on the oracle side by side.

use std::rc::Rc;
use std::time::Duration;

#[cfg(test)]
use bdev::sim::CrashChoice;
use blobfs::FsError;
use blobfs::fs::Attr;
use blobfs::ondisk::Timestamp;
use blobfs::units::InodeId;

use crate::operation::{Durability, Operation};
use crate::oracle::{Body, Content, Node, SECTOR, State, Step};
use crate::world::{Given, World};

/// A sync that was acknowledged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sync {
    /// Position in the disk's recorded history.
    pub(crate) acknowledged: usize,
    /// The state that it covers.
    pub(crate) state: usize,
    /// The inode that it covers; everything without one.
    pub(crate) inode: Option<InodeId>,
    pub(crate) data_only: bool,
    /// An error was reported before: data that had not been synced by then may be lost.
    pub(crate) data_lost: bool,
}

/// What was done since the recording began, and what the file system should be like after each operation.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// The state before the first operation, then after each.
    pub(crate) states: Vec<State>,
    pub(crate) operations: Vec<Operation>,
    /// Position in the disk's history at which each operation began.
    pub(crate) begun: Vec<usize>,
    pub(crate) syncs: Vec<Sync>,
    /// The state in which a failure of the device was first reported.
    pub(crate) failed: Option<usize>,
    /// Nobody can say what an operation that failed has done.
    pub(crate) unknown: bool,
}

impl Log {
    pub(crate) fn new(state: State) -> Self {
        Self { states: vec![state], ..Self::default() }
    }

    pub(crate) fn state(&self) -> &State {
        self.states.last().expect("the first state")
    }
}

/// A file system under test with its oracle.
pub(crate) struct Workload {
    pub(crate) world: World,
    pub(crate) log: Log,
}

impl Workload {
    /// Goes on from what is mounted.
    ///
    /// # Errors
    /// What the file system says when it is read.
    pub(crate) fn new(world: World) -> Result<Self, String> {
        let mut state = world.walk(&[]).map_err(|error| format!("walk: {error}"))?;
        state.was_read();
        Ok(Self { world, log: Log::new(state) })
    }

    pub(crate) fn state(&self) -> &State {
        self.log.state()
    }

    /// Performs one operation and compares what it gave and touched.
    ///
    /// # Errors
    /// How the file system differs from the oracle.
    pub(crate) fn perform(&mut self, operation: &Operation) -> Result<(), String> {
        let result = self.attempt(operation).map_err(|problem| format!("{operation}: {problem}"))?;
        match result {
            Ok(()) | Err(FsError::NoSpace) => Ok(()),
            Err(error) => Err(format!("{operation}: unexpectedly {error:?}")),
        }
    }

    /// As [`Workload::perform`]; an error that the oracle does not foresee, of a device that fails, is given
    /// back. What a data operation did before it is taken over.
    ///
    /// # Errors
    /// How the file system differs from the oracle.
    pub(crate) fn attempt(&mut self, operation: &Operation) -> Result<Result<(), FsError>, String> {
        // A time of its own for each operation.
        self.world.sleep(Duration::from_millis(1));
        let old = self.state().clone();
        let number = self.log.states.len();
        self.log.begun.push(self.world.disk.position());
        let started = self.world.now();
        let result = self.world.perform(operation, &old);
        let ended = self.world.now();
        let Given { made, written } = result.clone().unwrap_or_default();
        let step = Step { number, now: started, made, written };
        let mut new = old.clone();
        let expected = new.apply(operation, &step);
        let outcome = match (expected, result) {
            (Ok(()), Ok(given)) => {
                check_count(operation, given.written)?;
                self.adopt(&old, &mut new, operation, started, ended)?;
                self.note_sync(operation, &new, number);
                Ok(())
            }
            (Err(expected), Err(error)) if expected == error => {
                new = old;
                Ok(())
            }
            (expected, Err(error)) if expected.is_ok() || is_device_error(&error) => {
                if expected.is_err() {
                    new = old.clone();
                }
                if error == FsError::NoSpace && frees(operation, &old) {
                    return Err("a full device refuses what frees space".to_owned());
                }
                if is_device_error(&error) {
                    self.log.failed.get_or_insert(number);
                }
                new = self.part_done(&old, new, operation)?;
                Err(error)
            }
            (expected, result) => {
                return Err(format!("gave {result:?}, expected {expected:?}"));
            }
        };
        self.log.operations.push(operation.clone());
        self.log.states.push(new);
        Ok(outcome)
    }

    /// The state after a data operation that failed on its way: each sector as it was or as it should be. Other
    /// operations are atomic.
    fn part_done(&mut self, old: &State, mut new: State, operation: &Operation) -> Result<State, String> {
        let (Operation::Write { target, .. }
        | Operation::Fallocate { target, .. }
        | Operation::Truncate { target, .. }) = operation
        else {
            return Ok(old.clone());
        };
        // What does not exist cannot be done in part; it failed before that was known.
        let Ok(id) = old.target(target) else { return Ok(old.clone()) };
        let Ok(attr) = self.world.attr(id) else {
            // The device fails: nobody can say, and what a later sync covers is not known.
            self.log.unknown = true;
            return Ok(new);
        };
        let Ok(found) = self.world.content(id) else {
            self.log.unknown = true;
            let node = new.node_mut(id);
            (node.atime, node.mtime, node.ctime) = (None, attr.mtime, attr.ctime);
            if let Body::File(content) = &mut node.body {
                content.resize(attr.size);
            }
            return Ok(new);
        };
        let (Some(before), Some(after)) = (old.node(id).content(), new.node(id).content()) else {
            return Ok(old.clone());
        };
        let sizes = before.size.min(after.size)..=before.size.max(after.size);
        if !sizes.contains(&found.size) {
            return Err(format!("failed, and the size is {} (of {sizes:?})", found.size));
        }
        let (mut before, mut after) = (before.clone(), after.clone());
        before.resize(found.size);
        after.resize(found.size);
        if let Some(sector) = (0..found.size.div_ceil(512))
            .find(|n| found.sector(*n) != before.sector(*n) && found.sector(*n) != after.sector(*n))
        {
            // What was not synced before an earlier failure, or before a sync that fails, may be lost, and is not in the cache
            // for ever.
            let syncs =
                matches!(operation, Operation::Write { durability, .. } if *durability != Durability::None);
            if !syncs && self.log.failed.is_none_or(|failed| failed == self.log.states.len()) {
                return Err(format!("failed, and sector {sector} is neither old nor new"));
            }
            self.log.unknown = true;
        }
        let node = new.node_mut(id);
        (node.atime, node.mtime, node.ctime) = (None, attr.mtime, attr.ctime);
        node.body = Body::File(found);
        Ok(new)
    }

    /// Compares the attributes of what an operation touched, and takes over the exact times.
    fn adopt(
        &self,
        old: &State,
        new: &mut State,
        operation: &Operation,
        started: Timestamp,
        ended: Timestamp,
    ) -> Result<(), String> {
        let touched = new
            .nodes
            .iter()
            .filter(|(id, node)| old.nodes.get(id).is_none_or(|before| !Rc::ptr_eq(before, node)));
        let touched: Vec<InodeId> = touched.map(|(id, _)| *id).collect();
        for id in touched {
            let attr = self.world.attr(id).map_err(|error| format!("attributes of {id}: {error}"))?;
            let before = old.nodes.get(&id);
            let node = new.node_mut(id);
            same_attributes(node, &attr).map_err(|problem| format!("inode {id}: {problem}"))?;
            // Whether an allocation that changes no byte is a change is left open.
            let open = matches!(operation, Operation::Fallocate { .. });
            for (name, time, shown, earlier) in [
                ("mtime", &mut node.mtime, attr.mtime, before.map(|node| node.mtime)),
                ("ctime", &mut node.ctime, attr.ctime, before.map(|node| node.ctime)),
                ("atime", &mut node.atime.unwrap_or(attr.atime), attr.atime, None),
            ] {
                let just_now = *time == started && (started..=ended).contains(&shown);
                if *time != shown && !just_now && !(open && earlier == Some(shown)) {
                    return Err(format!("inode {id}: {name} is {shown:?}, expected {time:?}"));
                }
                *time = shown;
            }
            node.atime = node.atime.map(|_| attr.atime);
        }
        Ok(())
    }

    fn note_sync(&mut self, operation: &Operation, state: &State, number: usize) {
        let (inode, data_only) = match operation {
            Operation::Syncfs => (None, false),
            Operation::Fsync { target, data_only } => (state.target(target).ok(), *data_only),
            Operation::Write { target, durability: Durability::Data, .. } => {
                (state.target(target).ok(), true)
            }
            Operation::Write { target, durability: Durability::Full, .. } => {
                (state.target(target).ok(), false)
            }
            _ => return,
        };
        if self.log.unknown {
            return;
        }
        self.log.syncs.push(Sync {
            acknowledged: self.world.disk.position(),
            state: number,
            inode,
            data_only,
            data_lost: self.log.failed.is_some(),
        });
    }

    /// Compares everything.
    ///
    /// # Errors
    /// The first difference.
    pub(crate) fn compare(&mut self) -> Result<(), String> {
        let expected = self.log.states.last_mut().expect("the first state");
        let found = self.world.walk(&expected.nameless()).map_err(|error| format!("walk: {error}"))?;
        same_state(expected, &found)?;
        expected.was_read();
        Ok(())
    }

    /// Compares what the file system believes of its space with what a check of the device counts, when everything was
    /// just synced.
    ///
    /// # Errors
    /// The difference.
    #[cfg(test)]
    pub(crate) fn compare_space(&self) -> Result<(), String> {
        // What was freed waits for the end of background work.
        self.world.settle();
        let disk = self.world.disk.crash(CrashChoice::Everything);
        let held = self.state().nameless().len();
        match held {
            0 => self.world.same_space(&crate::world::fsck(&disk)?),
            _ => Ok(()),
        }
    }

    /// Unmounts and mounts again, and compares everything.
    ///
    /// # Errors
    /// The first difference.
    #[cfg(test)]
    pub(crate) fn remount(self, geometry: &crate::world::Geometry) -> Result<Self, String> {
        let seconds = self.world.now().seconds as u64 + 10 - 1_000_000;
        let disk = self.world.unmount().map_err(|error| format!("unmount: {error}"))?;
        self.world.same_space(&crate::world::fsck(&disk)?)?;
        let mut expected = self.log.states.into_iter().next_back().expect("the first state");
        forget_nameless(&mut expected);
        let world = World::mount(&disk, geometry, seconds)?;
        let mut workload = Self { world, log: Log::new(expected) };
        workload.compare()?;
        Ok(workload)
    }
}

/// The client is gone, and with it every file that has no name.
pub(crate) fn forget_nameless(state: &mut State) {
    for id in state.nameless() {
        state.nodes.remove(&id);
    }
    state.held.clear();
    // Numbers of operations begin again.
    for id in state.nodes.keys().copied().collect::<Vec<_>>() {
        state.node_mut(id).changes = Default::default();
    }
}

fn is_device_error(error: &FsError) -> bool {
    matches!(error, FsError::Device(_) | FsError::ReadOnly)
}

/// A write that accepts less than it was given has run out of space.
fn check_count(operation: &Operation, written: Option<usize>) -> Result<(), String> {
    match (operation, written) {
        (Operation::Write { len, .. }, Some(written)) if written == 0 || written > *len => {
            Err(format!("{written} bytes were written"))
        }
        _ => Ok(()),
    }
}

/// Whether an operation must succeed on a full device.
fn frees(operation: &Operation, state: &State) -> bool {
    match operation {
        Operation::Unlink { .. } | Operation::Rmdir { .. } | Operation::RemoveXattr { .. } => true,
        Operation::Truncate { target, size: 0 } => state
            .target(target)
            .is_ok_and(|id| state.node(id).content().is_some_and(|c| c.stored().next().is_some())),
        _ => false,
    }
}

fn same_attributes(node: &Node, attr: &Attr) -> Result<(), String> {
    let expected = (node.mode, node.nlink, node.uid, node.gid);
    let found = (attr.mode, attr.nlink, attr.uid, attr.gid);
    if expected != found {
        return Err(format!("mode, nlink, uid, gid are {found:?}, expected {expected:?}"));
    }
    match node.content() {
        Some(content) if content.size != attr.size => {
            Err(format!("the size is {}, expected {}", attr.size, content.size))
        }
        _ => Ok(()),
    }
}

/// Compares everything but content and times of files.
pub(crate) fn same_metadata(expected: &Node, found: &Node) -> Result<(), String> {
    let what = |node: &Node| (node.mode, node.nlink, node.uid, node.gid);
    if what(expected) != what(found) {
        return Err(format!("mode, nlink, uid, gid are {:?}, expected {:?}", what(found), what(expected)));
    }
    if expected.xattrs != found.xattrs {
        return Err(format!("attributes are {:?}, expected {:?}", names(found), names(expected)));
    }
    match (&expected.body, &found.body) {
        (Body::File(_), Body::File(_)) => {}
        (expected, found) if expected == found => {}
        (expected, found) => return Err(format!("is {found:?}, expected {expected:?}")),
    }
    match expected.atime {
        Some(atime) if Some(atime) != found.atime => {
            Err(format!("atime is {:?}, expected {atime:?}", found.atime))
        }
        _ => Ok(()),
    }
}

/// Compares the times of content and inode.
pub(crate) fn same_times(expected: &Node, found: &Node) -> Result<(), String> {
    let times = |node: &Node| (node.mtime, node.ctime);
    match times(expected) == times(found) {
        true => Ok(()),
        false => Err(format!("mtime, ctime are {:?}, expected {:?}", times(found), times(expected))),
    }
}

fn names(node: &Node) -> Vec<(String, usize)> {
    node.xattrs
        .iter()
        .map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), value.len()))
        .collect()
}

fn same_content(expected: &Content, found: &Content) -> Result<(), String> {
    if expected.size != found.size {
        return Err(format!("the size is {}, expected {}", found.size, expected.size));
    }
    let mut stored = expected.stored().chain(found.stored());
    match stored.find(|number| expected.sector(*number) != found.sector(*number)) {
        Some(number) => {
            let (expected, found) = (expected.sector(number), found.sector(number));
            let at = (0..expected.len()).find(|at| expected[*at] != found[*at]).unwrap_or_default();
            let (expected, found) = (&expected[at..(at + 8).min(512)], &found[at..(at + 8).min(512)]);
            let byte = number * SECTOR + at as u64;
            Err(format!("at byte {byte} there is {found:02x?}, expected {expected:02x?}"))
        }
        None => Ok(()),
    }
}

/// Compares two states as a whole.
fn same_state(expected: &State, found: &State) -> Result<(), String> {
    same_inodes(expected, found)?;
    for (id, node) in &expected.nodes {
        let found = found.node(*id);
        let same = same_metadata(node, found).and_then(|()| same_times(node, found));
        let same = same.and_then(|()| match (node.content(), found.content()) {
            (Some(expected), Some(found)) => same_content(expected, found),
            _ => Ok(()),
        });
        same.map_err(|problem| format!("inode {id}: {problem}"))?;
    }
    Ok(())
}

/// Compares which inodes there are.
pub(crate) fn same_inodes(expected: &State, found: &State) -> Result<(), String> {
    let missing = expected.nodes.keys().find(|id| !found.nodes.contains_key(id));
    let surplus = found.nodes.keys().find(|id| !expected.nodes.contains_key(id));
    match (missing, surplus) {
        (None, None) => Ok(()),
        (missing, surplus) => Err(format!("inode {missing:?} is missing, {surplus:?} should not be there")),
    }
}
