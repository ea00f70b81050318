//! A simulated disk: a volatile write cache, power cuts and faults, all drawn from a seed.
//!
//! | module | what it provides |
//! | --- | --- |
//! | [`image`] | content of a device, sparse and cheap to clone |
//! | [`cache`] | what is durable and what is not yet, power cuts, recorded histories |
//! | [`faults`] | errors, short and lost operations, bad sectors |
//!
//! A tester records a workload once ([`SimDisk::record`]), notes [`SimDisk::position`] whenever its oracle
//! is promised something, and asks the [`History`] for the states that a power cut can leave at any point;
//! [`SimDisk::from_image`] is the disk that the machine finds after it.
//!
//! Invariants:
//! - the same seed and the same calls give the same content, faults and completion order;
//! - durable content changes only by a completed flush or FUA write ([`SimDisk::poke`] aside);
//! - faults sit beside the content and can be taken away; only lost, misdirected and failed writes change
//!   what is stored, as they do on a real disk.

pub mod cache;
pub mod faults;
pub mod image;

use std::cell::RefCell;
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use reactor::Reactor;

pub use cache::{CrashChoice, Event, Fate, History, Mutation, Request, WriteCache};
pub use faults::{Effect, Fault, OpKind};
pub use image::Image;

use crate::{Bdev, BdevError, Io, IoBuffers, Limits, WriteFlags};
use faults::Faults;

/// A simulated disk. Without latency every operation completes in the call.
pub struct SimDisk {
    limits: Limits,
    state: RefCell<State>,
    this: Weak<Self>,
}

/// An operation that a disk was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// What for.
    pub kind: OpKind,
    /// Where, in bytes; empty for a flush.
    pub range: Range<u64>,
}

/// Operations take a random time between two bounds, so they end out of order.
struct Latency {
    reactor: Weak<Reactor>,
    bounds: Range<Duration>,
}

struct State {
    /// What a reader sees.
    live: Image,
    cache: WriteCache,
    rng: SmallRng,
    next_id: u64,
    faults: Faults,
    latency: Option<Latency>,
    /// Where operations that time out wait.
    clock: Option<Weak<Reactor>>,
    recording: Option<(WriteCache, Vec<Event>)>,
    events: usize,
    changes: u64,
    trace: Option<Vec<Asked>>,
}

/// An operation under way.
struct Op {
    id: u64,
    offset: u64,
    len: usize,
    action: Action,
    effect: Option<Effect>,
}

enum Action {
    Read(IoBuffers),
    /// Holds the buffers of a write until it ends, as a device that reads them late would.
    Change {
        _source: IoBuffers,
    },
    Flush,
}

impl SimDisk {
    /// A disk of `size` zero bytes with blocks of `block_size` that takes any buffers.
    pub fn new(size: u64, block_size: u32, seed: u64) -> Rc<Self> {
        Self::from_image(Image::zeroed(size), block_size, seed)
    }

    /// A disk with this content, all of it durable.
    pub fn from_image(image: Image, block_size: u32, seed: u64) -> Rc<Self> {
        let limits = Limits {
            size: image.size(),
            block_size,
            dma_align: 1,
            max_segments: usize::MAX,
            max_transfer: usize::MAX,
            volatile_cache: true,
            discard: true,
            write_zeroes: true,
            sparse: true,
        };
        Self::with_limits(image, limits, seed)
    }

    /// A disk with this content and these limits; their size is that of the image.
    pub fn with_limits(image: Image, limits: Limits, seed: u64) -> Rc<Self> {
        let limits = Limits { size: image.size(), ..limits };
        let state = State {
            cache: WriteCache::new(image.clone(), limits.block_size),
            live: image,
            rng: SmallRng::seed_from_u64(seed),
            next_id: 0,
            faults: Faults::default(),
            latency: None,
            clock: None,
            recording: None,
            events: 0,
            changes: 0,
            trace: None,
        };
        Rc::new_cyclic(|this| Self { limits, state: RefCell::new(state), this: this.clone() })
    }

