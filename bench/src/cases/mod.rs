//! The rows of the tables, by family.

pub mod footprint;
pub mod round_trip;
pub mod uml;

use crate::{result::Table, run::Run};

/// Measures every wanted row.
pub fn run(run: &Run) -> anyhow::Result<Vec<Table>> {
    let mut tables: Vec<Table> = round_trip::run(run)?.into_iter().collect();
    tables.extend(round_trip::run_checksums(run)?);
    tables.extend(uml::run(run)?);
    tables.extend(footprint::run(run));
    Ok(tables)
}

/// Table, name and question of every row.
pub fn names() -> impl Iterator<Item = (&'static str, String, &'static str)> {
    let round_trips = round_trip::names().map(|(name, what)| ("round-trip", name.to_owned(), what));
    let checksums = round_trip::checksum_names().map(|(name, what)| ("checksums", name.to_owned(), what));
    let footprints = footprint::names().map(|(name, what)| ("footprint", name.to_owned(), what));
    round_trips.chain(checksums).chain(uml::names()).chain(footprints)
}
