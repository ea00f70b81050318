//! Task slab, timers and the turn of the loop.

#![expect(unsafe_code, reason = "a RawWaker without allocation")]

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};
use std::time::Duration;

use crate::clock::Clock;
use crate::uring::Uring;

/// A source of completions that a [`Reactor`] polls once per turn.
pub trait Driver {
    /// Reaps what has completed, without blocking. Returns whether anything happened.
    fn poll(&self) -> bool;

    /// Submits what tasks have queued: called at the end of each turn, so one system call takes it all.
    fn submit(&self) {}

    /// Operations that are under way: as long as there are any, the loop has something to wait for.
    fn in_flight(&self) -> usize;

    /// Whether threads of the kernel are at work on some of them. They may need this thread's CPU: whoever spins until
    /// they are done may keep them from it.
    fn waits_for_threads(&self) -> bool {
        false
    }

    /// Blocks until something completes or `timeout` has passed. Called only when no task is ready.
    fn park(&self, timeout: Option<Duration>);

    /// Asks for a signal by the driver's own descriptor at the next completion. Returns whether something has
    /// completed already.
    fn arm(&self) -> bool {
        false
    }

    /// Takes back [`Driver::arm`].
    fn disarm(&self) {}

    /// The reactor is going away: ends what is under way. Afterwards nothing outside the process touches
    /// memory that was given to the driver.
    fn close(&self) {}
}

/// A task's number, as a waker carries it: reactor (8 bits), serial (32 bits), slab index (24 bits).
///
/// The serial counts the tasks of the thread, over all its reactors, so a waker that has outlived its task
/// or its reactor meets nobody. It wraps after four billion tasks; a waker that old wakes somebody in vain.
#[derive(Clone, Copy, PartialEq, Eq)]
struct TaskId {
    reactor: u8,
    serial: u32,
    index: u32,
}

/// Tasks of one reactor that have not finished, at most.
const TASKS_MAX: usize = 1 << 24;

/// Operations per submission of a reactor's io_uring. Picked: twice the queue depth at which fast devices
/// stop gaining; more than that in one turn takes a second system call, nothing worse.
const URING_ENTRIES: u32 = 256;

/// Reactors alive on one thread, at most.
const REACTORS_MAX: usize = 1 << 8;

impl TaskId {
    fn pack(self) -> *const () {
        let bits = u64::from(self.reactor) << 56 | u64::from(self.serial) << 24 | u64::from(self.index);
        std::ptr::without_provenance(bits as usize)
    }

    fn unpack(data: *const ()) -> Self {
        let bits = data.addr() as u64;
        Self { reactor: (bits >> 56) as u8, serial: (bits >> 24) as u32, index: bits as u32 & 0xff_ffff }
    }
}

const _: () = assert!(size_of::<usize>() == 8, "task numbers fill a pointer");

/// What the wakers of a thread reach.
struct ThreadState {
    /// Ready tasks of each reactor; `None` where a number is free.
    queues: Vec<Option<VecDeque<TaskId>>>,
    next_serial: u32,
}

thread_local! {
    static THREAD: RefCell<ThreadState> = const {
        RefCell::new(ThreadState { queues: Vec::new(), next_serial: 0 })
    };
}

impl ThreadState {
    fn add_reactor(&mut self) -> u8 {
        let free = self.queues.iter().position(Option::is_none);
        let number = free.unwrap_or_else(|| {
            self.queues.push(None);
            self.queues.len() - 1
        });
        assert!(number < REACTORS_MAX, "too many reactors are alive on one thread");
        self.queues[number] = Some(VecDeque::new());
        number as u8
    }

    fn queue(&mut self, reactor: u8) -> Option<&mut VecDeque<TaskId>> {
        self.queues.get_mut(usize::from(reactor))?.as_mut()
    }

    fn wake(&mut self, id: TaskId) {
        if let Some(queue) = self.queue(id.reactor) {
            queue.push_back(id);
        }
    }
}

fn wake(data: *const ()) {
    // A thread that ends has no tasks any more.
    let _ = THREAD.try_with(|thread| thread.borrow_mut().wake(TaskId::unpack(data)));
}

const VTABLE: RawWakerVTable = RawWakerVTable::new(|data| RawWaker::new(data, &VTABLE), wake, wake, |_| ());

fn waker_of(id: TaskId) -> Waker {
    // SAFETY: the vtable's functions only read the number packed into the data pointer, which is never
    // dereferenced. A waker that is sent to another thread finds no such task there: a lost wake-up, not
    // undefined behaviour. Other threads use `RemoteWaker`.
    unsafe { Waker::from_raw(RawWaker::new(id.pack(), &VTABLE)) }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    serial: u32,
    /// `None` while the task is being polled, or when the slot is free.
    task: Option<Task>,
}

/// Timers, apart from the reactor so that a sleeping task does not keep the reactor alive that owns it.
struct Timers {
    clock: Rc<dyn Clock>,
    /// Wakers by deadline and, among equals, by age.
    queue: RefCell<BTreeMap<(Duration, u64), Waker>>,
    next: Cell<u64>,
}

