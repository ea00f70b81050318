//! Space that is given back: to the device, by discards, and from metadata to data.

use std::rc::Rc;

use bdev::sim::{OpKind, SimDisk};
use blobfs::FsError;

use crate::crash::{Depth, Explorer};
use crate::operation::{Durability, NewKind, Operation};
use crate::oracle::State;
use crate::workload::Workload;
use crate::world::{Geometry, World, fsck};

fn create(path: String) -> Operation {
    Operation::Create { path, kind: NewKind::File, mode: 0o600 }
}

fn append(path: &str, len: usize, tag: u64) -> Operation {
    Operation::append(path, len, tag, Durability::None)
}

/// Files that are long enough to be discarded take each other's place; each deletion and each file is durable before
/// the next one. A discard leaves garbage, so that one of a block in use, of the state that a power cut leaves
/// included, would be seen.
#[test]
fn a_power_cut_finds_nothing_discarded_that_is_in_use() {
    // A file fits the cache.
    let geometry = Geometry { pages: 256, ..Geometry::PAGE };
    let world = World::mount(&geometry.format(1), &geometry, 10).unwrap();
    let disk = world.disk.clone();
    let mut workload = Workload::new(world).unwrap();
    disk.record();
    disk.trace();
    for number in 0..12_u64 {
        let path = format!("file {number}");
        let mut operations = vec![create(path.clone()), append(&path, 160 << 10, number), Operation::Syncfs];
        if number >= 4 {
            operations.push(Operation::Unlink { path: format!("file {}", number - 4), hold: false });
        }
        operations.push(Operation::Sleep { seconds: 7 });
        for operation in operations {
            workload.perform(&operation).unwrap();
        }
    }
    let discards = disk.take_trace().iter().filter(|asked| asked.kind == OpKind::Discard).count();
    assert!(discards >= 7, "{discards} discards");
    let mut history = disk.take_history();
    workload.compare().unwrap();
    workload.world.settle();
    let mut explorer = Explorer::new(geometry, 5);
    explorer.explore(&workload.log, &mut history, Depth { points: 400, choices: 2, again: 0.1 }).unwrap();
}

const GEOMETRY: Geometry = Geometry { device: 14 << 20, dirty: 1 << 20, pages: 256, ..Geometry::PAGE };

/// Does something as often as there is room for it; says how often that was.
fn until_full(world: &World, operation: impl Fn(u64) -> Operation) -> u64 {
    for number in 0.. {
        match world.perform(&operation(number), &State::default()) {
            Ok(given) if given.written.is_none_or(|written| written == DATA_LEN) => {}
            Ok(_) | Err(FsError::NoSpace) => return number,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!()
}

const DATA_LEN: usize = 64 << 10;

/// Writes data until there is no room; gives the number of bytes.
fn fill_with_data(world: &World) -> u64 {
    world.perform(&create("data".to_owned()), &State::default()).unwrap();
    until_full(world, |tag| append("data", DATA_LEN, tag)) * DATA_LEN as u64
}

/// A disk that was filled with inodes, all of them deleted.
fn filled_with_inodes_and_emptied() -> World {
    let world = World::mount(&GEOMETRY.format(1), &GEOMETRY, 10).unwrap();
    let before = world.available();
    let inodes = until_full(&world, |number| create(format!("{number:0>120}")));
    assert!(inodes > 10_000, "only {inodes} inodes");
    assert!(world.available() < before / 50);
    for number in 0..inodes {
        let path = format!("{number:0>120}");
        world.perform(&Operation::Unlink { path, hold: false }, &State::default()).unwrap();
    }
    world
}

/// What metadata may keep of the space that it took, in bytes: two of its chunks, and what it always needs.
fn kept() -> u64 {
    2 * 64 * u64::from(GEOMETRY.node)
}

#[test]
fn data_finds_the_space_that_deleted_inodes_took() {
    let empty = fill_with_data(&World::mount(&GEOMETRY.format(1), &GEOMETRY, 10).unwrap());
    let at_once = filled_with_inodes_and_emptied();
    let later = filled_with_inodes_and_emptied();
    later.perform(&Operation::Syncfs, &State::default()).unwrap();
    later.settle();
    let remounted =
        World::mount(&filled_with_inodes_and_emptied().unmount().unwrap(), &GEOMETRY, 20).unwrap();
    for (when, world) in [("at once", at_once), ("later", later), ("after a mount", remounted)] {
        let written = fill_with_data(&world);
        assert!(written + kept() >= empty, "{when}: {written} bytes, {empty} on an empty device");
        let disk: Rc<SimDisk> = world.unmount().unwrap();
        fsck(&disk).unwrap_or_else(|problem| panic!("{when}: {problem}"));
    }
}
