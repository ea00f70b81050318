//! Frontends and guests, well-behaved and hostile, over real sockets.
//!
//! Poller and frontend share the test's thread: the poller moves only in [`Rig::settle`], so each test is
//! exact and needs no clock.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bdev::Bdev;
use bdev::memory::Memory;
use blobfs::Fs;
use blobfs::fs::MountOptions;
use blobfs::store::{MkfsOptions, OpenOptions, Store, mkfs};
use blobfs::units::InodeId;
use fuse_map::{CachePolicy, Export};
use reactor::{Reactor, SystemClock};
use vhostfs::device::fs::FsDevice;
use vhostfs::events::{Events, Key};
use vhostfs::guest_mem::install_fault_handler;
use vhostfs::poller::{PollMode, Poller, Source, Tenure};
use vhostfs::vhost_user::connection::{Connection, ConnectionError};

mod support;

use support::empty_fs::{BATCH_FORGET, ECHO, ECHO_LATER, EmptyFs, FORGET, INIT, LOOKUP, SYNCFS};
use support::guest::{
    BUFFERS, Frontend, GPA, Guest, INDIRECT, MEMORY_LEN, NEXT, UVA, WRITE, code, fuse_reply, fuse_request,
    init_request, message, region, signals, vring_addr, words,
};

const MKDIR: u32 = 9;

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;

/// A poller with devices of one high-priority and two request queues.
struct Rig {
    poller: Poller,
}

impl Rig {
    fn new() -> Self {
        install_fault_handler().unwrap();
        let reactor = Reactor::new(Rc::new(SystemClock::new()));
        Self { poller: Poller::new(reactor, PollMode::Interrupt).unwrap() }
    }

    /// Adds a device with a connected frontend.
    fn connected(&mut self) -> (EmptyFs, Frontend) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fs = self.add(Source::Connected(ours.into()));
        (fs, Frontend::new(theirs))
    }

    fn add(&mut self, source: Source) -> EmptyFs {
        let fs = EmptyFs::default();
        let device = Rc::new(FsDevice::new(fs.clone(), "tag", 2).unwrap());
        self.poller.add_device(device, source, Tenure::Successive).unwrap();
        fs
    }

    /// Lets the poller do all there is to do.
    fn settle(&mut self) {
        let mut quiet = 0;
        // It looks at its sockets every 64 turns.
        while quiet < 130 {
            quiet = if self.poller.turn().unwrap() { 0 } else { quiet + 1 };
        }
    }

    /// Lets it look at its sockets once.
    fn settle_a_little(&mut self) {
        for _ in 0..65 {
            self.poller.turn().unwrap();
        }
    }

    /// Error and body of the reply to a guest's request.
    fn call(&mut self, guest: &mut Guest, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let reply = guest.request_about(1, 0, opcode, node, body);
        self.settle();
        let (len, error, _) = fuse_reply(&guest.read(reply, 16));
        assert_eq!(guest.take_used(1), [(0, len)]);
        (error, guest.read(reply + 16, len as usize - 16))
    }

    fn start(&mut self, features: u64) -> (EmptyFs, Frontend, Guest) {
        let (fs, frontend) = self.connected();
        let guest = Guest::new(16);
        frontend.start(&guest, features, 3);
        self.settle();
        (fs, frontend, guest)
    }
}

fn assert_echo(rig: &mut Rig, guest: &mut Guest, queue: u16) {
    let reply = guest.request(queue, 0, ECHO, b"hello");
    rig.settle();
    assert_eq!(guest.take_used(queue), [(0, 16 + 5)]);
    assert_eq!(fuse_reply(&guest.read(reply, 16)), (21, 0, 100));
    assert_eq!(guest.read(reply + 16, 5), b"hello");
}

/// The queue is broken: its error descriptor was signalled, nothing was answered, and it stays so. The other
/// queue works.
fn assert_broken(rig: &mut Rig, frontend: &Frontend, guest: &mut Guest) {
    rig.settle();
    assert_eq!(signals(&frontend.queues[1].error), 1);
    assert_eq!(guest.take_used(1), []);
    rig.settle();
    assert_eq!(signals(&frontend.queues[1].error), 0, "told once");
    assert_eq!(signals(&frontend.queues[2].error), 0);
    assert_echo(rig, guest, 2);
}

#[test]
fn requests_on_all_queues_are_answered() {
    let mut rig = Rig::new();
    let (_, _frontend, mut guest) = rig.start(0);
    for queue in 0..3 {
        assert_echo(&mut rig, &mut guest, queue);
    }
}

#[test]
fn a_batch_is_published_with_one_notification() {
    let mut rig = Rig::new();
    for features in [0, EVENT_IDX] {
        let (_, frontend, mut guest) = rig.start(features);
        signals(&frontend.queues[1].call);
        for head in [0, 2, 4, 6] {
            guest.request(1, head, ECHO, b"x");
        }
        rig.settle();
        assert_eq!(guest.take_used(1).len(), 4);
        assert_eq!(signals(&frontend.queues[1].call), 1);
    }
}

