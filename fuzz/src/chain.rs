//! A split virtqueue in memory that a hostile driver writes.
//!
//! A second implementation of the rules of virtio 1.3, 2.7, reads the same memory through the file behind it. Both must
//! agree on whether there is a chain, what is in it, and what an answer looks like. Whatever a chain names is then
//! read and written as a whole: it lies in the guest's memory, and where it was asked for.

mod model;

use std::ops::Range;
use std::rc::Rc;

use arbitrary::Arbitrary;
use bdev::{IoBuffers, Segment};
use vhostfs::descriptor::Descriptor;
use vhostfs::guest_mem::{GuestMemory, Region, RegionDescription};
use vhostfs::ring::chain::{Chain, ChainFault};
use vhostfs::ring::{Ring, RingAddresses, RingFeatures};

use crate::memory::{SharedMemory, descriptor};
use model::{Model, Parsed, Piece};

/// Bytes of each of the guest's two regions.
const REGION_LEN: u64 = 0x8000;
/// Addresses of the first region.
const GPA: u64 = 0x1_0000;
const UVA: u64 = 0x7f00_0000_0000;
/// What an indirect table lies behind.
const TABLES: u64 = 0x1000;

/// What an execution does.
#[derive(Debug, Arbitrary)]
pub struct Input {
    /// Power of two of the queue's size.
    size: u8,
    indirect: bool,
    event_index: bool,
    /// Number of the first chain.
    base: u16,
    /// Where the second region begins: at the end of the first one, or behind a gap.
    gap: u8,
    /// The used index that the ring starts with.
    used: u16,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    /// A descriptor in the queue's own table, or in one of the others.
    Descriptor {
        table: u8,
        index: u8,
        to: Address,
        len: Length,
        flags: u8,
        next: u8,
    },
    /// The next entry of the available ring, shown to the device.
    Offer(u8),
    /// Any available index.
    Index(u16),
    /// Bytes anywhere.
    Bytes {
        at: u16,
        bytes: Vec<u8>,
    },
    Pop,
    /// Answers one of the chains that were taken.
    Push {
        chain: u8,
        len: u32,
    },
    Publish,
    Kicks(bool),
    /// The ring moves.
    Move(Places),
}

/// Guest addresses.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Address {
    /// In the guest's memory.
    Inside(u16),
    /// Around the end of the first region.
    Seam(i8),
    /// An indirect table.
    Table(u8),
    Any(u64),
}

impl Address {
    fn get(self) -> u64 {
        match self {
            Self::Inside(at) => GPA + u64::from(at),
            Self::Seam(at) => (GPA + REGION_LEN).wrapping_add_signed(at.into()),
            Self::Table(number) => GPA + table(number),
            Self::Any(address) => address,
        }
    }
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Length {
    Small(u8),
    Entries(u8),
    Any(u32),
}

impl Length {
    fn get(self) -> u32 {
        match self {
            Self::Small(len) => len.into(),
            Self::Entries(count) => u32::from(count) * 16,
            Self::Any(len) => len,
        }
    }
}

/// Offset of a table; number 0 is the queue's own.
fn table(number: u8) -> u64 {
    match number % 8 {
        0 => 0,
        number => TABLES + u64::from(number) * 0x200,
    }
}

/// Where a ring lies, as offsets in the first region.
#[derive(Debug, Clone, Copy, Arbitrary)]
struct Places {
    descriptors: u16,
    available: u16,
    used: u16,
}

impl Places {
    const USUAL: Self = Self { descriptors: 0, available: 0x400, used: 0x800 };

    fn addresses(self) -> RingAddresses {
        let at = |offset: u16| UVA + u64::from(offset);
        RingAddresses {
            descriptors: at(self.descriptors),
            available: at(self.available),
            used: at(self.used),
        }
    }

    fn parts(self, size: u16) -> [Range<u64>; 3] {
        let part = |at: u16, len: u64| u64::from(at)..u64::from(at) + len;
        let size = u64::from(size);
        [part(self.descriptors, size * 16), part(self.available, 6 + size * 2), part(self.used, 6 + size * 8)]
    }

    fn overlap(self, size: u16) -> bool {
        let [descriptors, available, used] = self.parts(size);
        let meet = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        meet(&descriptors, &available) || meet(&descriptors, &used) || meet(&available, &used)
    }

    /// Whether all parts of a ring lie in the region and are aligned (virtio 1.3, 2.7).
    fn are_possible(self, size: u16) -> bool {
        let [descriptors, available, used] = self.parts(size);
        let fits = |part: Range<u64>, align| part.start.is_multiple_of(align) && part.end <= REGION_LEN;
        fits(descriptors, 16) && fits(available, 2) && fits(used, 4)
    }
}

/// Runs the target.
///
/// # Panics
/// When something is wrong.
pub fn run(input: Input) {
    let Some(mut queue) = Queue::new(&input) else { return };
    for step in &input.steps {
        if !queue.step(step) {
            break;
        }
    }
}

struct Queue {
    ring: Ring,
    chain: Chain,
    memory: Rc<GuestMemory>,
    model: Model,
    /// Heads that were taken and not answered.
    taken: Vec<u16>,
}

impl Queue {
    fn new(input: &Input) -> Option<Self> {
        let files = [SharedMemory::new(REGION_LEN), SharedMemory::new(REGION_LEN)];
        let starts = [GPA, GPA + REGION_LEN + u64::from(input.gap) * 0x100];
        let regions = files.iter().zip(starts).enumerate().map(|(number, (file, gpa))| {
            let uva = UVA + number as u64 * 0x10_0000;
            let description = RegionDescription { gpa, uva, len: REGION_LEN, mmap_offset: 0 };
            Region::map(description, &mut Descriptor::from(file.descriptor())).expect("a memfd can be mapped")
        });
        let memory = GuestMemory::new(regions.collect()).expect("the regions are apart");
        let size = 1 << (input.size % 5);
        let features = RingFeatures { indirect: input.indirect, event_index: input.event_index };
        files[0].write(u64::from(Places::USUAL.used) + 2, &input.used.to_le_bytes());
        let model = Model::new(files, starts, size, features, input.base);
        let ring = Ring::attach(&memory, &Places::USUAL.addresses(), size, features, input.base).ok()?;
        Some(Self { ring, chain: Chain::new(), memory, model, taken: Vec::new() })
    }

