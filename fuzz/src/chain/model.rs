//! The rules of split virtqueues once more (virtio 1.3, 2.7), by the letter and without a thought of speed.

use vhostfs::ring::RingFeatures;

use super::{Places, REGION_LEN};
use crate::memory::SharedMemory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Largest table.
const ENTRIES_MAX: u64 = 32768;

/// A part of a chain: which file, where, how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    region: usize,
    offset: u64,
    len: u64,
}

pub(super) fn lengths(pieces: &[Piece]) -> Vec<usize> {
    pieces.iter().map(|piece| piece.len as usize).collect()
}

/// Why the rest of a chain is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Not in memory.
    Address,
    /// To be read, behind something to be written.
    Order,
}

/// A chain.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) head: u16,
    pub(super) descriptors: usize,
    pub(super) readable: Vec<Piece>,
    pub(super) writable: Vec<Piece>,
    pub(super) fault: Option<Fault>,
}

/// The ring is of no use.
#[derive(Debug)]
pub(super) struct Broken;

/// The guest's memory, and the device's side of the ring in it.
pub(super) struct Model {
    files: [SharedMemory; 2],
    starts: [u64; 2],
    pub(super) size: u16,
    features: RingFeatures,
    pub(super) places: Places,
    /// The driver's available index.
    offered: u16,
    /// Number of the next chain to take.
    pub(super) next: u16,
    /// Available index that was seen last.
    seen: u16,
    next_used: u16,
    shown_used: u16,
    /// Index shown when a notification was last thought of.
    considered: Option<u16>,
}

impl Model {
    pub(super) fn new(
        files: [SharedMemory; 2],
        starts: [u64; 2],
        size: u16,
        features: RingFeatures,
        base: u16,
    ) -> Self {
        let places = Places::USUAL;
        let used = files[0].read_word(u64::from(places.used) + 2);
        let mut model = Self {
            files,
            starts,
            size,
            features,
            places,
            offered: base,
            next: base,
            seen: base,
            next_used: used,
            shown_used: used,
            considered: None,
        };
        model.set_available(base);
        model
    }

    /// The driver writes to the first region, as far as that reaches.
    pub(super) fn poke(&mut self, at: u64, bytes: &[u8]) {
        let room = REGION_LEN.saturating_sub(at).min(bytes.len() as u64);
        self.files[0].write(at, &bytes[..room as usize]);
    }

    pub(super) fn set_available(&mut self, index: u16) {
        self.offered = index;
        self.poke(u64::from(self.places.available) + 2, &index.to_le_bytes());
    }