#[test]
fn notifications_are_suppressed_as_the_driver_asks() {
    let mut rig = Rig::new();
    let (_, frontend, mut guest) = rig.start(EVENT_IDX);
    guest.set_interrupts(1, 0, 0);
    assert_echo(&mut rig, &mut guest, 1);
    assert_eq!(signals(&frontend.queues[1].call), 1);
    guest.set_interrupts(1, 0, 3);
    for expected in [0, 0, 1, 0] {
        assert_echo(&mut rig, &mut guest, 1);
        assert_eq!(signals(&frontend.queues[1].call), expected);
    }
    let (_, frontend, mut guest) = rig.start(0);
    guest.set_interrupts(1, 1, 0);
    assert_echo(&mut rig, &mut guest, 1);
    assert_eq!(signals(&frontend.queues[1].call), 0);
}

#[test]
fn indirect_chains_work() {
    let mut rig = Rig::new();
    let (_, _frontend, mut guest) = rig.start(INDIRECT_DESC);
    let table = BUFFERS + 0x8000;
    guest.write(BUFFERS, &fuse_request(ECHO, 7, b"abc"));
    guest.descriptor(table, 0, GPA + BUFFERS, 40, NEXT, 2);
    guest.descriptor(table, 2, GPA + BUFFERS + 40, 3, NEXT, 1);
    guest.descriptor(table, 1, 0, 0, NEXT, 3); // empty, and at no address
    guest.descriptor(table, 3, GPA + 0x50000, 16, NEXT | WRITE, 4);
    guest.descriptor(table, 4, GPA + 0x50100, 16, WRITE, 0);
    guest.descriptor(guest.table(1), 5, GPA + table, 5 * 16, INDIRECT, 0);
    guest.offer(1, 5);
    rig.settle();
    assert_eq!(guest.take_used(1), [(5, 19)]);
    assert_eq!(guest.read(0x50100, 3), b"abc");
}

#[test]
fn a_loop_breaks_its_queue_only() {
    let mut rig = Rig::new();
    let (_, frontend, mut guest) = rig.start(0);
    guest.descriptor(guest.table(1), 0, GPA + BUFFERS, 40, NEXT, 1);
    guest.descriptor(guest.table(1), 1, GPA + BUFFERS, 40, NEXT, 0);
    guest.offer(1, 0);
    assert_broken(&mut rig, &frontend, &mut guest);
}

#[test]
fn indexes_out_of_range_break_their_queue_only() {
    for case in 0..3 {
        let mut rig = Rig::new();
        let (_, frontend, mut guest) = rig.start(0);
        match case {
            0 => guest.offer(1, 16),
            1 => guest.set_available(1, 17),
            _ => {
                guest.descriptor(guest.table(1), 0, GPA + BUFFERS, 40, NEXT, 16);
                guest.offer(1, 0);
            }
        }
        assert_broken(&mut rig, &frontend, &mut guest);
    }
}

#[test]
fn misplaced_or_malformed_indirect_tables_break_their_queue_only() {
    let table = GPA + BUFFERS + 0x8000;
    let outside = GPA + MEMORY_LEN - 16;
    for (features, addr, len, flags) in [
        (0, table, 32, INDIRECT),
        (INDIRECT_DESC, table, 32, INDIRECT | NEXT),
        (INDIRECT_DESC, table, 0, INDIRECT),
        (INDIRECT_DESC, table, 33, INDIRECT),
        (INDIRECT_DESC, table, u32::MAX - 15, INDIRECT),
        (INDIRECT_DESC, outside, 32, INDIRECT),
        (INDIRECT_DESC, u64::MAX, 32, INDIRECT),
        (INDIRECT_DESC, table, 32, INDIRECT), // the table holds an indirect descriptor
    ] {
        let mut rig = Rig::new();
        let (_, frontend, mut guest) = rig.start(features);
        guest.descriptor(BUFFERS + 0x8000, 0, table, 32, INDIRECT, 0);
        guest.descriptor(guest.table(1), 0, addr, len, flags, 1);
        guest.offer(1, 0);
        assert_broken(&mut rig, &frontend, &mut guest);
    }
}

#[test]
fn a_request_without_room_for_a_reply_breaks_its_queue_only() {
    let outside = GPA + MEMORY_LEN;
    let inside = GPA + BUFFERS + 0x8000;
    for (request, request_len, reply, reply_len) in [
        (outside, 40, outside, 16),
        (outside, 40, inside, 15),
        (GPA + BUFFERS, 40, outside, 16),
        (GPA + BUFFERS, 40, outside - 8, 16),
        (GPA + BUFFERS, 40, inside, 15),
        (GPA + BUFFERS, 40, inside, 0),
        (GPA + BUFFERS, 39, inside, 0),
    ] {
        let mut rig = Rig::new();
        let (_, frontend, mut guest) = rig.start(0);
        guest.write(BUFFERS, &fuse_request(ECHO, 7, &[]));
        guest.descriptor(guest.table(1), 0, request, request_len, NEXT, 1);
        guest.descriptor(guest.table(1), 1, reply, reply_len, WRITE, 0);
        guest.offer(1, 0);
        assert_broken(&mut rig, &frontend, &mut guest);
    }
}

