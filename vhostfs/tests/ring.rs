//! The device side of the ring against a driver that keeps to the rules in every way it may, and against
//! rings full of noise.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bdev::{IoBuffers, Segment};
use proptest::prelude::*;
use vhostfs::descriptor::Descriptor;
use vhostfs::guest_mem::{GuestMemory, Region, RegionDescription};
use vhostfs::ring::chain::Chain;
use vhostfs::ring::{Ring, RingAddresses, RingFeatures};

mod support;

use support::guest::{BUFFERS, GPA, Guest, INDIRECT, MEMORY_LEN, NEXT, UVA, WRITE};

const SIZE: u16 = 8;

fn attach(guest: &Guest, features: RingFeatures) -> (Ring, Rc<GuestMemory>) {
    let file: OwnedFd = guest.memory.try_clone().unwrap().into();
    let mut file = Descriptor::from(file);
    let description = RegionDescription { gpa: GPA, uva: UVA, len: MEMORY_LEN, mmap_offset: 0 };
    let memory = GuestMemory::new(vec![Region::map(description, &mut file).unwrap()]).unwrap();
    let addresses = RingAddresses { descriptors: UVA, available: UVA + 0x1000, used: UVA + 0x2000 };
    let ring = Ring::attach(&memory, &addresses, SIZE, features, 0).unwrap();
    (ring, memory)
}

/// One step of a driver and its device.
#[derive(Debug, Clone)]
enum Step {
    /// Offer a chain of these buffers (device-writable or not, length) in a table of its own or not.
    Offer { readable: Vec<u32>, writable: Vec<u32>, indirect: bool },
    /// Take what is available.
    Pop,
    /// Answer one of the chains taken, picked by this number.
    Push(usize),
    /// Show the answers.
    Publish,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lengths = || prop::collection::vec(0u32..200, 0..4);
    let step = prop_oneof![
        (lengths(), lengths(), any::<bool>()).prop_map(|(readable, writable, indirect)| Step::Offer {
            readable,
            writable,
            indirect
        }),
        Just(Step::Pop),
        any::<usize>().prop_map(Step::Push),
        Just(Step::Publish),
    ];
    prop::collection::vec(step, 1..200)
}

/// A driver that keeps a list of free descriptors.
struct Driver {
    guest: Guest,
    free: Vec<u16>,
    /// Descriptors of each chain offered, by head.
    offered: HashMap<u16, Vec<u16>>,
}

impl Driver {
    fn offer(&mut self, readable: &[u32], writable: &[u32], indirect: bool) -> bool {
        let buffers: Vec<(u32, u16)> =
            readable.iter().map(|len| (*len, 0)).chain(writable.iter().map(|len| (*len, WRITE))).collect();
        let needed = if indirect { 1 } else { buffers.len() };
        if buffers.is_empty() || self.free.len() < needed {
            return false;
        }
        let descriptors = self.free.split_off(self.free.len() - needed);
        let head = descriptors[0];
        let own_table = BUFFERS + 0x40000 + u64::from(head) * 0x100;
        let at = |position: usize| GPA + BUFFERS + u64::from(head) * 0x1000 + position as u64 * 0x200;
        for (position, (len, write)) in buffers.iter().enumerate() {
            let last = position + 1 == buffers.len();
            let flags = write | if last { 0 } else { NEXT };
            if indirect {
                self.guest.descriptor(
                    own_table,
                    position as u16,
                    at(position),
                    *len,
                    flags,
                    position as u16 + 1,
                );
            } else {
                let next = if last { 0 } else { descriptors[position + 1] };
                self.guest.descriptor(0, descriptors[position], at(position), *len, flags, next);
            }
        }
        if indirect {
            self.guest.descriptor(0, head, GPA + own_table, buffers.len() as u32 * 16, INDIRECT, 0);
        }
        self.offered.insert(head, descriptors);
        self.guest.offer(0, head);
        true
    }

