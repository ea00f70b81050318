//! `vhostfs-bench`: measures, prints and writes the tables.

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::ensure;
use clap::{Parser, Subcommand};
use vhostfs_bench::{
    cases,
    guest::Stage,
    machine::Calibration,
    report,
    result::Results,
    run::{Run, Scale},
    server::{Programs, check_program},
};

/// Measure vhostfs against virtiofsd.
///
/// Rows come in tables: round-trip (a synthetic guest on one core, the server on the other), uml-file and uml-memory (a
/// User-Mode Linux guest and the server on one core), uml-two-cores, checksums (what they cost) and footprint. Without
/// --only all are measured.
///
/// Machines are noisy: only figures of one run are compared with each other, and the machine should be otherwise
/// idle. The range of the rounds is in the JSON.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Measure only this table, or the rows whose name contains ROW; may be repeated
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Fewer and shorter rounds, smaller files: for a look, not for the record
    #[arg(long)]
    quick: bool,
    /// More rounds, and a tree of a million files
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// The vhostfs program [default: beside this program]
    #[arg(long, value_name = "PATH")]
    server: Option<PathBuf>,
    /// The virtiofsd program [default: from PATH or /usr/libexec]
    #[arg(long, value_name = "PATH")]
    peer: Option<PathBuf>,
    /// How the peer differs from a released virtiofsd, to be told beside its version
    #[arg(long, value_name = "TEXT", requires = "peer")]
    peer_note: Option<String>,
    /// Write results.json, results.md and results.svg here
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/results"))]
    out: PathBuf,
    /// Folder for images and trees: the file system that the file rows are about [default: the temporary folder]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print the names of the rows and end
    #[arg(long)]
    list: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What this program is started for by itself.
#[derive(Debug, Subcommand)]
enum Part {
    /// Do the work of rows: inside a guest.
    #[command(hide = true)]
    InGuest {
        /// Folder to work in.
        #[arg(long)]
        folder: PathBuf,
        /// Folder with the archive, the repository and the script.
        #[arg(long)]
        material: PathBuf,
        /// Length of a round.
        #[arg(long)]
        round_ms: u64,
        /// Names that a row makes, changes or removes.
        #[arg(long)]
        names: u64,
        /// Rows.
        rows: Vec<String>,
    },
}

fn main() -> ExitCode {
    match execute(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhostfs-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(arguments: Arguments) -> anyhow::Result<()> {
    if let Some(Part::InGuest { folder, material, round_ms, names, rows }) = arguments.part {
        cases::uml::perform(&Stage::new(folder, material, Duration::from_millis(round_ms), names), &rows);
        return Ok(());
    }
    if arguments.list {
        for (table, name, what) in cases::names() {
            println!("{table:14} {name:31} {what}");
        }
        return Ok(());
    }
    let programs = programs(&arguments)?;
    let scratch = arguments.scratch.unwrap_or_else(env::temp_dir);
    let environment = environment(&programs, arguments.peer_note.as_deref(), &scratch);
    let scale = match (arguments.quick, arguments.long) {
        (true, _) => Scale::Quick,
        (false, true) => Scale::Long,
        (false, false) => Scale::Usual,
    };
    let run = Run::new(arguments.only, programs, scale, &scratch)?;
    let mut results = Results { environment, calibration: Calibration::measure()?, tables: Vec::new() };
    print!("{}\n{}\n", report::terminal::environment(&results), report::terminal::headings());
    results.tables = cases::run(&run)?;
    ensure!(!results.tables.is_empty(), "no row has such a name; --list prints the names");
    println!("\n{}", report::terminal::render(&results));
    report::write(&results, &arguments.out)?;
    println!("written to {}", arguments.out.display());
    Ok(())
}

/// The servers that are there. A program that was named must be.
fn programs(arguments: &Arguments) -> anyhow::Result<Programs> {
    let beside = env::current_exe().ok().and_then(|program| Some(program.parent()?.join("vhostfs")));
    let ours = arguments.server.clone().or(beside.filter(|path| path.exists()));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders =
        env::split_paths(&path).chain([PathBuf::from("/usr/libexec"), PathBuf::from("/usr/lib/qemu")]);
    let found = || folders.find_map(|folder| Some(folder.join("virtiofsd")).filter(|path| path.exists()));
    let peer = arguments.peer.clone().or_else(found);
    for program in ours.iter().chain(&peer) {
        check_program(program)?;
    }
    ensure!(
        ours.is_some() || peer.is_some(),
        "neither vhostfs nor virtiofsd was found; name one with --server or --peer"
    );
    if peer.is_none() {
        eprintln!("no virtiofsd: name it with --peer; cargo xtask bench builds one");
    }
    Ok(Programs { ours, peer })
}

/// What the results depend on.
fn environment(programs: &Programs, peer_note: Option<&str>, scratch: &Path) -> Vec<(String, String)> {
    let output = |program: &Path, arguments: &[&str]| {
        let output = std::process::Command::new(program).args(arguments).output();
        output.map_or("unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let version =
        |path: &Option<PathBuf>| path.as_ref().map_or("absent".into(), |path| output(path, &["--version"]));
    let peer_note = peer_note.map_or(String::new(), |note| format!(", {note}"));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let date = output(Path::new("date"), &["-u", "+%Y-%m-%d %H:%M UTC"]);
    let file_system = output(Path::new("stat"), &["-f", "-c", "%T", &scratch.to_string_lossy()]);
    vec![
        ("date".into(), date),
        ("machine".into(), format!("{cores} cores, {}", model.trim_start_matches([' ', '\t', ':']))),
        ("kernel".into(), output(Path::new("uname"), &["-sr"])),
        ("files on".into(), file_system),
        ("vhostfs".into(), version(&programs.ours)),
        ("virtiofsd".into(), version(&programs.peer) + &peer_note),
    ]
}
