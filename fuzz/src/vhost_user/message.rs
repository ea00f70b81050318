//! Messages as data, and their bytes (vhost-user, "Front-end message types").

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::frontend::{GPA, MEMORY_LEN, UVA, VringPlace};

/// A descriptor that comes with a message.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum FileKind {
    /// The memory that the queues are in.
    Memory,
    /// A memfd of so many pages.
    Pages(u8),
    Event {
        blocking: bool,
    },
    PipeReader,
    PipeWriter,
    Socket,
    InetSocket,
    Null,
    Zero,
    Directory,
    Regular,
}

impl FileKind {
    /// Opens one; `memory` is the frontend's.
    pub(super) fn open(self, memory: &dyn Fn() -> OwnedFd) -> OwnedFd {
        let file = |path| OwnedFd::from(File::open(path).expect("files that every system has"));
        match self {
            Self::Memory => memory(),
            Self::Pages(pages) => {
                let file = File::from(memfd_create("pages", MemfdFlags::CLOEXEC).expect("a memfd"));
                file.set_len(u64::from(pages) * 4096).expect("room in memory");
                file.into()
            }
            Self::Event { blocking } => {
                let flags = if blocking { EventfdFlags::empty() } else { EventfdFlags::NONBLOCK };
                eventfd(0, flags | EventfdFlags::CLOEXEC).expect("an event descriptor")
            }
            Self::PipeReader => std::io::pipe().expect("a pipe").0.into(),
            Self::PipeWriter => std::io::pipe().expect("a pipe").1.into(),
            Self::Socket => UnixStream::pair().expect("two sockets").0.into(),
            Self::InetSocket => std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket").into(),
            Self::Null => file("/dev/null"),
            Self::Zero => file("/dev/zero"),
            Self::Directory => file("/"),
            Self::Regular => file("/proc/self/exe"),
        }
    }
}

/// A number, mostly one of use.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum Number {
    Small(u8),
    Power(u8),
    Any(u64),
}

impl Number {
    fn get(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Power(power) => 1 << (power % 64),
            Self::Any(value) => value,
        }
    }
}

/// A region of memory.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum RegionKind {
    /// All of the frontend's memory.
    Whole,
    /// A part of it, in pages.
    Part {
        start: u8,
        count: u8,
    },
    Any {
        gpa: u64,
        len: u64,
        uva: u64,
        offset: u64,
    },
}

impl RegionKind {
    fn encode(self) -> Vec<u8> {
        let numbers = match self {
            Self::Whole => [GPA, MEMORY_LEN, UVA, 0],
            Self::Part { start, count } => {
                let (start, len) = (u64::from(start) * 4096, u64::from(count) * 4096);
                [GPA + start, len, UVA + start, start]
            }
            Self::Any { gpa, len, uva, offset } => [gpa, len, uva, offset],
        };
        longs(&numbers)
    }
}

/// What a frontend says.
#[derive(Debug, Clone, Arbitrary)]
pub(super) enum Message {
    GetFeatures,
    SetFeatures {
        usual: bool,
        event_index: bool,
        protocol: bool,
        more: Option<Number>,
    },
    SetOwner,
    ResetOwner,
    SetMemTable {
        regions: Vec<RegionKind>,
        count: Option<u8>,
    },
    SetLogBase([u64; 2]),
    SetVringNum {
        queue: u8,
        size: Number,
    },
    SetVringAddr {
        queue: u8,
        flags: u8,
        usual: bool,
        places: [u16; 3],
        more: Option<u64>,
    },
    SetVringBase {
        queue: u8,
        base: Number,
    },
    GetVringBase {
        queue: u8,
    },
    SetVringKick {
        queue: u8,
        no_file: bool,
    },
    SetVringCall {
        queue: u8,
        no_file: bool,
    },
    SetVringErr {
        queue: u8,
        no_file: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures {
        usual: bool,
        more: Option<Number>,
    },
    GetQueueNum,
    SetVringEnable {
        queue: u8,
        enable: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: Number,
        size: Number,
        room: u8,
    },
    SetConfig(Vec<u8>),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionKind),
    RemMemReg(RegionKind),
    /// Known or not, with any payload.
    Other {
        code: u8,
        payload: Vec<u8>,
    },
}

