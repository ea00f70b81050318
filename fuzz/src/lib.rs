//! Fuzz targets: what a hostile image, guest or frontend can send.
//!
//! | target | input | what must hold |
//! | --- | --- | --- |
//! | [`image`] | a sound image, damaged, with right checksums | checker and mount agree about what is sound |
//! | [`fuse`] | FUSE requests of one client | each gets a well-formed reply; files hold what was written; the image stays sound |
//! | [`chain`] | a virtqueue in hostile memory | chains are those that a second implementation finds |
//! | [`vhost_user`] | messages, descriptors and rings of a frontend | replies come in order; another frontend notices nothing |
//!
//! No input may make a target panic, run for ever or take much memory; `cargo xtask fuzz` sets limits for the
//! latter two. A module's `Input` is what the fuzzer's bytes are read as, its `run` is one execution: the same input
//! does the same every time.
//!
//! `fuzz_targets/` holds the programs. Built by `cargo fuzz`, one is a fuzzer; built in any other way, it replays the
//! inputs that it is given, which is what one wants under a debugger. `corpus/` holds the inputs that were kept: the
//! package's tests replay all of them.

mod disk;
mod memory;

pub mod chain;
pub mod fuse;
pub mod image;
pub mod vhost_user;

use std::process::ExitCode;

use arbitrary::{Arbitrary, Unstructured};

/// Defines the program of a target: a fuzzer, or without `cargo fuzz` a program that replays inputs.
#[macro_export]
macro_rules! target {
    ($module:ident) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|input: $crate::$module::Input| $crate::$module::run(input));

        #[cfg(not(fuzzing))]
        fn main() -> std::process::ExitCode {
            $crate::replay_files($crate::$module::run)
        }
    };
}

/// Runs a target on the bytes of an input. False for bytes that are too few to be one.
pub fn replay<Input: for<'a> Arbitrary<'a>>(bytes: &[u8], run: impl FnOnce(Input)) -> bool {
    // As the fuzzer does it, so that its inputs mean the same here.
    if bytes.len() < Input::size_hint(0).0 {
        return false;
    }
    match Input::arbitrary_take_rest(Unstructured::new(bytes)) {
        Ok(input) => {
            run(input);
            true
        }
        Err(_) => false,
    }
}

/// Replays the files named on the command line, after showing what they mean.
pub fn replay_files<Input: for<'a> Arbitrary<'a> + std::fmt::Debug>(run: fn(Input)) -> ExitCode {
    let mut status = ExitCode::SUCCESS;
    for path in std::env::args_os().skip(1) {
        match std::fs::read(&path) {
            Ok(bytes) => {
                let is_input = replay::<Input>(&bytes, |input| {
                    println!("{}: {input:#?}", path.display());
                    run(input);
                });
                if !is_input {
                    println!("{}: no input", path.display());
                }
            }
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                status = ExitCode::FAILURE;
            }
        }
    }
    status
}