#[test]
fn a_header_that_is_not_there_fails_its_request_only() {
    let outside = GPA + MEMORY_LEN;
    for (first, first_len, second, second_len, expected) in [
        (outside, 40, GPA + BUFFERS, 64, (16, -libc::EFAULT, 0)),
        (GPA + BUFFERS, 15, outside, 64, (16, -libc::EFAULT, 0)),
        (GPA + BUFFERS, 16, outside, 64, (16, -libc::EFAULT, 7)),
        (GPA + BUFFERS, 39, outside, 1, (16, -libc::EFAULT, 7)),
        (GPA + BUFFERS, 39, 0, 0, (16, -libc::EINVAL, 7)),
        (0, 0, 0, 0, (16, -libc::EINVAL, 0)),
    ] {
        let mut rig = Rig::new();
        let (_, frontend, mut guest) = rig.start(0);
        guest.write(BUFFERS, &fuse_request(ECHO, 7, &[]));
        guest.descriptor(guest.table(1), 0, first, first_len, NEXT, 1);
        guest.descriptor(guest.table(1), 1, second, second_len, NEXT, 2);
        guest.descriptor(guest.table(1), 2, GPA + 0x50000, 16, WRITE, 0);
        guest.offer(1, 0);
        rig.settle();
        assert_eq!(guest.take_used(1), [(0, 16)]);
        assert_eq!(fuse_reply(&guest.read(0x50000, 16)), expected);
        assert_eq!(signals(&frontend.queues[1].error), 0);
        assert_echo(&mut rig, &mut guest, 1);
    }
}

/// Nobody waits for an answer, so that none can be missing: the driver gets its descriptors back.
#[test]
fn a_request_without_a_reply_does_not_break_its_queue_whatever_its_addresses() {
    let outside = GPA + MEMORY_LEN;
    for (opcode, header, header_len, payload) in [
        (FORGET, GPA + BUFFERS, 40, outside),
        (BATCH_FORGET, GPA + BUFFERS, 40, outside),
        (BATCH_FORGET, GPA + BUFFERS, 39, outside),
        (FORGET, outside, 40, GPA + BUFFERS),
        (FORGET, GPA + BUFFERS, 7, outside),
    ] {
        let mut rig = Rig::new();
        let (_, frontend, mut guest) = rig.start(0);
        guest.write(BUFFERS, &fuse_request(opcode, 7, &[0; 24]));
        guest.descriptor(guest.table(0), 0, header, header_len, NEXT, 1);
        guest.descriptor(guest.table(0), 1, payload, 24, 0, 0);
        guest.offer(0, 0);
        rig.settle();
        assert_eq!(guest.take_used(0), [(0, 0)]);
        assert_eq!(signals(&frontend.queues[0].error), 0);
        assert_echo(&mut rig, &mut guest, 0);
    }
}

#[test]
fn a_payload_outside_memory_fails_its_request_only() {
    for (payload, len, flags) in [
        (GPA + MEMORY_LEN, 4096, 0),
        (0, 4096, 0),
        (GPA, u32::MAX, 0),
        (u64::MAX, u32::MAX, 0),
        (GPA + MEMORY_LEN - 8, 16, WRITE),
        (u64::MAX - 8, 16, WRITE),
    ] {
        let mut rig = Rig::new();
        let (_, frontend, mut guest) = rig.start(0);
        guest.write(BUFFERS, &fuse_request(ECHO, 7, &[]));
        let (second, third) = if flags == WRITE { (2, 1) } else { (1, 2) };
        guest.descriptor(guest.table(1), 0, GPA + BUFFERS, 40, NEXT, 1);
        guest.descriptor(guest.table(1), second, payload, len, flags | if second == 1 { NEXT } else { 0 }, 2);
        guest.descriptor(
            guest.table(1),
            third,
            GPA + 0x50000,
            64,
            WRITE | if third == 1 { NEXT } else { 0 },
            2,
        );
        guest.offer(1, 0);
        rig.settle();
        assert_eq!(guest.take_used(1), [(0, 16)]);
        assert_eq!(fuse_reply(&guest.read(0x50000, 16)), (16, -libc::EFAULT, 7));
        assert_eq!(signals(&frontend.queues[1].error), 0);
        assert_echo(&mut rig, &mut guest, 1);
    }
}

#[test]
fn a_readable_buffer_behind_a_writable_one_fails_its_request_only() {
    let mut rig = Rig::new();
    let (_, _frontend, mut guest) = rig.start(0);
    guest.write(BUFFERS, &fuse_request(ECHO, 7, &[]));
    guest.descriptor(guest.table(1), 0, GPA + BUFFERS, 40, NEXT, 1);
    guest.descriptor(guest.table(1), 1, GPA + 0x50000, 64, NEXT | WRITE, 2);
    guest.descriptor(guest.table(1), 2, GPA + BUFFERS, 64, 0, 0);
    guest.offer(1, 0);
    rig.settle();
    assert_eq!(guest.take_used(1), [(0, 16)]);
    assert_eq!(fuse_reply(&guest.read(0x50000, 16)), (16, -libc::EINVAL, 7));
    assert_echo(&mut rig, &mut guest, 1);
}

#[test]
fn a_driver_that_offers_chains_twice_gets_no_more_than_its_queue_under_way() {
    let mut rig = Rig::new();
    let (fs, _frontend, mut guest) = rig.start(0);
    for _ in 0..16 {
        guest.request(1, 0, ECHO_LATER, b"x");
    }
    rig.settle();
    for _ in 0..16 {
        guest.request(1, 0, ECHO_LATER, b"x");
    }
    rig.settle();
    assert_eq!(fs.waiting(), 16);
    fs.release();
    rig.settle();
    assert_eq!(fs.waiting(), 0);
    assert_eq!(guest.used_index(1), 32);
}

