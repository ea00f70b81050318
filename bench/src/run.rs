//! What a run is to measure, how long, with which programs, and where its files lie.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{report::terminal, result::Row, server::Programs};

/// A run's choices.
#[derive(Debug)]
pub struct Run {
    /// Parts of the names of the wanted rows or tables; all if there are none.
    pub names: Vec<String>,
    /// The servers.
    pub programs: Programs,
    /// Rounds of each case, without the one that warms up.
    pub rounds: u32,
    /// Time of a round.
    pub round: Duration,
    /// Bytes of the files for direct I/O.
    pub direct_file_len: u64,
    /// Files in the tree of the memory rows.
    pub tree_files: u64,
    /// Whether this is the short form.
    pub is_quick: bool,
    /// Removed at the end.
    pub scratch: tempfile::TempDir,
}

impl Run {
    /// The long or the short form, with its scratch folder below `parent`.
    pub fn new(
        names: Vec<String>,
        programs: Programs,
        is_quick: bool,
        parent: &Path,
    ) -> anyhow::Result<Self> {
        let scratch = tempfile::Builder::new().prefix("vhostfs-bench-").tempdir_in(parent)?;
        let (rounds, milliseconds) = if is_quick { (3, 300) } else { (7, 1000) };
        Ok(Self {
            names,
            programs,
            rounds,
            round: Duration::from_millis(milliseconds),
            direct_file_len: if is_quick { 64 << 20 } else { 256 << 20 },
            tree_files: if is_quick { 20_000 } else { 1_000_000 },
            is_quick,
            scratch,
        })
    }

    /// The folder for images, trees, sockets and logs.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Whether a row is to be measured.
    pub fn wants(&self, table: &str, row: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| table == name || row.contains(name.as_str()))
    }

    /// Shows a row as soon as it is measured.
    pub fn show(&self, row: &Row) {
        println!("{}", terminal::line(row));
    }
}

/// Folder for scratch folders if none is given.
pub fn default_scratch_parent() -> PathBuf {
    std::env::temp_dir()
}
