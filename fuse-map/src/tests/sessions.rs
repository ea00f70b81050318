//! INIT, DESTROY, FORGET, reset, and several clients.

use std::time::Duration;

use bdev::IoBuffers;
use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::{Handled, Request, op};

fn init_of(major: u32, minor: u32) -> fuse_init_in {
    fuse_init_in { major, minor, max_readahead: 4096, flags: 0 }
}

#[test]
fn init_agrees_on_what_both_can() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    // Everything that a kernel may offer, also what is not known here.
    let out = client.init(InitFlags::from_bits_retain(u64::MAX)).unwrap();
    assert_eq!((out.major, out.minor), (7, 45));
    assert_eq!((out.max_write, out.max_pages, out.max_readahead), (1 << 20, 256, 1 << 20));
    assert_eq!((out.time_gran, out.map_alignment), (1, 0));
    let agreed = InitFlags::from_bits_retain(u64::from(out.flags) | u64::from(out.flags2) << 32);
    let expected = InitFlags::all() - InitFlags::FUSE_AUTO_INVAL_DATA - InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
    assert_eq!(agreed, expected);
    assert_eq!(agreed.bits() & (1 << 3), 0, "ATOMIC_O_TRUNC with no-open loses truncations");
    let uncached = world.connect(NO_CACHE).init(InitFlags::all()).unwrap();
    let uncached = InitFlags::from_bits_retain(u64::from(uncached.flags) | u64::from(uncached.flags2) << 32);
    for flag in [
        InitFlags::FUSE_WRITEBACK_CACHE,
        InitFlags::FUSE_NO_OPEN_SUPPORT,
        InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        InitFlags::FUSE_CACHE_SYMLINKS,
    ] {
        assert!(!uncached.contains(flag), "{flag:?}");
    }
}

#[test]
fn nothing_is_taken_that_was_not_offered() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    let out = client.init(InitFlags::FUSE_BIG_WRITES | InitFlags::FUSE_SECURITY_CTX).unwrap();
    let flags = InitFlags::FUSE_BIG_WRITES | InitFlags::FUSE_INIT_EXT;
    assert_eq!((u64::from(out.flags), out.flags2), (flags.bits(), 1));
    // Without INIT_EXT the second word means nothing.
    let args = init_of(7, 45);
    let ext = fuse_init_ext_in { flags2: u32::MAX, unused: [0; 11] };
    let out: fuse_init_out = client.get(op::FUSE_INIT, 0, &[args.as_bytes(), ext.as_bytes()]).unwrap();
    assert_eq!((out.flags, out.flags2), (0, 0));
}

/// Before protocol 7.36 (Linux 5.17) INIT ended with the flags.
#[test]
fn older_kernels_send_a_shorter_init() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    for minor in [31, 35] {
        let args = fuse_init_in { flags: InitFlags::FUSE_BIG_WRITES.bits() as u32, ..init_of(7, minor) };
        let out: fuse_init_out = client.get(op::FUSE_INIT, 0, &[args.as_bytes()]).unwrap();
        assert_eq!(u64::from(out.flags), InitFlags::FUSE_BIG_WRITES.bits());
        assert!(client.getattr(ROOT).is_ok());
    }
    let promised = fuse_init_in { flags: InitFlags::FUSE_INIT_EXT.bits() as u32, ..init_of(7, 36) };
    assert_eq!(client.call(op::FUSE_INIT, 0, &[promised.as_bytes()]), Err(libc::EINVAL));
}

#[test]
fn versions_are_negotiated() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    for (major, minor) in [(6, 45), (0, 0), (7, 30), (7, 0)] {
        let reply = client.call(op::FUSE_INIT, 0, &[init_of(major, minor).as_bytes()]);
        assert_eq!(reply, Err(libc::EPROTO), "{major}.{minor}");
    }
    // A newer kernel comes again with our version.
    let out: fuse_init_out = client.get(op::FUSE_INIT, 0, &[init_of(8, 0).as_bytes()]).unwrap();
    assert_eq!((out.major, out.minor), (7, 45));
    assert_eq!(client.getattr(ROOT).err(), Some(libc::EIO));
    client.init(InitFlags::all()).unwrap();
    assert!(client.getattr(ROOT).is_ok());
}

#[test]
fn nothing_is_served_before_init_and_after_destroy() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    assert_eq!(client.getattr(ROOT).err(), Some(libc::EIO));
    assert_eq!(client.done(op::FUSE_DESTROY, 0, &[]), Ok(()));
    client.init(InitFlags::all()).unwrap();
    let file = client.file(ROOT, "file");
    client.done(op::FUSE_DESTROY, 0, &[]).unwrap();
    assert_eq!(client.getattr(ROOT).err(), Some(libc::EIO));
    client.init(InitFlags::all()).unwrap();
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE));
    assert_eq!(client.find(ROOT, "file"), Ok(file));
}