#[test]
fn shrunk_memory_ends_its_session_and_no_other() {
    let mut rig = Rig::new();
    let (fs, mut frontend, mut guest) = rig.start(0);
    let (_, _other_frontend, mut other) = rig.start(0);
    // Rings stay, the request's buffers go.
    guest.request(1, 0, ECHO, b"x");
    guest.memory.set_len(BUFFERS).unwrap();
    rig.settle();
    assert!(frontend.is_closed());
    assert_eq!(fs.resets(), 1);
    assert_echo(&mut rig, &mut other, 1);
}

#[test]
fn a_silent_frontend_does_not_stall_another_device() {
    let mut rig = Rig::new();
    let (_, silent) = rig.connected();
    let (_, _frontend, mut guest) = rig.start(0);
    let whole = message(code::SET_MEM_TABLE, 0, &[0; 40]);
    silent.send_raw(&whole[..7], &[]);
    assert_echo(&mut rig, &mut guest, 1);
    silent.send_raw(&whole[7..30], &[]);
    assert_echo(&mut rig, &mut guest, 1);
}

/// It is sent away once it has left 64 KiB of replies unread, and nobody waits for it before.
#[test]
fn a_frontend_that_never_reads_its_replies_is_sent_away() {
    let mut rig = Rig::new();
    let (fs, mut deaf) = rig.connected();
    let (_, _frontend, mut guest) = rig.start(0);
    let question = message(code::GET_QUEUE_NUM, 0, &[]);
    let mut questions = 0;
    while fs.resets() == 0 {
        deaf.send_raw(&question, &[]);
        questions += 1;
        rig.settle_a_little();
        assert!(questions < 100_000, "replies are kept without an end");
    }
    assert!(questions * 20 > 64 << 10, "{questions}");
    assert_echo(&mut rig, &mut guest, 1);
    let mut answers = 0;
    while deaf.receive().is_some() {
        answers += 1;
    }
    assert!(answers < questions && deaf.is_closed());
}

#[test]
fn replies_that_nobody_reads_are_told_as_the_reason() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(ours.into(), &Events::new().unwrap(), Key::WAKE).unwrap();
    let end = (0..1000).find_map(|_| connection.reply(1, &[0; 4096]).err());
    assert_eq!(end, Some(ConnectionError::Unread));
}

/// What one frontend sends at once is cut into turns, in each of which the others have theirs.
#[test]
fn a_flood_of_messages_leaves_each_turn_to_others() {
    let mut rig = Rig::new();
    let (_, mut flooder) = rig.connected();
    let (_, _frontend, mut guest) = rig.start(0);
    flooder.send_raw(&message(code::GET_QUEUE_NUM, 0, &[]).repeat(100), &[]);
    let mut turns = Vec::new();
    while turns.iter().sum::<usize>() < 100 {
        guest.request(1, 0, ECHO, b"hello");
        rig.poller.turn().unwrap();
        assert_eq!(guest.take_used(1), [(0, 16 + 5)]);
        turns.push(std::iter::from_fn(|| flooder.receive()).count());
    }
    turns.retain(|messages| *messages > 0);
    assert_eq!(turns, [16, 16, 16, 16, 16, 16, 4]);
}

/// A queue has 256 descriptors and 4 MiB of a turn; the chain that reaches the limit is taken whole.
#[test]
fn a_flood_in_one_queue_leaves_each_turn_to_others() {
    let small_chains = (0x800, [128, 128]); // of two descriptors
    let large_chains = (0xb8000, [6, 6]); // of 736 KiB
    for (reply_len, expected) in [small_chains, large_chains] {
        let mut rig = Rig::new();
        let (_, flooder) = rig.connected();
        let mut flood = Guest::new(256);
        flooder.start(&flood, 0, 3);
        let (_, _frontend, mut guest) = rig.start(0);
        flood.write(BUFFERS, &fuse_request(ECHO, 7, b"x"));
        flood.descriptor(flood.table(1), 0, GPA + BUFFERS, 41, NEXT, 1);
        flood.descriptor(flood.table(1), 1, GPA + BUFFERS + 0x8000, reply_len, WRITE, 0);
        for _ in 0..expected.iter().sum() {
            flood.offer(1, 0);
        }
        for chains in expected {
            for queue in 0..3 {
                guest.request(queue, 0, ECHO, b"hello");
            }
            rig.poller.turn().unwrap();
            assert_eq!(flood.take_used(1).len(), chains);
            for queue in 0..3 {
                assert_eq!(guest.take_used(queue), [(0, 16 + 5)]);
            }
        }
    }
}

#[test]
fn a_message_in_pieces_is_understood() {
    let mut rig = Rig::new();
    let (_, mut frontend) = rig.connected();
    for byte in message(code::GET_QUEUE_NUM, 0, &[]) {
        assert_eq!(frontend.receive(), None);
        frontend.send_raw(&[byte], &[]);
        rig.settle();
    }
    assert_eq!(frontend.receive(), Some((code::GET_QUEUE_NUM, 3u64.to_le_bytes().into())));
}

