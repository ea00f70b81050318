//! A queue with its slots: where requests are written, sent, and their replies read.
//!
//! A slot is a chain that keeps its place in memory: a page for the request, a page for the reply, and pages for
//! file data. Its descriptors look like those of Linux's driver: header and arguments apart, file data a page at
//! a time, in an indirect table where the device has them. They are written again only when a slot's shape changes,
//! so that sending a request costs its own bytes and two stores into the ring.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    ClientError,
    fuse::{InHeader, Opcode, OutHeader},
    memory::{Memory, PAGE_SIZE, Range},
    ring::{
        DESCRIPTOR_INDIRECT, DESCRIPTOR_LEN, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, Ring, UsedElement,
    },
};

/// How long a reply may take. Far more than any server needs, so that a lost request ends a run.
const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// Looks at the ring between two looks at the clock, while waiting.
const SPINS_PER_CLOCK: u32 = 4096;

/// Bytes of the request's header, the first descriptor of a chain.
const IN_HEADER_LEN: usize = size_of::<InHeader>();
const OUT_HEADER_LEN: usize = size_of::<OutHeader>();

/// Which way file data goes, and how much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Data {
    /// There is none.
    #[default]
    None,
    /// WRITE: the device reads this many bytes.
    ToDevice(u32),
    /// READ: the device writes up to this many bytes.
    FromDevice(u32),
}

/// The buffers of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    /// Bytes of the arguments behind the request's header.
    pub args_len: u32,
    /// Bytes of the answer behind the reply's header, without file data. `None`: no reply at all, as FORGET.
    pub reply_len: Option<u32>,
    /// File data.
    pub data: Data,
}

/// One chain and its memory.
#[derive(Debug)]
struct Slot {
    request: Range,
    reply: Range,
    data: Range,
    /// The chain's descriptors: a table of its own, or a part of the ring's.
    table: Range,
    /// Index of the table's first descriptor as links count it.
    first: u16,
    shape: Option<Shape>,
}

/// What a queue is to be like.
#[derive(Debug, Clone, Copy)]
pub struct ChannelOptions {
    /// Entries of the ring, a power of two.
    pub ring_size: u16,
    /// Requests that may be under way at once.
    pub depth: u16,
    /// Bytes of file data in each.
    pub data_len: usize,
    /// Indirect tables, as negotiated.
    pub indirect: bool,
    /// Event indexes, as negotiated.
    pub event_index: bool,
}

/// A virtqueue of the client.
#[derive(Debug)]
pub struct Channel {
    ring: Ring,
    kick: OwnedFd,
    slots: Vec<Slot>,
    indirect: bool,
    unique: u64,
}