    /// A disk that goes on with what another one had in its cache.
    pub fn from_cache(cache: WriteCache, block_size: u32, seed: u64) -> Rc<Self> {
        let disk = Self::from_image(cache.visible(), block_size, seed);
        disk.state.borrow_mut().cache = cache;
        disk
    }

    /// Lets every later operation take a random time within `bounds` of the reactor's clock.
    pub fn set_latency(&self, reactor: &Rc<Reactor>, bounds: Range<Duration>) {
        self.state.borrow_mut().latency = Some(Latency { reactor: Rc::downgrade(reactor), bounds });
    }

    /// Lets every later operation complete in the call again.
    pub fn clear_latency(&self) {
        self.state.borrow_mut().latency = None;
    }

    /// Gives the disk a clock for operations that time out.
    pub fn set_clock(&self, reactor: &Rc<Reactor>) {
        self.state.borrow_mut().clock = Some(Rc::downgrade(reactor));
    }

    /// Sets what a power cut does not tear, in bytes: a divisor of the block size, which it is from the start.
    /// A recording under way is thrown away.
    pub fn set_tear_unit(&self, bytes: u32) {
        let state = &mut *self.state.borrow_mut();
        state.cache.set_tear_unit(bytes);
        state.recording = None;
    }

    /// Number of writes, write-zeroes, discards and flushes that began.
    pub fn writes(&self) -> u64 {
        self.state.borrow().changes
    }

    /// Starts a list of the operations that begin from now on, those that will fail included.
    pub fn trace(&self) {
        self.state.borrow_mut().trace = Some(Vec::new());
    }

    /// Ends the list and gives it; empty when none was started.
    pub fn take_trace(&self) -> Vec<Asked> {
        self.state.borrow_mut().trace.take().unwrap_or_default()
    }

    /// Starts recording; a recording under way is thrown away.
    pub fn record(&self) {
        let state = &mut *self.state.borrow_mut();
        state.recording = Some((state.cache.clone(), Vec::new()));
        state.events = 0;
    }

    /// Events since recording began: the [`History`] point "now".
    pub fn position(&self) -> usize {
        self.state.borrow().events
    }

    /// Ends recording; empty when none was started.
    pub fn take_history(&self) -> History {
        let state = &mut *self.state.borrow_mut();
        let (start, events) = state.recording.take().unwrap_or_else(|| (state.cache.clone(), Vec::new()));
        History::new(start, events)
    }

    /// Number of changes that a power cut now may take or leave.
    pub fn undecided(&self) -> usize {
        self.state.borrow().cache.undecided()
    }

    /// The disk that the machine finds after a power cut now. This one goes on undisturbed; faults and
    /// latency stay with it.
    pub fn crash(&self, choice: CrashChoice) -> Rc<Self> {
        let state = &mut *self.state.borrow_mut();
        let found = Self::with_limits(state.cache.crash(choice), self.limits.clone(), state.rng.random());
        found.set_tear_unit(state.cache.tear_unit() as u32);
        found
    }

    /// A copy of what a reader sees.
    pub fn snapshot(&self) -> Image {
        self.state.borrow().live.clone()
    }

    /// Adds a fault to those that later operations meet.
    pub fn inject(&self, fault: Fault) {
        self.state.borrow_mut().faults.inject(fault);
    }

    /// Makes reads of any block of `range` fail with EIO until the block is written.
    pub fn fail_reads(&self, range: Range<u64>) {
        self.state.borrow_mut().faults.fail_reads(range);
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        self.state.borrow_mut().faults = Faults::default();
    }

