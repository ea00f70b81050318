//! Descriptors that frontends send: what may be asked of them, and who closes them.
//!
//! A frontend may send any descriptor that it has, also one of a file whose server never answers (FUSE, NFS).
//! Nearly everything that one does with such a descriptor waits for that server: `fstat` and `fstatfs` ask it,
//! `epoll` polls it, `close` sends it a FLUSH, and the last reference writes back what is dirty. So
//! - nothing is asked of a descriptor before its kind is known, and its kind is told by what the kernel knows by
//!   itself: the name of an anonymous inode in `/proc/self/fd`, which files have seals, and the list of mounts;
//! - a descriptor whose kind is not known, or whose closing closes others (a socket has descriptors in its
//!   queue), is closed by a thread that does nothing else ([`Closer`]). Nothing waits for that thread.
//!
//! What is left: a frontend that makes the closer wait keeps open what waits behind it, up to the process's
//! limit of descriptors, and the process itself once it has closed its image and ended otherwise. The host's own
//! disks are trusted to answer, and so is what the host has put below an overlay. `/proc` has to be there.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;

use rustix::fs::{CWD, fcntl_get_seals, readlinkat};
use rustix::net::{AddressFamily, sockopt::socket_domain};

/// Types of file systems that need nobody but a disk of the host. User-Mode Linux has its memory there if `/dev/shm`
/// is too small, and so has QEMU if it is told to.
const DISK_FILE_SYSTEMS: [&str; 8] = ["btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "xfs", "zfs"];

/// A frontend sent a descriptor of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// Neither event descriptor, pipe nor Unix socket.
    #[error("descriptor is neither an event descriptor nor a pipe or Unix socket")]
    NoEvents,
    /// Pages may come from another process.
    #[error("memory is neither a memfd nor a file of tmpfs, of hugetlbfs or on a disk of this host")]
    NoMemory,
    /// The kernel refused something about it.
    #[error("descriptor cannot be used: {0}")]
    Kernel(#[from] rustix::io::Errno),
}

/// A thread that closes descriptors. It ends with the last handle.
#[derive(Debug, Clone)]
pub struct Closer(mpsc::Sender<OwnedFd>);

impl Closer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> io::Result<Self> {
        let (sender, descriptors) = mpsc::channel::<OwnedFd>();
        std::thread::Builder::new().name("closer".into()).spawn(move || descriptors.iter().for_each(drop))?;
        Ok(Self(sender))
    }
}

/// An open descriptor. Dropping it does not wait.
#[derive(Debug)]
pub struct Descriptor {
    /// There until it is dropped.
    fd: Option<OwnedFd>,
    /// Who closes it; without one, closing is known not to wait.
    closer: Option<Closer>,
}

impl Descriptor {
    /// One that a frontend sent, or that a frontend sends others through.
    pub fn foreign(fd: OwnedFd, closer: &Closer) -> Self {
        Self { fd: Some(fd), closer: Some(closer.clone()) }
    }

    /// Checks that it is an event descriptor, a pipe or a Unix socket: what can be polled and written, and does
    /// not wait once it is non-blocking.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn check_events(&mut self) -> Result<(), DescriptorError> {
        // Paths of files begin with a slash: none of them looks like this.
        let link = readlinkat(CWD, format!("/proc/self/fd/{}", self.as_fd().as_raw_fd()), Vec::new())?;
        let is_socket = link.as_bytes().starts_with(b"socket:[");
        if link.as_bytes() == b"anon_inode:[eventfd]" || link.as_bytes().starts_with(b"pipe:[") {
            self.closer = None;
        } else if !is_socket || socket_domain(&*self)? != AddressFamily::UNIX {
            return Err(DescriptorError::NoEvents);
        }
        Ok(())
    }

    /// Checks that it is a file whose pages the kernel itself has, or gets from a disk of the host.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn check_memory(&mut self) -> Result<(), DescriptorError> {
        // The files that have seals, used or not, are memfds and those of tmpfs (`/dev/shm`) and hugetlbfs.
        if fcntl_get_seals(&*self).is_err() && !self.is_on_disk() {
            return Err(DescriptorError::NoMemory);
        }
        self.closer = None;
        Ok(())
    }

    /// Whether it lies on a file system of [`DISK_FILE_SYSTEMS`], in a mount that this process sees.
    fn is_on_disk(&self) -> bool {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.as_fd().as_raw_fd()));
        let mounts = fs::read("/proc/self/mountinfo");
        let (Ok(info), Ok(mounts)) = (info, mounts) else { return false };
        file_system_of(&info, &String::from_utf8_lossy(&mounts))
            .is_some_and(|kind| DISK_FILE_SYSTEMS.contains(&kind))
    }
}

/// Type of the file system of an open file (proc(5): `fdinfo` names the mount; in `mountinfo` a line begins with that
/// number, and the type follows a field of one dash).
fn file_system_of<'a>(fdinfo: &str, mountinfo: &'a str) -> Option<&'a str> {
    let mount = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let line = mountinfo.lines().find(|line| line.split(' ').next() == Some(mount))?;
    line.split(' ').skip_while(|field| *field != "-").nth(1)
}

/// One of this process's own.
impl From<OwnedFd> for Descriptor {
    fn from(fd: OwnedFd) -> Self {
        Self { fd: Some(fd), closer: None }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("taken by drop only").as_fd()
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let (Some(fd), Some(Closer(sender))) = (self.fd.take(), &self.closer) {
            // The thread receives as long as there is a handle.
            let _ = sender.send(fd);
        }
    }
}

#[cfg(test)]
mod tests;
