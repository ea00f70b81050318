//! Small synced writes in the journal: what they cost, and that they come back whatever happens around them.

use bdev::sim::{Asked, CrashChoice, OpKind};

use super::*;

const BLOCK: u64 = 4096;

impl Mount {
    /// Runs one call.
    fn now<T: 'static, F: Future<Output = T> + 'static>(&self, call: impl FnOnce(Rc<Fs>, Context) -> F) -> T {
        self.reactor.block_on(call(self.fs.clone(), self.ctx))
    }

    fn write(&self, inode: InodeId, offset: u64, bytes: &[u8], flags: IoFlags) {
        let bytes = bytes.to_vec();
        self.now(|fs, ctx| async move { write(&fs, ctx, inode, offset, &bytes, flags).await });
    }

    fn read(&self, inode: InodeId, len: usize, flags: IoFlags) -> Vec<u8> {
        self.now(|fs, ctx| async move { read(&fs, ctx, inode, 0, len, flags).await })
    }

    fn sync(&self, inode: InodeId) {
        self.now(|fs, _| async move { fs.sync_inode(inode, false).await }).unwrap();
    }

    /// What the device is asked to do during a call.
    fn traced(&self, call: impl FnOnce()) -> Vec<Asked> {
        self.disk.trace();
        call();
        self.disk.take_trace()
    }

    /// A file of 64 KiB in blocks, all of it durable and no checkpoint due.
    fn with_file() -> (Self, InodeId) {
        let mount = Self::new(4096, false);
        let inode = mount.create("file");
        mount.write(inode, 0, &[1; 65_536], BUFFERED);
        mount.now(|fs, _| async move { fs.sync_all().await }).unwrap();
        (mount, inode)
    }

    /// What a power cut leaves, mounted.
    fn cut(&self, readonly: bool) -> Self {
        self.mounted(self.disk.crash(CrashChoice::Nothing), readonly)
    }

    /// Unmounts, and lets the timers run out that keep the reactor alive.
    fn end(self) {
        let end = |fs: Rc<Fs>, _| async move {
            fs.unmount().await.unwrap();
            fs.store.reactor().sleep(Duration::from_secs(60)).await;
        };
        self.now(end);
    }

    fn mounted(&self, disk: Rc<SimDisk>, readonly: bool) -> Self {
        let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(2_000_000))));
        let (device, at): (Rc<dyn Bdev>, _) = (disk.clone(), reactor.clone());
        let fs = reactor.block_on(async move {
            let store = Store::open(device, at, OpenOptions { readonly, ..OpenOptions::default() }).await;
            let options = MountOptions { readonly, cache_size: 0, ..MountOptions::default() };
            Fs::mount(store.unwrap(), options).await.unwrap()
        });
        let ctx = Context { session: fs.open_session(), ..self.ctx };
        Self { reactor, disk, fs, ctx }
    }
}

#[track_caller]
fn assert_one_write(asked: &[Asked]) {
    let kinds: Vec<OpKind> = asked.iter().map(|asked| asked.kind).collect();
    assert_eq!(kinds, [OpKind::Write], "{asked:?}");
}

#[test]
fn a_small_synced_write_is_one_device_write() {
    let (mount, inode) = Mount::with_file();
    let synced = IoFlags { dsync: true, ..BUFFERED };
    for (what, offset, len) in [
        ("overwrite", 8192, 4096),
        ("part of a block", 100, 50),
        ("several blocks", 20_000, 9000),
        ("the same again", 8192, 4096),
        ("append", 65_536, 4096),
        ("append in the last block", 69_632, 10),
        ("over a hole", 1 << 20, 4096),
    ] {
        let bytes = vec![2; len];
        // Partly overwritten pages are read before.
        mount.read(inode, 80_000, BUFFERED);
        mount.write(inode, offset, &bytes, BUFFERED);
        let asked = mount.traced(|| mount.sync(inode));
        assert_eq!(asked.len(), 1, "{what}");
        assert_one_write(&asked);
        let again = IoFlags { direct: true, ..synced };
        let asked = mount.traced(|| mount.write(inode, offset, &bytes, again));
        assert_one_write(&asked);
        let asked = mount.traced(|| mount.sync(inode));
        assert!(asked.is_empty(), "{what}: nothing to sync, but {asked:?}");
    }
    let content = mount.read(inode, 2 << 20, BUFFERED);
    for readonly in [true, false] {
        let left = mount.cut(readonly);
        assert!(left.read(inode, 2 << 20, BUFFERED) == content, "readonly {readonly}");
        let again = mount.cut(readonly);
        assert!(again.read(inode, 2 << 20, DIRECT) == content, "direct, readonly {readonly}");
        if readonly {
            assert_eq!((left.disk.writes(), again.disk.writes()), (0, 0));
        }
    }
}