#[test]
fn wrong_sizes_and_unknown_messages_are_refused_and_the_connection_lives() {
    let mut rig = Rig::new();
    let (_, mut frontend, mut guest) = rig.start(0);
    let failure = 1u64.to_le_bytes().to_vec();
    for (number, payload) in [
        (code::SET_FEATURES, vec![0; 4]),
        (code::SET_VRING_NUM, vec![0; 9]),
        (code::SET_VRING_NUM, words(&[0, 3])),
        (code::SET_VRING_NUM, words(&[0, 65536])),
        (code::SET_VRING_NUM, words(&[3, 16])),
        (code::SET_VRING_NUM, words(&[u32::MAX, 16])),
        (code::SET_VRING_BASE, words(&[0, 0x10000])),
        (code::SET_VRING_ADDR, vring_addr(1, UVA + MEMORY_LEN)),
        (code::SET_VRING_ADDR, vring_addr(1, u64::MAX - 0xffff)),
        (code::SET_VRING_KICK, 0u64.to_le_bytes().into()), // without a descriptor
        (code::SET_MEM_TABLE, words(&[9, 0])),
        (code::SET_MEM_TABLE, words(&[u32::MAX, 0])),
        (code::ADD_MEM_REG, vec![0; 40]),
        (code::REM_MEM_REG, vec![0; 40]),
        (code::SET_FEATURES, u64::MAX.to_le_bytes().into()),
        (code::SET_PROTOCOL_FEATURES, u64::MAX.to_le_bytes().into()),
        (4711, vec![1, 2, 3]),
        (35, words(&[0, 0])), // VRING_KICK was not offered
    ] {
        frontend.send(number, code::NEED_REPLY, &payload, &[]);
        rig.settle();
        assert_eq!(frontend.receive(), Some((number, failure.clone())), "message {number} {payload:?}");
    }
    frontend.send(code::GET_CONFIG, 0, &words(&[250, 10, 0]), &[]);
    frontend.send(code::GET_VRING_BASE, 0, &words(&[7, 0]), &[]);
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::GET_CONFIG, vec![])));
    assert_eq!(frontend.receive(), Some((code::GET_VRING_BASE, vec![])));
    assert_echo(&mut rig, &mut guest, 1);
}

#[test]
fn lost_framing_ends_the_connection() {
    for bytes in [words(&[1, 1, 5000]), words(&[1, 1, u32::MAX]), words(&[1, 2, 0]), words(&[1, 5, 0])] {
        let mut rig = Rig::new();
        let (_, mut frontend) = rig.connected();
        frontend.send_raw(&bytes, &[]);
        rig.settle();
        assert!(frontend.is_closed());
    }
}

#[test]
fn a_regular_file_is_no_event_descriptor() {
    let mut rig = Rig::new();
    let (_, mut frontend, _guest) = rig.start(0);
    let file = tempfile::tempfile().unwrap();
    for number in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
        frontend.send(number, code::NEED_REPLY, &1u64.to_le_bytes(), &[file.as_fd()]);
        rig.settle();
        assert_eq!(frontend.receive(), Some((number, 1u64.to_le_bytes().into())));
    }
}

#[test]
fn configuration_is_read_in_any_range() {
    let mut rig = Rig::new();
    let (_, mut frontend) = rig.connected();
    let mut config = b"tag".to_vec();
    config.resize(36, 0);
    config.extend(2u32.to_le_bytes());
    config.resize(60, 0);
    for (offset, size) in [(0, 1), (0, 2), (0, 36), (36, 4), (0, 40), (0, 60), (5, 0)] {
        frontend.send(
            code::GET_CONFIG,
            0,
            &[words(&[offset, size, 0]), vec![0; size as usize]].concat(),
            &[],
        );
        rig.settle();
        let (number, payload) = frontend.receive().unwrap();
        assert_eq!(number, code::GET_CONFIG);
        assert_eq!(payload[..12], words(&[offset, size, 0]));
        assert_eq!(payload[12..], config[offset as usize..(offset + size) as usize]);
    }
}

#[test]
fn a_memory_table_of_user_mode_linux_is_accepted() {
    let mut rig = Rig::new();
    let (_, frontend) = rig.connected();
    let mut guest = Guest::new(16);
    frontend.start(&guest, 0, 0);
    let table = [words(&[1, 0]), region(GPA, MEMORY_LEN, UVA, 0), vec![0xff; 32]].concat();
    frontend.send(code::SET_MEM_TABLE, 0, &table, &[guest.memory.as_fd()]);
    frontend.start_queue(&guest, 1);
    assert_echo(&mut rig, &mut guest, 1);
}

#[test]
fn vring_base_is_answered_when_nothing_is_under_way() {
    let mut rig = Rig::new();
    let (fs, mut frontend, mut guest) = rig.start(0);
    guest.request(1, 0, ECHO_LATER, b"late");
    guest.request(1, 2, ECHO, b"early");
    rig.settle();
    frontend.send(code::GET_VRING_BASE, 0, &words(&[1, 0]), &[]);
    rig.settle();
    guest.request(1, 4, ECHO, b"not taken any more");
    rig.settle();
    assert_eq!(frontend.receive(), None);
    assert_eq!(guest.take_used(1), [(2, 16 + 5)]);
    fs.release();
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::GET_VRING_BASE, words(&[1, 2]))));
    assert_eq!(guest.take_used(1), [(0, 16 + 4)]);
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let mut rig = Rig::new();
    let (_, mut frontend, mut guest) = rig.start(0);
    assert_echo(&mut rig, &mut guest, 1);
    frontend.send(code::GET_VRING_BASE, 0, &words(&[1, 0]), &[]);
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::GET_VRING_BASE, words(&[1, 1]))));
    frontend.send(code::SET_VRING_BASE, 0, &words(&[1, 1]), &[]);
    frontend.send(code::SET_VRING_KICK, 0, &1u64.to_le_bytes(), &[frontend.queues[1].kick.as_fd()]);
    assert_echo(&mut rig, &mut guest, 1);
}

