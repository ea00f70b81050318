//! Checksums of blocks: files behave as ever, and what the device has changed by itself is never shown.

use bdev::sim::{CrashChoice, Effect, Fault, OpKind};
use bdev::{Io, Limits, WriteFlags};

use super::*;
use crate::check::{check, scrub};
use crate::fs::XattrMode;

const LEN: usize = 1 << 20;

fn with_sums(block_size: u32, latency: bool) -> Mount {
    let options = MkfsOptions { block_size, data_checksum: true, ..MkfsOptions::default() };
    Mount::made(options, latency)
}

/// Nothing is wrong with the file system, once it is unmounted.
fn check_clean(mount: &Mount) {
    let (fs, device): (_, Rc<dyn Bdev>) = (mount.fs.clone(), mount.disk.clone());
    let report = mount.reactor.block_on(async move {
        fs.unmount().await.unwrap();
        check(&device).await.unwrap()
    });
    assert!(report.is_clean(), "{:?}", report.findings);
}

fn is_wrong<T: std::fmt::Debug>(result: Result<T, FsError>) {
    assert!(matches!(result, Err(FsError::WrongData(_))), "{result:?}");
}

/// A file of [`LEN`] sevens that is not cached.
fn cold_file(sums: bool) -> (Mount, InodeId) {
    let mount = if sums { with_sums(4096, false) } else { Mount::new(4096, false) };
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &[7; LEN], BUFFERED).await });
    (mount.remount(), inode)
}

/// The device's byte of a byte of a file.
fn device_byte(mount: &Mount, inode: InodeId, offset: u64) -> u64 {
    let fs = mount.fs.clone();
    let piece = mount.reactor.block_on(async move {
        fs.run(|fs| fs.piece_at(MapId(inode.0), offset / 4096, u64::MAX)).await.unwrap()
    });
    piece.stored.unwrap().addr.0 * 4096 + offset % 4096
}

/// Flips a bit of a byte of a file on the device.
fn flip(mount: &Mount, inode: InodeId, offset: u64) {
    let at = device_byte(mount, inode, offset);
    let mut byte = [0];
    mount.disk.peek(at, &mut byte);
    mount.disk.poke(at, &[byte[0] ^ 4]);
}

/// What a read gives.
fn try_read(
    mount: &Mount,
    inode: InodeId,
    offset: u64,
    len: usize,
    flags: IoFlags,
) -> Result<Vec<u8>, FsError> {
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let buf = Rc::new(AlignedBuf::zeroed(len, 4096));
        let got = fs.read(ctx, inode, offset, IoBuffers::from_aligned(&buf), flags).await?;
        Ok(buf[..got].to_vec())
    })
}

#[test]
fn files_with_checksums_hold_what_vectors_would() {
    for (seed, block_size, latency) in
        [(0, 4096, false), (1, 4096, true), (2, 512, false), (3, 1024, true), (4, 16_384, false)]
    {
        run_steps_on(with_sums(block_size, latency), seed, 300);
    }
}

#[test]
fn a_flipped_bit_is_found_by_every_way_of_reading() {
    for (offset, len, flags) in [
        (40_960, 4096, BUFFERED),
        (40_000, 9000, BUFFERED),
        (40_960, 4096, DIRECT),
        (40_000, 9000, DIRECT),
        (40_961, 1, DIRECT),
    ] {
        let (mount, inode) = cold_file(true);
        flip(&mount, inode, 41_000);
        let got = try_read(&mount, inode, offset, len, flags);
        match got {
            // What comes before the bad block may be told.
            Ok(bytes) => assert!(flags == BUFFERED && bytes == vec![7; 40_960 - offset as usize]),
            error => is_wrong(error),
        }
        is_wrong(try_read(&mount, inode, 40_960, 4096, flags));
        // The block beside it is as good as ever.
        assert_eq!(try_read(&mount, inode, 45_056, 4096, flags).unwrap(), [7; 4096]);
    }
}

#[test]
fn a_flipped_bit_goes_unnoticed_without_checksums() {
    let (mount, inode) = cold_file(false);
    flip(&mount, inode, 41_000);
    assert_eq!(try_read(&mount, inode, 41_000, 1, BUFFERED).unwrap(), [7 ^ 4]);
}