#[test]
fn a_sync_moves_the_size_of_a_logged_page_that_grew_and_was_written_home_before() {
    for data_only in [true, false] {
        let (mount, inode) = Mount::with_file();
        let synced = IoFlags { dsync: true, ..BUFFERED };
        // Stays logged, and so dirty, to the end.
        mount.write(inode, 0, &[2; 10], synced);
        mount.write(inode, 65_536, &[2; 100], synced);
        mount.write(inode, 65_636, &[3; 100], BUFFERED);
        mount.now(|fs, _| async move {
            let file = fs.run(|fs| fs.inode(inode)).await.unwrap();
            fs.write_back(&file, 16..17).await.unwrap();
            fs.sync_inode(inode, data_only).await.unwrap();
        });
        let content = mount.cut(false).read(inode, 100_000, BUFFERED);
        assert_eq!(content[65_536..], [[2; 100], [3; 100]].concat());
    }
}

#[test]
fn a_rename_over_a_file_brings_what_was_written_home_since_it_was_logged() {
    let (mount, inode) = Mount::with_file();
    let (old, synced) = (mount.create("old"), IoFlags { dsync: true, ..BUFFERED });
    mount.write(old, 0, &[9; 10], synced);
    mount.write(inode, 8192, &[2; 10], synced);
    mount.write(inode, 8192, &[3; 10], BUFFERED);
    mount.now(|fs, ctx| async move {
        let file = fs.run(|fs| fs.inode(inode)).await.unwrap();
        fs.write_back(&file, 0..16).await.unwrap();
        let (from, to) = ((InodeId::ROOT, &b"file"[..]), (InodeId::ROOT, &b"old"[..]));
        fs.run(|fs| fs.rename(&ctx, from, to, RenameMode::Replace, false)).await.unwrap();
        fs.sync_inode(InodeId::ROOT, false).await.unwrap();
    });
    let content = mount.cut(false).read(inode, 10_000, BUFFERED);
    assert_eq!(content[8190..8204], [1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1, 1]);
}

#[test]
fn what_changed_since_it_was_logged_is_settled_before_it_is_logged_again() {
    let (mount, inode) = Mount::with_file();
    let pages = 140;
    mount.write(inode, 0, &vec![1; pages * 4096], BUFFERED);
    mount.now(|fs, _| async move { fs.sync_all().await }).unwrap();
    // Both ends are logged, so that all between them may be.
    mount.write(inode, 0, &[2; 4096], BUFFERED);
    mount.write(inode, (pages as u64 - 1) * BLOCK, &[2; 4096], BUFFERED);
    mount.sync(inode);
    // More ranges than one transaction settles.
    for page in (2..136).step_by(2) {
        mount.write(inode, page * BLOCK, &[3; 4096], DIRECT);
    }
    mount.write(inode, 134 * BLOCK, &[4; 4096], BUFFERED);
    mount.now(|fs, _| async move { fs.sync_inode(inode, true).await }).unwrap();
    let content = mount.cut(false).read(inode, pages * 4096, BUFFERED);
    for (page, bytes) in content.chunks(4096).enumerate() {
        let expected = match page {
            0 | 139 => 2,
            134 => 4,
            page if page % 2 == 0 && page < 136 => 3,
            _ => 1,
        };
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page} holds {}", bytes[0]);
    }
}