/// The messages of QEMU 10 when a guest is paused and goes on, then when its driver lets go of the device. In
/// between the guest goes on with the nodes that it knows.
#[test]
fn a_paused_guest_keeps_its_session_and_a_driver_that_leaves_ends_it() {
    let mut rig = Rig::new();
    let (fs, mut frontend, mut guest) = rig.start(0);
    assert_echo(&mut rig, &mut guest, 1);
    let stop_all = |rig: &mut Rig, frontend: &mut Frontend, bases: [u32; 3]| {
        for queue in 0..3 {
            frontend.send(code::SET_VRING_ENABLE, code::NEED_REPLY, &words(&[queue, 0]), &[]);
        }
        for queue in 0..3 {
            frontend.send(code::GET_VRING_BASE, 0, &words(&[queue, 0]), &[]);
        }
        rig.settle();
        for _ in 0..3 {
            assert_eq!(frontend.receive(), Some((code::SET_VRING_ENABLE, vec![0; 8])));
        }
        for (queue, base) in (0..).zip(bases) {
            assert_eq!(frontend.receive(), Some((code::GET_VRING_BASE, words(&[queue, base]))));
        }
    };
    stop_all(&mut rig, &mut frontend, [0, 1, 0]);
    assert_eq!(fs.resets(), 0);
    for (queue, base) in (0..).zip([0, 1, 0]) {
        frontend.start_queue_at(&guest, queue, base);
    }
    assert_echo(&mut rig, &mut guest, 1);
    assert_eq!(fs.resets(), 0);
    stop_all(&mut rig, &mut frontend, [0, 2, 0]);
    frontend.send(code::RESET_DEVICE, 0, &[], &[]);
    rig.settle();
    assert_eq!(fs.resets(), 1);
}

#[test]
fn disabling_is_acknowledged_when_nothing_is_under_way() {
    let mut rig = Rig::new();
    let (fs, mut frontend, mut guest) = rig.start(0);
    guest.request(1, 0, ECHO_LATER, b"late");
    rig.settle();
    frontend.send(code::SET_VRING_ENABLE, code::NEED_REPLY, &words(&[1, 0]), &[]);
    rig.settle();
    assert_eq!(frontend.receive(), None);
    fs.release();
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::SET_VRING_ENABLE, vec![0; 8])));
    guest.request(1, 2, ECHO, b"x");
    rig.settle();
    assert_eq!(guest.take_used(1), [(0, 20)], "a disabled ring takes nothing");
    // User-Mode Linux starts again like this, without GET_VRING_BASE.
    guest.reset();
    frontend.start_queue(&guest, 1);
    assert_echo(&mut rig, &mut guest, 1);
}

#[test]
fn ring_addresses_may_move_while_the_ring_runs() {
    let mut rig = Rig::new();
    let (_, frontend, mut guest) = rig.start(0);
    assert_echo(&mut rig, &mut guest, 1);
    // The same file again, at other addresses.
    let elsewhere = UVA + 0x10_0000_0000;
    let addition = [vec![0; 8], region(GPA + 0x10_0000_0000, MEMORY_LEN, elsewhere, 0)].concat();
    frontend.send(code::ADD_MEM_REG, 0, &addition, &[guest.memory.as_fd()]);
    frontend.send(code::SET_VRING_ADDR, 0, &vring_addr(1, elsewhere + guest.table(1)), &[]);
    assert_echo(&mut rig, &mut guest, 1);
}

#[test]
fn removing_memory_is_acknowledged_when_nobody_uses_it() {
    let mut rig = Rig::new();
    let (fs, mut frontend, mut guest) = rig.start(0);
    let more = Guest::new(16);
    let gpa = GPA + 0x1000_0000;
    let description = [vec![0; 8], region(gpa, MEMORY_LEN, UVA + 0x1000_0000, 0)].concat();
    frontend.send(code::ADD_MEM_REG, code::NEED_REPLY, &description, &[more.memory.as_fd()]);
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::ADD_MEM_REG, vec![0; 8])));
    guest.write(BUFFERS, &fuse_request(ECHO_LATER, 7, &[]));
    guest.descriptor(guest.table(1), 0, GPA + BUFFERS, 40, NEXT, 1);
    guest.descriptor(guest.table(1), 1, gpa, 64, WRITE, 0);
    guest.offer(1, 0);
    rig.settle();
    frontend.send(code::REM_MEM_REG, code::NEED_REPLY, &description, &[]);
    rig.settle();
    assert_eq!(frontend.receive(), None);
    assert_echo(&mut rig, &mut guest, 2);
    fs.release();
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::REM_MEM_REG, vec![0; 8])));
    assert_eq!(fuse_reply(&more.read(0, 16)), (16, 0, 7), "the request's memory stayed until it ended");
    // From now on it is outside.
    guest.descriptor(guest.table(1), 0, GPA + BUFFERS, 40, NEXT, 1);
    guest.offer(1, 0);
    rig.settle();
    assert_eq!(signals(&frontend.queues[1].error), 1);
}

