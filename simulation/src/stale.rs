//! Journal blocks that do not belong to the journal: a write of an earlier mount that a slow path delivers
//! late (a dead host's request in a network's queue), and a block of another future of the same mount.

use bdev::sim::{CrashChoice, Image};

use crate::operation::{NewKind, Operation};
use crate::workload::Workload;
use crate::world::{Geometry, World};

const GEOMETRY: Geometry = Geometry::TINY;

/// A mounted file system in which files of these names were made, each durable before the next.
fn with_files(image: &Image, names: &[&str]) -> Workload {
    let disk = GEOMETRY.disk(image.clone(), 1);
    let mut workload = Workload::new(World::mount(&disk, &GEOMETRY, 10).unwrap()).unwrap();
    for name in names {
        let file = Operation::Create { path: (*name).to_owned(), kind: NewKind::File, mode: 0o600 };
        workload.perform(&file).unwrap();
        workload.perform(&Operation::Syncfs).unwrap();
    }
    workload
}

/// What a power cut leaves when nothing is lost that was durable.
fn cut(workload: &Workload) -> Image {
    workload.world.disk.crash(CrashChoice::Nothing).snapshot()
}

/// Puts the journal sectors in which `late` differs from `before` into `image`, where it does not differ.
fn deliver(image: &mut Image, before: &Image, late: &Image, world: &World) {
    let superblock = world.store.superblock();
    let start = superblock.journal_start * u64::from(superblock.block_size);
    let end = start + superblock.journal_blocks * u64::from(superblock.block_size);
    let sector = |image: &Image, at: u64| {
        let mut bytes = vec![0; GEOMETRY.sector as usize];
        image.read(at, &mut bytes);
        bytes
    };
    for at in (start..end).step_by(GEOMETRY.sector as usize) {
        let (old, new) = (sector(before, at), sector(late, at));
        if old != new && sector(image, at) == old {
            image.write(at, &new);
        }
    }
}

fn names(image: Image) -> Vec<String> {
    let disk = GEOMETRY.disk(image, 1);
    let world = World::mount(&disk, &GEOMETRY, 100).unwrap();
    world.walk(&[]).unwrap().paths(|_| true).split_off(1)
}

/// Without a new epoch for each mount the block would fit: same place, sequence number and predecessor.
#[test]
fn a_journal_block_of_an_earlier_mount_that_arrives_late_is_not_replayed() {
    let image = GEOMETRY.format(1).snapshot();
    let first = with_files(&image, &[]);
    let before = cut(&first);
    let late = cut(&with_files(&image, &["late"]));
    assert_eq!(names(late.clone()), ["late"]);
    let second = with_files(&before, &[]);
    let mut found = cut(&second);
    deliver(&mut found, &before, &late, &second.world);
    assert_ne!(found.content_hash(), cut(&second).content_hash(), "the block was delivered");
    assert_eq!(names(found), Vec::<String>::new());
}

/// Without the predecessor's checksum the block would fit: same mount, place and sequence number.
#[test]
fn a_journal_block_that_follows_another_one_is_not_replayed() {
    let image = GEOMETRY.format(1).snapshot();
    let before = cut(&with_files(&image, &[]));
    let other = cut(&with_files(&image, &["one", "two"]));
    let this = with_files(&image, &["uno"]);
    let mut found = cut(&this);
    deliver(&mut found, &before, &other, &this.world);
    assert_ne!(found.content_hash(), cut(&this).content_hash(), "the second block was delivered");
    assert_eq!(names(found), ["uno"]);
}
