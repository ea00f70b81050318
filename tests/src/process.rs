//! Child processes that are watched, have their output in a file, and die with us.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How often a process or a file is looked at while waiting for it. Short beside everything waited for here.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Lines of a log that an error message shows.
const TAIL_LINES: usize = 40;

/// A command that is ended (SIGTERM) when the thread that starts it ends, however that happens.
///
/// `setpriv` (util-linux) sets the parent death signal and then executes the program in the same process.
pub fn tethered(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// A running child in a process group of its own. Dropping it kills the group.
#[derive(Debug)]
pub struct Supervised {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Supervised {
    /// Starts `command` with both outputs going to `log` and no input. Make it with [`tethered`].
    pub fn spawn(name: &'static str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        Self::spawn_with_input(name, command, Stdio::null(), log)
    }

    /// As [`spawn`](Self::spawn), with an input.
    pub fn spawn_with_input(
        name: &'static str,
        command: &mut Command,
        input: Stdio,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let output = File::create(log).with_context(|| format!("{name}: create {}", log.display()))?;
        command.stdin(input).stdout(output.try_clone()?).stderr(output);
        Self::start(name, command, log)
    }

    /// Starts `command` with no input and the outputs it was given; `log` names the file they end up in.
    pub fn spawn_with_output(name: &'static str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        Self::start(name, command.stdin(Stdio::null()), log)
    }

    fn start(name: &'static str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("{name}: start {command:?}"))?;
        Ok(Self { name, child, log: log.to_owned() })
    }

    /// The child's standard output, if it was asked for as a pipe and not taken before.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Exit status if the process has ended.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("{}: wait", self.name))
    }

    /// Fails with the log's end if the process has ended.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended early with {status}\n{}", self.name, tail(&self.log)),
        }
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} did not end within {} s\n{}", self.name, limit.as_secs(), tail(&self.log));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Asks the process to end (SIGTERM).
    pub fn terminate(&self) -> anyhow::Result<()> {
        kill_process(self.pid(), Signal::TERM).with_context(|| format!("{}: SIGTERM", self.name))
    }

    /// Kills the process and everything it started.
    pub fn kill(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // The group may be gone between the two calls; then there is nothing left to kill.
            let _gone = kill_process_group(self.pid(), Signal::KILL);
        }
        let _reaped = self.child.wait();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Calls `ready` until it returns true or fails; the limit's error message names `what`.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !ready()? {
        if Instant::now() >= deadline {
            bail!("{what}: not within {} s", limit.as_secs());
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// The last lines of a log file, under its name.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    format!("--- end of {} ---\n{}\n---", log.display(), shown.join("\n"))
}

/// Runs a command to its end and returns its standard output; fails with everything it printed.
pub fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?}: {}\n{stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}