#[test]
fn removing_the_ring_s_memory_breaks_the_queue() {
    let mut rig = Rig::new();
    let (_, mut frontend, _guest) = rig.start(0);
    let description = [vec![0; 8], region(GPA, MEMORY_LEN, UVA, 0)].concat();
    frontend.send(code::REM_MEM_REG, code::NEED_REPLY, &description, &[]);
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::REM_MEM_REG, vec![0; 8])));
    assert_eq!(signals(&frontend.queues[1].error), 1);
}

#[test]
fn reset_waits_for_what_is_under_way_and_forgets_the_guest() {
    let mut rig = Rig::new();
    let (fs, mut frontend, mut guest) = rig.start(0);
    guest.request(1, 0, ECHO_LATER, b"x");
    rig.settle();
    frontend.send(code::RESET_DEVICE, code::NEED_REPLY, &[], &[]);
    rig.settle();
    assert_eq!((frontend.receive(), fs.resets()), (None, 0));
    fs.release();
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::RESET_DEVICE, vec![0; 8])));
    assert_eq!(fs.resets(), 1);
    guest.reset();
    for queue in 0..3 {
        frontend.start_queue(&guest, queue);
    }
    assert_echo(&mut rig, &mut guest, 1);
}

#[test]
fn a_late_answer_does_not_enter_the_ring_of_a_frontend_that_left() {
    let mut rig = Rig::new();
    let (fs, frontend, mut guest) = rig.start(0);
    guest.request(1, 0, ECHO_LATER, b"x");
    rig.settle();
    drop(frontend);
    rig.settle();
    assert_eq!((fs.resets(), fs.waiting()), (1, 1));
    fs.release();
    rig.settle();
    assert_eq!(fs.waiting(), 0);
    assert_eq!(guest.take_used(1), []);
}

#[test]
fn a_frontend_that_dies_while_a_message_waits_is_noticed() {
    let mut rig = Rig::new();
    let (fs, frontend, mut guest) = rig.start(0);
    guest.request(1, 0, ECHO_LATER, b"x");
    rig.settle();
    frontend.send(code::GET_VRING_BASE, 0, &words(&[1, 0]), &[]);
    rig.settle();
    drop(frontend);
    rig.settle();
    assert_eq!(fs.resets(), 1);
    fs.release();
    rig.settle();
}

#[test]
fn one_frontend_follows_another_on_the_same_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut rig = Rig::new();
    let fs = rig.add(Source::Listener(listener.into()));
    for round in 0..3 {
        let first = Frontend::new(UnixStream::connect(&path).unwrap());
        let mut guest = Guest::new(16);
        first.start(&guest, EVENT_IDX | INDIRECT_DESC, 3);
        assert_echo(&mut rig, &mut guest, 1);
        // A second one waits until the first has left.
        let mut second = Frontend::new(UnixStream::connect(&path).unwrap());
        second.send(code::GET_FEATURES, 0, &[], &[]);
        rig.settle();
        assert_eq!(second.receive(), None);
        drop(first);
        rig.settle();
        assert_eq!(second.receive().unwrap().0, code::GET_FEATURES);
        assert_eq!(fs.resets(), 2 * round + 1);
        drop(second);
        rig.settle();
    }
}

#[test]
fn kicks_are_asked_for_before_sleeping_and_not_otherwise() {
    let mut rig = Rig::new();
    let (_, _frontend, mut guest) = rig.start(0);
    rig.settle();
    assert_eq!(guest.kicks(1).0, 1, "awake: no kicks wanted");
    assert_echo(&mut rig, &mut guest, 1);
    let reply = guest.request(1, 0, INIT, &[]);
    rig.settle();
    assert_eq!(fuse_reply(&guest.read(reply, 16)), (80, 0, 100));
}

/// Going to sleep and waking up write to rings that run, and to no other: a stopped ring's memory is the guest's.
#[test]
fn a_poller_that_sleeps_and_wakes_leaves_stopped_and_broken_rings_alone() {
    const POISON: u16 = 0x5aa5;
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let mut rig = Rig { poller: Poller::new(reactor.clone(), PollMode::Interrupt).unwrap() };
    let (_, mut frontend, mut guest) = rig.start(0);
    frontend.send(code::SET_VRING_ENABLE, code::NEED_REPLY, &words(&[1, 0]), &[]);
    guest.offer(2, 16);
    rig.settle();
    assert_eq!(frontend.receive(), Some((code::SET_VRING_ENABLE, vec![0; 8])));
    assert_eq!(signals(&frontend.queues[2].error), 1);
    for queue in 0..3 {
        guest.poison_kicks(queue, POISON);
    }
    // The timer wakes the poller out of its sleep; only then it is told to end.
    let (readable, mut signal) = UnixStream::pair().unwrap();
    rig.poller.stop_on(readable.into()).unwrap();
    let timer = reactor.sleep(Duration::from_millis(5));
    reactor.spawn(async move {
        timer.await;
        signal.write_all(b"x").unwrap();
    });
    rig.poller.run().unwrap();
    assert_eq!([0, 1, 2].map(|queue| guest.kicks(queue).0), [1, POISON, POISON]);
}

