//! Debian packages: which are needed, which are missing, how to install them.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context as _, bail};
use vhostfs_tests::{process::output_of, progress::step};

use crate::build::run_shown;

/// A list of packages with one purpose.
pub(super) type Packages = &'static [&'static str];

/// To boot QEMU guests: emulator, and the programs that go into their root.
pub(super) const GUESTS: Packages = &[
    "qemu-system-x86",
    "busybox-static",
    "bash",
    "coreutils",
    "findutils",
    "tar",
    "xz-utils",
    "fio",
    "attr",
    "acl",
    "cpio",
    "util-linux",
];

/// For the tests: User-Mode Linux and what runs in it.
pub(super) const TESTS: Packages =
    &["user-mode-linux", "e2fsprogs", "gcc", "libc6-dev", "make", "git", "sqlite3", "bzip2", "diffutils"];

/// For the fuzz targets: the fuzzer itself is C++.
pub(super) const FUZZING: Packages = &["g++"];

/// For the benchmarks: User-Mode Linux, what runs in it, and what virtiofsd is built with.
pub(super) const BENCHMARKS: Packages = &[
    "user-mode-linux",
    "fio",
    "git",
    "sqlite3",
    "tar",
    "gcc",
    "libc6-dev",
    "libcap-ng-dev",
    "libseccomp-dev",
    "patch",
];

/// The only package that Debian 12 has too old: its QEMU 7.2 lacks what the guests use.
const FROM_BACKPORTS: &str = "qemu-system-x86";

/// Debian 12's backports, if the machine does not know them yet.
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/vhostfs-backports.sources";
const BACKPORTS: &str = "# Added by cargo xtask for QEMU 10.\n\
    Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm-backports\nComponents: main\n\
    Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";

/// QEMU's first major version that the guests' command line is known to work with.
const QEMU_MAJOR_MIN: u32 = 10;

/// Installs what is missing of `lists`. Does not touch the network when nothing is.
pub(super) fn ensure_installed(lists: &[Packages]) -> anyhow::Result<()> {
    let wanted: Vec<&str> = lists.concat();
    let installed = installed_versions(&wanted)?;
    let is_missing = |package: &&&str| match installed.get(**package) {
        None => true,
        Some(version) => **package == FROM_BACKPORTS && major(version) < QEMU_MAJOR_MIN,
    };
    let missing: Vec<&str> = wanted.iter().filter(is_missing).copied().collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(&format!("install packages: {}", missing.join(" ")), || install(&missing))
}

/// Refreshes the package lists.
pub(super) fn update() -> anyhow::Result<()> {
    run_shown(as_root("apt-get")?.args(["update", "--quiet"]))
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let backports = is_bookworm() && packages.contains(&FROM_BACKPORTS);
    if backports && !knows_backports()? {
        add_backports()?;
    }
    update()?;
    let (newer, plain): (Vec<&str>, Vec<&str>) =
        packages.iter().partition(|package| backports && **package == FROM_BACKPORTS);
    for (suite, packages) in [(None, plain), (Some("bookworm-backports"), newer)] {
        if packages.is_empty() {
            continue;
        }
        let mut command = as_root("apt-get")?;
        command.args(["install", "--yes", "--quiet", "--no-install-recommends"]);
        if let Some(suite) = suite {
            command.args(["--target-release", suite]);
        }
        run_shown(command.args(packages))?;
    }
    Ok(())
}

/// A command with root's rights: as it is for root, through sudo otherwise.
fn as_root(program: &str) -> anyhow::Result<Command> {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("env")
    } else if Path::new("/usr/bin/sudo").exists() {
        let mut command = Command::new("sudo");
        command.arg("env");
        command
    } else {
        bail!(
            "packages are missing and cannot be installed: not root, and there is no sudo; run as root once"
        );
    };
    command.arg("DEBIAN_FRONTEND=noninteractive").arg(program);
    Ok(command)
}

fn add_backports() -> anyhow::Result<()> {
    println!("adding {BACKPORTS_FILE}");
    let source = tempfile::NamedTempFile::new()?;
    fs::write(source.path(), BACKPORTS)?;
    run_shown(as_root("install")?.args(["-m", "644"]).arg(source.path()).arg(BACKPORTS_FILE))
}

fn knows_backports() -> anyhow::Result<bool> {
    let policy = output_of(Command::new("apt-cache").arg("policy"))?;
    Ok(policy.contains("bookworm-backports") || Path::new(BACKPORTS_FILE).exists())
}

fn is_bookworm() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    release.lines().any(|line| line == "VERSION_CODENAME=bookworm")
}

/// Versions of those of `packages` that are installed.
fn installed_versions(packages: &[&str]) -> anyhow::Result<BTreeMap<String, String>> {
    // dpkg-query fails when it does not know one of the names, and still prints the others.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status} ${Version}\\n"])
        .args(packages)
        .output()
        .context("dpkg-query: this command needs a Debian system")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let installed = text.lines().filter_map(|line| {
        let mut words = line.split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some(package), Some("installed"), Some(version)) => {
                Some((package.to_owned(), version.to_owned()))
            }
            _ => None,
        }
    });
    Ok(installed.collect())
}

/// Installed versions of `packages`, as text: what a result made of their files depends on.
pub(super) fn versions(packages: Packages) -> anyhow::Result<String> {
    Ok(format!("{:?}", installed_versions(packages)?))
}

/// Major version of a Debian version `[epoch:]major.minor...`; 0 if there is none.
fn major(version: &str) -> u32 {
    let upstream = version.split_once(':').map_or(version, |(_, upstream)| upstream);
    let digits: String = upstream.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_version_is_what_follows_the_epoch() {
        assert_eq!(major("1:10.0.2+ds-2+deb13u1~bpo12+1"), 10);
        assert_eq!(major("7.2"), 7);
        assert_eq!(major("x"), 0);
    }
}
