//! The Unix socket that frontends connect to.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

/// Why a socket was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    #[error("another process listens on it; stop that process or choose another path")]
    Live,
    #[error("there is a file that is no socket; remove it or choose another path")]
    NoSocket,
    #[error("{0}; check the path and its permissions")]
    Io(#[from] io::Error),
}

/// A listening socket, whose file goes when it is dropped.
pub(crate) struct Listener {
    path: PathBuf,
}

/// Checks that `path` is free, or held by a socket that nobody listens on any more. Changes nothing.
pub(crate) fn check(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => Err(SocketError::NoSocket),
        Ok(_) if is_live(path)? => Err(SocketError::Live),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            fs::metadata(folder.unwrap_or(Path::new(".")))?;
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Asks with a socket of the wrong type: a live stream socket refuses the type, a stale one the connection.
/// So the other daemon does not notice.
fn is_live(path: &Path) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect(path) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

impl Listener {
    /// Listens on `path`, with these permissions.
    pub(crate) fn bind(path: &Path, mode: u32, group: Option<u32>) -> Result<(Self, OwnedFd), SocketError> {
        check(path)?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        // Nobody may connect before the permissions are right.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o777));
        let bound = UnixListener::bind(path);
        rustix::process::umask(umask);
        let socket = bound?;
        let listener = Self { path: path.to_owned() };
        socket.set_nonblocking(true)?;
        chown(path, None, group)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        Ok((listener, socket.into()))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket file is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "closing leaves the file");
        let (listener, socket) = Listener::bind(&path, 0o640, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(matches!(check(&path), Err(SocketError::Live)));
        assert!(matches!(Listener::bind(&path, 0o600, None), Err(SocketError::Live)));
        let socket = UnixListener::from(socket);
        let unnoticed = socket.accept().map_err(|error| error.kind());
        assert!(matches!(unnoticed, Err(io::ErrorKind::WouldBlock)), "the check does not connect");
        drop((listener, socket));
        assert!(!path.exists());
    }

    #[test]
    fn another_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path, 0o600, None), Err(SocketError::NoSocket)));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