    /// Changes stored bytes behind the host's back, durably and outside the recorded history: bit rot, or
    /// the damage that a check has to find.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        let state = &mut *self.state.borrow_mut();
        state.live.write(offset, bytes);
        state.cache.durable_mut().write(offset, bytes);
    }

    /// Reads stored bytes without being a device operation.
    pub fn peek(&self, offset: u64, out: &mut [u8]) {
        self.state.borrow().live.read(offset, out);
    }

    fn change(&self, mutation: Mutation, source: IoBuffers, kind: OpKind, flags: WriteFlags) -> Io {
        let range = mutation.range();
        let action = Action::Change { _source: source };
        let op = {
            let state = &mut *self.state.borrow_mut();
            let op = state.begin(kind, range.start, (range.end - range.start) as usize, action);
            state.changes += 1;
            state.log_begin(op.id, Request::Change { mutation, fua: flags.fua });
            op
        };
        self.run(op)
    }

    /// Ends the operation now or after its latency.
    fn run(&self, op: Op) -> Io {
        let delay = self.state.borrow_mut().delay(&op);
        let Some((reactor, delay)) = delay else {
            return Io::ready(self.state.borrow_mut().end(&self.limits, op));
        };
        let (io, completion) = Io::pending();
        if let (Some(reactor), Some(this)) = (reactor.upgrade(), self.this.upgrade()) {
            let sleep = reactor.sleep(delay);
            drop(reactor.spawn(async move {
                sleep.await;
                let result = this.state.borrow_mut().end(&this.limits, op);
                completion.complete(result);
            }));
        }
        io
    }
}

impl State {
    fn begin(&mut self, kind: OpKind, offset: u64, len: usize, action: Action) -> Op {
        let id = self.next_id;
        self.next_id += 1;
        if let Some(trace) = &mut self.trace {
            trace.push(Asked { kind, range: offset..offset + len as u64 });
        }
        Op { id, offset, len, action, effect: self.faults.draw(kind) }
    }

    fn log(&mut self, event: Event) {
        if let Some((_, events)) = &mut self.recording {
            events.push(event);
            self.events += 1;
        }
    }

    fn log_begin(&mut self, id: u64, request: Request) {
        self.cache.begin(id, request.clone());
        self.log(Event::Begin { id, request });
    }

    fn log_end(&mut self, id: u64, fate: Fate) {
        for mutation in self.cache.end(id, fate) {
            mutation.apply(&mut self.live);
            self.faults.heal(&mutation.range());
        }
        self.log(Event::End { id, fate });
    }

    fn delay(&mut self, op: &Op) -> Option<(Weak<Reactor>, Duration)> {
        match (op.effect, &self.clock) {
            (Some(Effect::Timeout { after }), Some(clock)) => Some((clock.clone(), after)),
            _ => self.draw_latency(),
        }
    }

    fn draw_latency(&mut self) -> Option<(Weak<Reactor>, Duration)> {
        let latency = self.latency.as_ref()?;
        let delay = if latency.bounds.is_empty() {
            latency.bounds.start
        } else {
            self.rng.random_range(latency.bounds.clone())
        };
        Some((latency.reactor.clone(), delay))
    }

    fn end(&mut self, limits: &Limits, op: Op) -> Result<(), BdevError> {
        match &op.action {
            Action::Read(buffers) => self.end_read(limits, &op, buffers),
            Action::Change { .. } | Action::Flush => self.end_change(limits, &op),
        }
    }

    fn end_read(&mut self, limits: &Limits, op: &Op, buffers: &IoBuffers) -> Result<(), BdevError> {
        if let Some(offset) = self.faults.first_bad(&(op.offset..op.offset + op.len as u64)) {
            return Err(BdevError::Io { offset, errno: libc::EIO });
        }
        let (offset, count, result) = match op.effect {
            None | Some(Effect::Delayed { .. }) => (op.offset, op.len, Ok(())),
            Some(Effect::Timeout { .. }) => {
                return Err(BdevError::Io { offset: op.offset, errno: libc::ETIMEDOUT });
            }
            Some(Effect::Error { errno }) => return Err(BdevError::Io { offset: op.offset, errno }),
            Some(Effect::Lost) => return Ok(()),
            Some(Effect::Short) => (op.offset, op.short_len(limits), op.short_error(limits)),
            Some(Effect::Misdirected) => (self.elsewhere(limits, op), op.len, Ok(())),
        };
        let mut bytes = vec![0; count];
        self.live.read(offset, &mut bytes);
        buffers.copy_from(0, &bytes);
        result
    }

