//! Behaviour of the public calls, on a device in memory.

use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

use bdev::memory::Memory;
use bdev::{AlignedBuf, IoBuffers};
use proptest::prelude::*;
use reactor::{Reactor, VirtualClock};

use super::*;
use crate::store::Store;
use crate::units::InodeId;
use crate::{FsError, Try};

pub(super) struct Bench {
    pub(super) reactor: Rc<Reactor>,
    pub(super) fs: Rc<Fs>,
    pub(super) ctx: Context,
}

pub(super) const FILE: CreateSpec<'static> =
    CreateSpec { node: NewNode::File, mode: 0o666, umask: 0o022, security: &[] };
pub(super) const DIRECTORY: CreateSpec<'static> =
    CreateSpec { node: NewNode::Directory, mode: 0o777, ..FILE };

impl Bench {
    pub(super) fn new() -> Self {
        let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1_000_000))));
        let store = Store::volatile(Memory::new(4 << 20, 4096), reactor.clone());
        Self::mount(reactor, store)
    }

    pub(super) fn mount(reactor: Rc<Reactor>, store: Rc<Store>) -> Self {
        let fs = reactor.block_on(Fs::mount(store, MountOptions::default())).unwrap();
        let session = fs.open_session();
        let ctx = Context { session, request: 1, uid: 1000, gid: 100, pid: 1, supplementary_gid: None };
        Self { reactor, fs, ctx }
    }

    pub(super) fn run<T: 'static>(
        &self,
        call: impl FnMut(&Rc<Fs>) -> Try<T> + 'static,
    ) -> Result<T, FsError> {
        let fs = self.fs.clone();
        self.reactor.block_on(async move { fs.run(call).await })
    }

    pub(super) fn create(&self, parent: InodeId, name: &'static str, spec: CreateSpec<'static>) -> InodeId {
        let ctx = self.ctx;
        self.run(move |fs| fs.create(&ctx, parent, name.as_bytes(), &spec)).unwrap().attr.inode
    }

    fn lookup(&self, parent: InodeId, name: &'static str) -> Result<Attr, FsError> {
        let ctx = self.ctx;
        self.run(move |fs| fs.lookup(&ctx, parent, name.as_bytes())).map(|entry| entry.attr)
    }

    pub(super) fn attr(&self, inode: InodeId) -> Result<Attr, FsError> {
        let ctx = self.ctx;
        self.run(move |fs| fs.get_attr(&ctx, inode))
    }

    fn write(&self, inode: InodeId, offset: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let mut buf = Rc::new(AlignedBuf::zeroed(bytes.len(), 1));
        Rc::get_mut(&mut buf).unwrap().copy_from_slice(bytes);
        let (fs, ctx) = (self.fs.clone(), self.ctx);
        let src = IoBuffers::from_aligned(&buf);
        self.reactor.block_on(async move { fs.write(ctx, inode, offset, src, IoFlags::default()).await })
    }

    fn read(&self, inode: InodeId, offset: u64, len: usize) -> Vec<u8> {
        let buf = Rc::new(AlignedBuf::zeroed(len, 1));
        let (fs, ctx) = (self.fs.clone(), self.ctx);
        let dst = IoBuffers::from_aligned(&buf);
        let read = async move { fs.read(ctx, inode, offset, dst, IoFlags::default()).await };
        let got = self.reactor.block_on(read).unwrap();
        buf[..got].to_vec()
    }

    fn resize(&self, inode: InodeId, size: u64) -> Result<Attr, FsError> {
        let ctx = self.ctx;
        let change = SetAttr { size: Some(size), ..SetAttr::default() };
        self.run(move |fs| fs.set_attr(&ctx, inode, &change))
    }

    fn fallocate(&self, inode: InodeId, mode: FallocateMode, offset: u64, len: u64) -> Result<(), FsError> {
        let (fs, ctx) = (self.fs.clone(), self.ctx);
        self.reactor.block_on(async move { fs.fallocate(ctx, inode, mode, offset, len).await })
    }

    fn names(&self, dir: InodeId) -> Vec<String> {
        let ctx = self.ctx;
        self.run(move |fs| {
            let mut names = Vec::new();
            fs.read_dir(&ctx, dir, 0, &mut |entry| {
                names.push(String::from_utf8_lossy(entry.name).into_owned());
                ControlFlow::Continue(())
            })?;
            names.sort();
            Ok(names)
        })
        .unwrap()
    }

    /// Lets background work end.
    pub(super) fn settle(&self) {
        while self.reactor.turn() {}
    }
}

