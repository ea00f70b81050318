//! Serves an empty directory over vhost-user: how to put a FUSE server of one's own behind the transport.
//!
//! `cargo run --example empty -- SOCKET`, then start a guest with a vhost-user-fs device on that socket and
//! mount the tag `empty` in it.

use std::os::unix::net::UnixListener;
use std::rc::Rc;

use anyhow::Context;
use reactor::{Reactor, SystemClock};
use vhostfs::device::fs::FsDevice;
use vhostfs::guest_mem::install_fault_handler;
use vhostfs::poller::{PollMode, Poller, Source, Tenure};

#[allow(unreachable_pub, reason = "a module of the tests")]
#[path = "../tests/support/empty_fs.rs"]
mod empty_fs;

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let socket = std::env::args().nth(1).context("usage: empty SOCKET")?;
    install_fault_handler()?;
    let listener = UnixListener::bind(&socket)?;
    listener.set_nonblocking(true)?;
    let device = Rc::new(FsDevice::new(empty_fs::EmptyFs::default(), "empty", 2)?);
    let mut poller = Poller::new(Reactor::new(Rc::new(SystemClock::new())), PollMode::Adaptive)?;
    poller.add_device(device, Source::Listener(listener.into()), Tenure::Successive)?;
    poller.run()?;
    Ok(())
}