impl Channel {
    /// Lays out the ring and its slots.
    pub fn new(memory: &mut Memory, options: ChannelOptions) -> Result<Self, ClientError> {
        let ring = Ring::new(memory, options.ring_size, options.event_index)?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC)?;
        let mut channel = Self { ring, kick, slots: Vec::new(), indirect: options.indirect, unique: 0 };
        for index in 0..options.depth {
            let slot = channel.lay_out(memory, index, options)?;
            channel.slots.push(slot);
        }
        Ok(channel)
    }

    fn lay_out(&self, memory: &mut Memory, index: u16, options: ChannelOptions) -> Result<Slot, ClientError> {
        // Header, arguments, reply's header, answer, and the pages of the data.
        let descriptors = 4 + options.data_len.div_ceil(PAGE_SIZE);
        let bytes = descriptors * DESCRIPTOR_LEN;
        let (table, first) = if options.indirect {
            let table = memory.allocate(bytes, 16)?;
            let flags = DESCRIPTOR_INDIRECT;
            let len = u32::try_from(bytes).map_err(|_| ClientError::OutOfMemory)?;
            self.ring.set_descriptor(memory, index, Descriptor { addr: table.gpa(), len, flags, next: 0 });
            (table, 0)
        } else {
            let first = usize::from(index) * descriptors;
            if first + descriptors > usize::from(self.ring.size()) {
                return Err(ClientError::RingTooSmall);
            }
            let offset = self.ring.layout().descriptors.offset + first * DESCRIPTOR_LEN;
            (Range { offset, len: bytes }, u16::try_from(first).map_err(|_| ClientError::RingTooSmall)?)
        };
        Ok(Slot {
            request: memory.allocate(PAGE_SIZE, PAGE_SIZE)?,
            reply: memory.allocate(PAGE_SIZE, PAGE_SIZE)?,
            data: memory.allocate(options.data_len, PAGE_SIZE)?,
            table,
            first,
            shape: None,
        })
    }

    /// Requests that may be under way at once.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// The ring below, for chains of one's own.
    pub fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// The descriptor by which the device is kicked.
    pub fn kick_fd(&self) -> &OwnedFd {
        &self.kick
    }

    /// Kicks, asked for or not.
    pub fn kick(&self) -> Result<(), ClientError> {
        rustix::io::write(&self.kick, 1_u64.as_bytes())?;
        Ok(())
    }

    /// Offset in memory of a slot's file data.
    #[inline]
    pub fn data_offset(&self, slot: usize) -> usize {
        self.slots[slot].data.offset
    }

    /// Writes a request into a slot and offers it; [`publish`](Self::publish) shows it to the device.
    /// The file data of `shape` must be in the slot already. Returns the request's unique number.
    #[inline]
    pub fn offer(
        &mut self,
        memory: &Memory,
        slot: usize,
        (opcode, nodeid): (Opcode, u64),
        args: &[&[u8]],
        shape: (Option<u32>, Data),
    ) -> u64 {
        self.unique += 2;
        let request = self.slots[slot].request.offset;
        let mut len = IN_HEADER_LEN;
        for part in args {
            memory.write(request + len, part);
            len += part.len();
        }
        let data_len = if let Data::ToDevice(len) = shape.1 { len } else { 0 };
        let args_len = as_u32(len - IN_HEADER_LEN);
        let header = InHeader {
            len: as_u32(len) + data_len,
            opcode: opcode as u32,
            unique: self.unique,
            nodeid,
            uid: 0,
            gid: 0,
            pid: 1,
            total_extlen: 0,
            padding: 0,
        };
        memory.store(request, &header);
        self.offer_shaped(memory, slot, Shape { args_len, reply_len: shape.0, data: shape.1 });
        self.unique
    }

    /// Offers a slot whose request is in place.
    #[inline]
    fn offer_shaped(&mut self, memory: &Memory, slot: usize, shape: Shape) {
        if self.slots[slot].shape != Some(shape) {
            self.reshape(memory, slot, shape);
        }
        let head = if self.indirect { as_u16(slot) } else { self.slots[slot].first };
        self.ring.offer(memory, head);
    }

    /// Marks the slot's request as one with extensions of this many bytes at the end of its arguments.
    pub fn set_extension_len(&self, memory: &Memory, slot: usize, len: u16) {
        let at = self.slots[slot].request.offset + std::mem::offset_of!(InHeader, total_extlen);
        memory.store(at, &(len / 8));
    }

    /// Writes the slot's descriptors.
    fn reshape(&mut self, memory: &Memory, slot: usize, shape: Shape) {
        let place = &self.slots[slot];
        let mut buffers = vec![(place.request.gpa(), as_u32(IN_HEADER_LEN), 0)];
        if shape.args_len > 0 {
            buffers.push((place.request.gpa() + IN_HEADER_LEN as u64, shape.args_len, 0));
        }
        if let Data::ToDevice(len) = shape.data {
            buffers.extend(pages(place.data, len).map(|(gpa, len)| (gpa, len, 0)));
        }
        if let Some(len) = shape.reply_len {
            buffers.push((place.reply.gpa(), as_u32(OUT_HEADER_LEN), DESCRIPTOR_WRITE));
            if len > 0 {
                buffers.push((place.reply.gpa() + OUT_HEADER_LEN as u64, len, DESCRIPTOR_WRITE));
            }
        }
        if let Data::FromDevice(len) = shape.data {
            buffers.extend(pages(place.data, len).map(|(gpa, len)| (gpa, len, DESCRIPTOR_WRITE)));
        }
        assert!(buffers.len() * DESCRIPTOR_LEN <= place.table.len, "the slot is too small for this request");
        let count = buffers.len();
        for (index, (addr, len, flags)) in buffers.into_iter().enumerate() {
            let is_last = index + 1 == count;
            let flags = if is_last { flags } else { flags | DESCRIPTOR_NEXT };
            let next = if is_last { 0 } else { place.first + as_u16(index) + 1 };
            let at = place.table.offset + index * DESCRIPTOR_LEN;
            memory.store(at, &Descriptor { addr, len, flags, next });
        }
        if self.indirect {
            let len = as_u32(count * DESCRIPTOR_LEN);
            let outer = Descriptor { addr: place.table.gpa(), len, flags: DESCRIPTOR_INDIRECT, next: 0 };
            self.ring.set_descriptor(memory, as_u16(slot), outer);
        }
        self.slots[slot].shape = Some(shape);
    }

    /// Shows the device everything offered, and kicks if it asked for that.
    #[inline]
    pub fn publish(&mut self, memory: &Memory) -> Result<(), ClientError> {
        if self.ring.publish(memory) { self.kick() } else { Ok(()) }
    }

    /// A slot whose reply has come.
    #[inline]
    pub fn take_reply(&mut self, memory: &Memory) -> Result<Option<usize>, ClientError> {
        let Some(UsedElement { head, .. }) = self.ring.take_used(memory) else { return Ok(None) };
        let slot = if self.indirect {
            head as usize
        } else {
            self.slots.iter().position(|slot| u32::from(slot.first) == head).unwrap_or(usize::MAX)
        };
        if slot < self.slots.len() { Ok(Some(slot)) } else { Err(ClientError::UnknownHead(head)) }
    }

    /// Waits for the next reply.
    #[inline]
    pub fn wait_reply(&mut self, memory: &Memory) -> Result<usize, ClientError> {
        if let Some(slot) = self.take_reply(memory)? {
            return Ok(slot);
        }
        let begin = Instant::now();
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if let Some(slot) = self.take_reply(memory)? {
                    return Ok(slot);
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() > REPLY_LIMIT {
                return Err(ClientError::NoReply);
            }
        }
    }

    /// The header of a slot's reply.
    #[inline]
    pub fn reply_header(&self, memory: &Memory, slot: usize) -> OutHeader {
        memory.load(self.slots[slot].reply.offset)
    }

    /// The answer behind the header of a slot's reply.
    #[inline]
    pub fn answer<T: FromBytes + IntoBytes + Immutable>(&self, memory: &Memory, slot: usize) -> T {
        memory.load(self.slots[slot].reply.offset + OUT_HEADER_LEN)
    }
}

/// A range's pages up to `len` bytes: address and length of each.
fn pages(range: Range, len: u32) -> impl Iterator<Item = (u64, u32)> {
    let page = as_u32(PAGE_SIZE);
    (0..len.div_ceil(page))
        .map(move |index| (range.gpa() + u64::from(index * page), page.min(len - index * page)))
}

/// Lengths here are below the size of the guest's memory, which is below 4 GiB.
#[inline]
fn as_u32(value: usize) -> u32 {
    debug_assert!(u32::try_from(value).is_ok());
    value as u32
}

/// Slots and descriptors are numbered below the ring's size.
#[inline]
fn as_u16(value: usize) -> u16 {
    debug_assert!(u16::try_from(value).is_ok());
    value as u16
}