    fn end_change(&mut self, limits: &Limits, op: &Op) -> Result<(), BdevError> {
        let (fate, result) = match op.effect {
            None => (Fate::Done, Ok(())),
            Some(Effect::Error { errno }) => {
                let fate = Fate::Failed { seed: self.rng.random() };
                (fate, Err(BdevError::Io { offset: op.offset, errno }))
            }
            Some(Effect::Timeout { .. }) => {
                let fate = Fate::Failed { seed: self.rng.random() };
                (fate, Err(BdevError::Io { offset: op.offset, errno: libc::ETIMEDOUT }))
            }
            Some(Effect::Lost) => (Fate::Lost, Ok(())),
            Some(Effect::Delayed { flushes }) => (Fate::Delayed { flushes }, Ok(())),
            Some(Effect::Short) => (Fate::Cut { bytes: op.short_len(limits) as u64 }, op.short_error(limits)),
            Some(Effect::Misdirected) => (Fate::Misdirected { offset: self.elsewhere(limits, op) }, Ok(())),
        };
        self.log_end(op.id, fate);
        result
    }

    /// Another place of the device with room for the operation.
    fn elsewhere(&mut self, limits: &Limits, op: &Op) -> u64 {
        let block = u64::from(limits.block_size);
        let places = (limits.size - op.len as u64) / block;
        self.rng.random_range(0..=places) * block
    }
}

impl Op {
    /// What a short operation transfers: half of it, in whole blocks.
    fn short_len(&self, limits: &Limits) -> usize {
        let block = limits.block_size as usize;
        self.len / block / 2 * block
    }

    fn short_error(&self, limits: &Limits) -> Result<(), BdevError> {
        Err(BdevError::Short { offset: self.offset, done: self.short_len(limits), len: self.len })
    }
}

impl Bdev for SimDisk {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, offset: u64, buffers: IoBuffers) -> Io {
        if let Err(error) = self.limits.check_transfer(offset, &buffers) {
            return Io::ready(Err(error));
        }
        let len = buffers.len();
        let op = self.state.borrow_mut().begin(OpKind::Read, offset, len, Action::Read(buffers));
        self.run(op)
    }

    fn write(&self, offset: u64, buffers: IoBuffers, flags: WriteFlags) -> Io {
        if let Err(error) = self.limits.check_transfer(offset, &buffers) {
            return Io::ready(Err(error));
        }
        let mut data = vec![0; buffers.len()];
        buffers.copy_to(0, &mut data);
        self.change(Mutation::write(offset, data.into()), buffers, OpKind::Write, flags)
    }

    fn flush(&self) -> Io {
        let op = {
            let state = &mut *self.state.borrow_mut();
            let op = state.begin(OpKind::Flush, 0, 0, Action::Flush);
            state.changes += 1;
            state.log_begin(op.id, Request::Flush);
            op
        };
        self.run(op)
    }

    fn discard(&self, range: Range<u64>) -> Io {
        if let Err(error) = self.limits.check_range(&range) {
            return Io::ready(Err(error));
        }
        let seed = self.state.borrow_mut().rng.random();
        self.change(Mutation::discard(range, seed), IoBuffers::empty(), OpKind::Discard, WriteFlags::NONE)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Io {
        if let Err(error) = self.limits.check_range(&range) {
            return Io::ready(Err(error));
        }
        self.change(Mutation::zeroes(range), IoBuffers::empty(), OpKind::WriteZeroes, flags)
    }
}

#[cfg(test)]
mod tests;