    fn collect(&mut self) -> Vec<(u32, u32)> {
        let used = self.guest.take_used(0);
        for (head, _) in &used {
            let descriptors = self.offered.remove(&(*head as u16)).expect("used what was offered");
            self.free.extend(descriptors);
        }
        used
    }
}

fn lengths(segments: &[Segment]) -> Vec<usize> {
    segments.iter().map(Segment::len).collect()
}

fn not_empty(lengths: &[u32]) -> Vec<usize> {
    lengths.iter().filter(|len| **len > 0).map(|len| *len as usize).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_chain_is_seen_once_in_order_and_answered_once(steps in steps(), event_index: bool) {
        let mut driver = Driver { guest: Guest::new(SIZE), free: (0..SIZE).collect(), offered: HashMap::new() };
        let (mut ring, _memory) = attach(&driver.guest, RingFeatures { indirect: true, event_index });
        let mut chain = Chain::new();
        let mut expected = std::collections::VecDeque::new();
        let mut taken: Vec<u16> = Vec::new();
        let mut pushed = Vec::new();
        for step in steps {
            match step {
                Step::Offer { readable, writable, indirect } => {
                    let before = driver.guest.read(0x1002, 2);
                    if driver.offer(&readable, &writable, indirect) {
                        prop_assert_ne!(before, driver.guest.read(0x1002, 2));
                        expected.push_back((readable, writable));
                    }
                }
                Step::Pop => {
                    prop_assert_eq!(ring.has_available(), !expected.is_empty());
                    while ring.pop(&mut chain).unwrap() {
                        let (readable, writable) = expected.pop_front().unwrap();
                        prop_assert_eq!(lengths(chain.readable()), not_empty(&readable));
                        prop_assert_eq!(lengths(chain.writable()), not_empty(&writable));
                        prop_assert_eq!(chain.fault(), None);
                        taken.push(chain.head());
                    }
                    prop_assert!(expected.is_empty());
                }
                Step::Push(pick) if !taken.is_empty() => {
                    let head = taken.swap_remove(pick % taken.len());
                    ring.push_used(head, pick as u32);
                    pushed.push((u32::from(head), pick as u32));
                }
                Step::Push(_) => {}
                Step::Publish => {
                    prop_assert_eq!(driver.collect(), vec![], "nothing shows before it is published");
                    let notify = ring.publish();
                    if pushed.is_empty() || (!event_index) {
                        prop_assert_eq!(notify, !pushed.is_empty());
                    }
                    prop_assert_eq!(driver.collect(), std::mem::take(&mut pushed));
                }
            }
        }
    }

    #[test]
    fn noise_in_the_ring_gives_an_error_or_memory_of_the_guest(
        noise in prop::collection::vec(any::<u8>(), 0x400),
        sane in prop::collection::vec((0u64..MEMORY_LEN * 2, any::<u32>(), 0u16..8, 0u16..9), 8),
        heads in prop::collection::vec(0u16..9, 8),
        use_noise: bool,
        indirect: bool,
    ) {
        let mut guest = Guest::new(SIZE);
        guest.write(BUFFERS, &noise);
        if use_noise {
            guest.write(0, &noise);
        } else {
            for (index, (addr, len, flags, next)) in sane.into_iter().enumerate() {
                guest.descriptor(0, index as u16, GPA + addr, len, flags, next);
            }
        }
        let (mut ring, memory) = attach(&guest, RingFeatures { indirect, event_index: false });
        for head in heads {
            guest.offer(0, head);
        }
        let mut chain = Chain::new();
        for _ in 0..SIZE {
            if ring.pop(&mut chain).is_err() {
                break;
            }
            prop_assert!(chain.descriptors() <= usize::from(SIZE));
            // Touching all of it proves that it is mapped.
            let readable = IoBuffers::new(chain.readable().iter().copied(), memory.clone());
            let mut copy = vec![0; readable.len()];
            prop_assert_eq!(readable.copy_to(0, &mut copy), copy.len());
            let writable = IoBuffers::new(chain.writable().iter().copied(), memory.clone());
            prop_assert_eq!(writable.zero(0, usize::MAX), writable.len());
        }
    }
}