#[test]
fn a_checkpoint_does_not_wait_for_who_holds_a_range_between_logged_pages() {
    let (mount, inode) = Mount::with_file();
    mount.write(inode, 4096, &[2; 10], BUFFERED);
    mount.write(inode, 3 * BLOCK, &[2; 10], BUFFERED);
    mount.sync(inode);
    mount.now(|fs, _| async move {
        let file = fs.run(|fs| fs.inode(inode)).await.unwrap();
        // As one that has to wait for the checkpoint with the range in its hands.
        let _guard = fs.lock_for_change(&file, 2..3).await.unwrap();
        let done = Rc::new(std::cell::Cell::new(false));
        let (store, is_done) = (fs.store.clone(), done.clone());
        drop(fs.store.reactor().spawn(async move {
            store.wait(&crate::Wait::Checkpoint).await.unwrap();
            is_done.set(true);
        }));
        fs.store.reactor().sleep(Duration::from_secs(60)).await;
        assert!(done.get(), "the checkpoint waits");
    });
}

#[test]
fn a_sync_of_an_inode_that_left_memory_meanwhile_covers_what_was_written_before() {
    let (mount, inode) = Mount::with_file();
    let other = mount.create("other");
    mount.write(other, 0, &[5; 65_536], BUFFERED);
    mount.now(|fs, _| async move { fs.sync_all().await }).unwrap();
    let synced = IoFlags { dsync: true, ..BUFFERED };
    mount.write(other, 0, &[6; 10], synced);
    mount.write(inode, 0, &[2; 65_536], DIRECT);
    mount.now(|fs, _| async move {
        let file = fs.run(|fs| fs.inode(inode)).await.unwrap();
        fs.run(|fs| fs.fold(&file)).await.unwrap();
        fs.settle_dirty(&file);
        drop(file);
    });
    // Its times become durable, by a block that needs no flush.
    assert_one_write(&mount.traced(|| mount.write(other, 0, &[7; 10], synced)));
    mount.fs.inodes.borrow_mut().evict(&inode);
    mount.sync(inode);
    let content = mount.cut(false).read(inode, 65_536, BUFFERED);
    assert!(content.iter().all(|byte| *byte == 2), "{}", content[0]);
}

#[test]
fn a_large_synced_write_is_written_once() {
    let (mount, inode) = Mount::with_file();
    mount.write(inode, 0, &[2; 65_536], BUFFERED);
    let asked = mount.traced(|| mount.sync(inode));
    let writes = asked.iter().filter(|asked| asked.kind == OpKind::Write);
    let written: u64 = writes.map(|asked| asked.range.end - asked.range.start).sum();
    assert!(written < 65_536 + 16_384, "{asked:?}");
}

#[test]
fn the_journal_is_let_go_when_the_logged_pages_are_written() {
    let (mount, inode) = Mount::with_file();
    let journal = mount.fs.store.superblock().journal_bytes();
    let pages = 16;
    let mut written = 0;
    // Twice around.
    for number in 0.. {
        let page = number % pages;
        mount.write(inode, page * BLOCK, &[number as u8; BLOCK as usize], BUFFERED);
        mount.sync(inode);
        written += BLOCK;
        if written > 2 * journal {
            break;
        }
    }
    let last = written / BLOCK - 1;
    let content = mount.cut(false).read(inode, 65_536, BUFFERED);
    for page in 0..pages {
        let number = last - (last - page) % pages;
        assert_eq!(content[(page * BLOCK) as usize], number as u8, "page {page}");
    }
}

/// What a crash may leave of a file: each sector as it was at some time since the last sync.
#[derive(Default)]
struct Versions {
    /// Position in the disk's history at which each began.
    list: Vec<(usize, Vec<u8>)>,
    /// Positions at which a sync was acknowledged, with the version that it covered.
    syncs: Vec<(usize, usize)>,
}

