//! A guest under User-Mode Linux: one script per boot, with the host's own tree as its (read-only) root.
//!
//! A real kernel with the real virtio-fs driver at near native speed: the place for compilers, test suites and
//! long runs. One CPU. Its kernel is Debian's `user-mode-linux` package.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    artifacts::TAG,
    process::{Supervised, tail, tethered},
    qemu::{Echo, append},
};

/// virtio device id of a file system device, in `virtio_uml.device=`.
const VIRTIO_ID_FS: u32 = 26;

/// Time between the script's end and the end of the kernel: it unmounts and powers off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(60);

/// A guest to run a script in, with the file system of `socket` at [`MOUNT_POINT`](crate::artifacts::MOUNT_POINT).
#[derive(Debug, Clone)]
pub struct UmlGuest<'a> {
    /// The daemon's vhost-user socket.
    pub socket: &'a Path,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Image to appear as `/dev/ubda`.
    pub disk: Option<PathBuf>,
    /// CPUs of the host to run on, as `taskset` takes them. All if `None`.
    pub cpus: Option<&'a str>,
}

impl<'a> UmlGuest<'a> {
    /// A guest with 512 MiB, no disk, on any CPU.
    pub fn new(socket: &'a Path) -> Self {
        Self { socket, memory_mib: 512, disk: None, cpus: None }
    }

    /// Boots, mounts, runs `script` with bash as root, unmounts and powers off.
    ///
    /// Fails unless the script exits 0. Returns what it printed. Everything the guest printed is in
    /// `scratch/name.log`. The limit is for all of it.
    pub fn run(
        &self,
        scratch: &Path,
        name: &str,
        script: &str,
        echo: Echo,
        limit: Duration,
    ) -> anyhow::Result<String> {
        let mut printed = String::new();
        self.run_watched(scratch, name, script, limit, &mut |line| {
            append(&mut printed, line, echo);
            Ok(())
        })?;
        Ok(printed)
    }

    /// As [`run`](Self::run); each line that the script prints is passed on when it comes.
    pub fn run_watched(
        &self,
        scratch: &Path,
        name: &str,
        script: &str,
        limit: Duration,
        on_line: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut run = self.start(scratch, name, script)?;
        let deadline = Instant::now() + limit;
        let mut begun = false;
        loop {
            let line = match run.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!("the guest took too long\n{}", tail(&run.log)),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest ended early\n{}", tail(&run.log)),
            };
            if let Some(status) = line.strip_prefix("@@exit ") {
                ensure!(begun && status == "0", "exit status {status} in the guest\n{}", tail(&run.log));
                run.uml.wait(POWER_OFF_LIMIT)?;
                return Ok(());
            }
            if begun {
                on_line(&line)?;
            }
            begun |= line == "@@begin";
        }
    }

    /// Boots, mounts and runs `script`, and does not wait for anything.
    pub fn start(&self, scratch: &Path, name: &str, script: &str) -> anyhow::Result<UmlRun> {
        let log = scratch.join(format!("{name}.log"));
        let mut uml = self.spawn(scratch, name, script, &log)?;
        let output = uml.take_stdout().context("no standard output")?;
        let lines = spawn_line_reader(output, File::create(&log)?);
        Ok(UmlRun { uml, lines, log })
    }

    fn spawn(&self, scratch: &Path, name: &str, script: &str, log: &Path) -> anyhow::Result<Supervised> {
        let job = scratch.join(format!("{name}.sh"));
        fs::write(&job, script)?;
        let init = scratch.join("uml-init");
        fs::write(&init, include_str!("../guest/uml-init"))?;
        fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;

        let mut command = match self.cpus {
            None => tethered("linux.uml"),
            Some(cpus) => {
                let mut command = tethered("taskset");
                command.args(["--cpu-list", cpus, "linux.uml"]);
                command
            }
        };
        command.arg(format!("mem={}M", self.memory_mib));
        command.args(["rootfstype=hostfs", "rootflags=/", "ro", "quiet", "con=null", "con0=fd:0,fd:1"]);
        command.arg(format!("init={}", init.display()));
        command.arg(format!("virtio_uml.device={}:{VIRTIO_ID_FS}", self.socket.display()));
        command.arg(format!("job={}", job.display())).arg(format!("fstag={TAG}"));
        if let Some(disk) = &self.disk {
            command.arg(format!("ubd0={}", disk.display()));
        }
        command
            .env("TMPDIR", memory_folder(scratch, self.memory_mib)?)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        Supervised::spawn_with_output("linux.uml", &mut command, log)
    }
}

/// A guest whose script runs. Dropping it kills the guest.
#[derive(Debug)]
pub struct UmlRun {
    uml: Supervised,
    lines: mpsc::Receiver<String>,
    log: PathBuf,
}

impl UmlRun {
    /// The next line that the guest prints, also before its script begins; `None` when none comes before `deadline`.
    ///
    /// Fails when the guest ends.
    pub fn line(&mut self, deadline: Instant) -> anyhow::Result<Option<String>> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest ended early\n{}", tail(&self.log)),
        }
    }

    /// Kills the guest, as if its power went. Returns the lines that it had printed and nobody had asked for.
    pub fn kill(mut self) -> Vec<String> {
        self.uml.kill();
        self.lines.iter().collect()
    }
}

/// Where the file lies that is the guest's memory: shared memory if there is room (a container may have 64 MiB of it),
/// otherwise the scratch folder, which is slower.
fn memory_folder(scratch: &Path, memory_mib: u32) -> anyhow::Result<PathBuf> {
    const SHARED_MEMORY: &str = "/dev/shm";
    let free = rustix::fs::statvfs(SHARED_MEMORY).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    let has_room = free >= u64::from(memory_mib) << 20;
    Ok(if has_room { PathBuf::from(SHARED_MEMORY) } else { scratch.canonicalize()? })
}

/// Sends the guest's lines, and writes them to its log. Ends with the output.
fn spawn_line_reader(output: std::process::ChildStdout, mut log: File) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if writeln!(log, "{line}").is_err() || sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}