    /// Performs a step. False when the ring is broken.
    fn step(&mut self, step: &Step) -> bool {
        let model = &mut self.model;
        match step {
            Step::Descriptor { table: number, index, to, len, flags, next } => {
                let at = match number % 8 {
                    0 => u64::from(model.places.descriptors),
                    _ => table(*number),
                };
                let bytes = descriptor(to.get(), len.get(), (flags & 15).into(), (next % 32).into());
                model.poke(at + u64::from(index % 32) * 16, &bytes);
            }
            Step::Offer(head) => model.offer((*head).into()),
            Step::Index(index) => model.set_available(*index),
            Step::Bytes { at, bytes } => model.poke((*at).into(), bytes),
            Step::Pop => return self.pop(),
            Step::Push { chain, len } => self.push(*chain, *len),
            Step::Publish => {
                let pushed = model.pushed();
                let expected = model.publish();
                assert_eq!(self.ring.publish(), expected, "whether the driver is notified");
                if pushed > 0 {
                    model.check_published();
                }
            }
            Step::Kicks(true) => {
                let expected = model.has_available();
                assert_eq!(self.ring.enable_kicks(), expected, "whether there is something to take");
                model.check_kicks(true);
            }
            Step::Kicks(false) => {
                self.ring.disable_kicks();
                model.check_kicks(false);
            }
            // Parts that overlap are the driver's own trouble: what it reads there is anything.
            Step::Move(places) if places.overlap(model.size) => {}
            Step::Move(places) => {
                let moved = self.ring.relocate(&self.memory, &places.addresses()).is_ok();
                assert_eq!(moved, places.are_possible(model.size), "whether the ring can be there");
                if moved {
                    model.places = *places;
                }
            }
        }
        true
    }

    /// Takes a chain. False when the ring is broken.
    fn pop(&mut self) -> bool {
        let expected = self.model.pop();
        let found = self.ring.pop(&mut self.chain);
        let parsed = match (expected, found) {
            (Ok(None), Ok(false)) => return true,
            (Err(_), Err(_)) => return false,
            (Ok(Some(parsed)), Ok(true)) => parsed,
            (expected, found) => panic!("{found:?} instead of {expected:?}"),
        };
        assert_eq!(self.ring.next_available(), self.model.next);
        self.compare(&parsed);
        // A queue never has more requests under way than entries; a chain that is offered twice is taken twice.
        if self.taken.len() < usize::from(self.model.size) {
            self.taken.push(parsed.head);
        }
        true
    }

    fn compare(&self, parsed: &Parsed) {
        let chain = &self.chain;
        assert_eq!(chain.head(), parsed.head);
        assert_eq!(chain.descriptors(), parsed.descriptors);
        let fault = match chain.fault() {
            None => None,
            Some(ChainFault::Address) => Some(model::Fault::Address),
            Some(ChainFault::Order) => Some(model::Fault::Order),
        };
        assert_eq!(fault, parsed.fault);
        assert_eq!(lengths(chain.readable()), model::lengths(&parsed.readable));
        assert_eq!(lengths(chain.writable()), model::lengths(&parsed.writable));
        self.compare_readable(&parsed.readable);
        self.compare_writable(&parsed.writable);
    }

    /// What is read is what the file holds at the places that the descriptors name.
    fn compare_readable(&self, pieces: &[Piece]) {
        for (segment, piece) in self.chain.readable().iter().zip(pieces) {
            let buffers = IoBuffers::new([*segment], self.memory.clone());
            let mut bytes = vec![0; buffers.len()];
            assert_eq!(buffers.copy_to(0, &mut bytes), bytes.len());
            assert_eq!(bytes, self.model.bytes(piece), "read from {piece:?}");
        }
    }

    /// What is written is in the file at those places.
    fn compare_writable(&self, pieces: &[Piece]) {
        for (segment, piece) in self.chain.writable().iter().zip(pieces) {
            let before = self.model.bytes(piece);
            let buffers = IoBuffers::new([*segment], self.memory.clone());
            let inverted: Vec<u8> = before.iter().map(|byte| !byte).collect();
            buffers.copy_from(0, &inverted);
            assert_eq!(self.model.bytes(piece), inverted, "written to {piece:?}");
            buffers.copy_from(0, &before);
        }
    }

    fn push(&mut self, chain: u8, len: u32) {
        let Some(index) = usize::from(chain).checked_rem(self.taken.len()) else { return };
        let head = self.taken.swap_remove(index);
        // What was pushed before and not shown yet must not be overtaken.
        if self.model.pushed() < self.model.size {
            self.ring.push_used(head, len);
            self.model.check_push(head, len);
        }
    }
}

fn lengths(segments: &[Segment]) -> Vec<usize> {
    segments.iter().map(Segment::len).collect()
}