#[test]
fn a_second_init_begins_anew() {
    let (world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.unlink(ROOT, "file").unwrap();
    client.write(file, 0, &[1; 5000]).unwrap();
    client.init(InitFlags::all()).unwrap();
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE));
    world.settle();
    assert_eq!(client.find(file, "."), Err(libc::ESTALE), "nothing kept the file any more");
}

#[test]
fn forgets_count() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for _ in 0..3 {
        client.lookup(ROOT, "file").unwrap();
    }
    client.forget(file, 3);
    assert!(client.getattr(file).is_ok());
    client.forget(file, 1);
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE));
    // More than was ever counted, of nodes that are not known, and of the root: nothing happens.
    client.forget(file, u64::MAX);
    client.forget(0, 1);
    client.forget(ROOT, u64::MAX);
    assert!(client.getattr(ROOT).is_ok());
}

#[test]
fn a_batch_forgets_what_it_holds_and_no_more() {
    let (_world, client) = exclusive();
    let files: Vec<u64> = (0..4).map(|i| client.file(ROOT, &format!("{i}"))).collect();
    let one = |nodeid| fuse_forget_one { nodeid, nlookup: 1 };
    let batch = |count, rest: &[fuse_forget_one]| {
        let head = fuse_batch_forget_in { count, dummy: 0 };
        let body = [head.as_bytes(), rest.as_bytes()].concat();
        let sent = client.send(op::FUSE_BATCH_FORGET, 0, &body, 0);
        assert!(matches!(sent.handled, Handled::NoReply));
    };
    batch(1, &[one(files[0]), one(files[1])]);
    // A count that lies.
    batch(u32::MAX, &[one(files[2])]);
    let known: Vec<bool> = files.iter().map(|file| client.getattr(*file).is_ok()).collect();
    assert_eq!(known, [false, true, false, true]);
    // No arguments at all.
    for opcode in [op::FUSE_FORGET, op::FUSE_BATCH_FORGET] {
        assert!(matches!(client.send(opcode, files[1], b"", 0).handled, Handled::NoReply));
    }
    assert!(client.getattr(files[1]).is_ok());
}

/// A chain of the longest queue whose buffers are all the same memory: what is not there is not worked on, and
/// what is there is gone through once (see `Cursor`).
#[test]
fn a_batch_is_as_long_as_its_request_and_no_longer() {
    const BUFFERS: usize = 32_766;
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for _ in 0..BUFFERS {
        client.lookup(ROOT, "file").unwrap();
    }
    let one = fuse_forget_one { nodeid: file, nlookup: 1 };
    let batch = fuse_batch_forget_in { count: u32::MAX, dummy: 0 };
    let send = |len: u32| {
        let header = fuse_in_header { len, ..client.header(op::FUSE_BATCH_FORGET, 0, 0) };
        let readable = repeated(&[header.as_bytes(), batch.as_bytes()].concat(), one.as_bytes(), BUFFERS);
        let request = Request { readable, writable: IoBuffers::empty() };
        assert!(matches!(client.session.handle(request), Handled::NoReply));
    };
    send(u32::MAX);
    send(40 + 8 + 16 * BUFFERS as u32 + 1);
    send(40 + 8 + 16 * BUFFERS as u32);
    assert!(client.getattr(file).is_ok(), "all were forgotten, each of them once");
    client.forget(file, 1);
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE));
}

