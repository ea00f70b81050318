//! Every input that was kept does what its target asks. A failure names the file; the program of the target shows what
//! it means: `cargo run --package vhostfs-fuzz --bin TARGET FILE`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use arbitrary::Arbitrary;
use vhostfs_fuzz::{chain, fuse, image, replay, vhost_user};

fn replay_all<Input: for<'a> Arbitrary<'a>>(target: &str, run: fn(Input)) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&folder).expect("the target's corpus") {
        let path = entry.expect("an entry").path();
        let bytes = fs::read(&path).expect("an input");
        let result = catch_unwind(AssertUnwindSafe(|| replay(&bytes, run)));
        assert!(result.is_ok(), "{}", path.display());
        count += 1;
    }
    assert!(count > 0, "{} is empty", folder.display());
}

#[test]
fn images_that_were_kept() {
    replay_all("image", image::run);
}

#[test]
fn fuse_requests_that_were_kept() {
    replay_all("fuse", fuse::run);
}

#[test]
fn chains_that_were_kept() {
    replay_all("chain", chain::run);
}

#[test]
fn frontends_that_were_kept() {
    replay_all("vhost-user", vhost_user::run);
}
