//! `cargo xtask fuzz`: runs the fuzz targets of the `fuzz` package, one after the other.
//!
//! `cargo fuzz` builds them; what it needs of the compiler is only to be had on a stable one by RUSTC_BOOTSTRAP. Each
//! run begins with the inputs in `fuzz/corpus` and leaves them as they are, unless told to keep what it found.

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use vhostfs_tests::{
    process::output_of,
    progress::{note, step},
};

use crate::{build, setup};

/// Targets, as they are called in `fuzz/Cargo.toml`.
pub(crate) const TARGETS: [&str; 4] = ["image", "fuse", "chain", "vhost-user"];

/// Where `cargo fuzz` puts what it builds, in the target folder.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Limits and habits of the fuzzer:
///
/// - an input of 2 KiB makes tens of steps, more only make it slow;
/// - an input takes some milliseconds, and a minute only when it would take for ever, or the machine is very busy;
/// - a target needs 100 MiB;
/// - SIGBUS in guest memory is the business of the code under test;
/// - the choice of inputs by entropy takes more time here than it saves, with thousands of features per input.
const FUZZER_OPTIONS: [&str; 6] =
    ["-max_len=2048", "-len_control=0", "-timeout=60", "-rss_limit_mb=1024", "-handle_bus=0", "-entropic=0"];

/// Time between two lines that tell how far a run is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// Lines of the fuzzer's output that are shown with a finding.
const TAIL_LINES: usize = 60;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only this target.
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long to run each target.
    #[arg(long, value_name = "N")]
    seconds: u64,
    /// Where chance begins.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u32,
    /// Build with the address sanitizer: several times slower, and finds leaks and errors of unsafe code.
    #[arg(long)]
    address_sanitizer: bool,
    /// Afterwards replace the kept corpus by a small one with the coverage of it and of all that was found.
    #[arg(long)]
    keep: bool,
}

/// What became of a run.
pub(crate) struct Outcome {
    executions: u64,
    coverage: u64,
    /// The input that fails.
    finding: Option<PathBuf>,
}

/// Runs what was asked for. False if there was a finding.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let programs = Programs::build(options.address_sanitizer)?;
    let chosen = |target: &&str| options.target.as_deref().is_none_or(|only| only == *target);
    let mut table = Vec::new();
    for target in TARGETS.into_iter().filter(chosen) {
        let outcome = step(&format!("fuzz {target} for {} s", options.seconds), || {
            programs.run(target, options.seconds, options.seed, options.keep)
        })?;
        table.push((target, outcome));
    }
    println!("\n{:<12} {:>12} {:>10}  finding", "target", "executions", "coverage");
    for (target, outcome) in &table {
        let finding = outcome.finding.as_ref().map_or("none".to_owned(), |path| path.display().to_string());
        println!("{target:<12} {:>12} {:>10}  {finding}", outcome.executions, outcome.coverage);
    }
    for (target, path) in
        table.iter().filter_map(|(target, outcome)| Some((target, outcome.finding.as_ref()?)))
    {
        println!("\nto replay it: cargo run --package vhostfs-fuzz --bin {target} {}", path.display());
    }
    Ok(table.iter().all(|(_, outcome)| outcome.finding.is_none()))
}

/// The targets' programs.
pub(crate) struct Programs {
    folder: PathBuf,
}

impl Programs {
    /// Builds them, and what that needs.
    pub(crate) fn build(address_sanitizer: bool) -> anyhow::Result<Self> {
        let cargo_fuzz = setup::ensure_fuzzer()?;
        // Another sanitizer makes other programs: they would replace each other.
        let sanitizer = if address_sanitizer { "address" } else { "none" };
        let target_dir = build::target_dir().join(format!("fuzz-{sanitizer}"));
        step("build the fuzz targets", || {
            let mut command = Command::new(cargo_fuzz);
            command
                .args(["build", "--sanitizer", sanitizer, "--codegen-units", "16", "--target", TRIPLE])
                .arg("--target-dir")
                .arg(&target_dir)
                .current_dir(build::workspace())
                .env("RUSTC_BOOTSTRAP", "1")
                // Optimising across crates takes longer than it saves.
                .env("CARGO_PROFILE_RELEASE_LTO", "off");
            build::run_shown(&mut command)
        })?;
        Ok(Self { folder: target_dir.join(TRIPLE).join("release") })
    }

