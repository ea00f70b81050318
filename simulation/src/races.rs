//! Operations at the same time, on a device whose operations end out of order: blocks that change hands while somebody
//! still reads or writes them, and more at work than the caches hold.

use std::time::Duration;

use blobfs::units::InodeId;

use crate::operation::{Durability, NewKind, Operation, Target, pattern};
use crate::workload::Workload;
use crate::world::{Geometry, World, fsck};

const LEN: usize = 96 << 10;
const A: u64 = 4;
const B: u64 = 9;

fn create(path: &str) -> Operation {
    Operation::Create { path: path.to_owned(), kind: NewKind::File, mode: 0o600 }
}

/// A write that is direct when its tag is a multiple of four.
fn write(path: &str, len: usize, tag: u64, durability: Durability) -> Operation {
    Operation::append(path, len, tag, durability)
}

/// A device with file `a`, an empty file `b` and no room for `b` to grow but that of `a`.
fn nearly_full(geometry: &Geometry, seed: u64) -> Result<(Workload, InodeId), String> {
    let mut workload = Workload::new(World::mount(&geometry.format(seed), geometry, 10)?)?;
    for path in ["a", "b", "ballast"] {
        workload.perform(&create(path))?;
    }
    workload.perform(&write("a", LEN, A, Durability::Full))?;
    while workload.world.available() > LEN as u64 / 2 {
        let len = (workload.world.available() as usize - LEN / 2).clamp(512, 32 << 10);
        workload.perform(&write("ballast", len, 12, Durability::Full))?;
    }
    workload.perform(&Operation::Syncfs)?;
    let a = workload.state().resolve("a").map_err(|error| error.to_string())?;
    let latency = Duration::from_micros(10)..Duration::from_millis(20);
    workload.world.disk.set_latency(&workload.world.reactor, latency);
    Ok((workload, a))
}

/// Whether each byte is that of the pattern or, where it was taken away, zero.
fn is_own(bytes: &[u8], tag: u64) -> bool {
    bytes.iter().zip(pattern(tag, 0, bytes.len())).all(|(&found, own)| found == own || found == 0)
}

fn read_while_blocks_change_hands(geometry: &Geometry, seed: u64) -> Result<(), String> {
    let (workload, a) = nearly_full(geometry, seed)?;
    let world = &workload.world;
    let read = world.start_read(a, LEN);
    let gone = match seed % 2 {
        0 => Operation::Truncate { target: Target::Path("a".to_owned()), size: 0 },
        _ => Operation::Unlink { path: "a".to_owned(), hold: false },
    };
    let gone = world.start(&gone);
    let tag = B - seed % 4 / 2;
    let written = world.start(&write("b", LEN, tag, Durability::Full));
    let bytes = world.end(read).map_err(|error| format!("read: {error}"))?;
    if !is_own(&bytes, A) {
        return Err("a read shows bytes of another file".to_owned());
    }
    world.end(gone).map_err(|error| format!("give up: {error}"))?;
    let written = world.end(written).map_err(|error| format!("write: {error}"))?.written;
    check_b(&workload, tag, written.unwrap_or_default())
}

fn overwrite_while_blocks_change_hands(geometry: &Geometry, seed: u64) -> Result<(), String> {
    let (workload, _) = nearly_full(geometry, seed)?;
    let world = &workload.world;
    let overwrite = Operation::Write {
        target: Target::Path("a".to_owned()),
        offset: 0,
        len: LEN,
        tag: 20 + seed % 3,
        append: false,
        durability: Durability::None,
        from_cache: false,
    };
    let overwrite = world.start(&overwrite);
    let gone = world.start(&Operation::Truncate { target: Target::Path("a".to_owned()), size: 0 });
    let tag = B - seed % 4 / 2;
    let written = world.start(&write("b", LEN, tag, Durability::Full));
    world.end(overwrite).map_err(|error| format!("overwrite: {error}"))?;
    world.end(gone).map_err(|error| format!("truncate: {error}"))?;
    match world.end(written) {
        Ok(given) => check_b(&workload, tag, given.written.unwrap_or_default()),
        // The overwrite may have come last.
        Err(blobfs::FsError::NoSpace) => check_b(&workload, tag, 0),
        Err(error) => Err(format!("write: {error}")),
    }
}

/// Everything that `b` was given is there, now and after a mount.
fn check_b(workload: &Workload, tag: u64, written: usize) -> Result<(), String> {
    let world = &workload.world;
    let state = world.walk(&[]).map_err(|error| error.to_string())?;
    let b = state.node(state.resolve("b").map_err(|error| error.to_string())?);
    let content = b.content().ok_or("b is no file")?;
    let expected = pattern(tag, 0, written);
    let same = expected
        .chunks(512)
        .enumerate()
        .all(|(number, chunk)| content.sector(number as u64)[..chunk.len()] == *chunk);
    if content.size < written as u64 || !same {
        return Err(format!("b has {} bytes, and not those {written} that were written", content.size));
    }
    let disk = world.unmount().map_err(|error| format!("unmount: {error}"))?;
    disk.clear_latency();
    world.same_space(&fsck(&disk)?)
}

#[test]
fn a_read_under_way_never_shows_bytes_of_the_file_that_gets_the_blocks() {
    for seed in 0..60 {
        let result = read_while_blocks_change_hands(&Geometry::TINY, seed);
        result.unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
}

#[test]
fn a_write_under_way_never_reaches_the_file_that_gets_the_blocks() {
    for seed in 0..60 {
        let result = overwrite_while_blocks_change_hands(&Geometry::TINY, seed);
        result.unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
}

/// More is written at the same time than the data cache holds, with as few pages as make sense.
#[test]
fn writes_that_together_exceed_the_cache_all_end() {
    const WRITERS: usize = 8;
    for pages in [16, 24, 64] {
        let geometry = Geometry { pages, ..Geometry::PAGE };
        let world = World::mount(&geometry.format(3), &geometry, 10).unwrap();
        world.disk.set_latency(&world.reactor, Duration::from_micros(10)..Duration::from_millis(5));
        let paths: Vec<String> = (0..WRITERS).map(|number| format!("file {number}")).collect();
        for path in &paths {
            world.end(world.start(&create(path))).unwrap();
        }
        // Odd tags: buffered.
        let started: Vec<_> =
            paths.iter().map(|path| world.start(&write(path, 40 << 10, 7, Durability::None))).collect();
        for started in started {
            assert_eq!(world.end(started).unwrap().written, Some(40 << 10), "{pages} pages");
        }
        let state = world.walk(&[]).unwrap();
        for path in &paths {
            let content = state.node(state.resolve(path).unwrap()).content().unwrap().clone();
            assert_eq!(content.sector(40 * 2 - 1)[..], pattern(7, 40 * 1024 - 512, 512)[..]);
        }
        let disk = world.unmount().unwrap();
        disk.clear_latency();
        fsck(&disk).unwrap();
    }
}
