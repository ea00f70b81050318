//! What a mount costs: a number of reads that depends on the journal, not on how much the file system holds.
//!
//! Two things grow, both slowly: the way from the root to an item by a node for each level of the tree, and the
//! chunk map by a page for 680 chunks of 1 MiB, which is more metadata than these tests make.

use std::rc::Rc;

use bdev::sim::{CrashChoice, Image, OpKind, SimDisk};
use blobfs::fs::FallocateMode;

use crate::operation::{NewKind, Operation, Target};
use crate::oracle::State;
use crate::world::{Geometry, World, fsck};

/// The sizes that mkfs picks for such a device, but for the journal, which is short enough to be filled.
const GEOMETRY: Geometry = Geometry {
    device: 16 << 30,
    sector: 4096,
    block: 4096,
    node: 16_384,
    journal: 1 << 20,
    dirty: 8 << 20,
    pages: 1024,
    sums: false,
};

const DIRECTORIES: usize = 20;
const FILES_PER_DIRECTORY: usize = 400;

/// Levels that the tree of the large file system has beyond the empty one's, at most.
const LEVELS: usize = 2;

fn path(directory: usize, file: usize) -> String {
    format!("directory {directory}/file number {file}")
}

fn perform(world: &World, operation: &Operation) {
    world.perform(operation, &State::default()).unwrap_or_else(|error| panic!("{operation}: {error}"));
}

/// Makes thousands of inodes and files of some GiB.
fn fill(world: &World) {
    for directory in 0..DIRECTORIES {
        let made = format!("directory {directory}");
        perform(world, &Operation::Create { path: made, kind: NewKind::Directory, mode: 0o700 });
        for file in 0..FILES_PER_DIRECTORY {
            let path = path(directory, file);
            perform(world, &Operation::Create { path, kind: NewKind::File, mode: 0o600 });
        }
        perform(
            world,
            &Operation::Fallocate {
                target: Target::Path(path(directory, 0)),
                mode: FallocateMode::Allocate { keep_size: false },
                offset: 0,
                len: 500 << 20,
            },
        );
    }
}

/// Changes files all over the tree, none of it written by a checkpoint yet.
fn touch(world: &World, files: usize) {
    for number in 0..files {
        let target = Target::Path(path(number % DIRECTORIES, number * 7 % FILES_PER_DIRECTORY));
        perform(world, &Operation::Chmod { target, mode: 0o640 });
    }
    perform(world, &Operation::Syncfs);
}

/// Reads that the device is asked for until the file system answers.
fn reads_of_mount(image: Image) -> usize {
    let disk = GEOMETRY.disk(image, 1);
    disk.trace();
    let world = World::mount(&disk, &GEOMETRY, 10).unwrap();
    let reads = disk.take_trace().iter().filter(|asked| asked.kind == OpKind::Read).count();
    drop(world);
    reads
}

/// The same file system mounted once more, with files touched, and the power cut.
fn crashed(disk: &Rc<SimDisk>, files: usize) -> Image {
    let disk = GEOMETRY.disk(disk.snapshot(), 1);
    let world = World::mount(&disk, &GEOMETRY, 5).unwrap();
    touch(&world, files);
    disk.crash(CrashChoice::Nothing).snapshot()
}

#[test]
fn a_mount_reads_no_more_of_a_large_file_system_than_of_an_empty_one() {
    let empty = GEOMETRY.format(1);
    let before = reads_of_mount(empty.snapshot());
    let world = World::mount(&empty, &GEOMETRY, 5).unwrap();
    let available = world.available();
    fill(&world);
    assert!(available - world.available() > 9 << 30);
    let large = world.unmount().unwrap();
    fsck(&large).unwrap();

    let clean = reads_of_mount(large.snapshot());
    assert!(clean <= before + LEVELS, "{clean} reads, {before} of an empty file system");
    for files in [10, 100] {
        let recovery = reads_of_mount(crashed(&large, files));
        // The journal block, in two reads, and the one that ends the replay; what the items lie in.
        let most = clean + 4 + files + LEVELS;
        assert!(recovery > clean, "nothing was replayed");
        assert!(recovery <= most, "{recovery} reads for {files} changes, expected {most} at most");
    }
}
