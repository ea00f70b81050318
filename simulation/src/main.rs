//! The file system on a simulated disk, against an oracle: every promise that it makes, and what power cuts,
//! failing devices and full devices may and may not do to it.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `operation` | operations as data, and random ones |
//! | `oracle` | what each operation should do: a plain tree in memory |
//! | `world` | a mounted file system on a simulated disk |
//! | `workload` | operations on both sides, compared after each one |
//! | `promise` | what a power cut may leave of a workload |
//! | `crash` | power cuts during random workloads and their recovery |
//! | `sequences` | power cuts during every sequence of one and of two operations |
//! | `making` | power cuts during mkfs |
//! | `faults` | failing devices |
//! | `campaign` | all of these for as long as one likes: `cargo xtask crash` |
//! | `model` | test: random operations, remounts, a full device |
//! | `space` | test: too little space |
//! | `races` | test: operations at the same time |
//! | `mount_cost` | test: what a mount reads |
//! | `stale` | test: journal blocks that do not belong to the journal |
//! | `give_back` | test: discards, and the metadata chunks of deleted inodes |
//!
//! Everything is drawn from seeds; a failure prints what repeats it.

mod campaign;
mod crash;
mod faults;
#[cfg(test)]
mod give_back;
mod making;
#[cfg(test)]
mod model;
#[cfg(test)]
mod mount_cost;
mod operation;
mod oracle;
mod promise;
#[cfg(test)]
mod races;
mod sequences;
#[cfg(test)]
mod space;
#[cfg(test)]
mod stale;
mod workload;
mod world;

use std::process::ExitCode;

use clap::Parser as _;

/// Each state is a device, a file system and its caches, made and dropped again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match campaign::run(&campaign::Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("simulation: {error:#}");
            ExitCode::FAILURE
        }
    }
}
