//! `vhostfs serve`: from a checked command line to a running poller, and back to a clean image.
//!
//! Order of the start, so that nothing is touched when something is wrong: the options, the place of the
//! socket, the image, then the socket itself. Frontends can connect only to a file system that is mounted.

#![expect(unsafe_code, reason = "adopting an inherited descriptor, looking up a group")]

use std::ffi::CString;
use std::io::IsTerminal;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use reactor::{Reactor, SystemClock};
use rustix::net::sockopt::socket_acceptconn;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::EnvFilter;
use vhostfs::device::fs::FsDevice;
use vhostfs::guest_mem::install_fault_handler;
use vhostfs::poller::{Poller, Source, Tenure};

use crate::config::ServeArgs;
use crate::failure::Failure;
use crate::filesystem::Filesystem;
use crate::socket::{self, Listener};

/// Request queues offered unless asked otherwise: more CPUs gain nothing from more queues on one poller.
const QUEUES_DEFAULT_MAX: usize = 8;

/// Serves until SIGTERM or SIGINT, or, with `--once`, until the first frontend has left.
pub(crate) fn serve(args: &ServeArgs) -> Result<(), Failure> {
    start_log(&args.log)?;
    let endpoint = Endpoint::check(args)?;
    let queues = args.queues.unwrap_or_else(default_queues);
    if let Some(cpu) = args.cpu {
        pin_to(cpu)?;
    }
    let system = |error| Failure::new("start", error, "check the system's limits");
    install_fault_handler().map_err(system)?;
    let stop = stop_signal().map_err(system)?;

    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let filesystem = Filesystem::open(args, &reactor)?;
    let (source, listener) = endpoint.open()?;
    let tag = args.tag.as_deref().unwrap_or_default();
    let device =
        FsDevice::new(filesystem.handler(), tag, queues).map_err(|error| Failure::usage("device", error))?;

    let mut poller = Poller::new(reactor.clone(), args.poll.into()).map_err(system)?;
    let tenure = if args.once { Tenure::Once } else { Tenure::Successive };
    poller.add_device(Rc::new(device), source, tenure).map_err(system)?;
    poller.stop_on(stop).map_err(system)?;
    filesystem.wake(&mut poller).map_err(system)?;

    tracing::info!(tag, queues, "ready");
    tell_service_manager(NotifyState::Ready);
    let served = poller.run();
    tell_service_manager(NotifyState::Stopping);
    drop((poller, listener));
    filesystem.close(&reactor)?;
    served.map_err(system)
}

fn start_log(filter: &str) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(filter).map_err(|error| Failure::usage("--log", error))?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    Ok(())
}

fn default_queues() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    cpus.min(QUEUES_DEFAULT_MAX) as u16
}

fn pin_to(cpu: usize) -> Result<(), Failure> {
    let refused = |why: String| Failure::new("--cpu", why, "choose a CPU that this process may run on");
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(refused(format!("there is no CPU {cpu}")));
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|error| refused(format!("CPU {cpu}: {error}")))
}

/// A descriptor that becomes readable at SIGTERM or SIGINT.
fn stop_signal() -> std::io::Result<OwnedFd> {
    let (readable, written) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, written.try_clone()?)?;
    }
    Ok(readable.into())
}

/// Without a service manager this does nothing.
fn tell_service_manager(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Where frontends will come from.
enum Endpoint<'a> {
    Path { args: &'a ServeArgs, path: &'a std::path::Path, group: Option<u32> },
    Descriptor(OwnedFd),
}

impl<'a> Endpoint<'a> {
    /// Checks without changing anything.
    fn check(args: &'a ServeArgs) -> Result<Self, Failure> {
        match (&args.socket, args.fd) {
            (Some(path), _) => {
                let group = args.socket_group.as_deref().map(find_group).transpose()?;
                socket::check(path).map_err(|error| socket_failure(path, &error))?;
                Ok(Self::Path { args, path, group })
            }
            (None, Some(fd)) => adopt(fd).map(Self::Descriptor),
            (None, None) => Err(Failure::usage("command line", "one of --socket and --fd is needed")),
        }
    }

    fn open(self) -> Result<(Source, Option<Listener>), Failure> {
        match self {
            Self::Path { args, path, group } => {
                let default = if group.is_some() { 0o660 } else { 0o600 };
                let mode = args.socket_mode.unwrap_or(default);
                let (listener, socket) =
                    Listener::bind(path, mode, group).map_err(|error| socket_failure(path, &error))?;
                Ok((Source::Listener(socket), Some(listener)))
            }
            Self::Descriptor(socket) => {
                let refused = |error| Failure::new("--fd", error, "pass a Unix stream socket");
                rustix::io::ioctl_fionbio(&socket, true).map_err(refused)?;
                let listens = socket_acceptconn(&socket).map_err(refused)?;
                Ok((if listens { Source::Listener(socket) } else { Source::Connected(socket) }, None))
            }
        }
    }
}

fn socket_failure(path: &std::path::Path, error: &socket::SocketError) -> Failure {
    let text = error.to_string();
    let (why, advice) = text.split_once("; ").unwrap_or((&text, "check the path"));
    Failure::new(format!("socket {}", path.display()), why, advice)
}

fn adopt(fd: RawFd) -> Result<OwnedFd, Failure> {
    let refused = |why: String| Failure::new(format!("--fd {fd}"), why, "pass a Unix stream socket");
    // SAFETY: fcntl only looks whether the number is open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(refused(std::io::Error::last_os_error().to_string()));
    }
    // SAFETY: it is open, was given to this process for this purpose, and is taken here only, before this
    // process has opened anything by itself that could have this number (descriptors below were inherited).
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::net::sockopt::socket_domain(&socket) {
        Ok(domain) if domain == rustix::net::AddressFamily::UNIX => Ok(socket),
        Ok(_) => Err(refused("not a Unix socket".into())),
        Err(error) => Err(refused(error.to_string())),
    }
}

/// The number of a group that is given by number or name.
fn find_group(group: &str) -> Result<u32, Failure> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let unknown =
        || Failure::new(format!("--socket-group {group}"), "no such group", "choose an existing group");
    let name = CString::new(group).map_err(|_| unknown())?;
    // SAFETY: `name` is a C string; the result is read at once, and no other thread runs yet.
    let entry = unsafe { libc::getgrnam(name.as_ptr()).as_ref() };
    entry.map(|entry| entry.gr_gid).ok_or_else(unknown)
}