#[test]
fn what_is_read_ahead_of_a_reader_is_verified_and_fails_the_reader_of_that_block_only() {
    let (mount, inode) = cold_file(true);
    let bad = 100_000 / 4096;
    flip(&mount, inode, 100_000);
    for page in 0..LEN as u64 / 4096 {
        let got = try_read(&mount, inode, page * 4096, 4096, BUFFERED);
        match page == bad {
            true => is_wrong(got),
            false => assert_eq!(got.unwrap(), [7; 4096], "page {page}"),
        }
    }
}

#[test]
fn a_partial_overwrite_of_a_wrong_block_is_refused_and_a_whole_one_heals_it() {
    for flags in [BUFFERED, DIRECT] {
        let (mount, inode) = cold_file(true);
        flip(&mount, inode, 41_000);
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move {
            is_wrong(fs.write(ctx, inode, 40_970, buffer(&[8; 10]), flags).await);
            write(&fs, ctx, inode, 40_960, &[9; 4096], flags).await;
            fs.sync_inode(inode, false).await.unwrap();
        });
        let mount = mount.remount();
        assert_eq!(try_read(&mount, inode, 40_960, 4096, BUFFERED).unwrap(), [9; 4096]);
        check_clean(&mount);
    }
}

#[test]
fn blocks_that_buffered_data_replaces_are_not_counted_twice() {
    let (mount, inode) = cold_file(true);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let sectors = || fs.get_attr(&ctx, inode).unwrap().sectors;
        write(&fs, ctx, inode, 8192, &[8; 8192], BUFFERED).await;
        assert_eq!(sectors(), LEN as u64 / 512);
        write(&fs, ctx, inode, LEN as u64, &[8; 8192], BUFFERED).await;
        assert_eq!(sectors(), LEN as u64 / 512 + 16);
        fs.sync_inode(inode, false).await.unwrap();
        assert_eq!(sectors(), LEN as u64 / 512 + 16);
    });
}

/// A file of 5000 bytes, none of it cached, whose last block does not have its checksum.
fn wrong_last_block() -> (Mount, InodeId) {
    let (mount, inode) = cold_file(true);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { resize(&fs, ctx, inode, 5000).await });
    let mount = mount.remount();
    flip(&mount, inode, 4097);
    (mount, inode)
}

#[test]
fn a_growing_file_does_not_take_over_a_wrong_last_block() {
    let (mount, inode) = wrong_last_block();
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let change = SetAttr { size: Some(9000), ..SetAttr::default() };
        is_wrong(fs.run(|fs| fs.set_attr(&ctx, inode, &change)).await);
        assert_eq!(fs.get_attr(&ctx, inode).unwrap().size, 5000);
    });
}

#[test]
fn a_value_of_an_attribute_in_blocks_is_verified_and_frees_its_checksums() {
    let mount = with_sums(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let map = mount.reactor.block_on(async move {
        fs.store_xattr(ctx, inode, b"user.large", &[5; 30_000], XattrMode::Set).await.unwrap();
        assert_eq!(fs.read_xattr(ctx, inode, b"user.large").await.unwrap(), [5; 30_000]);
        InodeId(fs.store.next_id() - 1)
    });
    flip(&mount, map, 10_000);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        is_wrong(fs.read_xattr(ctx, inode, b"user.large").await);
        fs.store_xattr(ctx, inode, b"user.large", &[6; 20_000], XattrMode::Replace).await.unwrap();
        assert_eq!(fs.read_xattr(ctx, inode, b"user.large").await.unwrap(), [6; 20_000]);
    });
    check_clean(&mount);
}

/// A write that goes to another place leaves a block that looks as if nothing had happened, and one that is wrong.
#[test]
fn a_misdirected_and_a_lost_write_are_found_when_the_block_is_read() {
    for effect in [Effect::Lost, Effect::Misdirected] {
        let (mount, inode) = cold_file(true);
        mount.disk.inject(Fault::nth(OpKind::Write, 0, effect));
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move {
            write(&fs, ctx, inode, 40_960, &[9; 4096], DIRECT).await;
            fs.sync_inode(inode, false).await.unwrap();
        });
        for flags in [BUFFERED, DIRECT] {
            is_wrong(try_read(&mount, inode, 40_960, 4096, flags));
        }
    }
}