/// The single-thread executor; cheap to clone by `Rc`.
pub struct Reactor {
    number: u8,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    live: Cell<usize>,
    in_turn: Cell<bool>,
    timers: Rc<Timers>,
    drivers: RefCell<Vec<Rc<dyn Driver>>>,
    uring: OnceCell<Rc<Uring>>,
}

impl Reactor {
    /// A reactor without tasks or drivers.
    ///
    /// # Panics
    /// When 256 reactors are alive on this thread.
    pub fn new(clock: Rc<dyn Clock>) -> Rc<Self> {
        Rc::new(Self {
            number: THREAD.with_borrow_mut(ThreadState::add_reactor),
            slots: RefCell::default(),
            free: RefCell::default(),
            live: Cell::new(0),
            in_turn: Cell::new(false),
            timers: Rc::new(Timers { clock, queue: RefCell::default(), next: Cell::new(0) }),
            drivers: RefCell::default(),
            uring: OnceCell::new(),
        })
    }

    /// Adds a driver to every later turn.
    pub fn add_driver(&self, driver: Rc<dyn Driver>) {
        self.drivers.borrow_mut().push(driver);
    }

    /// The reactor's io_uring, made and added as a driver at the first call.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or does not let this process have one.
    pub fn uring(&self) -> io::Result<Rc<Uring>> {
        if let Some(uring) = self.uring.get() {
            return Ok(uring.clone());
        }
        let uring = Uring::new(URING_ENTRIES)?;
        self.add_driver(uring.clone());
        Ok(self.uring.get_or_init(|| uring).clone())
    }

    /// The injected clock.
    pub fn clock(&self) -> &Rc<dyn Clock> {
        &self.timers.clock
    }

    /// Number of tasks that have not finished.
    pub fn live_tasks(&self) -> usize {
        self.live.get()
    }

