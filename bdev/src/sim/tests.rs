use super::*;
use crate::AlignedBuf;
use reactor::VirtualClock;
use std::collections::HashSet;

const BLOCK: usize = 512;
const EIO: Effect = Effect::Error { errno: libc::EIO };

fn disk() -> Rc<SimDisk> {
    SimDisk::new(1 << 20, BLOCK as u32, 1)
}

fn bytes(len: usize, fill: u8) -> IoBuffers {
    let mut buf = AlignedBuf::zeroed(len, BLOCK);
    buf.fill(fill);
    IoBuffers::from_aligned(&Rc::new(buf))
}

fn now(io: Io) -> Result<(), BdevError> {
    io.try_result().expect("a disk without latency completes in the call")
}

fn write(disk: &SimDisk, offset: u64, len: usize, fill: u8, flags: WriteFlags) {
    now(disk.write(offset, bytes(len, fill), flags)).unwrap();
}

fn block_of(image: &Image, offset: u64) -> u8 {
    let mut block = [0; BLOCK];
    image.read(offset, &mut block);
    assert!(block.iter().all(|&byte| byte == block[0]), "a block is never torn inside");
    block[0]
}

#[test]
fn flushed_and_fua_writes_survive_every_power_cut() {
    let disk = disk();
    write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
    now(disk.flush()).unwrap();
    write(&disk, 512, BLOCK, 2, WriteFlags::FUA);
    write(&disk, 1024, BLOCK, 3, WriteFlags::NONE);
    for seed in 0..50 {
        let image = disk.crash(CrashChoice::Random { seed }).snapshot();
        assert_eq!((block_of(&image, 0), block_of(&image, 512)), (1, 2));
    }
    let lost = disk.crash(CrashChoice::Nothing).snapshot();
    assert_eq!(block_of(&lost, 1024), 0);
    let kept = disk.crash(CrashChoice::Everything).snapshot();
    assert_eq!(block_of(&kept, 1024), 3);
}

#[test]
fn a_power_cut_never_puts_an_older_version_over_a_durable_one() {
    let disk = disk();
    write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
    write(&disk, 0, BLOCK, 2, WriteFlags::FUA);
    write(&disk, 0, BLOCK, 3, WriteFlags::NONE);
    let seen: HashSet<u8> =
        (0..50).map(|seed| block_of(&disk.crash(CrashChoice::Random { seed }).snapshot(), 0)).collect();
    assert_eq!(seen, HashSet::from([2, 3]));
}

#[test]
fn random_power_cuts_tear_and_reorder() {
    let disk = disk();
    write(&disk, 0, 4 * BLOCK, 1, WriteFlags::NONE);
    write(&disk, 8192, 4 * BLOCK, 2, WriteFlags::NONE);
    let mut torn = false;
    let mut reordered = false;
    for seed in 0..200 {
        let image = disk.crash(CrashChoice::Random { seed }).snapshot();
        let first: Vec<u8> = (0..4).map(|i| block_of(&image, i * 512)).collect();
        torn |= first.contains(&0) && first.contains(&1);
        reordered |= first == [0; 4] && block_of(&image, 8192) == 2;
    }
    assert!(torn && reordered);
}

#[test]
fn history_gives_the_states_that_the_disk_itself_would_have_left() {
    let disk = disk();
    disk.record();
    let mut live = Vec::new();
    for round in 0..40_u64 {
        match round % 5 {
            0 | 1 => write(&disk, round * 1024, 1024, round as u8, WriteFlags { fua: round % 10 == 1 }),
            2 => now(disk.write_zeroes(round * 512..round * 512 + 2048, WriteFlags::NONE)).unwrap(),
            3 => now(disk.discard(0..4096)).unwrap(),
            _ => now(disk.flush()).unwrap(),
        }
        live.push((disk.position(), disk.crash(CrashChoice::Random { seed: round }).snapshot()));
    }
    let mut history = disk.take_history();
    assert_eq!(history.last_point(), 80);
    for (round, (point, image)) in live.iter().enumerate().rev() {
        let state = history.state_at(*point, CrashChoice::Random { seed: round as u64 });
        assert_eq!(state.content_hash(), image.content_hash(), "point {point}");
    }
}

