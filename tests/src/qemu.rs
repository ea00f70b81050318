//! A guest under QEMU: a Debian cloud kernel with a small root in memory, driven one command at a time.
//!
//! Three sockets, on which this side listens before QEMU starts so that nothing is lost: the kernel's console (logged, and the
//! user's terminal while [`QemuGuest::attach`] runs), the agent's serial port (commands and their exit status,
//! see `guest/agent`), and QMP (reset).
//!
//! Emulation only (`accel=tcg`): it works on every machine, with or without a usable `/dev/kvm`.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use crate::{
    artifacts::{Artifacts, MOUNT_POINT, TAG, socket_path},
    process::{Supervised, tail, tethered, wait_until},
};

/// From power-on or reset to the agent's first line. 5 s when the machine is quiet, more on a loaded CI host.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// For QEMU to connect its sockets, and to answer a QMP command.
const QEMU_LIMIT: Duration = Duration::from_secs(30);

/// Default limit of one command in the guest.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// The hardware of a guest.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// Memory in MiB. The root archive takes about 100 of it.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Request queues of the file system device.
    pub request_queues: u32,
    /// Slots per queue. 1024 allows requests of 1 MiB; QEMU's default of 128 stops at 496 KiB.
    pub queue_size: u32,
}

impl Default for Hardware {
    fn default() -> Self {
        Self { memory_mib: 512, cpus: 1, request_queues: 1, queue_size: 1024 }
    }
}

/// What happens to the output of a command, besides being returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Echo {
    /// Nothing.
    Quiet,
    /// Each line is printed as it arrives.
    Lines,
}

/// What the agent said.
enum AgentEvent {
    Ready,
    Line(String),
    Exit { id: u64, status: i32 },
}

/// A running guest. Dropping it kills QEMU.
pub struct QemuGuest {
    qemu: Supervised,
    console_log: std::path::PathBuf,
    console: UnixStream,
    /// While set, console output also goes to our standard output.
    console_shown: Arc<AtomicBool>,
    agent: UnixStream,
    events: Receiver<AgentEvent>,
    qmp: BufReader<UnixStream>,
    next_id: u64,
}

impl QemuGuest {
    /// Boots a guest with a `vhost-user-fs-pci` device on `socket`. Logs go to `scratch/name-*.log`.
    pub fn boot(
        artifacts: &Artifacts,
        scratch: &Path,
        name: &str,
        socket: &Path,
        hardware: &Hardware,
    ) -> anyhow::Result<Self> {
        let console_log = scratch.join(format!("{name}-console.log"));
        let port = |kind: &str| -> anyhow::Result<_> {
            let path = socket_path(scratch, &format!("{name}-{kind}.sock"))?;
            let _stale = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).with_context(|| format!("bind {}", path.display()))?;
            listener.set_nonblocking(true)?;
            Ok((path, listener))
        };
        let (console_path, console) = port("console")?;
        let (agent_path, agent) = port("agent")?;
        let (qmp_path, qmp) = port("qmp")?;

        let mut command = qemu_command(artifacts, socket, hardware);
        for (id, path) in [("console", &console_path), ("agent", &agent_path), ("qmp", &qmp_path)] {
            command.arg("-chardev").arg(format!("socket,id={id},path={}", path.display()));
        }
        command.args([
            "-serial",
            "chardev:console",
            "-serial",
            "chardev:agent",
            "-mon",
            "chardev=qmp,mode=control",
        ]);
        let mut qemu = Supervised::spawn("qemu", &mut command, &scratch.join(format!("{name}-qemu.log")))?;

        let console = accept(&mut qemu, &console)?;
        let agent = accept(&mut qemu, &agent)?;
        let qmp = accept(&mut qemu, &qmp)?;
        qmp.set_read_timeout(Some(QEMU_LIMIT))?;
        let console_shown = Arc::new(AtomicBool::new(false));
        spawn_console_reader(console.try_clone()?, File::create(&console_log)?, console_shown.clone());
        let (sender, events) = mpsc::channel();
        spawn_agent_reader(agent.try_clone()?, sender);

