//! The guest kernel: Debian's cloud kernel, unpacked into the cache without being installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use vhostfs_tests::{process::output_of, progress::step};

use super::apt;

/// Packages that depend on the newest build of a kernel. On Debian 12 the series comes from its updates or backports; on
/// Debian 13 it is the only one, and older releases of this list's first name are gone.
const KERNELS: &[&str] = &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];

/// Returns the kernel, downloading it if the cache has none. One that is there is kept: nothing needs the newest build.
pub(super) fn ensure(cache: &Path) -> anyhow::Result<PathBuf> {
    let folder = cache.join("kernel");
    if let Some(kernel) = find(&folder) {
        return Ok(kernel);
    }
    step("download the guest kernel", || download(&folder))?;
    find(&folder).context("the kernel package has no /boot/vmlinuz-*")
}

fn find(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    let mut kernels: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    kernels
        .retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    kernels.sort();
    kernels.pop()
}

fn download(folder: &Path) -> anyhow::Result<()> {
    let package = match newest_package() {
        Ok(package) => package,
        Err(_) => {
            apt::update()?;
            newest_package()?
        }
    };
    fs::create_dir_all(folder)?;
    let scratch = tempfile::tempdir_in(folder)?;
    output_of(Command::new("apt-get").current_dir(&scratch).args(["download", "--quiet", &package]))?;
    let archive = fs::read_dir(&scratch)?.next().context("apt-get download left no file")??.path();
    let tree = scratch.path().join("tree");
    output_of(Command::new("dpkg").arg("--extract").arg(&archive).arg(&tree))?;
    for entry in fs::read_dir(tree.join("boot"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("vmlinuz-") {
            fs::rename(entry.path(), folder.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// The package with the image itself, found as the dependency of the one that follows it.
fn newest_package() -> anyhow::Result<String> {
    for name in KERNELS {
        let depends = output_of(Command::new("apt-cache").args(["depends", "--important", name]));
        let depends = depends.unwrap_or_default();
        let image = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
        if let Some(image) = image {
            return Ok(format!("linux-image-{image}"));
        }
    }
    anyhow::bail!("apt knows none of {}", KERNELS.join(", "))
}
