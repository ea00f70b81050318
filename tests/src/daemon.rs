//! The file service as a process: started on an image, watched, stopped, killed.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use crate::{
    artifacts::{Server, TAG, socket_path},
    process::{Supervised, output_of, tethered, wait_until},
};

/// Time for the daemon to listen: formatting is quick, replay is bounded, the machine may be busy.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Time for the daemon to commit and end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Flag of a listening socket in `/proc/net/unix` (`__SO_ACCEPTCON`).
const LISTENING: &str = "00010000";

/// A running file service with one export named [`TAG`].
#[derive(Debug)]
pub struct Daemon {
    process: Supervised,
    server: Server,
    socket: PathBuf,
    image: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Serves `scratch/name.img`, made with `size` if it does not exist, on a socket in `scratch`.
    ///
    /// Returns once the socket listens. `options` are added to `vhostfs serve`; virtiofsd has others.
    pub fn start(
        server: &Server,
        scratch: &Path,
        name: &str,
        size: &str,
        options: &[&str],
    ) -> anyhow::Result<Self> {
        let socket = socket_path(scratch, &format!("{name}.sock"))?;
        let image = image_path(scratch, name);
        let log = scratch.join(format!("{name}.log"));
        let mut command = match server {
            Server::Vhostfs { vhostfs, .. } => serve_command(vhostfs, &socket, &image, size, options),
            Server::Virtiofsd(program) => virtiofsd_command(program, &socket, &image)?,
        };
        let process = spawn_listening(&mut command, &socket, &log)?;
        Ok(Self { process, server: server.clone(), socket, image, log })
    }

    /// As [`start`](Self::start), but the daemon inherits a listening socket as descriptor 3 (`--fd`), as from a service
    /// manager. Not for virtiofsd.
    pub fn start_with_descriptor(
        server: &Server,
        scratch: &Path,
        name: &str,
        size: &str,
        options: &[&str],
    ) -> anyhow::Result<Self> {
        let Server::Vhostfs { vhostfs, .. } = server else {
            bail!("virtiofsd is started by the path of its socket")
        };
        let socket = socket_path(scratch, &format!("{name}.sock"))?;
        let image = image_path(scratch, name);
        let log = scratch.join(format!("{name}.log"));
        let listener = UnixListener::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
        // The shell moves the socket from its standard input to where the daemon is told to look for it.
        let mut command = tethered("sh");
        command.args(["-c", r#"exec "$@" 3<&0 </dev/null"#, "sh"]).arg(vhostfs);
        command.args(["serve", "--fd", "3", "--tag", TAG, "--size", size]).args(options).arg(&image);
        let process =
            Supervised::spawn_with_input("daemon", &mut command, OwnedFd::from(listener).into(), &log)?;
        Ok(Self { process, server: server.clone(), socket, image, log })
    }

    /// To be called between two guests. Our daemon must still run; virtiofsd ends with its guest and is started again.
    pub fn expect_next_guest(&mut self) -> anyhow::Result<()> {
        if let Server::Virtiofsd(program) = &self.server {
            self.process.wait(STOP_LIMIT)?;
            let mut command = virtiofsd_command(program, &self.socket, &self.image)?;
            self.process = spawn_listening(&mut command, &self.socket, &self.log)?;
        }
        self.process.check_running()
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The image (for virtiofsd: the folder) being served.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Process id, to read the daemon's figures under `/proc`.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Fails if the daemon is no longer there.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        self.process.check_running()
    }

    /// Stops the daemon with SIGTERM, expects exit status 0, and checks the image with `blobfs fsck`.
    pub fn stop_and_check(mut self) -> anyhow::Result<()> {
        let Server::Vhostfs { blobfs, .. } = self.server.clone() else {
            return Ok(()); // virtiofsd ends with its guest and has no image to check
        };
        self.process.check_running()?;
        self.process.terminate()?;
        let status = self.process.wait(STOP_LIMIT)?;
        ensure!(status.success(), "daemon ended with {status} after SIGTERM instead of exit status 0");
        check_closed(&blobfs, &self.image)
    }

    /// Waits for a daemon that ends by itself (`--once`), expects exit status 0, and checks the image.
    pub fn wait_and_check(mut self) -> anyhow::Result<()> {
        let status = self.process.wait(STOP_LIMIT)?;
        ensure!(
            status.success(),
            "daemon ended with {status} when its guest had left instead of exit status 0"
        );
        match &self.server {
            Server::Vhostfs { blobfs, .. } => check_closed(blobfs, &self.image),
            Server::Virtiofsd(_) => Ok(()),
        }
    }

    /// Kills the daemon (SIGKILL), as a crash would.
    pub fn kill(mut self) {
        self.process.kill();
    }
}

/// Where the image of a daemon is.
pub fn image_path(scratch: &Path, name: &str) -> PathBuf {
    scratch.join(format!("{name}.img"))
}

/// Checks an image that a daemon has closed: marked clean, so that a mount replays nothing, and without findings.
fn check_closed(blobfs: &Path, image: &Path) -> anyhow::Result<()> {
    let info = output_of(Command::new(blobfs).args(["info", "--json"]).arg(image))?;
    ensure!(info.contains("\"clean\": true"), "the daemon ended without marking the image clean: {info}");
    fsck(blobfs, image)
}

/// Checks an image with `blobfs fsck`; any finding is an error that shows the report.
pub fn fsck(blobfs: &Path, image: &Path) -> anyhow::Result<()> {
    output_of(Command::new(blobfs).arg("fsck").arg(image)).context("the image is not clean").map(drop)
}

/// Starts the daemon and waits for its socket.
fn spawn_listening(command: &mut Command, socket: &Path, log: &Path) -> anyhow::Result<Supervised> {
    let mut process = Supervised::spawn("daemon", command, log)?;
    wait_until("daemon listens on its socket", START_LIMIT, || {
        process.check_running()?;
        is_listening(socket)
    })?;
    Ok(process)
}

fn serve_command(vhostfs: &Path, socket: &Path, image: &Path, size: &str, options: &[&str]) -> Command {
    let mut command = tethered(vhostfs);
    command
        .arg("serve")
        .arg("--socket")
        .arg(socket)
        .args(["--tag", TAG, "--size", size])
        .args(options)
        .arg(image);
    command
}

fn virtiofsd_command(program: &Path, socket: &Path, folder: &Path) -> anyhow::Result<Command> {
    fs::create_dir_all(folder)?;
    let mut command = tethered(program);
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(folder);
    command.args(["--tag", TAG, "--sandbox", "none", "--cache", "auto", "--xattr", "--posix-acl=always"]);
    Ok(command)
}

/// Whether a socket at `path` listens. Looks without connecting: a connection would be a session to the daemon.
fn is_listening(path: &Path) -> anyhow::Result<bool> {
    let Some(path) = path.to_str() else { bail!("socket path {} is not UTF-8", path.display()) };
    let table = fs::read_to_string("/proc/net/unix")?;
    Ok(table.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some(LISTENING)))
}