    /// Runs a target.
    pub(crate) fn run(&self, target: &str, seconds: u64, seed: u32, keep: bool) -> anyhow::Result<Outcome> {
        let corpus = fuzz_folder().join("corpus").join(target);
        let findings = fuzz_folder().join("artifacts").join(target);
        fs::create_dir_all(&findings)?;
        let new = tempfile::tempdir()?;
        let mut command = self.fuzzer(target);
        command
            .arg(format!("-seed={seed}"))
            .arg(format!("-max_total_time={seconds}"))
            // A folder's name, with the separator.
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .arg(new.path())
            .arg(&corpus);
        let outcome = watch(&mut command, target, seconds)?;
        if keep && outcome.finding.is_none() {
            self.merge(target, &corpus, new.path())?;
        }
        Ok(outcome)
    }

    fn fuzzer(&self, target: &str) -> Command {
        let mut command = Command::new(self.folder.join(target));
        command.args(FUZZER_OPTIONS).env("RUST_BACKTRACE", "1");
        command
    }

    /// Replaces the kept corpus by a small one that covers the same code as it and what was found. How often an input
    /// passes through code does not count: that would keep ten times as many.
    fn merge(&self, target: &str, corpus: &Path, new: &Path) -> anyhow::Result<()> {
        let merged = tempfile::tempdir_in(fuzz_folder())?;
        step("minimize the corpus", || {
            let mut command = self.fuzzer(target);
            command.args(["-set_cover_merge=1", "-use_counters=0"]);
            output_of(command.arg(merged.path()).arg(new).arg(corpus))
        })?;
        fs::remove_dir_all(corpus)?;
        fs::rename(merged.keep(), corpus)?;
        fs::set_permissions(corpus, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(())
    }
}

fn fuzz_folder() -> PathBuf {
    build::workspace().join("fuzz")
}

/// Runs a fuzzer, tells how far it is, and what it found.
fn watch(command: &mut Command, target: &str, seconds: u64) -> anyhow::Result<Outcome> {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let output = BufReader::new(child.stderr.take().context("no standard error")?);
    let (began, mut told) = (Instant::now(), Instant::now());
    let mut outcome = Outcome { executions: 0, coverage: 0, finding: None };
    let mut tail = VecDeque::new();
    for line in output.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        outcome.take_in(&line);
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            let (Outcome { executions, coverage, .. }, done) = (&outcome, began.elapsed().as_secs());
            note(&format!("{target}: {done} of {seconds} s, {executions} executions, coverage {coverage}"));
        }
        if !line.starts_with('#') {
            tail.push_back(line);
            if tail.len() > TAIL_LINES {
                tail.pop_front();
            }
        }
    }
    let status = child.wait()?;
    if !status.success() {
        for line in &tail {
            eprintln!("    {line}");
        }
        ensure!(outcome.finding.is_some(), "the fuzzer of {target} ended with {status}");
    }
    Ok(outcome)
}

impl Outcome {
    /// Takes in a line of the fuzzer: `#1024 NEW cov: 12 ft: 34 ...`, or the name of a file that fails.
    fn take_in(&mut self, line: &str) {
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.finding = Some(PathBuf::from(path.trim()));
        }
        let Some(rest) = line.strip_prefix('#') else { return };
        let mut words = rest.split_whitespace();
        if let Some(Ok(executions)) = words.next().map(str::parse) {
            self.executions = executions;
        }
        if let Some(Ok(coverage)) = words.skip_while(|word| *word != "cov:").nth(1).map(str::parse) {
            self.coverage = coverage;
        }
    }

    /// Whether nothing was found.
    pub(crate) fn is_clean(&self) -> bool {
        self.finding.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_fuzzer_are_understood() {
        let mut outcome = Outcome { executions: 0, coverage: 0, finding: None };
        outcome.take_in("#824\tREDUCE cov: 11896 ft: 26976 corp: 65/172b lim: 4 exec/s: 28 rss: 425Mb");
        outcome.take_in("INFO: Seed: 7");
        assert_eq!((outcome.executions, outcome.coverage), (824, 11896));
        assert!(outcome.is_clean());
        outcome.take_in("artifact_prefix='a/'; Test unit written to a/crash-12");
        assert_eq!(outcome.finding, Some(PathBuf::from("a/crash-12")));
    }
}