        let mut guest = Self {
            qemu,
            console_log,
            console,
            console_shown,
            agent,
            events,
            qmp: BufReader::new(qmp),
            next_id: 0,
        };
        guest.qmp_line()?; // greeting
        guest.qmp("qmp_capabilities")?;
        guest.wait_ready()?;
        Ok(guest)
    }

    /// Boots and mounts the file system.
    pub fn boot_mounted(
        artifacts: &Artifacts,
        scratch: &Path,
        name: &str,
        socket: &Path,
        hardware: &Hardware,
    ) -> anyhow::Result<Self> {
        let mut guest = Self::boot(artifacts, scratch, name, socket, hardware)?;
        guest.mount()?;
        Ok(guest)
    }

    /// Mounts the file system at [`MOUNT_POINT`].
    pub fn mount(&mut self) -> anyhow::Result<()> {
        self.run(&format!("mount -t virtiofs {TAG} {MOUNT_POINT}")).map(drop)
    }

    /// Runs a script in the guest; fails unless it exits 0. Returns what it printed.
    pub fn run(&mut self, script: &str) -> anyhow::Result<String> {
        self.run_with(script, Echo::Quiet, COMMAND_LIMIT)
    }

    /// As [`run`](Self::run), with a limit and, if asked for, each line shown as it comes.
    pub fn run_with(&mut self, script: &str, echo: Echo, limit: Duration) -> anyhow::Result<String> {
        let id = self.send(script)?;
        let deadline = Instant::now() + limit;
        let mut printed = String::new();
        // The newest line is held back: the last one may be there, and empty, only because the agent ends it.
        let mut newest: Option<String> = None;
        let status = loop {
            match self.event(deadline, script)? {
                AgentEvent::Line(line) => {
                    if let Some(line) = newest.replace(line) {
                        append(&mut printed, &line, echo);
                    }
                }
                AgentEvent::Exit { id: ended, status } if ended == id => break status,
                AgentEvent::Exit { .. } => {} // of a command that was given up before
                AgentEvent::Ready => {
                    bail!("the guest rebooted during: {script}\n{}", tail(&self.console_log))
                }
            }
        };
        if let Some(line) = newest.filter(|line| !line.is_empty()) {
            append(&mut printed, &line, echo);
        }
        ensure!(
            status == 0,
            "in the guest, exit status {status}: {script}\n{printed}{}",
            tail(&self.console_log)
        );
        Ok(printed)
    }

    /// Starts a script and does not wait for its end: [`line`](Self::line) gives what it prints.
    pub fn start(&mut self, script: &str) -> anyhow::Result<()> {
        self.send(script).map(drop)
    }

    /// The next line that the script prints; `None` when none comes before `deadline`.
    ///
    /// Fails when the script or the guest ends.
    pub fn line(&mut self, deadline: Instant) -> anyhow::Result<Option<String>> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(AgentEvent::Line(line)) => Ok(Some(line)),
            Ok(AgentEvent::Exit { status, .. }) => bail!("the script ended with status {status}"),
            Ok(AgentEvent::Ready) => bail!("the guest rebooted\n{}", tail(&self.console_log)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest is gone\n{}", tail(&self.console_log)),
        }
    }

    /// Resets the machine through QMP, as the reset button would, and waits until it has booted again.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.qmp("system_reset")?;
        self.wait_ready()
    }

    /// Reboots from inside, without syncing or unmounting, and waits until the guest has booted again.
    pub fn reboot(&mut self) -> anyhow::Result<()> {
        self.send("reboot -f")?;
        self.wait_ready()
    }

    /// Unmounts the file system and powers the guest off.
    pub fn power_off(mut self) -> anyhow::Result<()> {
        self.run(&format!("cd /; sync; ! mountpoint -q {MOUNT_POINT} || umount {MOUNT_POINT}"))?;
        self.send("poweroff -f")?;
        let status = self.qemu.wait(BOOT_LIMIT)?;
        ensure!(status.success(), "QEMU ended with {status}\n{}", tail(&self.console_log));
        Ok(())
    }

    /// Kills QEMU, as a crash of the virtual machine monitor would. Returns the lines that the guest had printed and
    /// nobody had asked for.
    pub fn kill(mut self) -> Vec<String> {
        self.qemu.kill();
        let lines = self.events.iter().filter_map(|event| match event {
            AgentEvent::Line(line) => Some(line),
            AgentEvent::Ready | AgentEvent::Exit { .. } => None,
        });
        lines.collect()
    }

    /// Gives the console to the user until the shell that it starts there ends.
    ///
    /// `rows` and `columns` are the size of the user's terminal, which must be in raw mode. The thread that reads
    /// `input` stays behind, blocked, until the next byte or the end of the process.
    pub fn attach(
        &mut self,
        mut input: impl Read + Send + 'static,
        (rows, columns): (u16, u16),
    ) -> anyhow::Result<()> {
        let mut console = self.console.try_clone()?;
        std::thread::spawn(move || std::io::copy(&mut input, &mut console));
        self.console_shown.store(true, Ordering::Relaxed);
        let shell = format!(
            "stty -F /dev/ttyS0 rows {rows} cols {columns} sane\n\
             cd {MOUNT_POINT}\n\
             PS1='guest:\\w\\$ ' setsid cttyhack bash </dev/ttyS0 >/dev/ttyS0 2>&1\n\
             true"
        );
        /// A user may stay as long as they like; a day is for ever.
        const SESSION_LIMIT: Duration = Duration::from_secs(24 * 3600);
        let result = self.run_with(&shell, Echo::Quiet, SESSION_LIMIT);
        self.console_shown.store(false, Ordering::Relaxed);
        result.map(drop)
    }

    fn send(&mut self, script: &str) -> anyhow::Result<u64> {
        self.next_id += 1;
        writeln!(self.agent, "{} {}", self.next_id, BASE64.encode(script))
            .context("the guest's agent is gone")?;
        Ok(self.next_id)
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        while !matches!(self.event(deadline, "boot")?, AgentEvent::Ready) {}
        Ok(())
    }

    fn event(&mut self, deadline: Instant, doing: &str) -> anyhow::Result<AgentEvent> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest took too long: {doing}\n{}", tail(&self.console_log))
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the guest is gone: {doing}\n{}", tail(&self.console_log))
            }
        }
    }

    /// Executes a QMP command without arguments. Events that arrive before its answer are passed over.
    fn qmp(&mut self, command: &str) -> anyhow::Result<()> {
        writeln!(self.qmp.get_mut(), "{{\"execute\":\"{command}\"}}")?;
        loop {
            let answer = self.qmp_line()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            ensure!(answer.get("error").is_none(), "QMP {command}: {answer}");
        }
    }

    fn qmp_line(&mut self) -> anyhow::Result<serde_json::Value> {
        let mut line = String::new();
        self.qmp.read_line(&mut line).context("QMP")?;
        serde_json::from_str(&line).with_context(|| format!("QMP: not JSON: {line:?}"))
    }
}

