//! The root of QEMU guests: one cpio archive with busybox, a few real programs and the libraries they need.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use vhostfs_tests::{artifacts::GUEST_TOUR_ARCHIVE, process::output_of};

use super::{apt, made_from};

/// First program, agent: see `tests/guest`.
const INIT: &str = include_str!("../../../tests/guest/init");
const AGENT: &str = include_str!("../../../tests/guest/agent");

/// Programs taken from the host instead of busybox: those that the tour and the tests are about or that users expect
/// in their usual form.
const PROGRAMS: &[&str] = &[
    "bash",
    "cat",
    "chmod",
    "chown",
    "cp",
    "dd",
    "df",
    "du",
    "env",
    "find",
    "fio",
    "getfacl",
    "getfattr",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "setfacl",
    "setfattr",
    "sha256sum",
    "sort",
    "stat",
    "sync",
    "tar",
    "truncate",
    "xargs",
    "xz",
];

/// Version of this file's recipe, to be raised when it changes in a way its other inputs do not show.
const RECIPE: u32 = 1;

/// Makes the archive if its inputs have changed.
pub(super) fn ensure(cache: &Path, tour: &Path) -> anyhow::Result<PathBuf> {
    let archive = cache.join("initramfs.cpio");
    let versions = apt::versions(apt::GUESTS)?;
    let recipe = format!("{RECIPE}\n{PROGRAMS:?}\n{versions}\n{}\n{INIT}\n{AGENT}", tour.display());
    made_from(&archive, &recipe, "build the root of QEMU guests", || build(cache, &archive, tour))?;
    Ok(archive)
}

fn build(cache: &Path, archive: &Path, tour: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir_in(cache)?;
    let root = scratch.path();
    for folder in ["bin", "dev", "etc", "lib64", "mnt", "proc", "root", "run", "sys", "tmp", "usr/src"] {
        fs::create_dir_all(root.join(folder))?;
    }
    write_script(&root.join("init"), INIT)?;
    write_script(&root.join("agent"), AGENT)?;
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::copy(tour, root.join(GUEST_TOUR_ARCHIVE.trim_start_matches('/')))?;
    add_busybox(root)?;
    let libraries = add_programs(root)?;
    for library in libraries {
        let target = root.join(library.strip_prefix("/").context("library path is not absolute")?);
        fs::create_dir_all(target.parent().context("library without folder")?)?;
        fs::copy(&library, target).with_context(|| format!("copy {}", library.display()))?;
    }
    pack(root, archive)
}

fn write_script(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// busybox and a link for each of its commands; `PROGRAMS` replace some of them.
fn add_busybox(root: &Path) -> anyhow::Result<()> {
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for command in output_of(Command::new("busybox").arg("--list"))?.lines() {
        if command != "busybox" && !PROGRAMS.contains(&command) {
            symlink("busybox", root.join("bin").join(command))?;
        }
    }
    Ok(())
}

/// Copies the programs and returns the libraries that they need.
fn add_programs(root: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let path = ["/usr/bin", "/bin", "/usr/sbin"].iter().map(|folder| Path::new(folder).join(name));
        let path =
            path.into_iter().find(|path| path.exists()).with_context(|| format!("no program {name}"))?;
        fs::copy(&path, root.join("bin").join(name))?;
        let needed = output_of(Command::new("ldd").arg(&path))?;
        ensure!(!needed.contains("not found"), "{name} lacks a library:\n{needed}");
        libraries.extend(needed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    Ok(libraries)
}

/// Packs `root`, with all files owned by root, and moves the archive to its place.
fn pack(root: &Path, archive: &Path) -> anyhow::Result<()> {
    let part = archive.with_extension("part");
    let packed = Command::new("sh")
        .current_dir(root)
        .args(["-c", "find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 >\"$1\"", "sh"])
        .arg(&part)
        .status()?;
    ensure!(packed.success(), "cpio: {packed}");
    Ok(fs::rename(&part, archive)?)
}
