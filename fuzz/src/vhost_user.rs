//! Messages of a frontend that is hostile, with all kinds of descriptors, and rings in memory that it takes away.
//!
//! Messages that were sent whole are answered in their order, each that asks for it exactly once. Another frontend of
//! the same poller notices nothing. Nothing that is sent makes the poller wait.

mod echo;
mod frontend;
mod message;

use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};

use arbitrary::Arbitrary;
use reactor::Reactor;
use vhostfs::device::fs::FsDevice;
use vhostfs::guest_mem::install_fault_handler;
use vhostfs::poller::{PollMode, Poller, Source, Tenure};

use crate::disk::new_reactor;
use echo::Echo;
use frontend::Frontend;
use message::{FileKind, Message, Payload};

/// Steps of an execution: what comes behind them would only make it slow.
const STEPS_MAX: usize = 60;

/// Turns without work after which the poller has looked at its sockets: it does so every 64 turns.
const QUIET_TURNS: u32 = 130;

/// Turns that an execution can be worth: messages, requests and replies are far fewer.
const TURNS_MAX: u32 = 100_000;

/// What an execution does.
#[derive(Debug, Arbitrary)]
pub struct Input {
    /// Begin with memory and queues that run.
    started: bool,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    /// A message with these descriptors.
    Send {
        message: Message,
        need_reply: bool,
        files: Vec<FileKind>,
    },
    /// A header of this kind, and a payload that does not fit it.
    Malformed {
        code: u8,
        flags: u32,
        size: u32,
        payload: Vec<u8>,
        files: Vec<FileKind>,
    },
    /// The poller does what there is to do.
    Settle,
    Kick(u8),
    /// A request in a chain of two descriptors.
    Request {
        queue: u8,
        later: bool,
    },
    /// A descriptor of a queue's table.
    Descriptor {
        queue: u8,
        index: u8,
        to: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// An entry of an available ring, shown to the device.
    Offer {
        queue: u8,
        head: u8,
    },
    /// Any available index.
    Index {
        queue: u8,
        index: u16,
    },
    /// The memory gets another size.
    Resize(u8),
    /// Requests that wait are answered.
    Release,
    /// The frontend leaves.
    Close,
}

/// Runs the target.
///
/// # Panics
/// When something is wrong.
pub fn run(input: Input) {
    install_fault_handler().expect("a signal can be handled");
    handle_broken_pipes();
    let mut rig = Rig::new();
    let (echo, mut frontend) = rig.connect();
    let (_, mut witness) = rig.connect();
    witness.start();
    rig.settle();
    if input.started {
        frontend.start();
        rig.settle();
    }
    for step in input.steps.into_iter().take(STEPS_MAX) {
        rig.step(&mut frontend, &echo, step);
        frontend.read_replies();
    }
    echo.become_prompt();
    rig.settle();
    frontend.read_replies();
    frontend.check_replies();
    rig.check(&mut witness);
}

/// A Rust program survives writes to pipes that nobody reads; a fuzzer's program is none.
fn handle_broken_pipes() {
    static HANDLED: Once = Once::new();
    HANDLED.call_once(|| {
        let noticed = Arc::<AtomicBool>::default();
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, noticed).expect("a signal can be handled");
    });
}

struct Rig {
    poller: Poller,
}

impl Rig {
    fn new() -> Self {
        let reactor: Rc<Reactor> = new_reactor();
        Self { poller: Poller::new(reactor, PollMode::Interrupt).expect("a poll set") }
    }

    /// Adds a device with a frontend.
    fn connect(&mut self) -> (Echo, Frontend) {
        let (ours, theirs) = UnixStream::pair().expect("two sockets");
        let echo = Echo::default();
        let device = Rc::new(FsDevice::new(echo.clone(), "tag", 2).expect("a device"));
        let added = self.poller.add_device(device, Source::Connected(ours.into()), Tenure::Successive);
        added.expect("a socket can be watched");
        (echo, Frontend::new(theirs))
    }

    /// Lets the poller do all there is to do.
    fn settle(&mut self) {
        let (mut quiet, mut turns) = (0, 0);
        while quiet < QUIET_TURNS {
            quiet = if self.poller.turn().expect("events") { 0 } else { quiet + 1 };
            turns += 1;
            assert!(turns < TURNS_MAX, "the poller always finds something to do");
        }
    }

    fn step(&mut self, frontend: &mut Frontend, echo: &Echo, step: Step) {
        match step {
            Step::Send { message, need_reply, files } => {
                let Payload { code, bytes } = message.encode();
                frontend.send(code, need_reply, &bytes, &files, &message);
                self.settle();
            }
            Step::Malformed { code, flags, size, payload, files } => {
                frontend.send_malformed([code.into(), flags, size], &payload, &files);
                self.settle();
            }
            Step::Settle => self.settle(),
            Step::Kick(queue) => frontend.kick(queue),
            Step::Request { queue, later } => frontend.request(queue, later),
            Step::Descriptor { queue, index, to, len, flags, next } => {
                frontend.descriptor(queue, index, to, len, flags, next);
            }
            Step::Offer { queue, head } => frontend.offer(queue, head.into()),
            Step::Index { queue, index } => frontend.set_available(queue, index),
            Step::Resize(quarters) => frontend.resize(quarters % 5),
            Step::Release => echo.release(),
            Step::Close => frontend.close(),
        }
    }

    /// The frontend's queues work.
    fn check(&mut self, frontend: &mut Frontend) {
        for queue in 1..3 {
            frontend.request(queue, false);
            self.settle();
            assert!(frontend.has_reply(queue), "another frontend is served");
        }
        frontend.read_replies();
        frontend.check_replies();
    }
}
