use super::*;
use crate::sync::{Notify, join_all};
use crate::{SystemClock, VirtualClock};

fn reactor() -> Rc<Reactor> {
    Reactor::new(Rc::new(VirtualClock::new(Duration::ZERO)))
}

fn run(reactor: &Reactor) {
    while reactor.live_tasks() > 0 {
        if !reactor.turn() {
            reactor.park();
        }
    }
}

/// Stores the waker that it is polled with and never ends.
struct Forever(Rc<RefCell<Option<Waker>>>);

impl Future for Forever {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        *self.0.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[test]
fn virtual_timers_fire_in_order_without_waiting() {
    let reactor = reactor();
    let order = Rc::new(RefCell::new(Vec::new()));
    for hours in [3, 1, 2] {
        let (sleep, order) = (reactor.sleep(Duration::from_secs(hours * 3600)), order.clone());
        drop(reactor.spawn(async move {
            sleep.await;
            order.borrow_mut().push(hours);
        }));
    }
    run(&reactor);
    assert_eq!(*order.borrow(), [1, 2, 3]);
    assert_eq!(reactor.clock().monotonic(), Duration::from_secs(3 * 3600));
}

#[test]
fn real_timers_wait() {
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let sleep = reactor.sleep(Duration::from_millis(5));
    reactor.block_on(sleep);
    assert!(reactor.clock().monotonic() >= Duration::from_millis(5));
}

#[test]
fn a_dropped_sleep_leaves_no_timer() {
    let reactor = reactor();
    let mut sleep = Box::pin(reactor.sleep(Duration::from_secs(1)));
    let poll = sleep.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(poll.is_pending() && reactor.next_timer().is_some());
    drop(sleep);
    assert_eq!(reactor.next_timer(), None);
}

#[test]
fn notify_wakes_all_who_wait_and_misses_none_that_began_before() {
    let reactor = reactor();
    let notify = Notify::new();
    let early = notify.notified();
    let waiters: Vec<_> = (0..3).map(|_| reactor.spawn(notify.notified())).collect();
    reactor.turn();
    assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
    notify.notify_all();
    reactor.turn();
    assert!(waiters.iter().all(JoinHandle::is_finished));
    reactor.block_on(early);
    let late = reactor.spawn(notify.notified());
    reactor.turn();
    assert!(!late.is_finished());
}

#[test]
fn join_all_keeps_the_order_of_its_futures() {
    let reactor = reactor();
    let sleeps: Vec<_> = [30, 10, 20]
        .into_iter()
        .map(|ms| {
            let sleep = reactor.sleep(Duration::from_millis(ms));
            async move {
                sleep.await;
                ms
            }
        })
        .collect();
    assert_eq!(reactor.block_on(join_all(sleeps)), [30, 10, 20]);
    assert_eq!(reactor.clock().monotonic(), Duration::from_millis(30));
}

#[test]
fn a_task_that_wakes_itself_does_not_hold_up_the_turn() {
    let reactor = reactor();
    drop(reactor.spawn(std::future::poll_fn(|cx| {
        cx.waker().wake_by_ref();
        Poll::<()>::Pending
    })));
    assert!(reactor.turn() && reactor.turn() && reactor.has_ready());
}

#[test]
fn wakers_of_finished_tasks_and_gone_reactors_wake_nobody() {
    let stale = Rc::new(RefCell::new(None));
    let first = reactor();
    drop(first.spawn(Forever(stale.clone())));
    first.turn();
    drop(first);
    let waker = stale.borrow_mut().take().unwrap();

    let second = reactor();
    let polls = Rc::new(Cell::new(0));
    let counted = polls.clone();
    drop(second.spawn(std::future::poll_fn(move |_| {
        counted.set(counted.get() + 1);
        Poll::<()>::Pending
    })));
    second.turn();
    waker.wake();
    second.turn();
    assert_eq!(polls.get(), 1);
}

#[test]
fn reactors_of_one_thread_run_their_own_tasks_only() {
    let (one, other) = (reactor(), reactor());
    let task = one.spawn(async { 7 });
    assert!(!other.turn());
    assert!(one.turn());
    assert_eq!(task.take(), Some(7));
}

#[test]
fn dropping_a_reactor_drops_its_tasks_even_those_that_sleep() {
    let held = Rc::new(());
    let reactor = reactor();
    let (sleep, hold) = (reactor.sleep(Duration::from_secs(1)), held.clone());
    drop(reactor.spawn(async move {
        sleep.await;
        drop(hold);
    }));
    reactor.turn();
    drop(reactor);
    assert_eq!(Rc::strong_count(&held), 1);
}

#[test]
fn destructors_of_tasks_may_spawn_and_wake() {
    struct SpawnOnDrop(Rc<Reactor>, Rc<Cell<bool>>);
    impl Drop for SpawnOnDrop {
        fn drop(&mut self) {
            let ran = self.1.clone();
            drop(self.0.spawn(async move { ran.set(true) }));
        }
    }
    let reactor = reactor();
    let ran = Rc::new(Cell::new(false));
    let guard = SpawnOnDrop(reactor.clone(), ran.clone());
    drop(reactor.spawn(async move { drop(guard) }));
    run(&reactor);
    assert!(ran.get());
}

#[test]
#[should_panic(expected = "inside a task")]
fn blocking_inside_a_task_is_refused() {
    let reactor = reactor();
    let inner = reactor.clone();
    reactor.block_on(async move { inner.block_on(async {}) });
}

#[test]
#[should_panic(expected = "deadlock")]
fn waiting_for_nothing_is_refused() {
    reactor().block_on(std::future::pending::<()>());
}
