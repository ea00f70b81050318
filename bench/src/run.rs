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
    /// Boots of each real guest.
    pub boots: u32,
    /// Names that a guest's row makes, changes or removes.
    pub guest_names: u64,
    /// Bytes of the files for direct I/O.
    pub direct_file_len: u64,
    /// Files in the tree of the memory rows.
    pub tree_files: u64,
    /// Removed at the end.
    pub scratch: tempfile::TempDir,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// A look, not for the record.
    Quick,
    /// Below ten minutes on a quiet machine.
    Usual,
    /// With the tree of a million files.
    Long,
}

impl Run {
    /// A run with its scratch folder below `parent`.
    pub fn new(names: Vec<String>, programs: Programs, scale: Scale, parent: &Path) -> anyhow::Result<Self> {
        let scratch = tempfile::Builder::new().prefix("vhostfs-bench-").tempdir_in(parent)?;
        let pick = |quick: u64, usual: u64, long: u64| match scale {
            Scale::Quick => quick,
            Scale::Usual => usual,
            Scale::Long => long,
        };
        Ok(Self {
            names,
            programs,
            rounds: pick(3, 5, 9) as u32,
            round: Duration::from_millis(pick(200, 500, 1000)),
            boots: pick(1, 3, 5) as u32,
            guest_names: pick(1000, 2000, 4000),
            direct_file_len: pick(64 << 20, 256 << 20, 256 << 20),
            tree_files: pick(10_000, 50_000, 1_000_000),
            scratch,
        })
    }

    /// Where what guests unpack and clone lies.
    pub fn material(&self) -> PathBuf {
        self.scratch().join("material")
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