/// With checksums a mapped block is never overwritten: whatever a power cut leaves of writes, a block is old or new.
#[test]
fn a_torn_overwrite_leaves_the_old_block_or_the_new_one() {
    for seed in 0..40 {
        let (mount, inode) = cold_file(true);
        let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
        let crashed = mount.reactor.block_on(async move {
            write(&fs, ctx, inode, 0, &[9; 100_000], BUFFERED).await;
            match seed % 2 {
                0 => fs.write_back_file(&fs.inode(inode).unwrap()).await.unwrap(),
                _ => write(&fs, ctx, inode, 8192, &[9; 65_536], DIRECT).await,
            }
            disk.crash(CrashChoice::Random { seed })
        });
        let mount = Mount::open(mount.reactor.clone(), crashed);
        let got = try_read(&mount, inode, 0, LEN, BUFFERED).unwrap();
        let is_whole =
            |block: &[u8]| block == [7; 4096] || block == [9; 4096] || block[0] == 9 && block[4095] == 7;
        assert!(got.chunks(4096).all(is_whole), "seed {seed}");
    }
}

/// A device that looks at the bytes of a write some time after it was asked, as real ones do.
struct LateDevice {
    disk: Rc<SimDisk>,
    reactor: Rc<Reactor>,
}

impl Bdev for LateDevice {
    fn limits(&self) -> &Limits {
        self.disk.limits()
    }

    fn read(&self, offset: u64, buffers: IoBuffers) -> Io {
        self.disk.read(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: IoBuffers, flags: WriteFlags) -> Io {
        let (io, completion) = Io::pending();
        let (disk, sleep) = (self.disk.clone(), self.reactor.sleep(Duration::from_millis(1)));
        drop(self.reactor.spawn(async move {
            sleep.await;
            completion.complete(disk.write(offset, buffers, flags).await);
        }));
        io
    }

    fn flush(&self) -> Io {
        self.disk.flush()
    }

    fn discard(&self, range: Range<u64>) -> Io {
        self.disk.discard(range)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Io {
        self.disk.write_zeroes(range, flags)
    }
}

/// A mounted file system on a [`LateDevice`].
fn late_mount() -> Mount {
    let Mount { reactor, disk, fs, .. } = with_sums(4096, false);
    let unmounted = fs.clone();
    reactor.block_on(async move { unmounted.unmount().await }).unwrap();
    let device = Rc::new(LateDevice { disk: disk.clone(), reactor: reactor.clone() });
    Mount::on(reactor, disk, device, MountOptions { cache_size: 0, ..MountOptions::default() })
}

/// A page on its way to the device does not change: otherwise its checksum would be that of other bytes.
#[test]
fn writes_into_pages_that_are_being_written_wait_for_the_end() {
    let mount = late_mount();
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &[1; 40_000], BUFFERED).await;
        let syncing = fs.clone();
        let sync = fs.store.reactor().spawn(async move { syncing.sync_inode(inode, true).await });
        reactor::sync::yield_now().await;
        write(&fs, ctx, inode, 0, &[2; 40_000], BUFFERED).await;
        sync.await.unwrap();
        fs.store.sync(fs.store.last_seq()).await.unwrap();
    });
    let crashed = Mount::open(mount.reactor.clone(), mount.disk.crash(CrashChoice::Nothing));
    assert_eq!(try_read(&crashed, inode, 0, 40_000, DIRECT).unwrap(), [1; 40_000]);
    let mount = mount.remount();
    assert_eq!(try_read(&mount, inode, 0, 40_000, DIRECT).unwrap(), [2; 40_000]);
    check_clean(&mount);
}

/// A client may change its memory while a direct write is under way: what gets to the device has its checksum.
#[test]
fn memory_that_changes_during_a_direct_write_leaves_one_state_of_it() {
    let mount = late_mount();
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let memory = buffer(&[1; 40_960]);
        let (writing, src) = (fs.clone(), memory.clone());
        let written =
            fs.store.reactor().spawn(async move { writing.write(ctx, inode, 0, src, DIRECT).await });
        for byte in 2..20 {
            reactor::sync::yield_now().await;
            memory.copy_from(0, &[byte; 40_960]);
        }
        assert_eq!(written.await, Ok(40_960));
    });
    let got = try_read(&mount, inode, 0, 40_960, DIRECT).unwrap();
    assert!(got == vec![got[0]; 40_960]);
    check_clean(&mount);
}

