//! `cargo xtask test`: every test there is, with a table at the end whose last line counts them.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use vhostfs_tests::{
    artifacts::{Artifacts, Server},
    cases::{CASES, Case, CaseContext, Scale},
    process::tail,
    progress::{seconds, step},
};

use crate::{build, fuzz, setup};

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only this test; may be given several times. `--list` shows the names.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// List the tests and end.
    #[arg(long)]
    list: bool,
    /// Full counts: a million fsx operations, 100 resets.
    #[arg(long)]
    long: bool,
    /// Run the guest tests against this virtiofsd instead, to tell a defect of ours from a defect of a test.
    #[arg(long, value_name = "VIRTIOFSD")]
    peer: Option<PathBuf>,
}

/// A test that runs on the host.
struct HostTest {
    name: &'static str,
    about: &'static str,
    run: fn() -> anyhow::Result<Counts>,
}

/// Tests on the host, in order.
const HOST_TESTS: &[HostTest] = &[
    HostTest { name: "format", about: "cargo fmt --check", run: format },
    HostTest { name: "lints", about: "cargo clippy, no warning allowed", run: lints },
    HostTest { name: "documentation", about: "cargo doc, no warning allowed", run: documentation },
    HostTest { name: "workspace", about: "cargo test of every package", run: workspace },
    HostTest {
        name: "root",
        about: "the tests that `workspace` leaves out, as root or through sudo",
        run: as_root,
    },
    HostTest { name: "crash", about: "power cuts on a simulated disk for 60 seconds, seed 1", run: crash },
    HostTest { name: "fuzz", about: "each fuzz target for 20 seconds on the kept inputs", run: fuzz_targets },
];

/// Tests that passed and failed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
}

impl Counts {
    const ONE_PASSED: Self = Self { passed: 1, failed: 0 };
    const ONE_FAILED: Self = Self { passed: 0, failed: 1 };
}

/// A row of the table.
struct Row {
    name: String,
    counts: Counts,
    took: Duration,
}

/// Runs the tests chosen. False if one failed, which the table then shows.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    if options.list {
        print_list();
        return Ok(true);
    }
    check_names(&options.only)?;
    let chosen = |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    let mut rows = Vec::new();
    for test in HOST_TESTS.iter().filter(|test| chosen(test.name)) {
        record(&mut rows, test.name, test.run);
    }
    let cases: Vec<&Case> = CASES.iter().filter(|case| chosen(case.name)).collect();
    if !cases.is_empty() {
        run_cases(&mut rows, &cases, options);
    }
    Ok(summary(&rows))
}

fn run_cases(rows: &mut Vec<Row>, cases: &[&Case], options: &Options) {
    let mut artifacts = Err(anyhow::anyhow!("not set up"));
    record(rows, "guest set-up", || {
        artifacts = Ok(prepare(options)?);
        Ok(Counts::ONE_PASSED)
    });
    let scale = if options.long { Scale::Long } else { Scale::Short };
    for case in cases {
        record(rows, case.name, || match &artifacts {
            Ok(artifacts) => run_case(case, artifacts, scale).map(|()| Counts::ONE_PASSED),
            Err(_) => bail!("could not run: the guest set-up failed"),
        });
    }
}

fn prepare(options: &Options) -> anyhow::Result<Artifacts> {
    setup::ensure(setup::Purpose::Tests, || match &options.peer {
        Some(program) => Ok(Server::Virtiofsd(program.clone())),
        None => build::programs(),
    })
}

/// Runs a case in a scratch folder of its own. A failure keeps its logs and shows their ends.
fn run_case(case: &Case, artifacts: &Artifacts, scale: Scale) -> anyhow::Result<()> {
    let scratch = tempfile::Builder::new().prefix(case.name).tempdir_in(&artifacts.run_dir)?;
    let result = (case.run)(&CaseContext { artifacts, scratch: scratch.path(), scale });
    if result.is_err() {
        keep_logs(case.name, scratch.path())?;
    }
    result
}

fn keep_logs(name: &str, scratch: &Path) -> anyhow::Result<()> {
    let kept = build::target_dir().join("guest-logs").join(name);
    fs::create_dir_all(&kept)?;
    for entry in fs::read_dir(scratch)? {
        let log = entry?.path();
        if log.extension().is_some_and(|extension| extension == "log") {
            let copy = kept.join(log.file_name().unwrap_or_default());
            fs::copy(&log, &copy)?;
            eprintln!("{}", tail(&copy));
        }
    }
    Ok(())
}

fn record(rows: &mut Vec<Row>, name: &str, test: impl FnOnce() -> anyhow::Result<Counts>) {
    let began = Instant::now();
    let counts = step(name, test).unwrap_or_else(|error| {
        eprintln!("{name}: {error:#}");
        Counts::ONE_FAILED
    });
    rows.push(Row { name: name.to_owned(), counts, took: began.elapsed() });
}