fn qemu_command(artifacts: &Artifacts, socket: &Path, hardware: &Hardware) -> std::process::Command {
    let Hardware { memory_mib, cpus, request_queues, queue_size } = hardware;
    let mut command = tethered("qemu-system-x86_64");
    command.args([
        "-M",
        "q35,accel=tcg",
        "-cpu",
        "max",
        "-display",
        "none",
        "-nic",
        "none",
        "-no-user-config",
    ]);
    command.args(["-vga", "none", "-nodefaults"]);
    command.args(["-smp", &cpus.to_string(), "-m", &memory_mib.to_string()]);
    command.args(["-object", &format!("memory-backend-memfd,id=mem,size={memory_mib}M,share=on")]);
    command.args(["-numa", "node,memdev=mem"]);
    command.arg("-chardev").arg(format!("socket,id=fs,path={}", socket.display()));
    command.arg("-device").arg(format!(
        "vhost-user-fs-pci,chardev=fs,tag={TAG},queue-size={queue_size},num-request-queues={request_queues}"
    ));
    command.arg("-kernel").arg(&artifacts.kernel).arg("-initrd").arg(&artifacts.initramfs);
    command.args(["-append", "console=ttyS0 quiet"]);
    command
}

/// Waits for QEMU to connect to one of the sockets it was told.
fn accept(qemu: &mut Supervised, listener: &UnixListener) -> anyhow::Result<UnixStream> {
    let mut connection = None;
    wait_until("QEMU connects its serial ports", QEMU_LIMIT, || {
        qemu.check_running()?;
        match listener.accept() {
            Ok((stream, _)) => connection = Some(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        Ok(connection.is_some())
    })?;
    let stream = connection.context("no connection")?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Copies the console to its log and, while `shown`, to standard output. Ends with the connection.
fn spawn_console_reader(mut console: UnixStream, mut log: File, shown: Arc<AtomicBool>) {
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let length = console.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            log.write_all(&buffer[..length])?;
            if shown.load(Ordering::Relaxed) {
                let mut terminal = std::io::stdout().lock();
                terminal.write_all(&buffer[..length])?;
                terminal.flush()?;
            }
        }
    });
}

/// Turns the agent's lines into events. Ends with the connection, which the receiver sees as a disconnect.
fn spawn_agent_reader(agent: UnixStream, events: Sender<AgentEvent>) {
    std::thread::spawn(move || {
        for line in BufReader::new(agent).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).into_owned();
            if events.send(parse_agent_line(line)).is_err() {
                return;
            }
        }
    });
}

fn parse_agent_line(line: String) -> AgentEvent {
    if line == "@@ready" {
        return AgentEvent::Ready;
    }
    let exit = line.strip_prefix("@@exit ").and_then(|rest| rest.split_once(' '));
    if let Some((Ok(id), Ok(status))) = exit.map(|(id, status)| (id.parse(), status.parse())) {
        return AgentEvent::Exit { id, status };
    }
    AgentEvent::Line(line)
}

/// Adds a line to what a command printed, and shows it if asked for.
pub(crate) fn append(printed: &mut String, line: &str, echo: Echo) {
    if echo == Echo::Lines {
        println!("    | {line}");
    }
    printed.push_str(line);
    printed.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_lines_are_told_apart() {
        assert!(matches!(parse_agent_line("@@ready".into()), AgentEvent::Ready));
        assert!(matches!(parse_agent_line("@@exit 7 3".into()), AgentEvent::Exit { id: 7, status: 3 }));
        assert!(matches!(parse_agent_line("@@exit x 3".into()), AgentEvent::Line(_)));
        assert!(matches!(parse_agent_line("text @@ready".into()), AgentEvent::Line(_)));
    }
}