#[test]
fn a_directory_counts_its_entries_and_subdirectories() {
    let bench = Bench::new();
    let dir = bench.create(InodeId::ROOT, "d", DIRECTORY);
    bench.create(dir, "sub", DIRECTORY);
    bench.create(dir, "file", FILE);
    assert_eq!(bench.attr(dir).unwrap().nlink, 3);
    assert_eq!(bench.names(dir), [".", "..", "file", "sub"]);
    let ctx = bench.ctx;
    let full = bench.run(move |fs| fs.rmdir(&ctx, InodeId::ROOT, b"d"));
    assert_eq!(full, Err(FsError::NotEmpty));
    bench.run(move |fs| fs.rmdir(&ctx, dir, b"sub")).unwrap();
    assert_eq!(bench.attr(dir).unwrap().nlink, 2);
}

#[test]
fn names_that_cannot_be_are_refused() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    for (name, error) in [
        (b"".to_vec(), FsError::Invalid),
        (b"..".to_vec(), FsError::Invalid),
        (b"a/b".to_vec(), FsError::Invalid),
        (vec![b'x'; 256], FsError::NameTooLong),
    ] {
        let got = bench.run(move |fs| fs.create(&ctx, InodeId::ROOT, &name, &FILE));
        assert_eq!(got.err(), Some(error));
    }
    let longest = vec![b'x'; 255];
    assert!(bench.run(move |fs| fs.create(&ctx, InodeId::ROOT, &longest, &FILE)).is_ok());
}

#[test]
fn a_rename_replaces_exchanges_and_refuses_by_its_mode() {
    let bench = Bench::new();
    let (root, ctx) = (InodeId::ROOT, bench.ctx);
    let a = bench.create(root, "a", FILE);
    let b = bench.create(root, "b", FILE);
    let rename = |mode| bench.run(move |fs| fs.rename(&ctx, (root, b"a"), (root, b"b"), mode, false));
    assert_eq!(rename(RenameMode::NoReplace), Err(FsError::Exists));
    rename(RenameMode::Exchange).unwrap();
    assert_eq!(bench.lookup(root, "a").unwrap().inode, b);
    rename(RenameMode::Replace).unwrap();
    assert_eq!(bench.lookup(root, "b").unwrap().inode, b);
    assert_eq!(bench.lookup(root, "a"), Err(FsError::NotFound));
    assert_eq!(bench.attr(a).unwrap().nlink, 0);
    assert_eq!(bench.names(root), [".", "..", "b"]);
}

#[test]
fn a_directory_does_not_move_below_itself() {
    let bench = Bench::new();
    let (root, ctx) = (InodeId::ROOT, bench.ctx);
    let outer = bench.create(root, "outer", DIRECTORY);
    let inner = bench.create(outer, "inner", DIRECTORY);
    let moved =
        bench.run(move |fs| fs.rename(&ctx, (root, b"outer"), (inner, b"x"), RenameMode::Replace, false));
    assert_eq!(moved, Err(FsError::Invalid));
}

#[test]
fn an_unlinked_file_lives_until_it_is_forgotten_and_then_gives_its_blocks_back() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    let free = bench.fs.stat_fs().free;
    let file = bench.create(InodeId::ROOT, "f", FILE);
    bench.write(file, 0, &[7; 10_000]).unwrap();
    bench.run(move |fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).unwrap();
    bench.settle();
    assert_eq!(bench.read(file, 0, 10_000), [7; 10_000]);
    bench.fs.forget(ctx.session, file, 1);
    bench.settle();
    assert_eq!(bench.attr(file), Err(FsError::Stale));
    assert_eq!(bench.fs.stat_fs().free, free);
}

#[test]
fn a_session_knows_only_what_it_was_told_of() {
    let bench = Bench::new();
    let file = bench.create(InodeId::ROOT, "f", FILE);
    let other = bench.fs.open_session();
    assert_eq!(bench.fs.check_known(other, file), Err(FsError::Stale));
    assert_eq!(bench.fs.check_known(bench.ctx.session, file), Ok(()));
    bench.fs.forget(bench.ctx.session, file, u64::MAX);
    assert_eq!(bench.fs.check_known(bench.ctx.session, file), Err(FsError::Stale));
}

