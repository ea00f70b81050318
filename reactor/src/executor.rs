//! Task slab, timers and the turn of the loop.

#![expect(unsafe_code, reason = "a RawWaker without allocation")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};
use std::time::Duration;

use crate::clock::Clock;

/// A source of completions that a [`Reactor`] polls once per turn.
pub trait Driver {
    /// Submits what is queued and reaps what has completed, without blocking. Returns whether anything
    /// happened.
    fn poll(&self) -> bool;

    /// Operations that are under way: as long as there are any, the loop has something to wait for.
    fn in_flight(&self) -> usize;

    /// Blocks until something completes or `timeout` has passed. Called only when no task is ready.
    fn park(&self, timeout: Option<Duration>);
}

/// A task's number: slab index in the low half, generation in the high half.
#[derive(Clone, Copy, PartialEq, Eq)]
struct TaskId {
    index: u32,
    generation: u32,
}

impl TaskId {
    fn pack(self) -> *const () {
        std::ptr::without_provenance(((self.generation as usize) << 32) | self.index as usize)
    }

    fn unpack(data: *const ()) -> Self {
        let bits = data.addr() as u64;
        Self { index: (bits & 0xffff_ffff) as u32, generation: (bits >> 32) as u32 }
    }
}

thread_local! {
    static READY: RefCell<VecDeque<TaskId>> = const { RefCell::new(VecDeque::new()) };
}

const VTABLE: RawWakerVTable = RawWakerVTable::new(
    |data| RawWaker::new(data, &VTABLE),
    |data| READY.with_borrow_mut(|ready| ready.push_back(TaskId::unpack(data))),
    |data| READY.with_borrow_mut(|ready| ready.push_back(TaskId::unpack(data))),
    |_| (),
);

fn waker_of(id: TaskId) -> Waker {
    // SAFETY: the vtable's functions only read the number packed into the data pointer, which is never
    // dereferenced. A waker that is sent to another thread wakes a task there that does not exist: a lost
    // wake-up, not undefined behaviour; nothing in this workspace sends one.
    unsafe { Waker::from_raw(RawWaker::new(id.pack(), &VTABLE)) }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    generation: u32,
    /// `None` while the task is being polled, or when the slot is free.
    task: Option<Task>,
}

/// The single-thread executor; cheap to clone by `Rc`.
pub struct Reactor {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    live: Cell<usize>,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    timer_seq: Cell<u64>,
    drivers: RefCell<Vec<Rc<dyn Driver>>>,
    clock: Rc<dyn Clock>,
}

impl Reactor {
    /// A reactor without tasks or drivers.
    pub fn new(clock: Rc<dyn Clock>) -> Rc<Self> {
        Rc::new(Self {
            slots: RefCell::default(),
            free: RefCell::default(),
            live: Cell::new(0),
            timers: RefCell::default(),
            timer_seq: Cell::new(0),
            drivers: RefCell::default(),
            clock,
        })
    }

    /// Adds a driver to every later turn.
    pub fn add_driver(&self, driver: Rc<dyn Driver>) {
        self.drivers.borrow_mut().push(driver);
    }

    /// The injected clock.
    pub fn clock(&self) -> &Rc<dyn Clock> {
        &self.clock
    }

    /// Number of tasks that have not finished.
    pub fn live_tasks(&self) -> usize {
        self.live.get()
    }