#[test]
fn an_unlinked_file_lives_as_long_as_any_client_knows_it() {
    let (world, a) = exclusive();
    let b = world.client(NO_CACHE);
    let statfs = || a.get::<fuse_kstatfs>(op::FUSE_STATFS, ROOT, &[]).unwrap().bfree;
    let file = a.file(ROOT, "file");
    assert_eq!(b.find(ROOT, "file"), Ok(file));
    a.write(file, 0, &vec![7; 1 << 20]).unwrap();
    a.fsync(file).unwrap();
    let used = statfs();
    a.unlink(ROOT, "file").unwrap();
    a.forget(file, 1);
    world.settle();
    assert_eq!(a.getattr(file).err(), Some(libc::ESTALE));
    assert_eq!(b.getattr(file).unwrap().nlink, 0);
    assert_eq!(b.read(file, (1 << 20) - 10, 100).unwrap(), [7; 10]);
    b.write(file, 5, b"x").unwrap();
    b.session.reset();
    world.settle();
    a.done(op::FUSE_SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    assert!(statfs() >= used + 256);
}

#[test]
fn a_session_that_is_dropped_keeps_nothing() {
    let (world, a) = exclusive();
    let file = a.file(ROOT, "file");
    a.unlink(ROOT, "file").unwrap();
    drop(a);
    world.settle();
    let b = world.client(EXCLUSIVE);
    assert_eq!(b.find(file, "."), Err(libc::ESTALE));
}

#[test]
fn no_late_answer_reaches_a_client_that_was_reset() {
    let (world, disk) = World::on_disk();
    let client = world.client(EXCLUSIVE);
    let file = client.file(ROOT, "file");
    client.write(file, 0, &[7; 8192]).unwrap();
    disk.set_latency(&world.reactor, Duration::from_millis(1)..Duration::from_millis(2));
    let fsync = fuse_fsync_in::new_zeroed();
    let init = || client.init(InitFlags::all()).map(drop);
    let destroy = || client.done(op::FUSE_DESTROY, 0, &[]);
    let reset = || {
        client.session.reset();
        Ok(())
    };
    let ends: [&dyn Fn() -> Result<(), i32>; 3] = [&init, &destroy, &reset];
    for end in ends {
        client.init(InitFlags::all()).unwrap();
        client.find(ROOT, "file").unwrap();
        // Something to be written, so that the request waits.
        client.mkdir(ROOT, "dir").unwrap();
        let waiting = client.send(op::FUSE_FSYNC, file, fsync.as_bytes(), 100);
        end().unwrap();
        assert!(client.finish_silently(waiting));
        client.init(InitFlags::all()).unwrap();
        client.rmdir(ROOT, "dir").unwrap();
    }
    client.find(ROOT, "file").unwrap();
    let answered = client.send(op::FUSE_FSYNC, file, fsync.as_bytes(), 100);
    assert_eq!(client.finish(answered), Ok(Vec::new()), "the test's requests would be answered");
}

#[test]
fn a_header_that_ends_too_early_is_an_error() {
    let (_world, client) = exclusive();
    let header = client.header(op::FUSE_GETATTR, ROOT, 16);
    let whole = [header.as_bytes(), &[0; 16]].concat();
    for len in 0..40 {
        // The reply names the request as soon as that can be told.
        let unique = if len < 16 { 0 } else { header.unique };
        let sent = client.send_bytes(&whole[..len], unique, 200);
        assert_eq!(client.finish(sent), Err(libc::EINVAL), "{len}");
        // Without room: whoever may be waiting for a reply is not left out.
        let without_room = client.send_bytes(&whole[..len], unique, 0).handled;
        assert!(matches!(without_room, Handled::NoReply) == (len < 8), "{len}");
        assert!(matches!(without_room, Handled::Unanswerable) == (len >= 8), "{len}");
    }
    let forget = client.header(op::FUSE_FORGET, ROOT, 8);
    for len in 0..40 {
        let handled = client.send_bytes(&forget.as_bytes()[..len], 0, 0).handled;
        assert!(matches!(handled, Handled::NoReply), "{len}");
    }
    assert!(client.finish(client.send_bytes(&whole, header.unique, 200)).is_ok());
}

#[test]
fn requests_without_room_for_a_reply_header_cannot_be_answered() {
    let (_world, client) = exclusive();
    let header = client.header(op::FUSE_GETATTR, ROOT, 16);
    let whole = [header.as_bytes(), &[0; 16]].concat();
    for room in 0..16 {
        let sent = client.send_bytes(&whole, header.unique, room);
        assert!(matches!(sent.handled, Handled::Unanswerable), "{room}");
    }
}

#[test]
fn a_reply_without_room_is_refused_before_anything_is_done() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let mkdir = [fuse_mkdir_in { mode: 0o755, umask: 0 }.as_bytes(), b"dir\0"].concat();
    let write = fuse_write_in { size: 1, ..fuse_write_in::new_zeroed() };
    let write = [write.as_bytes(), b"x"].concat();
    for (opcode, nodeid, body, room) in [
        (op::FUSE_MKDIR, ROOT, &mkdir[..], 127),
        (op::FUSE_LOOKUP, ROOT, b"file\0", 127),
        (op::FUSE_WRITE, file, &write, 7),
        (op::FUSE_GETATTR, file, &[0; 16], 103),
        (op::FUSE_INIT, 0, &[0; 16], 63),
    ] {
        assert_eq!(client.finish(client.send(opcode, nodeid, body, 16 + room)), Err(libc::EINVAL));
    }
    assert_eq!(client.find(ROOT, "dir"), Err(libc::ENOENT));
    assert_eq!(client.getattr(file).unwrap().size, 0);
    client.forget(file, 1);
    assert_eq!(client.getattr(file).err(), Some(libc::ESTALE), "the refused lookup did not count");
}

#[test]
fn a_length_that_lies_is_refused() {
    let (_world, client) = exclusive();
    let body = [0; 16];
    for len in [0, 39, 40 + 15, 40 + 17, u32::MAX] {
        let header = fuse_in_header { len, ..client.header(op::FUSE_GETATTR, ROOT, body.len()) };
        let sent = client.send_bytes(&[header.as_bytes(), &body].concat(), header.unique, 200);
        assert_eq!(client.finish(sent), Err(libc::EINVAL), "{len}");
    }
    let header = fuse_in_header { total_extlen: 3, ..client.header(op::FUSE_GETATTR, ROOT, body.len()) };
    let sent = client.send_bytes(&[header.as_bytes(), &body].concat(), header.unique, 200);
    assert_eq!(client.finish(sent), Err(libc::EINVAL));
}
