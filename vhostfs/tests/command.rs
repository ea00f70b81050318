//! The program as its users meet it: exit status, and one line when something is wrong.

use std::os::unix::net::UnixListener;
use std::process::{Command, Output};

fn vhostfs(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhostfs")).args(arguments).output().unwrap()
}

/// Fails with this status and one line that gives the reason `expected`.
#[track_caller]
fn assert_refused(arguments: &[&str], status: i32, expected: &str) {
    let output = vhostfs(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("vhostfs: ") && text.contains(expected) && text.contains("; "), "{text}");
    assert!(output.stdout.is_empty());
}

#[test]
fn wrong_command_lines_are_refused_in_one_line() {
    assert_refused(&[], 2, "no command");
    assert_refused(&["fly"], 2, "unrecognized subcommand");
    assert_refused(&["serve"], 2, "required arguments were not provided: --tag <TAG> <IMAGE>");
    assert_refused(&["serve", "--tag", "t", "image"], 2, "one of --socket and --fd is needed");
    assert_refused(&["serve", "--socket", "s", "image"], 2, "--tag <TAG>");
    assert_refused(&["serve", "--socket", "s", "--fd", "3", "--tag", "t", "image"], 2, "cannot be used with");
    assert_refused(&["serve", "--socket", "s", "--tag", &"t".repeat(37), "image"], 2, "1 to 36 bytes");
    assert_refused(
        &["serve", "--socket", "s", "--tag", "t", "--queues", "0", "image"],
        2,
        "0 is not in 1..=128",
    );
    assert_refused(
        &["serve", "--socket", "s", "--tag", "t", "--guest-cache", "shared", "image"],
        2,
        "possible values: exclusive, none",
    );
    assert_refused(&["serve", "--socket", "s", "--tag", "t", "--size", "4Q", "image"], 2, "is not a size");
    assert_refused(
        &["serve", "--socket", "s", "--tag", "t", "--log", "a=b=c", "image"],
        2,
        "error parsing level filter",
    );
}

#[test]
fn unusable_descriptors_and_sockets_are_refused_before_the_image_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (socket, image) = (path("socket"), path("image"));
    let serve = ["serve", "--tag", "t", "--size", "16M", &image];
    assert_refused(&[&serve[..], &["--fd", "77"]].concat(), 1, "Bad file descriptor");
    assert_refused(
        &[&serve[..], &["--socket", &path("none/socket")]].concat(),
        1,
        "No such file or directory",
    );
    assert_refused(
        &[&serve[..], &["--socket", &socket, "--socket-group", "nobody here"]].concat(),
        1,
        "no such group",
    );
    assert_refused(&[&serve[..], &["--socket", &socket, "--cpu", "1000"]].concat(), 1, "Invalid argument");
    let _live = UnixListener::bind(&socket).unwrap();
    assert_refused(&[&serve[..], &["--socket", &socket]].concat(), 1, "another process listens");
    assert!(!std::path::Path::new(&image).exists());
}

#[test]
fn capabilities_and_help_are_printed() {
    for arguments in [&["--print-capabilities"][..], &["serve", "--print-capabilities"]] {
        let output = vhostfs(arguments);
        assert!(output.status.success());
        let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(capabilities["type"], "fs");
        assert!(capabilities["features"].is_array());
    }
    let help = String::from_utf8(vhostfs(&["serve", "--help"]).stdout).unwrap();
    for word in ["vhost-user-fs-pci", "mount -t virtiofs", "<filesystem", "--guest-cache"] {
        assert!(help.contains(word), "{word} is missing in {help}");
    }
    assert!(vhostfs(&["--version"]).status.success());
}
