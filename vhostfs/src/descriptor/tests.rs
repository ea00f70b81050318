use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pipe::pipe;

use super::*;

/// A closer that only collects, in place of its thread.
fn collecting() -> (Closer, mpsc::Receiver<OwnedFd>) {
    let (sender, collected) = mpsc::channel();
    (Closer(sender), collected)
}

/// What `check` says of a frontend's descriptor, and whether it is closed in the place where it is dropped.
fn after<T>(fd: impl Into<OwnedFd>, check: fn(&mut Descriptor) -> T) -> (T, bool) {
    let (closer, collected) = collecting();
    let mut descriptor = Descriptor::foreign(fd.into(), &closer);
    let result = check(&mut descriptor);
    drop(descriptor);
    (result, collected.try_recv().is_err())
}

#[test]
fn event_descriptors_pipes_and_unix_sockets_can_signal_events() {
    let events = |fd: OwnedFd| after(fd, Descriptor::check_events);
    assert_eq!(events(eventfd(0, EventfdFlags::empty()).unwrap()), (Ok(()), true));
    assert_eq!(events(pipe().unwrap().1), (Ok(()), true));
    // Its queue may hold anything.
    assert_eq!(events(UnixStream::pair().unwrap().0.into()), (Ok(()), false));
}

#[test]
fn nothing_else_can_and_it_is_closed_elsewhere() {
    let others: [OwnedFd; 5] = [
        epoll::create(epoll::CreateFlags::empty()).unwrap(),
        memfd_create("anon_inode:[eventfd]", MemfdFlags::empty()).unwrap(),
        TcpListener::bind("127.0.0.1:0").unwrap().into(),
        File::open("/dev/null").unwrap().into(),
        File::open(std::env::current_exe().unwrap()).unwrap().into(),
    ];
    for fd in others {
        assert_eq!(after(fd, Descriptor::check_events), (Err(DescriptorError::NoEvents), false));
    }
}

#[test]
fn memory_is_what_needs_nobody_but_this_host() {
    let memory = |fd: OwnedFd| after(fd, Descriptor::check_memory);
    for fd in [
        memfd_create("guest", MemfdFlags::empty()).unwrap(),
        tempfile::tempfile_in("/dev/shm").unwrap().into(),
        // On a disk, or in a tmpfs, too.
        tempfile::tempfile().unwrap().into(),
    ] {
        assert_eq!(memory(fd), (Ok(()), true));
    }
    for fd in [
        eventfd(0, EventfdFlags::empty()).unwrap(),
        UnixStream::pair().unwrap().0.into(),
        File::open("/dev/zero").unwrap().into(),
        File::open("/proc/self/status").unwrap().into(),
    ] {
        assert_eq!(memory(fd), (Err(DescriptorError::NoMemory), false));
    }
}

#[test]
fn the_file_system_of_a_file_is_that_of_its_mount() {
    const MOUNTS: &str = "\
24 30 0:22 / /proc rw,nosuid shared:5 - proc proc rw
30 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 30 0:45 / /mnt/a\\040- rw master:2 shared:7 - fuse.sshfs host:/ rw,user_id=0
310 30 0:46 / /mnt/ext4 rw - nfs4 server:/ext4 rw
";
    let kind = |mount: u32| {
        file_system_of(&format!("pos:\t0\nflags:\t0100002\nmnt_id:\t{mount}\nino:\t7\n"), MOUNTS)
    };
    assert_eq!(kind(30), Some("ext4"));
    assert_eq!(kind(31), Some("fuse.sshfs"));
    assert_eq!(kind(310), Some("nfs4"));
    assert_eq!(kind(3), None, "a mount of another namespace");
    assert_eq!(file_system_of("pos:\t0\n", MOUNTS), None);
}

#[test]
fn what_nobody_looked_at_is_closed_elsewhere_and_our_own_here() {
    assert!(!after(pipe().unwrap().0, |_| ()).1);
    let (closer, collected) = collecting();
    drop(closer);
    drop(Descriptor::from(pipe().unwrap().0));
    assert!(collected.recv().is_err());
}

#[test]
fn the_closer_closes() {
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    drop(Descriptor::foreign(ours.into(), &Closer::start().unwrap()));
    assert_eq!(std::io::Read::read(&mut theirs, &mut [0]).unwrap(), 0);
}
