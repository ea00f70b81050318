use super::*;
use crate::remote::RemoteEvent;
use crate::sync::join_all;
use crate::{Reactor, SystemClock};
use rustix::event::{EventfdFlags, epoll, eventfd};
use std::os::fd::OwnedFd;

fn setup(entries: u32) -> (Rc<Reactor>, Rc<Uring>) {
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let uring = Uring::new(entries).expect("this kernel has io_uring");
    reactor.add_driver(uring.clone());
    (reactor, uring)
}

fn event(count: u32) -> Rc<OwnedFd> {
    Rc::new(eventfd(count, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

/// Counts its completions and keeps the last result.
#[derive(Default)]
struct Counter {
    completed: Cell<u32>,
    result: Cell<i32>,
}

impl Client for Counter {
    fn complete(&self, _token: u32, result: i32) {
        self.completed.set(self.completed.get() + 1);
        self.result.set(result);
    }
}

fn queue_nops(uring: &Uring, client: &Rc<Counter>, count: u32) {
    for token in 0..count {
        // SAFETY: a no-op names no memory.
        unsafe { uring.queue(opcode::Nop::new().build(), client.clone(), token, Carrier::Device) };
    }
}

#[test]
fn more_operations_than_the_queue_holds_all_complete() {
    let (reactor, uring) = setup(4);
    let client = Rc::<Counter>::default();
    queue_nops(&uring, &client, 1000);
    assert_eq!(uring.in_flight(), 1000);
    while uring.in_flight() > 0 {
        reactor.turn();
    }
    assert_eq!(client.completed.get(), 1000);
    assert_eq!(uring.slots.borrow().operations.len(), 1000);
    queue_nops(&uring, &client, 10);
    assert_eq!(uring.slots.borrow().operations.len(), 1000, "slots are used again");
}

#[test]
fn operations_queued_by_tasks_are_submitted_in_the_same_turn() {
    let (reactor, uring) = setup(8);
    let client = Rc::<Counter>::default();
    let (ring, counted) = (uring.clone(), client.clone());
    drop(reactor.spawn(async move { queue_nops(&ring, &counted, 1) }));
    reactor.turn();
    assert!(uring.ring.borrow_mut().submission().is_empty());
    while uring.in_flight() > 0 {
        reactor.turn();
    }
    assert_eq!((client.completed.get(), client.result.get()), (1, 0));
}

#[test]
fn readable_waits_for_the_descriptor_and_others_do_not_hold_it_up() {
    let (reactor, uring) = setup(8);
    let (first, second) = (event(0), event(0));
    let waiters = [first.clone(), second.clone()].map(|fd| {
        let uring = uring.clone();
        reactor.spawn(async move { uring.readable(fd.as_fd()).await })
    });
    for _ in 0..3 {
        reactor.turn();
    }
    assert!(!waiters[0].is_finished() && !waiters[1].is_finished());
    rustix::io::write(&*second, &[1; 8]).unwrap();
    let [first_waiter, second_waiter] = waiters;
    reactor.block_on(second_waiter);
    assert!(!first_waiter.is_finished());
    assert_eq!(uring.in_flight(), 1);
}

#[test]
fn a_dropped_wait_ends_its_poll() {
    let (reactor, uring) = setup(8);
    let fd = event(0);
    {
        let mut wait = Box::pin(uring.readable(fd.as_fd()));
        assert!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        reactor.turn();
        assert_eq!(uring.in_flight(), 1);
    }
    while uring.in_flight() > 0 {
        reactor.turn();
        if uring.in_flight() > 0 {
            uring.park(Some(Duration::from_millis(10)));
        }
    }
}

#[test]
fn dropping_the_reactor_ends_waits_that_nothing_would_end() {
    let (reactor, uring) = setup(8);
    let client = Rc::<Counter>::default();
    let fd = event(0);
    let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), libc::POLLIN as u32).build();
    // SAFETY: a poll names no memory.
    unsafe { uring.queue(entry, client.clone(), 0, Carrier::Device) };
    reactor.turn();
    drop(reactor);
    assert_eq!((uring.in_flight(), client.result.get()), (0, -libc::ECANCELED));
}

#[test]
fn another_thread_wakes_a_parked_reactor() {
    let (reactor, uring) = setup(8);
    let (event, waker) = RemoteEvent::new(&uring).unwrap();
    let thread = std::thread::spawn(move || {
        for _ in 0..3 {
            waker.wake();
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    reactor.block_on(async move { event.wait().await });
    thread.join().unwrap();
}

#[test]
fn timers_fire_while_an_operation_is_under_way() {
    let (reactor, uring) = setup(8);
    let fd = event(0);
    drop(reactor.spawn(async move { uring.readable(fd.as_fd()).await }));
    let sleeps = [2, 1].map(|ms| reactor.sleep(Duration::from_millis(ms)));
    reactor.block_on(join_all(sleeps));
}

/// Completions arrive from another thread at every possible moment around the decision to sleep.
#[test]
fn a_sleeper_on_the_wake_descriptor_misses_no_completion() {
    const ROUNDS: u32 = 2000;
    let (reactor, uring) = setup(8);
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let interest = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&set, uring.wake_fd().unwrap(), epoll::EventData::new_u64(0), interest).unwrap();

    let (source, signalled) = rustix::pipe::pipe().unwrap();
    let (ask, asked) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        for round in asked {
            for _ in 0..round % 64 {
                std::hint::spin_loop();
            }
            rustix::io::write(&signalled, &[0; 8]).unwrap();
        }
    });
    let client = Rc::<Counter>::default();
    let mut counter = Box::new([0u8; 8]);
    for round in 0..ROUNDS {
        let read = opcode::Read::new(Fd(source.as_raw_fd()), counter.as_mut_ptr(), 8).build();
        // SAFETY: `counter` outlives the operation, for which this round waits.
        unsafe { uring.queue(read, client.clone(), 0, Carrier::Device) };
        reactor.turn();
        ask.send(round).unwrap();
        while client.completed.get() <= round {
            if reactor.turn() {
                continue;
            }
            if !reactor.prepare_sleep() {
                let mut events = [const { std::mem::MaybeUninit::uninit() }; 1];
                let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
                let (happened, _) = epoll::wait(&set, &mut events, Some(&limit)).unwrap();
                assert_eq!(happened.len(), 1, "round {round}: nobody woke the sleeper");
            }
            reactor.finish_sleep();
        }
    }
    drop(ask);
    thread.join().unwrap();
}