/// Prints the table and the count. True if nothing failed.
fn summary(rows: &[Row]) -> bool {
    println!("\n{:<16} {:>8} {:>8} {:>10}", "test", "passed", "failed", "time");
    for Row { name, counts, took } in rows {
        let mark = if counts.failed == 0 { "" } else { "  FAILED" };
        println!("{name:<16} {:>8} {:>8} {:>10}{mark}", counts.passed, counts.failed, seconds(*took));
    }
    let passed: u64 = rows.iter().map(|row| row.counts.passed).sum();
    let failed: u64 = rows.iter().map(|row| row.counts.failed).sum();
    println!("\n{passed} passed, {failed} failed");
    failed == 0
}

fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    let host = HOST_TESTS.iter().map(|test| (test.name, test.about));
    host.chain(CASES.iter().map(|case| (case.name, case.about)))
}

fn print_list() {
    for (name, about) in names() {
        println!("{name:<16} {about}");
    }
}

fn check_names(only: &[String]) -> anyhow::Result<()> {
    for wanted in only {
        ensure!(
            names().any(|(name, _)| name == wanted),
            "no test is named {wanted}; see `cargo xtask test --list`"
        );
    }
    Ok(())
}

fn format() -> anyhow::Result<Counts> {
    build::run_shown(build::cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Counts::ONE_PASSED)
}

fn lints() -> anyhow::Result<Counts> {
    let mut command = build::cargo();
    command.args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]);
    build::run_shown(&mut command)?;
    Ok(Counts::ONE_PASSED)
}

fn documentation() -> anyhow::Result<Counts> {
    let mut command = build::cargo();
    command.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings");
    build::run_shown(&mut command)?;
    Ok(Counts::ONE_PASSED)
}

fn workspace() -> anyhow::Result<Counts> {
    let mut command = build::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    count_results(&mut command)
}

/// Runs every test that is marked as ignored: only what needs root is.
fn as_root() -> anyhow::Result<Counts> {
    let mut command = build::cargo();
    command.args(["test", "--workspace", "--tests", "--no-fail-fast"]);
    if !rustix::process::geteuid().is_root() {
        ensure!(
            Path::new("/usr/bin/sudo").exists(),
            "some tests need root, and there is no sudo; run as root"
        );
        // Cargo builds as the user, and only what it built runs as root.
        command.args(["--config", "target.'cfg(all())'.runner = 'sudo'"]);
    }
    command.args(["--", "--ignored"]);
    let counts = count_results(&mut command)?;
    ensure!(counts.passed + counts.failed > 0, "no test was found that needs root; this step should go");
    Ok(counts)
}

/// The same seed in every run: a failure is the change's.
fn crash() -> anyhow::Result<Counts> {
    build::run_shown(crate::crash::simulation()?.args(["--seconds", "60", "--seed", "1"]))?;
    Ok(Counts::ONE_PASSED)
}

/// Runs each fuzz target for a while, always from the same seed.
fn fuzz_targets() -> anyhow::Result<Counts> {
    const SECONDS: u64 = 20;
    const SEED: u32 = 1;
    let programs = fuzz::Programs::build(false)?;
    let mut counts = Counts::default();
    for target in fuzz::TARGETS {
        let outcome = step(&format!("fuzz {target}"), || programs.run(target, SECONDS, SEED, false))?;
        match outcome.is_clean() {
            true => counts.passed += 1,
            false => counts.failed += 1,
        }
    }
    Ok(counts)
}

/// Runs `cargo test`, shows its output and adds up its result lines.
fn count_results(command: &mut Command) -> anyhow::Result<Counts> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
    let mut counts = Counts::default();
    for line in BufReader::new(child.stdout.take().context("no standard output")?).lines() {
        let line = line?;
        println!("{line}");
        if let Some(more) = parse_result(&line) {
            counts.passed += more.passed;
            counts.failed += more.failed;
        }
    }
    let status = child.wait()?;
    if !status.success() && counts.failed == 0 {
        // It did not build, or a test process died without counting.
        counts.failed = 1;
    }
    Ok(counts)
}

/// Reads `test result: ok. 12 passed; 1 failed; ...`.
fn parse_result(line: &str) -> Option<Counts> {
    let results = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let mut counts = Counts::default();
    for part in results.split("; ") {
        match part.split_once(' ') {
            Some((number, "passed")) => counts.passed = number.parse().ok()?,
            Some((number, "failed")) => counts.failed = number.parse().ok()?,
            _ => {}
        }
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted() {
        let line = "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(parse_result(line), Some(Counts { passed: 12, failed: 1 }));
        assert_eq!(parse_result("running 3 tests"), None);
    }
}
