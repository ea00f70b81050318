//! Benchmarks of vhostfs against virtiofsd.
//!
//! | module | is |
//! |---|---|
//! | [`client`] | a synthetic vhost-user-fs guest |
//! | [`load`], [`workloads`] | the loop that keeps requests under way, and what they are |
//! | [`guest`], [`material`] | what a real guest does, and what it unpacks and clones |
//! | [`server`], [`machine`] | the servers as processes on a core; what the cores can do at best |
//! | [`cases`] | the rows: what is measured, and what is to be reached |
//! | [`result`], [`report`] | figures and goals; terminal, JSON, Markdown and picture |
//! | [`run`] | the choices of one run |
//!
//! What holds for every figure: ours and the peer's come from one run, in alternating rounds, since the machine may
//! be noisy; the median of the rounds counts; content that is read is compared with what was written.

pub mod client;
pub mod load;
pub mod workloads;

pub mod guest;
pub mod material;

pub mod machine;
pub mod server;

pub mod cases;
pub mod result;
pub mod run;

pub mod report;