#[test]
fn an_access_acl_and_the_mode_follow_each_other() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    let file = bench.create(InodeId::ROOT, "f", FILE);
    // user::rw-, user:1:rwx, group::r--, mask::rwx, other::---
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions, id) in [(1u16, 6u16, !0u32), (2, 7, 1), (4, 4, !0), (16, 7, !0), (32, 0, !0)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    bench
        .run(move |fs| fs.set_xattr(&ctx, file, b"system.posix_acl_access", &acl, XattrMode::Set, false))
        .unwrap();
    assert_eq!(bench.attr(file).unwrap().mode & 0o777, 0o670);
    let change = SetAttr { mode: Some(0o640), ..SetAttr::default() };
    bench.run(move |fs| fs.set_attr(&ctx, file, &change)).unwrap();
    let stored = bench.run(move |fs| fs.get_xattr(&ctx, file, b"system.posix_acl_access")).unwrap();
    let XattrValue::Here(stored) = stored else { panic!("an ACL lies in its item") };
    assert_eq!(stored[4 + 3 * 8 + 2], 4, "the mask follows the group bits");
}

#[test]
fn a_scan_resumes_behind_its_cookie_while_entries_go() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    let names: Vec<String> = (0..500).map(|i| format!("file{i}")).collect();
    for name in names.clone() {
        bench.run(move |fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &FILE)).unwrap();
    }
    let mut seen = Vec::new();
    let mut cookie = 2;
    loop {
        let batch = bench
            .run(move |fs| {
                let mut batch = Vec::new();
                fs.read_dir(&ctx, InodeId::ROOT, cookie, &mut |entry| {
                    batch.push((entry.name.to_vec(), entry.cookie));
                    if batch.len() == 7 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })?;
                Ok(batch)
            })
            .unwrap();
        let Some((_, last)) = batch.last() else { break };
        cookie = *last;
        for (name, _) in batch {
            seen.push(String::from_utf8(name.clone()).unwrap());
            bench.run(move |fs| fs.unlink(&ctx, InodeId::ROOT, &name)).unwrap();
        }
    }
    seen.sort();
    let mut expected = names;
    expected.sort();
    assert_eq!(seen, expected);
}

#[test]
fn a_full_device_refuses_writes_and_lets_files_be_deleted() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    let file = bench.create(InodeId::ROOT, "f", FILE);
    let mut offset = 0;
    let error = loop {
        match bench.write(file, offset, &[1; 65_536]) {
            Ok(written) => offset += written as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(error, FsError::NoSpace);
    assert_eq!(bench.read(file, offset - 10, 10), [1; 10]);
    bench.run(move |fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).unwrap();
    bench.fs.forget(ctx.session, file, 1);
    bench.settle();
    let again = bench.create(InodeId::ROOT, "g", FILE);
    assert_eq!(bench.write(again, 0, &[1; 65_536]), Ok(65_536));
}

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, len: usize, byte: u8 },
    Resize(u64),
    Punch { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, keep_size: bool },
    Allocate { offset: u64, len: u64, keep_size: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let offset = || 0..60_000u64;
    let len = || 1..20_000u64;
    prop_oneof![
        (offset(), 1..20_000usize, 1..255u8).prop_map(|(offset, len, byte)| Step::Write {
            offset,
            len,
            byte
        }),
        (0..80_000u64).prop_map(Step::Resize),
        (offset(), len()).prop_map(|(offset, len)| Step::Punch { offset, len }),
        (offset(), len(), any::<bool>()).prop_map(|(offset, len, keep_size)| Step::Zero {
            offset,
            len,
            keep_size
        }),
        (offset(), len(), any::<bool>()).prop_map(|(offset, len, keep_size)| Step::Allocate {
            offset,
            len,
            keep_size
        }),
    ]
}

