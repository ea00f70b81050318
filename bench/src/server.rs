//! The servers under test as processes: ours and the peer, on a core, with their CPU time and memory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use vhostfs_tests::{
    artifacts::TAG,
    process::{Supervised, output_of, tethered, wait_until},
};

use crate::machine::SERVER_CORE;

/// Time for a server to listen, and to end: it may have much to format or to write.
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// Flag of a listening socket in `/proc/net/unix` (`__SO_ACCEPTCON`).
const LISTENING: &str = "00010000";

/// Size of the file system that vhostfs serves from memory, and of the image file.
const MEMORY_SIZE: &str = "4G";
const IMAGE_SIZE: &str = "8G";

/// Folder for the peer's tree in memory.
const SHARED_MEMORY: &str = "/dev/shm";

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// `vhostfs serve`.
    Ours,
    /// `virtiofsd`.
    Peer,
    /// `vhostfs serve`, where blocks have checksums.
    Summed,
}

/// What the files lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Media {
    /// `memory:` against tmpfs.
    Memory,
    /// An image file against a folder, both on the file system of the scratch folder.
    File,
    /// As `File`, and the peer may not answer from the host's page cache (`--allow-direct-io`).
    FileDirect,
    /// An image file in memory. Only ours.
    FileInMemory,
}

/// The programs of a run.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `vhostfs`, if there is one to measure.
    pub ours: Option<PathBuf>,
    /// `virtiofsd`, if there is one to compare with.
    pub peer: Option<PathBuf>,
}

impl Programs {
    /// The sides that can be measured.
    pub fn sides(&self) -> impl Iterator<Item = Side> {
        let ours = self.ours.is_some().then_some(Side::Ours);
        ours.into_iter().chain(self.peer.is_some().then_some(Side::Peer))
    }
}

/// A running server with one export.
#[derive(Debug)]
pub struct ServerProcess {
    process: Supervised,
    side: Side,
    socket: PathBuf,
    /// Removed with the process: the peer's tree in memory, or an image there.
    _tree: Option<tempfile::TempDir>,
}

impl ServerProcess {
    /// Starts a server on its core and waits for its socket. Files from an earlier server in the same scratch folder
    /// are still there, except in memory.
    pub fn start(programs: &Programs, side: Side, media: Media, scratch: &Path) -> anyhow::Result<Self> {
        let name = format!("{side:?}-{media:?}").to_lowercase();
        let socket = scratch.join(format!("{name}.sock"));
        let log = scratch.join(format!("{name}.log"));
        let program = |path: &Option<PathBuf>| path.clone().context("no program for this side");
        let (mut command, tree) = match side {
            Side::Ours | Side::Summed => vhostfs(&program(&programs.ours)?, &socket, side, media, scratch)?,
            Side::Peer => virtiofsd(&program(&programs.peer)?, &socket, media, scratch)?,
        };
        let mut process = Supervised::spawn("server", &mut command, &log)?;
        wait_until(&format!("{name} listens"), START_LIMIT, || {
            process.check_running()?;
            is_listening(&socket)
        })?;
        Ok(Self { process, side, socket, _tree: tree })
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Which program this is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// CPU time of all its threads so far.
    ///
    /// From the scheduler's own count, which is exact for threads that sleep and behind by at most a clock tick for
    /// threads that run.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let mut total = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.process.id()))? {
            let schedstat = fs::read_to_string(thread?.path().join("schedstat"))?;
            total += first_number(&schedstat)?;
        }
        Ok(Duration::from_nanos(total))
    }

    /// Resident memory that is the process's own, in bytes: the guest's memory, which it maps too, is not counted,
    /// and neither are pages of files.
    pub fn own_memory(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        Ok(first_number(line.context("no RssAnon")?)? << 10)
    }

    /// Ends the server: ours by SIGTERM, which makes it commit; the peer by its guest's disconnect or SIGTERM.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.process.terminate()?;
        let status = self.process.wait(STOP_LIMIT)?;
        ensure!(self.side == Side::Peer || status.success(), "vhostfs ended with {status} after SIGTERM");
        Ok(())
    }
}

/// First number of a text.
fn first_number(text: &str) -> anyhow::Result<u64> {
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .context("no number where one was expected")
}

/// `program`, on the server's core.
fn on_core(program: &Path) -> Command {
    let mut command = tethered("taskset");
    command.args(["--cpu-list", &SERVER_CORE.to_string()]).arg(program);
    command
}

fn vhostfs(
    program: &Path,
    socket: &Path,
    side: Side,
    media: Media,
    scratch: &Path,
) -> anyhow::Result<(Command, Option<tempfile::TempDir>)> {
    let mut command = on_core(program);
    command.arg("serve").arg("--socket").arg(socket).args(["--tag", TAG]);
    if media == Media::Memory {
        ensure!(side == Side::Ours, "what is served from memory has no checksums");
        command.arg(format!("memory:{MEMORY_SIZE}"));
        return Ok((command, None));
    }
    let folder = (media == Media::FileInMemory).then(folder_in_memory).transpose()?;
    let name = format!("{side:?}-{media:?}.img").to_lowercase();
    let image = folder.as_ref().map_or(scratch, tempfile::TempDir::path).join(name);
    if side == Side::Summed && !image.exists() {
        let mut mkfs = Command::new(program.with_file_name("blobfs"));
        output_of(mkfs.args(["mkfs", "--data-checksum", "--size", IMAGE_SIZE]).arg(&image))?;
    }
    command.args(["--size", IMAGE_SIZE]).arg(image);
    Ok((command, folder))
}

fn folder_in_memory() -> anyhow::Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix("vhostfs-bench-").tempdir_in(SHARED_MEMORY)?)
}

fn virtiofsd(
    program: &Path,
    socket: &Path,
    media: Media,
    scratch: &Path,
) -> anyhow::Result<(Command, Option<tempfile::TempDir>)> {
    let (folder, tree) = match media {
        Media::Memory => {
            let tree = folder_in_memory()?;
            (tree.path().to_owned(), Some(tree))
        }
        Media::File | Media::FileDirect => (scratch.join(format!("{media:?}.tree").to_lowercase()), None),
        Media::FileInMemory => bail!("an image is for ours only"),
    };
    fs::create_dir_all(&folder)?;
    let mut command = on_core(program);
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(folder).args(["--tag", TAG]);
    command.args(["--sandbox", "none", "--cache", "auto", "--xattr", "--posix-acl=always"]);
    command.args(["--log-level", "error"]);
    if media == Media::FileDirect {
        command.arg("--allow-direct-io");
    }
    Ok((command, tree))
}

/// Whether a socket at `path` listens. Looks without connecting: the peer serves one connection and ends.
fn is_listening(path: &Path) -> anyhow::Result<bool> {
    let path = path.to_str().context("the socket's path is not UTF-8")?;
    let table = fs::read_to_string("/proc/net/unix")?;
    Ok(table.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some(LISTENING)))
}

/// Fails early, with a message that says what to do, if a program cannot be started.
pub fn check_program(path: &Path) -> anyhow::Result<()> {
    let output = Command::new(path).arg("--version").output();
    let output = output.with_context(|| format!("{}: cannot be started", path.display()))?;
    ensure!(output.status.success(), "{} --version: {}", path.display(), output.status);
    Ok(())
}
