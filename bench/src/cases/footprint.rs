//! What a server costs that does nothing: CPU time, and memory before and after a guest has seen a large tree.
//!
//! Memory is what the process allocated for itself (anonymous pages): neither the guest's memory, which it maps too,
//! nor the data cache, which has its own limit and is a shared memory object.

use std::{fs, path::Path, thread::sleep, time::Duration};

use anyhow::{Context as _, ensure};
use vhostfs_tests::{artifacts::MOUNT_POINT, uml::UmlGuest};

use crate::{
    client::{Client, ClientOptions, fuse::ROOT_ID},
    load,
    result::{Figure, Goal, Row, Table, Unit},
    run::Run,
    server::{Media, ServerProcess, Side},
    workloads::Create,
};

/// Files in each folder of the tree.
const FILES_PER_FOLDER: u64 = 1000;

/// Requests under way while the tree is made.
const MAKE_DEPTH: usize = 32;

/// Time to fall asleep after the last request, and time watched.
const SETTLE: Duration = Duration::from_secs(6);
const WATCHED: Duration = Duration::from_secs(5);

/// Time for a guest to look at the whole tree.
const FIND_LIMIT: Duration = Duration::from_secs(1200);

/// The line that follows the guest's look at the tree, with how much it found.
const FOUND: &str = "@@found ";

const IDLE_CPU: (&str, &str) = ("idle-cpu", "CPU time of an idle server with a guest");
const IDLE_MEMORY: (&str, &str) = ("idle-memory", "memory of an idle server with a guest");
const TREE_MEMORY: (&str, &str) = ("tree-memory", "memory after find in a guest");

/// Names and questions of the rows.
pub fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    [IDLE_CPU, IDLE_MEMORY, TREE_MEMORY].into_iter()
}

/// Measures the chosen rows.
pub fn run(run: &Run) -> Option<Table> {
    let wants = |row: (&str, &str)| run.wants("footprint", row.0);
    let mut rows = Vec::new();
    if wants(IDLE_CPU) || wants(IDLE_MEMORY) {
        let idle = both(run, idle);
        let part = |part: fn(&Idle) -> f64| -> Sides<f64> {
            idle.each_ref()
                .map(|side| side.as_ref().map(|idle| idle.as_ref().map(part).map_err(Clone::clone)))
        };
        // "0 %": below what the system's clock can tell in the time watched.
        rows.push(row(IDLE_CPU, Unit::Percent, part(|idle| idle.cpu_percent), &[Goal::Figure(0.1)]));
        rows.push(row(IDLE_MEMORY, Unit::Mebibytes, part(|idle| idle.memory_mib), &[Goal::Figure(32.0)]));
    }
    if wants(TREE_MEMORY) {
        rows.push(row(TREE_MEMORY, Unit::Mebibytes, both(run, after_find), &[Goal::Figure(200.0)]));
    }
    rows.iter().for_each(|row| run.show(row));
    let caption = format!("Footprint: image file against folder; a tree of {} files", run.tree_files);
    (!rows.is_empty()).then_some(Table { name: "footprint", caption, rows })
}

/// A figure of each side, ours first; `None` for a side that is not measured.
type Sides<T> = [Option<Result<T, String>>; 2];

fn both<T>(run: &Run, measure: fn(&Run, Side) -> anyhow::Result<T>) -> Sides<T> {
    [Side::Ours, Side::Peer].map(|side| {
        let is_there = run.programs.sides().any(|there| there == side);
        is_there.then(|| measure(run, side).map_err(|error| format!("{side:?}: {error:#}")))
    })
}

fn row((name, what): (&str, &str), unit: Unit, sides: Sides<f64>, goals: &[Goal]) -> Row {
    let mut failures = Vec::new();
    let [ours, peer] = sides.map(|side| match side? {
        Ok(value) => Some(Figure::of_rounds(vec![value], Vec::new(), Vec::new())),
        Err(why) => {
            failures.push(why);
            None
        }
    });
    let (name, what, goals) = (name.into(), what.into(), goals.to_vec());
    Row { name, what, unit, ours, peer, reference: None, goals, failures }
}

struct Idle {
    cpu_percent: f64,
    memory_mib: f64,
}

fn idle(run: &Run, side: Side) -> anyhow::Result<Idle> {
    let server = ServerProcess::start(&run.programs, side, Media::File, run.scratch())?;
    let mut client = Client::connect(server.socket(), ClientOptions::default())?;
    client.getattr(ROOT_ID)?;
    sleep(SETTLE);
    let before = server.cpu_time()?;
    sleep(WATCHED);
    let used = server.cpu_time()?.saturating_sub(before);
    let memory_mib = mebibytes(server.own_memory()?);
    drop(client);
    server.stop()?;
    Ok(Idle { cpu_percent: used.as_secs_f64() / WATCHED.as_secs_f64() * 100.0, memory_mib })
}

/// Memory in MiB after a guest has looked at the whole tree.
fn after_find(run: &Run, side: Side) -> anyhow::Result<f64> {
    let scratch = run.scratch().join("tree");
    fs::create_dir_all(&scratch)?;
    let folders = run.tree_files.div_ceil(FILES_PER_FOLDER);
    match side {
        Side::Ours | Side::Summed => make_tree(run, &scratch, folders)?,
        Side::Peer => make_host_tree(&scratch.join("file.tree"), folders)?,
    }
    let server = ServerProcess::start(&run.programs, side, Media::File, &scratch)?;
    let mut memory = None;
    // The guest stays mounted until the memory has been read.
    let script = format!("echo {FOUND}$(find {MOUNT_POINT} -type f -size 0 | wc -l); sleep 2");
    let mut on_line = |line: &str| -> anyhow::Result<()> {
        if let Some(count) = line.strip_prefix(FOUND) {
            let expected = folders * FILES_PER_FOLDER;
            ensure!(count.parse() == Ok(expected), "find saw {count} files of {expected}");
            memory = Some(mebibytes(server.own_memory()?));
        }
        Ok(())
    };
    UmlGuest::new(server.socket()).run_watched(&scratch, "find", &script, FIND_LIMIT, &mut on_line)?;
    server.stop()?;
    memory.context("the guest said nothing")
}

/// Makes the tree through a server, which is ended: the next one has seen nothing of it.
fn make_tree(run: &Run, scratch: &Path, folders: u64) -> anyhow::Result<()> {
    let server = ServerProcess::start(&run.programs, Side::Ours, Media::File, scratch)?;
    let mut client = Client::connect(server.socket(), ClientOptions::default())?;
    for folder in 0..folders {
        let folder = client.mkdir(ROOT_ID, &format!("folder{folder}"))?.nodeid;
        let mut create = Create::new(&client, folder, FILES_PER_FOLDER);
        load::run(&mut client, &mut create, MAKE_DEPTH, Duration::MAX)?;
        create.release(&mut client)?;
        create.forget(&mut client)?;
    }
    drop(client);
    server.stop()
}

fn make_host_tree(root: &Path, folders: u64) -> anyhow::Result<()> {
    for folder in 0..folders {
        let folder = root.join(format!("folder{folder}"));
        fs::create_dir_all(&folder)?;
        for file in 0..FILES_PER_FOLDER {
            fs::File::create(folder.join(format!("f{file:08}")))?;
        }
    }
    Ok(())
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