    /// Starts a task; it runs from the next turn on, to its end or to that of the reactor.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
        let shared = Rc::new(JoinState { value: RefCell::new(None), waiter: RefCell::new(None) });
        let result = shared.clone();
        let id = self.insert(Box::pin(async move {
            let value = future.await;
            *result.value.borrow_mut() = Some(value);
            if let Some(waker) = result.waiter.borrow_mut().take() {
                waker.wake();
            }
        }));
        READY.with_borrow_mut(|ready| ready.push_back(id));
        JoinHandle { shared }
    }

    fn insert(&self, task: Task) -> TaskId {
        self.live.set(self.live.get() + 1);
        let mut slots = self.slots.borrow_mut();
        if let Some(index) = self.free.borrow_mut().pop() {
            let slot = &mut slots[index as usize];
            slot.task = Some(task);
            return TaskId { index, generation: slot.generation };
        }
        slots.push(Slot { generation: 0, task: Some(task) });
        TaskId { index: (slots.len() - 1) as u32, generation: 0 }
    }

    /// Runs ready tasks, fires due timers and polls the drivers once. Returns whether anything happened.
    pub fn turn(&self) -> bool {
        let mut busy = false;
        for index in 0..self.drivers.borrow().len() {
            let driver = self.drivers.borrow()[index].clone();
            busy |= driver.poll();
        }
        busy |= self.fire_timers();
        // Only what is ready now: a task that wakes itself must not starve the drivers.
        let count = READY.with_borrow(VecDeque::len);
        for _ in 0..count {
            let Some(id) = READY.with_borrow_mut(VecDeque::pop_front) else { break };
            busy = true;
            self.poll_task(id);
        }
        busy
    }

    fn poll_task(&self, id: TaskId) {
        let taken = {
            let mut slots = self.slots.borrow_mut();
            match slots.get_mut(id.index as usize) {
                Some(slot) if slot.generation == id.generation => slot.task.take(),
                _ => None,
            }
        };
        let Some(mut task) = taken else { return };
        let waker = waker_of(id);
        let finished = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        // A finished task's destructors may spawn or wake: they run before the slab is borrowed.
        let task = if finished { None } else { Some(task) };
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[id.index as usize];
        if finished {
            slot.generation = slot.generation.wrapping_add(1);
            self.free.borrow_mut().push(id.index);
            self.live.set(self.live.get() - 1);
        } else {
            slot.task = task;
        }
    }

    fn fire_timers(&self) -> bool {
        if self.timers.borrow().is_empty() {
            return false;
        }
        let now = self.clock.monotonic();
        let mut fired = false;
        loop {
            let mut timers = self.timers.borrow_mut();
            match timers.first_entry() {
                Some(entry) if entry.key().0 <= now => entry.remove().wake(),
                _ => return fired,
            }
            fired = true;
        }
    }

    /// Whether a task is waiting to be run.
    pub fn has_ready(&self) -> bool {
        READY.with_borrow(|ready| !ready.is_empty())
    }

    /// When the next timer fires, as monotonic time.
    pub fn next_timer(&self) -> Option<Duration> {
        self.timers.borrow().first_key_value().map(|((when, _), _)| *when)
    }

    /// A future that is ready once `duration` of the injected clock has passed.
    pub fn sleep(self: &Rc<Self>, duration: Duration) -> Sleep {
        Sleep { reactor: self.clone(), deadline: self.clock.monotonic() + duration, key: None }
    }

    /// Runs the loop until `future` is done.
    ///
    /// # Panics
    /// When nothing is ready, no timer is set and no driver has work under way: the future would never end.
    pub fn block_on<T: 'static>(self: &Rc<Self>, future: impl Future<Output = T> + 'static) -> T {
        let handle = self.spawn(future);
        loop {
            if let Some(value) = handle.take() {
                return value;
            }
            if !self.turn() && !handle.is_finished() {
                self.park();
            }
        }
    }

    /// Waits for the next event when no task is ready: in a driver, or by moving a virtual clock.
    pub fn park(&self) {
        let next = self.next_timer();
        let now = self.clock.monotonic();
        let timeout = next.map(|when| when.saturating_sub(now));
        let waiting = self.drivers.borrow().iter().find(|driver| driver.in_flight() > 0).cloned();
        match (waiting, timeout) {
            (Some(driver), timeout) if !self.clock.is_virtual() => driver.park(timeout),
            (Some(driver), _) => driver.park(Some(Duration::ZERO)),
            (None, Some(_)) if self.clock.is_virtual() => self.clock.advance(next.unwrap_or(now)),
            (None, Some(timeout)) => std::thread::sleep(timeout),
            (None, None) => panic!("deadlock: a future waits for an event that nothing can bring"),
        }
    }
}

struct JoinState<T> {
    value: RefCell<Option<T>>,
    waiter: RefCell<Option<Waker>>,
}

/// The result of a spawned task, as a future. Dropping it lets the task go on alone.
pub struct JoinHandle<T> {
    shared: Rc<JoinState<T>>,
}

impl<T> JoinHandle<T> {
    /// Whether the task has ended and its value was not taken yet.
    pub fn is_finished(&self) -> bool {
        self.shared.value.borrow().is_some()
    }

    /// Takes the value of a task that has ended.
    pub fn take(&self) -> Option<T> {
        self.shared.value.borrow_mut().take()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if let Some(value) = self.take() {
            return Poll::Ready(value);
        }
        *self.shared.waiter.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Future of [`Reactor::sleep`].
pub struct Sleep {
    reactor: Rc<Reactor>,
    deadline: Duration,
    key: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Some(key) = this.key.take() {
            this.reactor.timers.borrow_mut().remove(&key);
        }
        if this.reactor.clock.monotonic() >= this.deadline {
            return Poll::Ready(());
        }
        let seq = this.reactor.timer_seq.get();
        this.reactor.timer_seq.set(seq + 1);
        this.reactor.timers.borrow_mut().insert((this.deadline, seq), cx.waker().clone());
        this.key = Some((this.deadline, seq));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.reactor.timers.borrow_mut().remove(&key);
        }
    }
}
