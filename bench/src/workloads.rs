//! What the synthetic client asks for: one type per kind of request, and the files they work on.

use anyhow::{Context as _, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use crate::{
    client::{
        Client, ClientError,
        channel::{Channel, Data},
        create_args,
        fuse::{
            self, AttrOut, CreateOut, EntryOut, FsyncIn, GetattrIn, O_DIRECT, O_RDWR, Opcode, ROOT_ID,
            WriteOut, bytes,
        },
        memory::{Memory, PAGE_SIZE},
        read_args, write_args,
    },
    load::Workload,
};

/// Bytes of one request while a file is filled.
const FILL_LEN: usize = 1 << 20;

/// First word of a page of a test file: tells which page it is. Odd factor, so that all pages differ.
fn page_tag(offset: u64) -> u64 {
    (offset / PAGE_SIZE as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A file whose pages tell which they are.
#[derive(Debug, Clone, Copy)]
pub struct TestFile {
    node: u64,
    fh: u64,
    /// Bytes.
    pub len: u64,
    /// `O_DIRECT` or 0.
    flags: u32,
}

impl TestFile {
    /// Makes the file in the root, fills it, syncs it, and opens it with or without `O_DIRECT`.
    pub fn make(client: &mut Client, name: &str, len: u64, direct: bool) -> anyhow::Result<Self> {
        match client.unlink(ROOT_ID, name) {
            Ok(()) | Err(ClientError::Errno { errno: fuse::ENOENT, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let created = client.create(ROOT_ID, name, 0)?;
        let (node, fh) = (created.entry.nodeid, created.open.fh);
        let step = FILL_LEN.min(client.max_write() as usize);
        for offset in (0..len).step_by(step) {
            let part = usize::try_from(len - offset).map_or(step, |rest| rest.min(step));
            client.write(node, fh, offset, &tagged_pages(offset, part))?;
        }
        client.fsync(node, fh)?;
        client.release(node, fh)?;
        let flags = if direct { O_DIRECT } else { 0 };
        let fh = client.open(node, O_RDWR | flags)?;
        Ok(Self { node, fh, len, flags })
    }
}

fn tagged_pages(offset: u64, len: usize) -> Vec<u8> {
    let mut pages = vec![0; len];
    for (page, at) in pages.chunks_mut(PAGE_SIZE).zip((offset..).step_by(PAGE_SIZE)) {
        page.chunks_mut(8).for_each(|word| word.copy_from_slice(&page_tag(at).to_le_bytes()[..word.len()]));
    }
    pages
}

/// Offsets at multiples of `len`, random, and remembered per slot.
struct Offsets {
    random: SmallRng,
    count: u64,
    len: u32,
    in_slots: Vec<u64>,
}

impl Offsets {
    fn new(file_len: u64, len: u32, depth: usize) -> Self {
        let count = file_len / u64::from(len);
        Self { random: SmallRng::seed_from_u64(1), count, len, in_slots: vec![0; depth] }
    }

    #[inline]
    fn next(&mut self, slot: usize) -> u64 {
        self.in_slots[slot] = self.random.random_range(0..self.count) * u64::from(self.len);
        self.in_slots[slot]
    }
}

/// Reads at random offsets, and checks the first word of the first and the last page.
pub struct RandomRead {
    file: TestFile,
    offsets: Offsets,
}

impl RandomRead {
    /// Reads of `len` bytes, a multiple of a page.
    pub fn new(file: TestFile, len: u32, depth: usize) -> Self {
        Self { file, offsets: Offsets::new(file.len, len, depth) }
    }
}

impl Workload for RandomRead {
    #[inline]
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool {
        let len = self.offsets.len;
        let args = read_args(self.file.fh, self.offsets.next(slot), len, self.file.flags);
        let request = (Opcode::Read, self.file.node);
        channel.offer(memory, slot, request, &[bytes(&args)], (Some(0), Data::FromDevice(len)));
        true
    }

    #[inline]
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64> {
        let len = self.offsets.len as usize;
        succeeded(channel, memory, slot, Opcode::Read, len)?;
        let (offset, data) = (self.offsets.in_slots[slot], channel.data_offset(slot));
        let last = len - PAGE_SIZE;
        let is_right = memory.load::<u64>(data) == page_tag(offset)
            && memory.load::<u64>(data + last) == page_tag(offset + last as u64);
        ensure!(is_right, "wrong content read at offset {offset}");
        Ok(1)
    }
}

/// Writes of a page at random offsets, each followed by FSYNC if asked for.
pub struct RandomWrite {
    file: TestFile,
    offsets: Offsets,
    with_fsync: bool,
    is_sync_next: bool,
}

impl RandomWrite {
    /// Each write on its own.
    pub fn new(file: TestFile, depth: usize) -> Self {
        let offsets = Offsets::new(file.len, PAGE_SIZE as u32, depth);
        Self { file, offsets, with_fsync: false, is_sync_next: false }
    }

    /// A write and an FSYNC are one operation; only at depth 1.
    pub fn synced(file: TestFile) -> Self {
        Self { with_fsync: true, ..Self::new(file, 1) }
    }
}

impl Workload for RandomWrite {
    #[inline]
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool {
        if self.is_sync_next {
            let args = FsyncIn { fh: self.file.fh, fsync_flags: 0, padding: 0 };
            channel.offer(
                memory,
                slot,
                (Opcode::Fsync, self.file.node),
                &[bytes(&args)],
                (Some(0), Data::None),
            );
            return true;
        }
        let offset = self.offsets.next(slot);
        memory.store(channel.data_offset(slot), &page_tag(offset));
        let args = write_args(self.file.fh, offset, PAGE_SIZE as u32, self.file.flags);
        let shape = (Some(size_of::<WriteOut>() as u32), Data::ToDevice(PAGE_SIZE as u32));
        channel.offer(memory, slot, (Opcode::Write, self.file.node), &[bytes(&args)], shape);
        true
    }

    #[inline]
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64> {
        if self.is_sync_next {
            self.is_sync_next = false;
            return succeeded(channel, memory, slot, Opcode::Fsync, 0).map(|()| 1);
        }
        succeeded(channel, memory, slot, Opcode::Write, size_of::<WriteOut>())?;
        let out: WriteOut = channel.answer(memory, slot);
        ensure!(out.size as usize == PAGE_SIZE, "short write");
        self.is_sync_next = self.with_fsync;
        Ok(u64::from(!self.with_fsync))
    }
}

/// GETATTR of one file.
pub struct Getattr {
    node: u64,
}

impl Getattr {
    /// Of a file.
    pub fn new(file: TestFile) -> Self {
        Self { node: file.node }
    }
}

impl Workload for Getattr {
    #[inline]
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool {
        let args = GetattrIn { getattr_flags: 0, dummy: 0, fh: 0 };
        let shape = (Some(size_of::<AttrOut>() as u32), Data::None);
        channel.offer(memory, slot, (Opcode::Getattr, self.node), &[bytes(&args)], shape);
        true
    }

    #[inline]
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64> {
        succeeded(channel, memory, slot, Opcode::Getattr, size_of::<AttrOut>()).map(|()| 1)
    }
}

/// Names of a directory's files.
fn file_name(number: u64) -> [u8; 10] {
    let mut name = *b"f00000000\0";
    let mut rest = number;
    for digit in name[1..9].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    name
}

/// LOOKUP of the names of a directory in turn.
pub struct Lookup {
    directory: u64,
    count: u64,
    next: u64,
    /// How often the files have been looked up, which is to be forgotten at the end.
    done: u64,
}

impl Lookup {
    /// Makes `count` files.
    pub fn make(client: &mut Client, count: u64) -> anyhow::Result<Self> {
        let directory = client.mkdir(ROOT_ID, "lookup")?.nodeid;
        for number in 0..count {
            let created = client.create(directory, text(&file_name(number)), 0)?;
            client.release(created.entry.nodeid, created.open.fh)?;
        }
        Ok(Self { directory, count, next: 0, done: 0 })
    }
}

impl Workload for Lookup {
    #[inline]
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool {
        let name = file_name(self.next);
        self.next = (self.next + 1) % self.count;
        let shape = (Some(size_of::<EntryOut>() as u32), Data::None);
        channel.offer(memory, slot, (Opcode::Lookup, self.directory), &[&name], shape);
        true
    }

    #[inline]
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64> {
        succeeded(channel, memory, slot, Opcode::Lookup, size_of::<EntryOut>())?;
        self.done += 1;
        Ok(1)
    }
}

/// CREATE of numbered files in one directory.
pub struct Create {
    directory: u64,
    extension: Vec<u8>,
    next: u64,
    limit: u64,
    /// What came of it: node and file handle. Replies may come in another order than requests, so names are apart.
    pub created: Vec<(u64, u64)>,
}

impl Create {
    /// Up to `limit` files in a directory.
    pub fn new(client: &Client, directory: u64, limit: u64) -> Self {
        let created = Vec::with_capacity(usize::try_from(limit).unwrap_or(0));
        Self { directory, extension: client.create_extension(), next: 0, limit, created }
    }

    /// Closes the files.
    pub fn release(&self, client: &mut Client) -> Result<(), ClientError> {
        self.created.iter().try_for_each(|(node, fh)| client.release(*node, *fh))
    }

    /// Drops the nodes' lookups.
    pub fn forget(&self, client: &mut Client) -> Result<(), ClientError> {
        let nodes: Vec<u64> = self.created.iter().map(|(node, _)| *node).collect();
        client.forget_all(&nodes)
    }
}

impl Workload for Create {
    #[inline]
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool {
        if self.next == self.limit {
            return false;
        }
        let name = file_name(self.next);
        self.next += 1;
        let args = create_args(0);
        let parts = [bytes(&args), name.as_slice(), self.extension.as_slice()];
        let shape = (Some(size_of::<CreateOut>() as u32), Data::None);
        channel.offer(memory, slot, (Opcode::Create, self.directory), &parts, shape);
        if !self.extension.is_empty() {
            channel.set_extension_len(memory, slot, self.extension.len() as u16);
        }
        true
    }

    #[inline]
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64> {
        succeeded(channel, memory, slot, Opcode::Create, size_of::<CreateOut>())?;
        let out: CreateOut = channel.answer(memory, slot);
        self.created.push((out.entry.nodeid, out.open.fh));
        Ok(1)
    }
}

/// UNLINK of the files that [`Create`] made.
pub struct Unlink {
    directory: u64,
    next: u64,
    count: u64,
}

impl Unlink {
    /// The first `count` files of a directory.
    pub fn new(directory: u64, count: u64) -> Self {
        Self { directory, next: 0, count }
    }
}

impl Workload for Unlink {
    #[inline]
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool {
        if self.next == self.count {
            return false;
        }
        let name = file_name(self.next);
        self.next += 1;
        channel.offer(memory, slot, (Opcode::Unlink, self.directory), &[&name], (Some(0), Data::None));
        true
    }

    #[inline]
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64> {
        succeeded(channel, memory, slot, Opcode::Unlink, 0).map(|()| 1)
    }
}

/// A reply without error and of the expected length.
#[inline]
fn succeeded(
    channel: &Channel,
    memory: &Memory,
    slot: usize,
    opcode: Opcode,
    answer_len: usize,
) -> anyhow::Result<()> {
    let header = channel.reply_header(memory, slot);
    if header.error != 0 {
        return Err(ClientError::Errno { opcode, errno: header.error.saturating_neg() }.into());
    }
    let expected = size_of::<fuse::OutHeader>() + answer_len;
    ensure!(header.len as usize == expected, "{opcode:?}: reply of {} bytes, not {expected}", header.len);
    Ok(())
}

/// A name without its NUL.
fn text(name: &[u8]) -> &str {
    std::str::from_utf8(&name[..name.len() - 1]).unwrap_or_default()
}

/// Makes an empty directory, or takes the one that is there.
pub fn directory(client: &mut Client, name: &str) -> anyhow::Result<u64> {
    match client.mkdir(ROOT_ID, name) {
        Ok(entry) => Ok(entry.nodeid),
        Err(ClientError::Errno { errno: fuse::EEXIST, .. }) => Ok(client.lookup(ROOT_ID, name)?.nodeid),
        Err(error) => Err(error).with_context(|| format!("directory {name}")),
    }
}
