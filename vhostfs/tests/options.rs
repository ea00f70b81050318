//! What the options of `vhostfs serve` do, seen by a guest and by the system.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

mod support;

use support::daemon::{Daemon, DaemonGuest, Folder};
use support::guest::init_request;

const LOOKUP: u32 = 1;
const MKDIR: u32 = 9;
const INIT: u32 = 26;
const ROOT: u64 = 1;

/// FUSE_WRITEBACK_CACHE.
const WRITEBACK_CACHE: u32 = 1 << 16;

/// Offers everything; what was agreed on.
fn init(guest: &mut DaemonGuest) -> u32 {
    let (error, body) = guest.call(INIT, 0, &init_request(!(1 << 30)));
    assert_eq!(error, 0);
    u32::from_le_bytes(body[12..16].try_into().unwrap())
}

/// Node id of an entry; 0 when there is none.
fn lookup(guest: &mut DaemonGuest, parent: u64, name: &[u8]) -> u64 {
    match guest.call(LOOKUP, parent, &[name, b"\0"].concat()) {
        (0, body) => u64::from_le_bytes(body[..8].try_into().unwrap()),
        (error, _) => {
            assert_eq!(error, -libc::ENOENT);
            0
        }
    }
}

fn mkdir(guest: &mut DaemonGuest, parent: u64, name: &[u8]) -> u64 {
    let mode_and_umask = [0o755u32.to_le_bytes(), 0o022u32.to_le_bytes()].concat();
    let (error, body) = guest.call(MKDIR, parent, &[&mode_and_umask[..], name, b"\0"].concat());
    assert_eq!(error, 0);
    u64::from_le_bytes(body[..8].try_into().unwrap())
}

#[test]
fn each_way_of_waiting_answers_a_guest_and_ends() {
    for mode in ["adaptive", "busy", "interrupt"] {
        let folder = Folder::new();
        let daemon = folder.start(Path::new("memory:64M"), &["--poll", mode]);
        let mut guest = folder.guest();
        init(&mut guest);
        for round in 0..20 {
            assert_eq!(lookup(&mut guest, ROOT, b"none"), 0, "{mode} {round}");
        }
        daemon.stop();
    }
}

#[test]
fn a_guest_caches_as_it_is_told() {
    for (policy, caches) in [("exclusive", true), ("none", false)] {
        let folder = Folder::new();
        let daemon = folder.start(Path::new("memory:64M"), &["--guest-cache", policy]);
        assert_eq!(init(&mut folder.guest()) & WRITEBACK_CACHE != 0, caches, "{policy}");
        daemon.stop();
    }
}

#[test]
fn a_subdirectory_is_a_guest_s_root() {
    let folder = Folder::new();
    let image = folder.made();
    let daemon = folder.start(&image, &[]);
    let mut guest = folder.guest();
    init(&mut guest);
    let sub = mkdir(&mut guest, ROOT, b"sub");
    mkdir(&mut guest, sub, b"inside");
    mkdir(&mut guest, ROOT, b"outside");
    daemon.stop();
    let daemon = folder.start(&image, &["--root", "sub"]);
    let mut guest = folder.guest();
    init(&mut guest);
    assert!(lookup(&mut guest, ROOT, b"inside") != 0);
    for name in [&b"outside"[..], b"sub"] {
        assert_eq!(lookup(&mut guest, ROOT, name), 0);
    }
    assert_eq!(guest.call(LOOKUP, ROOT, b"..\0").0, -libc::ESTALE);
    daemon.stop();
}

#[test]
fn the_socket_has_the_permissions_and_the_group_that_were_asked_for() {
    // Root may give it to any group, others only to one of theirs.
    let group =
        if rustix::process::geteuid().is_root() { 12_345 } else { rustix::process::getegid().as_raw() };
    let group_text = group.to_string();
    for (options, mode) in [
        (&[][..], 0o600),
        (&["--socket-mode", "640"][..], 0o640),
        (&["--socket-group", &group_text][..], 0o660),
        (&["--socket-group", &group_text, "--socket-mode", "0620"][..], 0o620),
    ] {
        let folder = Folder::new();
        let daemon = folder.start(Path::new("memory:64M"), options);
        let socket = fs::metadata(folder.path("socket")).unwrap();
        assert_eq!(socket.permissions().mode() & 0o777, mode, "{options:?}");
        if options.contains(&"--socket-group") {
            assert_eq!(socket.gid(), group);
        }
        daemon.stop();
    }
}

#[test]
fn the_poller_runs_on_the_cpu_that_it_was_given() {
    let ours = rustix::thread::sched_getaffinity(None).unwrap();
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).rfind(|cpu| ours.is_set(*cpu)).unwrap();
    let folder = Folder::new();
    let daemon = folder.start(Path::new("memory:64M"), &["--cpu", &cpu.to_string()]);
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    assert_eq!(allowed.trim(), cpu.to_string());
    daemon.stop();
}

#[test]
fn a_service_manager_is_told_of_the_begin_and_of_the_end() {
    let folder = Folder::new();
    let manager = UnixDatagram::bind(folder.path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let told = || {
        let mut message = [0; 4096];
        let len = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..len].to_vec()).unwrap()
    };
    let mut command = folder.serve(Path::new("memory:64M"), &[]);
    let daemon = Daemon::spawn(command.env("NOTIFY_SOCKET", folder.path("notify")));
    assert_eq!(told().trim(), "READY=1");
    assert!(folder.path("socket").exists(), "a guest can connect by now");
    daemon.stop();
    assert_eq!(told().trim(), "STOPPING=1");
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut [0]).is_err(), "nothing else");
}
