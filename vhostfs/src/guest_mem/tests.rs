use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

fn memfd(len: u64) -> Descriptor {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    file.into()
}

fn region(gpa: u64, uva: u64, len: u64) -> Rc<Region> {
    Region::map(RegionDescription { gpa, uva, len, mmap_offset: 0 }, &mut memfd(len)).unwrap()
}

fn pieces(memory: &GuestMemory, gpa: u64, len: u64) -> Option<Vec<usize>> {
    let mut out = Vec::new();
    memory.translate(gpa, len, &mut out).ok()?;
    Some(out.iter().map(Segment::len).collect())
}

#[test]
fn translation_accepts_what_lies_inside_and_nothing_else() {
    let memory = GuestMemory::new(vec![region(0x10000, 0x7000_0000, 0x2000)]).unwrap();
    assert_eq!(pieces(&memory, 0x10000, 0x2000), Some(vec![0x2000]));
    assert_eq!(pieces(&memory, 0x11fff, 1), Some(vec![1]));
    assert_eq!(pieces(&memory, 0x11fff, 2), None);
    assert_eq!(pieces(&memory, 0xffff, 1), None);
    assert_eq!(pieces(&memory, u64::MAX, 0xffff_ffff), None);
    assert_eq!(pieces(&memory, u64::MAX, 0), Some(vec![]));
}

#[test]
fn a_buffer_over_adjoining_regions_is_split() {
    let memory =
        GuestMemory::new(vec![region(0x1000, 0x9000, 0x1000), region(0x2000, 0x20000, 0x1000)]).unwrap();
    assert_eq!(pieces(&memory, 0x1800, 0x1000), Some(vec![0x800, 0x800]));
    assert!(memory.table(0x1800, 0x1000).is_err(), "a table must be in one piece");
    assert!(memory.table(0x1800, 0x800).is_ok());
}

#[test]
fn ring_areas_are_found_by_frontend_address_and_alignment() {
    let memory = GuestMemory::new(vec![region(0, 0x7000_0000, 0x1000)]).unwrap();
    assert!(memory.ring_area(0x7000_0010, 0xff0, 16).is_ok());
    assert!(memory.ring_area(0x7000_0010, 0xff1, 16).is_err());
    assert!(memory.ring_area(0x7000_0008, 16, 16).is_err());
    assert!(memory.ring_area(0x10, 16, 16).is_err(), "a guest address is not a frontend address");
}

#[test]
fn malformed_and_overlapping_regions_are_refused() {
    let mut file = memfd(0x1000);
    let mut with =
        |gpa, uva, len, mmap_offset| Region::map(RegionDescription { gpa, uva, len, mmap_offset }, &mut file);
    assert!(with(0, 0, 0, 0).is_err());
    assert!(with(u64::MAX, 0, 2, 0).is_err());
    assert!(with(0, u64::MAX, 2, 0).is_err());
    assert!(with(0, 0, 2, u64::MAX).is_err());
    assert!(with(0, 0, u64::MAX / 2, 0x1000).is_err());
    let overlapping = vec![region(0, 0x10000, 0x2000), region(0x1000, 0x20000, 0x1000)];
    assert!(matches!(GuestMemory::new(overlapping), Err(MemoryError::Overlap(_))));
}

#[test]
fn an_unaligned_file_offset_reaches_the_right_bytes() {
    let mut file = memfd(0x4000);
    rustix::io::pwrite(&file, b"here", 0x1234).unwrap();
    let description = RegionDescription { gpa: 0, uva: 0, len: 0x1000, mmap_offset: 0x1234 };
    let memory = GuestMemory::new(vec![Region::map(description, &mut file).unwrap()]).unwrap();
    assert_eq!(&memory.table(0, 16).unwrap().entry(0).unwrap()[..4], b"here");
}

#[test]
fn a_removed_region_lives_as_long_as_its_buffers() {
    let memory = GuestMemory::new(vec![region(0, 0, 0x1000), region(0x1000, 0x1000, 0x1000)]).unwrap();
    let mut segments = Vec::new();
    memory.translate(0, 8, &mut segments).unwrap();
    let buffers = bdev::IoBuffers::new(segments, memory.clone());
    let (rest, removed) = memory.without(memory.regions()[0].description()).unwrap();
    let watch = Rc::downgrade(&removed);
    drop((removed, memory));
    assert_eq!(rest.regions().len(), 1);
    buffers.copy_from(0, b"late");
    assert!(watch.upgrade().is_some());
    drop(buffers);
    assert!(watch.upgrade().is_none(), "nothing holds the region any more");
}

#[test]
fn shrinking_the_file_breaks_its_region_only() {
    install_fault_handler().unwrap();
    let mut file = memfd(0x4000);
    let description = RegionDescription { gpa: 0, uva: 0, len: 0x4000, mmap_offset: 0 };
    let shrunk = GuestMemory::new(vec![Region::map(description, &mut file).unwrap()]).unwrap();
    let other = GuestMemory::new(vec![region(0, 0, 0x1000)]).unwrap();
    let before = fault_count();
    ftruncate(&file, 0x1000).unwrap();
    assert_eq!(shrunk.table(0, 16).unwrap().entry(0), Some([0; 16]));
    assert!(!shrunk.is_broken(), "the first page is still there");
    assert_eq!(shrunk.table(0x2000, 16).unwrap().entry(0), Some([0; 16]));
    assert!(shrunk.is_broken());
    assert!(!other.is_broken());
    assert!(fault_count() > before);
    shrunk.ring_area(0x3000, 16, 16).unwrap().store_pair(0, 1, 2);
}