#[test]
fn blocks_that_were_allocated_ahead_are_written_on_a_full_device() {
    const LEN: u64 = 1 << 20;
    let mount = with_sums(4096, false);
    let (inode, filler) = (mount.create("f"), mount.create("filler"));
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        fs.fallocate(ctx, inode, FallocateMode::Allocate { keep_size: false }, 0, LEN).await.unwrap();
        let (piece, mut offset) = (vec![5; 1 << 20], 0);
        while let Ok(len) = fs.write(ctx, filler, offset, buffer(&piece), BUFFERED).await {
            offset += len as u64;
        }
        fs.sync_inode(filler, false).await.unwrap();
        write(&fs, ctx, inode, 0, &[3; LEN as usize / 2], BUFFERED).await;
        write(&fs, ctx, inode, LEN / 2, &[4; LEN as usize / 2], DIRECT).await;
        fs.sync_inode(inode, false).await.unwrap();
    });
    let mount = mount.remount();
    assert_eq!(try_read(&mount, inode, LEN / 2 - 1, 2, BUFFERED).unwrap(), [3, 4]);
    check_clean(&mount);
}

/// Its checksums alone are more than one transaction can remove.
#[test]
fn a_large_file_is_punched_truncated_and_deleted_in_pieces() {
    const LEN: usize = 12 << 20;
    let mount = with_sums(512, false);
    let free = mount.fs.stat_fs().free;
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &vec![3; LEN], DIRECT).await;
        fs.fallocate(ctx, inode, FallocateMode::PunchHole, 4096, LEN as u64 / 2).await.unwrap();
        resize(&fs, ctx, inode, 5000).await;
        resize(&fs, ctx, inode, 6000).await;
        let got = read(&fs, ctx, inode, 0, 6000, BUFFERED).await;
        assert!(got[..4096] == [3; 4096] && got[4096..] == [0; 6000 - 4096]);
        write(&fs, ctx, inode, 0, &vec![3; LEN], DIRECT).await;
        fs.sync_all().await.unwrap();
        fs.run(|fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).await.unwrap();
        fs.forget(ctx.session, inode, u64::MAX);
    });
    let mount = mount.remount();
    let (fs, at) = (mount.fs.clone(), mount.reactor.clone());
    mount.reactor.block_on(async move {
        at.sleep(Duration::from_secs(60)).await;
        fs.sync_all().await.unwrap();
        assert!(
            (free - fs.stat_fs().free) * 512 < 1 << 20,
            "{} of {free} blocks are free",
            fs.stat_fs().free
        );
    });
    check_clean(&mount);
}

#[test]
fn a_scrub_names_the_file_and_offset_of_every_wrong_block() {
    for sums in [true, false] {
        let (mount, inode) = cold_file(sums);
        flip(&mount, inode, 41_000);
        flip(&mount, inode, 46_000);
        flip(&mount, inode, 300_000);
        let block = device_byte(&mount, inode, 40_960) / 4096;
        let (fs, device): (_, Rc<dyn Bdev>) = (mount.fs.clone(), mount.disk.clone());
        let report = mount.reactor.block_on(async move {
            fs.unmount().await.unwrap();
            scrub(&device, &mut |_| ()).await.unwrap()
        });
        assert!(report.check.is_clean(), "{:?}", report.check);
        let found: Vec<_> = report.unreadable.iter().map(|run| (run.offset, run.len)).collect();
        if !sums {
            assert!(found.is_empty());
            continue;
        }
        assert_eq!(found, [(40_960, 8192), (299_008, 4096)]);
        let first = &report.unreadable[0];
        assert_eq!((first.inode, first.path.as_deref(), first.block), (inode.0, Some("/f"), block));
        assert!(first.error.contains("checksum"), "{}", first.error);
    }
}

#[test]
fn a_buffered_overwrite_up_to_the_end_of_the_file_heals_its_last_block() {
    let (mount, inode) = wrong_last_block();
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        is_wrong(fs.write(ctx, inode, 4096, buffer(&[9; 903]), BUFFERED).await);
        write(&fs, ctx, inode, 4096, &[9; 904], BUFFERED).await;
        fs.sync_inode(inode, false).await.unwrap();
        resize(&fs, ctx, inode, 6000).await;
    });
    let mount = mount.remount();
    let expected = [vec![9; 904], vec![0; 1000]].concat();
    assert_eq!(try_read(&mount, inode, 4096, 1904, BUFFERED).unwrap(), expected);
    check_clean(&mount);
}