    /// Starts a task; it runs from the next turn on, to its end or to that of the reactor.
    ///
    /// # Panics
    /// When 16 million tasks are alive.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
        let shared = Rc::new(JoinState { value: RefCell::new(None), waiter: RefCell::new(None) });
        let result = shared.clone();
        let task = Box::pin(async move {
            let value = future.await;
            *result.value.borrow_mut() = Some(value);
            let waiter = result.waiter.take();
            if let Some(waker) = waiter {
                waker.wake();
            }
        });
        THREAD.with_borrow_mut(|thread| {
            let id = self.insert(task, thread.next_serial);
            thread.next_serial = thread.next_serial.wrapping_add(1);
            thread.wake(id);
        });
        JoinHandle { shared }
    }

    fn insert(&self, task: Task, serial: u32) -> TaskId {
        self.live.set(self.live.get() + 1);
        let mut slots = self.slots.borrow_mut();
        let slot = Slot { serial, task: Some(task) };
        let index = match self.free.borrow_mut().pop() {
            Some(index) => {
                slots[index as usize] = slot;
                index
            }
            None => {
                assert!(slots.len() < TASKS_MAX, "too many tasks are alive");
                slots.push(slot);
                (slots.len() - 1) as u32
            }
        };
        TaskId { reactor: self.number, serial, index }
    }

    /// Polls the drivers, fires due timers, runs ready tasks and submits what all these have queued. Returns
    /// whether anything happened.
    ///
    /// # Panics
    /// When called from inside a task.
    pub fn turn(&self) -> bool {
        let in_turn = InTurn::enter(&self.in_turn);
        let mut busy = false;
        self.each_driver(|driver| busy |= driver.poll());
        busy |= self.fire_timers();
        // Only what is ready now: a task that wakes itself must not starve the drivers.
        let count = self.with_queue(|queue| queue.len());
        for _ in 0..count {
            let Some(id) = self.with_queue(VecDeque::pop_front) else { break };
            busy = true;
            self.poll_task(id);
        }
        self.each_driver(|driver| driver.submit());
        drop(in_turn);
        busy
    }

    fn each_driver(&self, mut each: impl FnMut(&dyn Driver)) {
        let mut index = 0;
        // A driver may add drivers: no borrow is held while one runs.
        while let Some(driver) = { self.drivers.borrow().get(index).cloned() } {
            each(&*driver);
            index += 1;
        }
    }

    fn with_queue<R>(&self, f: impl FnOnce(&mut VecDeque<TaskId>) -> R) -> R {
        THREAD.with_borrow_mut(|thread| f(thread.queue(self.number).expect("a live reactor has a queue")))
    }

    fn poll_task(&self, id: TaskId) {
        let taken = {
            let mut slots = self.slots.borrow_mut();
            match slots.get_mut(id.index as usize) {
                Some(slot) if slot.serial == id.serial => slot.task.take(),
                _ => None,
            }
        };
        let Some(mut task) = taken else { return };
        let waker = waker_of(id);
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.slots.borrow_mut()[id.index as usize].task = Some(task);
            return;
        }
        // Its destructors may spawn or wake: nothing is borrowed while they run.
        drop(task);
        self.free.borrow_mut().push(id.index);
        self.live.set(self.live.get() - 1);
    }

    fn fire_timers(&self) -> bool {
        if self.timers.queue.borrow().is_empty() {
            return false;
        }
        let now = self.timers.clock.monotonic();
        let mut fired = false;
        loop {
            let mut queue = self.timers.queue.borrow_mut();
            match queue.first_entry() {
                Some(entry) if entry.key().0 <= now => entry.remove().wake(),
                _ => return fired,
            }
            fired = true;
        }
    }

    /// Whether a task is waiting to be run.
    pub fn has_ready(&self) -> bool {
        self.with_queue(|queue| !queue.is_empty())
    }

    /// Whether threads of the kernel, which may need this thread's CPU, are at work for a driver.
    pub fn waits_for_threads(&self) -> bool {
        let mut waits = false;
        self.each_driver(|driver| waits |= driver.waits_for_threads());
        waits
    }

    /// Prepares for a sleep on descriptors outside the reactor: the drivers signal theirs from now on. Returns
    /// whether there is work already, so that there is nothing to wait for.
    pub fn prepare_sleep(&self) -> bool {
        let mut wakeful = self.has_ready();
        self.each_driver(|driver| wakeful |= driver.arm());
        wakeful
    }

    /// Ends what [`Reactor::prepare_sleep`] began.
    pub fn finish_sleep(&self) {
        self.each_driver(|driver| driver.disarm());
    }

    /// When the next timer fires, as monotonic time.
    pub fn next_timer(&self) -> Option<Duration> {
        self.timers.queue.borrow().first_key_value().map(|((when, _), _)| *when)
    }

    /// A future that is ready once `duration` of the injected clock has passed.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let deadline = self.timers.clock.monotonic().saturating_add(duration);
        Sleep { timers: self.timers.clone(), deadline, key: None }
    }

    /// Runs the loop until `future` is done.
    ///
    /// # Panics
    /// When nothing is ready, no timer is set and no driver has work under way: the future would never end.
    /// When called from inside a task.
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
    ///
    /// # Panics
    /// When nothing is ready, no timer is set and no driver has work under way: it would wait for ever.
    pub fn park(&self) {
        if self.has_ready() {
            return;
        }
        let next = self.next_timer();
        let now = self.timers.clock.monotonic();
        let timeout = next.map(|when| when.saturating_sub(now));
        let is_virtual = self.timers.clock.is_virtual();
        let mut waiting = Vec::new();
        self.each_driver(|driver| waiting.push(driver.in_flight() > 0));
        let count = waiting.iter().filter(|&&waits| waits).count();
        let driver =
            waiting.iter().position(|&waits| waits).map(|index| self.drivers.borrow()[index].clone());
        match (driver, timeout) {
            // Virtual time stands still while the real world has something under way.
            (Some(driver), _) if is_virtual => driver.park(Some(Duration::ZERO)),
            (Some(driver), timeout) if count == 1 => driver.park(timeout),
            (Some(driver), timeout) => {
                driver.park(Some(timeout.map_or(SHARED_PARK, |timeout| timeout.min(SHARED_PARK))));
            }
            (None, Some(_)) if is_virtual => self.timers.clock.advance(next.unwrap_or(now)),
            (None, Some(timeout)) => std::thread::sleep(timeout),
            (None, None) => panic!("deadlock: a future waits for an event that nothing can bring"),
        }
    }
}

/// How long one driver may sleep while another one has work under way, too. A program that cares has one
/// driver, or sleeps on the descriptors of all.
const SHARED_PARK: Duration = Duration::from_millis(1);

impl Drop for Reactor {
    fn drop(&mut self) {
        // Tasks first, one by one: their destructors may wake others and use drivers.
        while let Some(slot) = { self.slots.borrow_mut().pop() } {
            drop(slot);
        }
        self.each_driver(|driver| driver.close());
        // Wakers that outlive the reactor find no queue.
        let _ = THREAD.try_with(|thread| {
            if let Some(queue) = thread.borrow_mut().queues.get_mut(usize::from(self.number)) {
                *queue = None;
            }
        });
    }
}

/// Says that a turn is running, to its end or to a panic.
struct InTurn<'a>(&'a Cell<bool>);

impl<'a> InTurn<'a> {
    fn enter(flag: &'a Cell<bool>) -> Self {
        assert!(!flag.replace(true), "block_on or turn inside a task of the same reactor");
        Self(flag)
    }
}

impl Drop for InTurn<'_> {
    fn drop(&mut self) {
        self.0.set(false);
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
    timers: Rc<Timers>,
    deadline: Duration,
    key: Option<(Duration, u64)>,
}

impl Sleep {
    fn disarm(&mut self) {
        if let Some(key) = self.key.take() {
            self.timers.queue.borrow_mut().remove(&key);
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.disarm();
        if self.timers.clock.monotonic() >= self.deadline {
            return Poll::Ready(());
        }
        let key = (self.deadline, self.timers.next.get());
        self.timers.next.set(key.1 + 1);
        self.timers.queue.borrow_mut().insert(key, cx.waker().clone());
        self.key = Some(key);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.disarm();
    }
}

#[cfg(test)]
mod tests;
