//! Requests of a FUSE client: plausible ones about files that exist, damaged ones, and bytes without a meaning.
//!
//! What must hold: a request gets a reply of the right form, or none where none is due. A regular file reads as what
//! was written to it, as far as its requests were answered before the next one was sent. Another client of the file
//! system notices nothing. When the client has gone, the file system unmounts, and the checker finds nothing.

mod content;
mod request;

use std::rc::Rc;
use std::time::Duration;

use arbitrary::Arbitrary;
use bdev::{Bdev, IoBuffers};
use blobfs::Fs;
use blobfs::units::InodeId;
use fuse_map::{CachePolicy, Export, Handled, Session};
use reactor::{JoinHandle, Reactor};

use crate::disk::{Geometry, bytes_of, device_of, fsck, mount, new_reactor, private, wind_down};
use content::Contents;
use request::{Body, HEADER_LEN, Node, Nodes, request};

/// Room for a reply whose request asks for nothing large.
const ROOM: usize = 4096;

/// Bytes of a reply's header.
const REPLY_HEADER_LEN: usize = 16;

/// Steps of an execution: what comes behind them would only make it slow.
const STEPS_MAX: usize = 60;

/// What an execution does.
#[derive(Debug, Arbitrary)]
pub struct Input {
    /// The client caches nothing.
    uncached: bool,
    /// The client may change nothing.
    readonly: bool,
    large_blocks: bool,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    /// A request that is answered before the next one is sent.
    Call(Call),
    /// A request that others overtake.
    Send(Call),
    /// Bytes instead of a request.
    Bytes { bytes: Vec<u8>, room: u8 },
    /// All requests are answered.
    Settle,
    /// Time goes by.
    Sleep(u8),
    /// The device is reset.
    Reset,
}

#[derive(Debug, Arbitrary)]
struct Call {
    node: Node,
    body: Body,
    damage: Option<Damage>,
}

/// How a request differs from a proper one.
#[derive(Debug, Arbitrary)]
enum Damage {
    /// A byte is another one.
    Byte {
        at: u8,
        value: u8,
    },
    /// The header states so much more or less.
    Length(i8),
    Extensions(u16),
    /// The memory ends early.
    Cut(u8),
    /// Little room for the reply.
    Room(u8),
}

/// Runs the target.
///
/// # Panics
/// When something is wrong.
pub fn run(input: Input) {
    let geometry = if input.large_blocks { Geometry::PAGE } else { Geometry::TINY };
    let reactor = new_reactor();
    let device = new_file_system(&geometry);
    let (bdev, inner) = (device.clone(), reactor.clone());
    let fs = reactor.block_on(async move { mount(&bdev, &inner, false).await });
    let fs = fs.expect("a sound file system mounts");
    let cache = if input.uncached { CachePolicy::None } else { CachePolicy::Exclusive };
    let export = Export { root: InodeId::ROOT, readonly: input.readonly, cache };
    let mut client = Client::new(&reactor, &fs, export);
    let mut witness = Client::new(&reactor, &fs, Export { readonly: false, ..export });
    client.init();
    witness.init();
    for step in input.steps.into_iter().take(STEPS_MAX) {
        client.step(step);
    }
    client.settle();
    witness.ask_for_root();
    drop((client, witness));
    unmount_and_check(&reactor, fs, &device);
}

fn new_file_system(geometry: &Geometry) -> Rc<dyn Bdev> {
    use std::collections::HashMap;
    use std::sync::Mutex;
    static FORMATTED: Mutex<Option<HashMap<u64, Vec<u8>>>> = Mutex::new(None);
    let mut formatted = FORMATTED.lock().expect("nobody panics with it");
    let bytes = formatted.get_or_insert_default().entry(geometry.device).or_insert_with(|| {
        let reactor = new_reactor();
        bytes_of(&geometry.format(&reactor))
    });
    device_of(bytes)
}

fn unmount_and_check(reactor: &Rc<Reactor>, fs: Rc<Fs>, device: &Rc<dyn Bdev>) {
    let unmounted = reactor.block_on(async move { fs.unmount().await });
    assert_eq!(unmounted, Ok(()), "a file system on a sound device unmounts");
    wind_down(reactor);
    let report = fsck(device, &new_reactor()).expect("a file system can be checked");
    assert!(report.is_clean(), "{:?}", report.findings);
}

struct Client {
    reactor: Rc<Reactor>,
    session: Rc<Session>,
    unique: u64,
    nodes: Nodes,
    contents: Contents,
    under_way: Vec<Sent>,
}

/// A request that waits for its reply.
struct Sent {
    reply: JoinHandle<usize>,
    writable: IoBuffers,
    unique: u64,
    /// Of an earlier beginning of the session: there may be no reply.
    outdated: bool,
}

/// A reply: error number or body.
type Reply = Result<Vec<u8>, i32>;

impl Client {
    fn new(reactor: &Rc<Reactor>, fs: &Rc<Fs>, export: Export) -> Self {
        Self {
            reactor: reactor.clone(),
            session: Session::new(fs.clone(), export),
            unique: 0,
            nodes: Nodes::default(),
            contents: Contents::default(),
            under_way: Vec::new(),
        }
    }

    fn init(&mut self) {
        let reply = self.call(&Call { node: Node::ROOT, body: Body::INIT, damage: None });
        assert!(reply.is_some_and(|reply| reply.is_ok()), "INIT of a known version is answered");
    }