/// Lines of this thread's log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_broken_queue_is_told_in_one_line() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut rig = Rig::new();
    let (_, frontend, mut guest) = rig.start(0);
    let before = log.lines().len();
    guest.offer(1, 16);
    assert_broken(&mut rig, &frontend, &mut guest);
    guest.offer(1, 16);
    frontend.send(code::GET_FEATURES, 0, &[], &[]);
    rig.settle();
    let lines = &log.lines()[before..];
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("WARN") && lines[0].contains("queue=1"), "{lines:?}");
    assert!(lines[0].contains("descriptor index 16 is outside its table of 16"), "{lines:?}");
}

/// Two file systems, each with its device and its guest, on one thread.
#[test]
fn two_file_systems_are_served_by_one_poller() {
    install_fault_handler().unwrap();
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let mut rig = Rig { poller: Poller::new(reactor.clone(), PollMode::Interrupt).unwrap() };
    let mut guests = ["a", "b"].map(|tag| {
        let fs = new_file_system(&reactor);
        let export = Export { root: InodeId::ROOT, readonly: false, cache: CachePolicy::Exclusive };
        let device = FsDevice::new(fuse_map::Session::new(fs, export), tag, 2).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        rig.poller.add_device(Rc::new(device), Source::Connected(ours.into()), Tenure::Successive).unwrap();
        let (frontend, guest) = (Frontend::new(theirs), Guest::new(16));
        frontend.start(&guest, EVENT_IDX | INDIRECT_DESC, 3);
        (Some(frontend), guest)
    });
    for (_, guest) in &mut guests {
        assert_eq!(rig.call(guest, INIT, 0, &init_request(!(1 << 30))).0, 0);
    }
    // One directory in the one, a tree in the other, in turns.
    for round in 0..50 {
        for (index, (_, guest)) in guests.iter_mut().enumerate() {
            let name = format!("{index}-{round}\0");
            assert_eq!(rig.call(guest, MKDIR, 1, &[&[0; 8][..], name.as_bytes()].concat()).0, 0);
        }
    }
    let found = |(error, body): (i32, Vec<u8>)| error == 0 && body[..8] != [0; 8];
    for (index, (_, guest)) in guests.iter_mut().enumerate() {
        assert!(found(rig.call(guest, LOOKUP, 1, format!("{index}-49\0").as_bytes())));
        assert!(!found(rig.call(guest, LOOKUP, 1, format!("{}-0\0", 1 - index).as_bytes())));
    }
    // One guest dies; the other does not notice.
    guests[0].0 = None;
    rig.settle();
    assert_eq!(rig.call(&mut guests[1].1, SYNCFS, 1, &[0; 8]).0, 0);
    assert!(found(rig.call(&mut guests[1].1, LOOKUP, 1, b"1-0\0")));
}

fn new_file_system(reactor: &Rc<Reactor>) -> Rc<Fs> {
    let inner = reactor.clone();
    reactor.block_on(async move {
        let device: Rc<dyn Bdev> = Memory::new(64 << 20, 4096);
        mkfs(&device, &MkfsOptions::default()).await.unwrap();
        let store = Store::open(device, inner, OpenOptions::default()).await.unwrap();
        Fs::mount(store, MountOptions::default()).await.unwrap()
    })
}

#[test]
fn features_are_offered() {
    let mut rig = Rig::new();
    let (_, mut frontend) = rig.connected();
    frontend.send(code::GET_FEATURES, 0, &[], &[]);
    frontend.send(code::GET_PROTOCOL_FEATURES, 0, &[], &[]);
    rig.settle();
    let offered = 1u64 << 32 | EVENT_IDX | INDIRECT_DESC | 1 << 30;
    assert_eq!(frontend.receive(), Some((code::GET_FEATURES, offered.to_le_bytes().into())));
    assert_eq!(frontend.receive(), Some((code::GET_PROTOCOL_FEATURES, 0xa229u64.to_le_bytes().into())));
}

#[test]
fn the_poller_ends_when_its_only_frontend_has_left() {
    for mode in [PollMode::Adaptive, PollMode::Interrupt, PollMode::Busy] {
        let reactor = Reactor::new(Rc::new(SystemClock::new()));
        let mut poller = Poller::new(reactor, mode).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let device = Rc::new(FsDevice::new(EmptyFs::default(), "tag", 1).unwrap());
        poller.add_device(device, Source::Connected(ours.into()), Tenure::Once).unwrap();
        let frontend = std::thread::spawn(move || {
            let mut frontend = Frontend::new(theirs);
            frontend.send(code::GET_QUEUE_NUM, 0, &[], &[]);
            while frontend.receive().is_none() {
                std::thread::yield_now();
            }
        });
        poller.run().unwrap();
        frontend.join().unwrap();
    }
}

#[test]
fn a_stopping_poller_finishes_what_is_under_way_and_takes_no_more() {
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let mut rig = Rig { poller: Poller::new(reactor.clone(), PollMode::Adaptive).unwrap() };
    let (fs, _frontend, mut guest) = rig.start(0);
    guest.request(1, 0, ECHO_LATER, b"late");
    rig.settle();
    let (readable, mut signal) = UnixStream::pair().unwrap();
    rig.poller.stop_on(readable.into()).unwrap();
    signal.write_all(b"x").unwrap();
    rig.settle();
    guest.request(1, 2, ECHO, b"too late");
    let timer = reactor.sleep(Duration::from_millis(5));
    reactor.spawn(async move {
        timer.await;
        fs.release();
    });
    rig.poller.run().unwrap();
    assert_eq!(guest.take_used(1), [(0, 16 + 4)]);
}
