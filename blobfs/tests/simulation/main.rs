//! The file system on a simulated disk, against an oracle: every promise that it makes, and what power cuts,
//! failing devices and full devices may and may not do to it.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `operation` | operations as data, and random ones |
//! | `oracle` | what each operation should do: a plain tree in memory |
//! | `world` | a mounted file system on a simulated disk |
//! | `workload` | operations on both sides, compared after each one |
//! | `model` | test: random operations, remounts, a full device |
//! | `mount_cost` | test: what a mount reads |
//! | `promise` | what a power cut may leave of a workload |
//! | `crash` | test: power cuts during random workloads and their recovery |
//! | `campaign` | the power cut tests for as long as one likes |
//! | `sequences` | test: power cuts during every sequence of one and of two operations |
//! | `faults` | test: failing devices, too little space |
//! | `stale` | test: journal blocks that do not belong to the journal |
//! | `give_back` | test: discards, and the metadata chunks of deleted inodes |
//!
//! Everything is drawn from seeds; a failure prints the one that repeats it.

mod campaign;
mod crash;
mod faults;
mod give_back;
mod model;
mod mount_cost;
mod operation;
mod oracle;
mod promise;
mod sequences;
mod stale;
mod workload;
mod world;
