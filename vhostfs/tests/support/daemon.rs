//! The program itself: started on an image, stopped, and used by a guest over its socket.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::guest::{Frontend, Guest, code, fuse_reply, message};

/// How long a daemon may take for anything at all: only against a test that never ends.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder for an image and a socket.
pub struct Folder(pub TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `vhostfs serve` of `image`.
    pub fn serve(&self, image: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhostfs"));
        command.arg("serve").arg("--socket").arg(self.path("socket")).args(["--tag", "t"]).args(options);
        command.arg(image);
        command
    }

    /// A daemon that has said that it is ready.
    pub fn start(&self, image: &Path, options: &[&str]) -> Daemon {
        Daemon::spawn(&mut self.serve(image, options))
    }

    /// An image that a daemon made and left clean.
    pub fn made(&self) -> PathBuf {
        let image = self.path("image");
        self.start(&image, &["--size", "16M"]).stop();
        image
    }

    /// A guest of the daemon that serves here.
    pub fn guest(&self) -> DaemonGuest {
        DaemonGuest::connect(&self.path("socket"))
    }
}

/// A running daemon.
pub struct Daemon {
    pub child: Child,
    log: BufReader<ChildStderr>,
}

impl Daemon {
    /// Starts it and waits until it has said that it is ready.
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("ready") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the daemon has ended");
        }
        Self { child, log }
    }

    pub fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM: it leaves a clean image and exits 0. Gives what it has logged since it was ready.
    pub fn stop(mut self) -> String {
        self.signal(libc::SIGTERM);
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{rest}");
        rest
    }
}

impl Drop for Daemon {
    /// A failed test leaves none behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that kicks after each request and waits for its answer.
pub struct DaemonGuest {
    frontend: Frontend,
    guest: Guest,
}

impl DaemonGuest {
    fn connect(socket: &Path) -> Self {
        let frontend = Frontend::new(UnixStream::connect(socket).unwrap());
        let guest = Guest::new(16);
        frontend.start(&guest, 0, 2);
        let mut connected = Self { frontend, guest };
        // What was sent before is done when this is answered.
        connected.frontend.send_raw(&message(code::GET_QUEUE_NUM, 0, &[]), &[]);
        wait_for(|| connected.frontend.receive());
        connected
    }

    /// Error and body of the reply to a request.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let reply = self.guest.request_about(1, 0, opcode, node, body);
        rustix::io::write(&self.frontend.queues[1].kick, &1u64.to_le_bytes()).unwrap();
        let used = wait_for(|| self.guest.take_used(1).pop());
        let (len, error, _) = fuse_reply(&self.guest.read(reply, 16));
        assert_eq!(used, (0, len));
        (error, self.guest.read(reply + 16, len as usize - 16))
    }
}

/// Waits until there is something.
pub fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "the daemon does not answer");
        std::thread::sleep(Duration::from_micros(200));
    }
}
