//! One virtqueue of one frontend: its ring, its event descriptors and its requests under way.
//!
//! A queue is configured by vhost-user messages, in whatever order they come, and attaches to its ring as
//! soon as it knows enough and is enabled. It lives as long as the frontend's connection.
//!
//! Invariants:
//! - each popped chain is owned by one `Popped`, which is answered or abandoned, never dropped;
//! - a late answer enters the ring only if the ring is still the one that the chain came from: detaching
//!   starts a new *epoch*, and an answer of an older one is dropped;
//! - there are never more requests under way than the queue has entries, whatever the driver's index says;
//! - at most one notification per queue and turn ([`Queue::publish`]).

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use reactor::Reactor;

use crate::device::{Served, VirtioDevice};
use crate::events::{EventFd, Kick};
use crate::guest_mem::{GuestMemory, OutsideMemory};
use crate::ring::chain::Chain;
use crate::ring::{QUEUE_SIZE_MAX, Ring, RingAddresses, RingError, RingFeatures};

/// What one queue may take in one turn, so that it starves no other: several times the deepest useful queue
/// of small requests, or a few large ones. Picked; the last chain may exceed it.
const BUDGET_DESCRIPTORS: usize = 256;
const BUDGET_BYTES: usize = 4 << 20;

/// Why a queue was broken.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub enum QueueError {
    /// The ring itself.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The ring's memory.
    #[error("ring: {0}")]
    Memory(#[from] OutsideMemory),
    /// A request without room for any reply.
    #[error("a request has no room for a reply")]
    Unanswerable,
}

/// A chain that was taken from a ring and has to be answered.
#[must_use = "a popped chain is answered or abandoned"]
struct Popped {
    head: u16,
    epoch: u64,
    settled: bool,
}

impl Popped {
    /// The ring is gone, or broken: there is nobody to answer to.
    fn abandon(mut self) {
        self.settled = true;
    }

    /// The head, to put into the used ring.
    fn answer(mut self) -> u16 {
        self.settled = true;
        self.head
    }
}

impl Drop for Popped {
    fn drop(&mut self) {
        debug_assert!(self.settled || std::thread::panicking(), "chain {} was dropped unanswered", self.head);
    }
}

#[derive(Default)]
struct State {
    size: u16,
    addresses: Option<RingAddresses>,
    base: u16,
    kick: Option<Kick>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    enabled: bool,
    broken: bool,
    features: RingFeatures,
    ring: Option<Ring>,
    epoch: u64,
    under_way: u32,
}

/// One virtqueue.
pub struct Queue {
    index: u16,
    state: RefCell<State>,
}