/// Message numbers that the frontend's own bookkeeping needs.
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
/// Messages that the specification gives an answer of their own. It is empty where the device does not know the message.
pub(super) const WITH_REPLY: [u32; 14] = [GET_FEATURES, 11, 15, 17, 24, 26, 28, 31, 36, 40, 41, 42, 43, 44];

/// VERSION_1, PROTOCOL_FEATURES, INDIRECT_DESC.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 28;
const EVENT_INDEX: u64 = 1 << 29;
const PROTOCOL: u64 = 1 << 30;

/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS: all that the device offers.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15;

/// A message's number and payload.
pub(super) struct Payload {
    pub(super) code: u32,
    pub(super) bytes: Vec<u8>,
}

impl Message {
    /// Protocol features that are set by it.
    pub(super) fn protocol_features(&self) -> Option<u64> {
        match self {
            Self::SetProtocolFeatures { usual, more } => {
                let usual = if *usual { PROTOCOL_FEATURES } else { 0 };
                Some(usual | more.map_or(0, Number::get))
            }
            _ => None,
        }
    }

    pub(super) fn encode(&self) -> Payload {
        let vring = |queue: &u8, no_file: &bool| longs(&[u64::from(*queue) | u64::from(*no_file) << 8]);
        let state = |queue: &u8, number: u64| words(&[(*queue).into(), number as u32]);
        let (code, bytes) = match self {
            Self::GetFeatures => (GET_FEATURES, Vec::new()),
            Self::SetFeatures { usual, event_index, protocol, more } => {
                let mut features = more.map_or(0, Number::get);
                features |= if *usual { FEATURES & !PROTOCOL } else { 0 };
                features |= if *event_index { EVENT_INDEX } else { 0 };
                features |= if *protocol { PROTOCOL } else { 0 };
                (2, longs(&[features]))
            }
            Self::SetOwner => (3, Vec::new()),
            Self::ResetOwner => (4, Vec::new()),
            Self::SetMemTable { regions, count } => {
                let count = count.map_or(regions.len() as u32, u32::from);
                let regions = regions.iter().flat_map(|region| region.encode());
                (5, words(&[count, 0]).into_iter().chain(regions).collect())
            }
            Self::SetLogBase(numbers) => (6, longs(numbers)),
            Self::SetVringNum { queue, size } => (8, state(queue, size.get())),
            Self::SetVringAddr { queue, flags, usual, places, more } => {
                let mut bytes = words(&[(*queue).into(), (*flags).into()]);
                let usual_place = VringPlace::of(*queue);
                let [descriptors, used, available] = match usual {
                    true => [usual_place.descriptors, usual_place.used, usual_place.available],
                    false => places.map(u64::from),
                };
                let base = more.unwrap_or(UVA);
                let places = [descriptors, used, available].map(|at| base.wrapping_add(at));
                bytes.extend(longs(&places));
                bytes.extend(longs(&[0]));
                (9, bytes)
            }
            Self::SetVringBase { queue, base } => (10, state(queue, base.get())),
            Self::GetVringBase { queue } => (11, state(queue, 0)),
            Self::SetVringKick { queue, no_file } => (12, vring(queue, no_file)),
            Self::SetVringCall { queue, no_file } => (13, vring(queue, no_file)),
            Self::SetVringErr { queue, no_file } => (14, vring(queue, no_file)),
            Self::GetProtocolFeatures => (15, Vec::new()),
            Self::SetProtocolFeatures { .. } => {
                (SET_PROTOCOL_FEATURES, longs(&[self.protocol_features().unwrap_or(0)]))
            }
            Self::GetQueueNum => (17, Vec::new()),
            Self::SetVringEnable { queue, enable } => (18, state(queue, (*enable).into())),
            Self::SetBackendReqFd => (21, Vec::new()),
            Self::GetConfig { offset, size, room } => {
                let mut bytes = words(&[offset.get() as u32, size.get() as u32, 0]);
                bytes.resize(12 + usize::from(*room), 0);
                (24, bytes)
            }
            Self::SetConfig(payload) => (25, payload.clone()),
            Self::ResetDevice => (34, Vec::new()),
            Self::GetMaxMemSlots => (36, Vec::new()),
            Self::AddMemReg(region) => (37, [longs(&[0]), region.encode()].concat()),
            Self::RemMemReg(region) => (38, [longs(&[0]), region.encode()].concat()),
            Self::Other { code, payload } => ((*code).into(), payload.clone()),
        };
        Payload { code, bytes }
    }
}

pub(super) fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(super) fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