    pub(super) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.poke(u64::from(self.places.available) + 4 + slot * 2, &head.to_le_bytes());
        self.set_available(self.offered.wrapping_add(1));
    }

    fn word(&self, offset: u64) -> u16 {
        self.files[0].read_word(offset)
    }

    /// Whether there is something to take, as far as was seen or is shown.
    pub(super) fn has_available(&self) -> bool {
        self.seen != self.next || self.available() != self.next
    }

    /// The available index in memory.
    fn available(&self) -> u16 {
        self.word(u64::from(self.places.available) + 2)
    }

    pub(super) fn bytes(&self, piece: &Piece) -> Vec<u8> {
        self.files[piece.region].read_bytes(piece.offset, piece.len as usize)
    }

    pub(super) fn pop(&mut self) -> Result<Option<Parsed>, Broken> {
        if self.seen == self.next {
            let available = self.available();
            if available.wrapping_sub(self.next) > self.size {
                return Err(Broken);
            }
            self.seen = available;
        }
        if self.seen == self.next {
            return Ok(None);
        }
        let slot = u64::from(self.next % self.size);
        let head = self.word(u64::from(self.places.available) + 4 + slot * 2);
        let parsed = self.parse(head)?;
        self.next = self.next.wrapping_add(1);
        Ok(Some(parsed))
    }

    fn parse(&self, head: u16) -> Result<Parsed, Broken> {
        let mut parsed =
            Parsed { head, descriptors: 0, readable: Vec::new(), writable: Vec::new(), fault: None };
        let mut faults = [None; 2];
        let mut table =
            Piece { region: 0, offset: self.places.descriptors.into(), len: u64::from(self.size) * 16 };
        let (mut index, mut is_indirect) = (u64::from(head), false);
        loop {
            if index >= table.len / 16 {
                return Err(Broken);
            }
            let raw = self.files[table.region].read::<16>(table.offset + index * 16);
            let [addr, rest] = [&raw[..8], &raw[8..]];
            let addr = addr.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let len = rest.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            let [flags, next] = [4, 6].map(|at| u16::from_le_bytes([rest[at], rest[at + 1]]));
            if flags & INDIRECT != 0 {
                let entries = u64::from(len) / 16;
                let is_table = len > 0 && len % 16 == 0 && entries <= ENTRIES_MAX;
                if is_indirect || !self.features.indirect || flags & NEXT != 0 || !is_table {
                    return Err(Broken);
                }
                // In one piece.
                let pieces = self.pieces(addr, len.into()).filter(|pieces| pieces.len() == 1);
                table = pieces.ok_or(Broken)?[0];
                (index, is_indirect) = (0, true);
                continue;
            }
            if parsed.descriptors == usize::from(self.size) {
                return Err(Broken);
            }
            parsed.descriptors += 1;
            self.add(&mut parsed, &mut faults, addr, len, flags);
            if flags & NEXT == 0 {
                parsed.fault = faults[0].or(faults[1]);
                return Ok(parsed);
            }
            index = next.into();
        }
    }

    /// Adds a buffer. `faults` are those of what is to be read, and of what is to be written.
    fn add(&self, parsed: &mut Parsed, faults: &mut [Option<Fault>; 2], addr: u64, len: u32, flags: u16) {
        let has_writable = !parsed.writable.is_empty() || faults[1].is_some();
        let (list, fault) = if flags & WRITE != 0 {
            (&mut parsed.writable, &mut faults[1])
        } else if has_writable {
            faults[0].get_or_insert(Fault::Order);
            return;
        } else {
            (&mut parsed.readable, &mut faults[0])
        };
        if fault.is_some() {
            return;
        }
        match self.pieces(addr, len.into()) {
            Some(pieces) => list.extend(pieces),
            None => *fault = Some(Fault::Address),
        }
    }

    /// The pieces of memory that guest addresses are, if they all are memory.
    fn pieces(&self, addr: u64, len: u64) -> Option<Vec<Piece>> {
        let (mut pieces, mut addr, mut left) = (Vec::new(), addr, len);
        while left > 0 {
            let region = self.starts.iter().position(|start| (*start..start + REGION_LEN).contains(&addr))?;
            let offset = addr - self.starts[region];
            let len = left.min(REGION_LEN - offset);
            pieces.push(Piece { region, offset, len });
            left -= len;
            addr += len;
        }
        Some(pieces)
    }

    /// Entries that were not shown yet.
    pub(super) fn pushed(&self) -> u16 {
        self.next_used.wrapping_sub(self.shown_used)
    }

    /// An entry was put into the used ring, where nobody sees it yet.
    pub(super) fn check_push(&mut self, head: u16, len: u32) {
        let used = u64::from(self.places.used);
        let at = used + 4 + u64::from(self.next_used % self.size) * 8;
        let expected = [u32::from(head).to_le_bytes(), len.to_le_bytes()].concat();
        assert_eq!(self.files[0].read::<8>(at).to_vec(), expected, "used entry {}", self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Whether the driver is to be notified of what is shown now.
    pub(super) fn publish(&mut self) -> bool {
        if self.next_used == self.shown_used {
            return false;
        }
        self.shown_used = self.next_used;
        let before = self.considered.replace(self.next_used);
        let available = u64::from(self.places.available);
        if !self.features.event_index {
            return self.word(available) & 1 == 0;
        }
        let event = self.word(available + 4 + u64::from(self.size) * 2);
        // Passed when one of the entries since then is number `event`.
        before.is_none_or(|before| {
            let new = self.next_used.wrapping_sub(before);
            (0..new).any(|more| before.wrapping_add(more) == event)
        })
    }

    /// The used ring shows what was pushed.
    pub(super) fn check_published(&self) {
        assert_eq!(self.word(u64::from(self.places.used) + 2), self.shown_used, "used index");
    }

    /// The used ring asks for kicks, or says that none are needed.
    pub(super) fn check_kicks(&self, enabled: bool) {
        let used = u64::from(self.places.used);
        match (self.features.event_index, enabled) {
            (true, true) => {
                assert_eq!(self.word(used + 4 + u64::from(self.size) * 8), self.next, "event index");
            }
            (true, false) => {}
            (false, _) => assert_eq!(self.word(used), u16::from(!enabled), "flags"),
        }
    }
}