impl Versions {
    fn check(&self, point: usize, found: &[u8]) -> Result<(), String> {
        let covered = self.syncs.iter().filter(|(at, _)| *at <= point).map(|(_, version)| *version).max();
        let from = covered.unwrap_or(0);
        let until = self.list.iter().filter(|(begun, _)| *begun < point).count().max(from + 1);
        let versions: Vec<&Vec<u8>> = self.list[from..until].iter().map(|(_, content)| content).collect();
        let sizes: Vec<usize> = versions.iter().map(|version| version.len()).collect();
        let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
        if !(least..=most).contains(&&found.len()) {
            return Err(format!("size {}, expected {least} to {most}", found.len()));
        }
        for (number, sector) in found.chunks(512).enumerate() {
            let shows = |version: &[u8], limit: usize| {
                let at = number * 512;
                (0..sector.len()).all(|byte| {
                    let held = if at + byte < limit { version.get(at + byte).copied() } else { None };
                    sector[byte] == held.unwrap_or(0)
                })
            };
            let is_known = versions.iter().enumerate().any(|(age, version)| {
                let cuts = sizes[age..].iter().copied();
                cuts.chain([usize::MAX]).any(|limit| shows(version, limit))
            });
            if !is_known {
                return Err(format!(
                    "sector {number} begins with {:?}, versions {from}..{until}",
                    &sector[..8]
                ));
            }
        }
        Ok(())
    }
}

const CONTENT_MAX: usize = 40_000;

/// Synced and other writes, direct ones, truncations and holes in the same few pages, write-back in between; cut
/// at many points.
fn mix(block: u32, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mount = Mount::new(block, rng.random());
    let inode = mount.create("file");
    let mut content = vec![7; 20_000];
    mount.write(inode, 0, &content, BUFFERED);
    mount.sync(inode);
    mount.disk.record();
    let mut versions = Versions::default();
    versions.list.push((0, content.clone()));
    versions.syncs.push((0, 0));
    for step in 0..60_u8 {
        let begun = mount.disk.position();
        let at = rng.random_range(0..content.len().clamp(1, CONTENT_MAX - 9000));
        let len = rng.random_range(1..9000);
        let mut is_synced = false;
        match rng.random_range(0..10) {
            0..=4 => {
                let flags = IoFlags { dsync: rng.random(), direct: rng.random_bool(0.2), ..BUFFERED };
                let (at, len) = if rng.random() { (at, len) } else { (at / 4096 * 4096, 4096) };
                content.resize(content.len().max(at + len), 0);
                content[at..at + len].fill(step + 10);
                versions.list.push((begun, content.clone()));
                mount.write(inode, at as u64, &content[at..at + len], flags);
                is_synced = flags.dsync;
            }
            5 => {
                content.resize(at, 0);
                versions.list.push((begun, content.clone()));
                mount.now(|fs, ctx| async move { resize(&fs, ctx, inode, at as u64).await });
            }
            6 => {
                let size = (content.len() + len).min(CONTENT_MAX);
                content.resize(size, 0);
                versions.list.push((begun, content.clone()));
                mount.now(|fs, ctx| async move { resize(&fs, ctx, inode, size as u64).await });
            }
            7 => {
                let end = (at + len).min(content.len());
                content[at.min(end)..end].fill(0);
                versions.list.push((begun, content.clone()));
                let punch = FallocateMode::PunchHole;
                let done = mount.now(|fs, ctx| async move {
                    fs.fallocate(ctx, inode, punch, at as u64, len as u64).await
                });
                done.unwrap();
            }
            8 => mount.now(|fs, _| async move { fs.store.reactor().sleep(Duration::from_secs(6)).await }),
            _ => {
                mount.sync(inode);
                is_synced = true;
            }
        }
        if is_synced {
            versions.syncs.push((mount.disk.position(), versions.list.len() - 1));
        }
    }
    let mut history = mount.disk.take_history();
    for point in 0..=history.last_point() {
        for choice in
            [CrashChoice::Nothing, CrashChoice::Everything, CrashChoice::Random { seed: rng.random() }]
        {
            let image = history.state_at(point, choice);
            let left = mount.mounted(SimDisk::from_image(image, 512, seed), rng.random_bool(0.2));
            let found = left.read(inode, CONTENT_MAX + 9000, BUFFERED);
            left.end();
            let checked = versions.check(point, &found);
            checked.unwrap_or_else(|problem| {
                panic!("seed {seed}, block {block}, point {point}, {choice:?}: {problem}")
            });
        }
    }
}

#[test]
fn logged_data_survives_power_cuts_among_everything_that_changes_the_same_blocks() {
    for seed in 0..24 {
        mix(if seed % 3 == 0 { 512 } else { 4096 }, seed);
    }
}
