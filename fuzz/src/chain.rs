//! To come.
/// Input.
#[derive(Debug, arbitrary::Arbitrary)]
pub struct Input(u8);
/// Runs.
pub fn run(_: Input) {}