#[test]
fn a_write_under_way_at_the_power_cut_may_be_there_or_not() {
    let disk = disk();
    disk.record();
    write(&disk, 0, BLOCK, 9, WriteFlags::FUA);
    let mut history = disk.take_history();
    assert_eq!(block_of(&history.state_at(1, CrashChoice::Nothing), 0), 0);
    assert_eq!(block_of(&history.state_at(1, CrashChoice::Everything), 0), 9);
    assert_eq!(block_of(&history.state_at(2, CrashChoice::Nothing), 0), 9);
}

#[test]
fn faults_hit_one_operation_and_can_be_cleared() {
    let disk = disk();
    disk.inject(Fault::nth(OpKind::Write, 1, EIO));
    write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
    let failed = now(disk.write(0, bytes(BLOCK, 2), WriteFlags::NONE));
    assert_eq!(failed, Err(BdevError::Io { offset: 0, errno: libc::EIO }));
    write(&disk, 0, BLOCK, 3, WriteFlags::NONE);

    disk.inject(Fault::nth(OpKind::Read, 0, Effect::Short));
    let short = now(disk.read(0, bytes(4 * BLOCK, 0)));
    assert_eq!(short, Err(BdevError::Short { offset: 0, done: 2 * BLOCK, len: 4 * BLOCK }));

    disk.inject(Fault::dead_from(0));
    assert!(now(disk.flush()).is_err());
    disk.clear_faults();
    now(disk.flush()).unwrap();
}

#[test]
fn lost_writes_leave_old_content_and_bad_sectors_heal_when_written() {
    let disk = disk();
    write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
    disk.inject(Fault::nth(OpKind::Write, 0, Effect::Lost));
    write(&disk, 0, BLOCK, 2, WriteFlags::NONE);
    assert_eq!(block_of(&disk.snapshot(), 0), 1);

    disk.fail_reads(0..512);
    assert!(now(disk.read(0, bytes(BLOCK, 0))).is_err());
    write(&disk, 0, BLOCK, 3, WriteFlags::NONE);
    now(disk.read(0, bytes(BLOCK, 0))).unwrap();
}

#[test]
fn a_failed_flush_may_lose_what_it_should_have_saved() {
    let survived: HashSet<u8> = (0..20)
        .map(|seed| {
            let disk = SimDisk::new(1 << 20, 512, seed);
            write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
            disk.inject(Fault::nth(OpKind::Flush, 0, EIO));
            assert!(now(disk.flush()).is_err());
            now(disk.flush()).unwrap();
            block_of(&disk.crash(CrashChoice::Nothing).snapshot(), 0)
        })
        .collect();
    assert_eq!(survived, HashSet::from([0, 1]));
}

#[test]
fn latency_completes_out_of_order_in_virtual_time_and_repeats_exactly() {
    let order = |seed| {
        let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::ZERO)));
        let disk = SimDisk::new(1 << 20, 512, seed);
        disk.set_latency(&reactor, Duration::from_micros(10)..Duration::from_millis(5));
        let ended = Rc::new(RefCell::new(Vec::new()));
        for number in 0..16_u64 {
            let io = disk.write(number * 512, bytes(BLOCK, 1), WriteFlags::NONE);
            let ended = ended.clone();
            drop(reactor.spawn(async move {
                io.await.unwrap();
                ended.borrow_mut().push(number);
            }));
        }
        assert_eq!(disk.undecided(), 16);
        let flush = disk.flush();
        reactor.block_on(flush).unwrap();
        while reactor.live_tasks() > 0 {
            if !reactor.turn() {
                reactor.park();
            }
        }
        // The flush began before any of the writes had completed: it covers none of them.
        assert_eq!(disk.undecided(), 16);
        ended.take()
    };
    let first = order(3);
    assert_eq!(first, order(3));
    assert!(!first.is_sorted());
    assert_ne!(first, order(4));
}