/// What a plain vector of bytes would hold.
fn apply(model: &mut Vec<u8>, step: &Step) {
    let grow = |model: &mut Vec<u8>, end: u64| {
        if model.len() < end as usize {
            model.resize(end as usize, 0);
        }
    };
    let clear = |model: &mut Vec<u8>, offset: u64, end: u64| {
        let len = model.len();
        model[(offset as usize).min(len)..(end as usize).min(len)].fill(0);
    };
    match *step {
        Step::Write { offset, len, byte } => {
            grow(model, offset + len as u64);
            model[offset as usize..offset as usize + len].fill(byte);
        }
        Step::Resize(size) => model.resize(size as usize, 0),
        Step::Punch { offset, len } => clear(model, offset, offset + len),
        Step::Zero { offset, len, keep_size } => {
            if !keep_size {
                grow(model, offset + len);
            }
            clear(model, offset, offset + len);
        }
        Step::Allocate { offset, len, keep_size } => {
            if !keep_size {
                grow(model, offset + len);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_file_holds_what_a_vector_would(steps in proptest::collection::vec(step(), 1..30)) {
        let bench = Bench::new();
        let free = bench.fs.stat_fs().free;
        let file = bench.create(InodeId::ROOT, "f", FILE);
        let mut model = Vec::new();
        for step in &steps {
            match *step {
                Step::Write { offset, len, byte } => {
                    bench.write(file, offset, &vec![byte; len]).unwrap();
                }
                Step::Resize(size) => {
                    bench.resize(file, size).unwrap();
                }
                Step::Punch { offset, len } => bench.fallocate(file, FallocateMode::PunchHole, offset, len).unwrap(),
                Step::Zero { offset, len, keep_size } => {
                    bench.fallocate(file, FallocateMode::Zero { keep_size }, offset, len).unwrap();
                }
                Step::Allocate { offset, len, keep_size } => {
                    bench.fallocate(file, FallocateMode::Allocate { keep_size }, offset, len).unwrap();
                }
            }
            apply(&mut model, step);
            prop_assert_eq!(bench.attr(file).unwrap().size, model.len() as u64);
            prop_assert!(bench.read(file, 0, 200_000) == model, "after {:?}", step);
            let used = free - bench.fs.stat_fs().free;
            prop_assert_eq!(bench.attr(file).unwrap().sectors, used * 8);
        }
        bench.resize(file, 0).unwrap();
        let ctx = bench.ctx;
        bench.run(move |fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).unwrap();
        bench.fs.forget(ctx.session, file, 1);
        bench.settle();
        prop_assert_eq!(bench.fs.stat_fs().free, free);
    }
}

#[test]
fn a_nameless_file_gets_no_name_from_a_session_that_has_forgotten_it() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    let file = bench.run(move |fs| fs.create_tmpfile(&ctx, InodeId::ROOT, &FILE)).unwrap().attr.inode;
    let other = Context { session: bench.fs.open_session(), ..ctx };
    let linked = bench.run(move |fs| fs.link(&other, file, InodeId::ROOT, b"name"));
    assert_eq!(linked.map(drop), Err(FsError::Stale));
    bench.run(move |fs| fs.link(&ctx, file, InodeId::ROOT, b"name")).unwrap();
    bench.run(move |fs| fs.link(&other, file, InodeId::ROOT, b"another")).unwrap();
}

#[test]
fn inodes_that_nothing_needs_leave_memory_and_come_back() {
    let bench = Bench::new();
    let kept = bench.create(InodeId::ROOT, "kept", FILE);
    bench.write(kept, 0, b"buffered").unwrap();
    let first = bench.create(InodeId::ROOT, "first", FILE);
    let before = bench.attr(first).unwrap();
    let table = |with: &mut dyn FnMut(&mut inode::InodeTable)| with(&mut bench.fs.inodes.borrow_mut());
    let item = *bench.fs.inodes.borrow().get(&first).unwrap().live.borrow();
    let limit = inode::INODES_MAX;
    table(&mut |table| {
        for number in 0..2 * limit as u64 {
            let id = InodeId(1 << 40 | number);
            table.insert(id, Inode::new(id, item));
        }
        assert_eq!(table.len(), limit);
        assert!(table.get(&kept).is_some(), "its data is in the cache only");
        assert!(table.get(&first).is_none());
    });
    assert_eq!(bench.attr(first), Ok(before));
    assert_eq!(bench.read(kept, 0, 8), b"buffered");
}