impl Queue {
    /// Queue number `index`, without any configuration.
    pub fn new(index: u16) -> Rc<Self> {
        Rc::new(Self { index, state: RefCell::default() })
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// What was negotiated; for rings attached from now on.
    pub fn set_features(&self, features: RingFeatures) {
        self.state.borrow_mut().features = features;
    }

    /// SET_VRING_NUM. Returns whether the size is possible.
    pub fn set_size(&self, size: u32) -> bool {
        let valid = size.is_power_of_two() && size <= QUEUE_SIZE_MAX;
        if valid {
            let mut state = self.state.borrow_mut();
            state.restart();
            state.size = size as u16;
        }
        valid
    }

    /// SET_VRING_ADDR, also of a running ring.
    ///
    /// # Errors
    /// [`OutsideMemory`] when a running ring cannot follow; it goes on where it is.
    pub fn set_addresses(
        &self,
        memory: &Rc<GuestMemory>,
        addresses: RingAddresses,
    ) -> Result<(), OutsideMemory> {
        let mut state = self.state.borrow_mut();
        if let Some(ring) = &mut state.ring {
            ring.relocate(memory, &addresses)?;
        }
        state.addresses = Some(addresses);
        Ok(())
    }

    /// SET_VRING_BASE: the ring starts anew, at chain number `base`.
    pub fn set_base(&self, base: u16) {
        let mut state = self.state.borrow_mut();
        state.restart();
        state.base = base;
    }

    /// SET_VRING_KICK: from now on the ring may run.
    pub fn set_kick(&self, kick: Kick) {
        self.state.borrow_mut().kick = Some(kick);
    }

    /// SET_VRING_CALL. Signals a running ring's new descriptor: its driver may have missed an answer meanwhile.
    pub fn set_call(&self, call: Option<EventFd>) {
        let mut state = self.state.borrow_mut();
        state.call = call;
        if let (Some(_), Some(call)) = (&state.ring, &state.call) {
            call.signal();
        }
    }

    /// SET_VRING_ERR.
    pub fn set_error(&self, error: Option<EventFd>) {
        self.state.borrow_mut().error = error;
    }

    /// SET_VRING_ENABLE. A disabled ring takes no chains; those under way are still answered.
    pub fn set_enabled(&self, enabled: bool) {
        let mut state = self.state.borrow_mut();
        if enabled && !state.enabled {
            state.broken = false;
        }
        state.enabled = enabled;
    }

    /// Whether requests are under way.
    pub fn is_busy(&self) -> bool {
        self.state.borrow().under_way > 0
    }

    /// Takes no more chains until the frontend gives a kick descriptor again: the first half of GET_VRING_BASE.
    pub fn stop(&self) {
        self.state.borrow_mut().kick = None;
    }

    /// The second half, once nothing is under way: detaches and returns the number of the next chain.
    pub fn detach(&self) -> u16 {
        let mut state = self.state.borrow_mut();
        state.restart();
        state.base
    }

    /// The connection ends: answers under way are dropped from now on, all descriptors closed.
    pub fn close(&self) {
        let mut state = self.state.borrow_mut();
        state.detach();
        let epoch = state.epoch;
        *state = State { epoch, ..State::default() };
    }

    /// Attaches to the ring if everything is known and it may run.
    ///
    /// # Errors
    /// [`QueueError::Memory`]; the queue is then broken.
    pub fn attach(&self, memory: &Rc<GuestMemory>) -> Result<(), QueueError> {
        let mut state = self.state.borrow_mut();
        let ready = state.enabled && state.kick.is_some() && state.size > 0;
        let (true, None, false, Some(addresses)) = (ready, &state.ring, state.broken, state.addresses) else {
            return Ok(());
        };
        match Ring::attach(memory, &addresses, state.size, state.features, state.base) {
            Ok(ring) => state.ring = Some(ring),
            Err(error) => {
                state.break_off();
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Follows a new memory table.
    ///
    /// # Errors
    /// [`QueueError::Memory`] when the ring's memory is not in it; the queue is then broken.
    pub fn remap(&self, memory: &Rc<GuestMemory>) -> Result<(), QueueError> {
        let mut state = self.state.borrow_mut();
        let State { ring: Some(ring), addresses: Some(addresses), .. } = &mut *state else { return Ok(()) };
        let followed = ring.relocate(memory, addresses);
        if followed.is_err() {
            state.detach();
            state.break_off();
        }
        Ok(followed?)
    }

    /// Takes a turn's share of chains and has `device` answer them. Returns whether there were any.
    ///
    /// # Errors
    /// [`QueueError`]; the queue is then broken and its error descriptor signalled.
    pub fn process(
        self: &Rc<Self>,
        device: &Rc<dyn VirtioDevice>,
        reactor: &Reactor,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        let Some(memory) = self.state.borrow().ring.as_ref().map(|ring| ring.memory().clone()) else {
            return Ok(false);
        };
        let mut any = false;
        let (mut descriptors, mut bytes) = (0, 0);
        while descriptors < BUDGET_DESCRIPTORS && bytes < BUDGET_BYTES {
            let Some(popped) = self.pop(chain)? else { break };
            any = true;
            descriptors += chain.descriptors().max(1);
            bytes += chain.bytes();
            match device.serve(self.index, chain, &memory) {
                Served::Done(written) => self.complete(popped, written),
                Served::Pending(mut answer) => {
                    // What never waits, such as I/O of a device in memory, needs no task.
                    match answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                        Poll::Ready(written) => self.complete(popped, written),
                        Poll::Pending => {
                            let queue = self.clone();
                            reactor.spawn(async move { queue.complete(popped, answer.await) });
                        }
                    }
                }
                Served::Unanswerable => {
                    popped.abandon();
                    let mut state = self.state.borrow_mut();
                    state.under_way -= 1;
                    state.break_off();
                    return Err(QueueError::Unanswerable);
                }
            }
        }
        Ok(any)
    }

    #[inline]
    fn pop(&self, chain: &mut Chain) -> Result<Option<Popped>, QueueError> {
        let mut state = self.state.borrow_mut();
        if !state.takes_chains() {
            return Ok(None);
        }
        let State { ring: Some(ring), under_way, epoch, .. } = &mut *state else { return Ok(None) };
        match ring.pop(chain) {
            Ok(false) => Ok(None),
            Ok(true) => {
                *under_way += 1;
                Ok(Some(Popped { head: chain.head(), epoch: *epoch, settled: false }))
            }
            Err(error) => {
                state.break_off();
                Err(error.into())
            }
        }
    }

    #[inline]
    fn complete(&self, popped: Popped, written: usize) {
        let mut state = self.state.borrow_mut();
        if popped.epoch != state.epoch {
            popped.abandon();
            return;
        }
        state.under_way -= 1;
        match &mut state.ring {
            // A descriptor's length has 32 bits, and so has what can be written into all of a chain's.
            Some(ring) => ring.push_used(popped.answer(), u32::try_from(written).unwrap_or(u32::MAX)),
            None => popped.abandon(),
        }
    }

    /// Shows the turn's answers to the driver at once and notifies it if it asked for that.
    pub fn publish(&self) {
        let mut state = self.state.borrow_mut();
        let Some(ring) = &mut state.ring else { return };
        if ring.publish()
            && let Some(call) = &state.call
        {
            call.signal();
        }
    }

    /// Asks for kicks before the poller sleeps. Returns whether there is something to do first.
    pub fn prepare_sleep(&self) -> bool {
        self.state.borrow_mut().running_ring().is_some_and(Ring::enable_kicks)
    }

    /// The poller is awake: kicks are not needed.
    pub fn finish_sleep(&self) {
        if let Some(ring) = self.state.borrow_mut().running_ring() {
            ring.disable_kicks();
        }
    }

    /// Whether the ring runs without a kick descriptor, so that nobody would wake a sleeping poller.
    pub fn needs_polling(&self) -> bool {
        let state = self.state.borrow();
        state.ring.is_some() && matches!(state.kick, Some(Kick::Polled))
    }
}

impl State {
    /// Whether chains may be taken if there are any.
    #[inline]
    fn takes_chains(&self) -> bool {
        self.enabled && !self.broken && self.kick.is_some() && self.under_way < u32::from(self.size)
    }

    /// The ring, if chains may be taken from it. The memory of another one may be the guest's again: nothing but
    /// the answers to what was taken before is written there.
    fn running_ring(&mut self) -> Option<&mut Ring> {
        if self.takes_chains() { self.ring.as_mut() } else { None }
    }

    /// Leaves the ring, if there is one. Answers under way are dropped when they come.
    fn detach(&mut self) {
        if let Some(mut ring) = self.ring.take() {
            ring.publish();
            self.base = ring.next_available();
        }
        self.epoch += 1;
        self.under_way = 0;
    }

    /// Leaves the ring, to begin with a sound one.
    fn restart(&mut self) {
        self.detach();
        self.broken = false;
    }

    /// Takes no more chains; tells the frontend.
    #[cold]
    fn break_off(&mut self) {
        self.broken = true;
        if let Some(error) = &self.error {
            error.signal();
        }
    }
}