#[test]
fn a_trace_lists_what_was_asked_for_whatever_became_of_it() {
    let disk = disk();
    write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
    disk.trace();
    disk.inject(Fault::nth(OpKind::Write, 0, EIO));
    assert!(now(disk.write(512, bytes(BLOCK, 2), WriteFlags::NONE)).is_err());
    now(disk.flush()).unwrap();
    now(disk.discard(1024..2048)).unwrap();
    let asked = |kind, range| Asked { kind, range };
    let wanted =
        [asked(OpKind::Write, 512..1024), asked(OpKind::Flush, 0..0), asked(OpKind::Discard, 1024..2048)];
    assert_eq!(disk.take_trace(), wanted);
    now(disk.flush()).unwrap();
    assert!(disk.take_trace().is_empty());
}

#[test]
fn a_delayed_write_is_read_at_once_and_lost_in_spite_of_a_flush() {
    let disk = disk();
    disk.inject(Fault::nth(OpKind::Write, 0, Effect::Delayed { flushes: 1 }));
    write(&disk, 0, BLOCK, 1, WriteFlags::FUA);
    write(&disk, 512, BLOCK, 2, WriteFlags::NONE);
    now(disk.flush()).unwrap();
    assert_eq!(block_of(&disk.snapshot(), 0), 1);
    let lost = disk.crash(CrashChoice::Nothing).snapshot();
    assert_eq!((block_of(&lost, 0), block_of(&lost, 512)), (0, 2));
    now(disk.flush()).unwrap();
    assert_eq!(block_of(&disk.crash(CrashChoice::Nothing).snapshot(), 0), 1);
}

#[test]
fn an_operation_that_times_out_takes_its_time_and_fails() {
    let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::ZERO)));
    let disk = disk();
    disk.set_clock(&reactor);
    let after = Duration::from_secs(30);
    disk.inject(Fault::nth(OpKind::Write, 0, Effect::Timeout { after }));
    let io = disk.write(0, bytes(BLOCK, 1), WriteFlags::NONE);
    assert_eq!(reactor.block_on(io), Err(BdevError::Io { offset: 0, errno: libc::ETIMEDOUT }));
    assert!(reactor.clock().monotonic() >= after);
    write(&disk, 0, BLOCK, 2, WriteFlags::NONE);
}

#[test]
fn whole_writes_are_never_torn_and_torn_ones_only_where_the_choice_says() {
    let disk = disk();
    for number in 0..3 {
        write(&disk, number * 4096, 4096, 1, WriteFlags::NONE);
    }
    let blocks = |choice, number: u64| -> usize {
        let image = disk.crash(choice).snapshot();
        (0..8).filter(|block| block_of(&image, number * 4096 + block * 512) == 1).count()
    };
    let mut parts = HashSet::new();
    for seed in 0..50 {
        for number in 0..3 {
            assert!([0, 8].contains(&blocks(CrashChoice::Whole { seed }, number)));
        }
        let torn = CrashChoice::TornAfter { count: 1, seed };
        assert_eq!((blocks(torn, 0), blocks(torn, 2)), (8, 0));
        parts.insert(blocks(torn, 1));
    }
    assert!(parts.len() > 3);
}

#[test]
fn what_a_dead_host_has_written_is_read_and_may_still_be_lost() {
    let disk = disk();
    disk.record();
    write(&disk, 0, BLOCK, 1, WriteFlags::NONE);
    write(&disk, 512, BLOCK, 2, WriteFlags::NONE);
    let mut history = disk.take_history();
    // The second write has begun.
    let next = SimDisk::from_cache(history.cache_at(3).after_the_host(), BLOCK as u32, 2);
    let blocks = |image: &Image| (block_of(image, 0), block_of(image, 512));
    assert_eq!(blocks(&next.snapshot()), (1, 2));
    assert_eq!(blocks(&next.crash(CrashChoice::Nothing).snapshot()), (0, 0));
    now(next.flush()).unwrap();
    assert_eq!(blocks(&next.crash(CrashChoice::Nothing).snapshot()), (1, 2));
}

#[test]
fn a_device_of_large_blocks_may_tear_them() {
    let disk = SimDisk::new(1 << 20, 4096, 1);
    disk.set_tear_unit(512);
    write(&disk, 0, 4096, 1, WriteFlags::NONE);
    let torn = (0..20).any(|seed| {
        let image = disk.crash(CrashChoice::Random { seed }).snapshot();
        let blocks: HashSet<u8> = (0..8).map(|block| block_of(&image, block * 512)).collect();
        blocks.len() == 2
    });
    assert!(torn);
}
