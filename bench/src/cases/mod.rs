//! The rows of the tables, by family.

pub mod round_trip;

use crate::{result::Table, run::Run};

/// Measures every wanted row.
pub fn run(run: &Run) -> anyhow::Result<Vec<Table>> {
    Ok([round_trip::run(run)?].into_iter().flatten().collect())
}

/// Table, name and question of every row.
pub fn names() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    round_trip::names().map(|(name, what)| ("round-trip", name, what))
}