    /// The root directory answers.
    fn ask_for_root(&mut self) {
        let reply = self.call(&Call { node: Node::ROOT, body: Body::GetAttr, damage: None });
        assert!(reply.is_some_and(|reply| reply.is_ok()), "another client's root answers");
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Call(call) => drop(self.call(&call)),
            Step::Send(call) => self.send(&call),
            Step::Bytes { bytes, room } => self.send_bytes(&bytes, usize::from(room)),
            Step::Settle => self.settle(),
            Step::Sleep(seconds) => {
                self.reactor.block_on(self.reactor.sleep(Duration::from_secs((seconds % 16).into())));
            }
            Step::Reset => {
                self.session.reset();
                self.restart();
            }
        }
    }

    /// The session has begun anew.
    fn restart(&mut self) {
        self.nodes = Nodes::default();
        for sent in &mut self.under_way {
            sent.outdated = true;
        }
    }

    /// The bytes of a request, its node, and the room for its reply.
    fn encode(&mut self, call: &Call) -> (Vec<u8>, u64, usize) {
        self.unique += 2;
        let node = self.nodes.get(call.node);
        let (opcode, arguments) = call.body.encode(&self.nodes);
        let mut bytes = request(opcode, self.unique, node, &arguments, call.body.extensions());
        let mut room = ROOM + call.body.reply_len();
        match call.damage {
            None => {}
            Some(Damage::Byte { at, value }) => {
                let at = HEADER_LEN + usize::from(at);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            Some(Damage::Length(more)) => {
                let len = (bytes.len() as u32).wrapping_add_signed(more.into());
                bytes[..4].copy_from_slice(&len.to_le_bytes());
            }
            Some(Damage::Extensions(len)) => bytes[36..38].copy_from_slice(&len.to_le_bytes()),
            Some(Damage::Cut(len)) => bytes.truncate(bytes.len().saturating_sub(len.into())),
            Some(Damage::Room(len)) => room = len.into(),
        }
        (bytes, node, room)
    }

    /// A request and its reply; `None` when there is none.
    fn call(&mut self, call: &Call) -> Option<Reply> {
        let (bytes, node, room) = self.encode(call);
        let reply = self.exchange(&bytes, room);
        if call.body.begins_anew() {
            self.restart();
        }
        match &reply {
            // What was asked is not known for sure.
            _ if call.damage.is_some() => self.contents.forget_all(),
            Some(Ok(reply)) => {
                self.nodes.learn(&call.body, reply);
                self.contents.compare(&call.body, node, reply);
            }
            Some(Err(errno)) => self.contents.failed(&call.body, node, *errno),
            None => {}
        }
        reply
    }

    /// Sends bytes and waits for the reply.
    fn exchange(&mut self, bytes: &[u8], room: usize) -> Option<Reply> {
        let writable = private(&vec![0xaa; room]);
        let unique = unique_of(bytes);
        let request = fuse_map::Request { readable: private(bytes), writable: writable.clone() };
        let len = match self.session.handle(request) {
            Handled::Done(len) => len,
            Handled::Pending(reply) => self.reactor.block_on(reply),
            Handled::NoReply => return None,
            Handled::Unanswerable => {
                assert!(room < REPLY_HEADER_LEN, "a reply was possible");
                return None;
            }
        };
        // A request may end the session that it belongs to.
        (len > 0).then(|| parse_reply(&writable, unique, len))
    }

    fn send(&mut self, call: &Call) {
        let (bytes, _, room) = self.encode(call);
        // What is read and written at the same time has no order.
        self.contents.forget_all();
        if call.body.begins_anew() {
            self.restart();
        }
        self.submit(&bytes, room);
    }

    fn send_bytes(&mut self, bytes: &[u8], room: usize) {
        self.contents.forget_all();
        self.restart();
        self.submit(bytes, room);
    }

    fn submit(&mut self, bytes: &[u8], room: usize) {
        let writable = private(&vec![0xaa; room]);
        let unique = unique_of(bytes);
        let request = fuse_map::Request { readable: private(bytes), writable: writable.clone() };
        match self.session.handle(request) {
            Handled::Done(len) => drop(parse_reply(&writable, unique, len)),
            Handled::Pending(reply) => {
                let reply = self.reactor.spawn(reply);
                self.under_way.push(Sent { reply, writable, unique, outdated: false });
            }
            Handled::NoReply => {}
            Handled::Unanswerable => assert!(room < REPLY_HEADER_LEN, "a reply was possible"),
        }
    }

    /// Waits for all replies.
    fn settle(&mut self) {
        for sent in std::mem::take(&mut self.under_way) {
            let Sent { reply, writable, unique, outdated } = sent;
            let len = loop {
                match reply.take() {
                    Some(len) => break len,
                    None if self.reactor.turn() => {}
                    None => self.reactor.park(),
                }
            };
            if len > 0 || !outdated {
                let _ = parse_reply(&writable, unique, len);
            }
        }
        self.contents.forget_all();
    }
}

/// The number of a request, as far as its bytes have one.
fn unique_of(bytes: &[u8]) -> u64 {
    bytes.get(8..16).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Checks the form of a reply.
fn parse_reply(writable: &IoBuffers, unique: u64, len: usize) -> Reply {
    let mut bytes = vec![0; writable.len()];
    writable.copy_to(0, &mut bytes);
    assert!((REPLY_HEADER_LEN..=bytes.len()).contains(&len), "{len} bytes in a room of {}", bytes.len());
    let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
    assert_eq!(word(0) as usize, len, "the length in the header");
    assert_eq!(unique_of(&bytes), unique, "the number in the header");
    match word(4).cast_signed() {
        0 => Ok(bytes[REPLY_HEADER_LEN..len].to_vec()),
        error => {
            assert!((-4095..0).contains(&error), "error {error}");
            assert_eq!(len, REPLY_HEADER_LEN, "an error has no body");
            Err(-error)
        }
    }
}
