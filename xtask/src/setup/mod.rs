//! Installs, downloads and builds what guests need, and says so. Quick when everything is there.
//!
//! Packages come from apt; everything else goes to the cache `${XDG_CACHE_HOME:-~/.cache}/vhostfs` and changes nothing on the
//! machine: the guest kernel is unpacked, not installed. Each part checks for itself whether it is up to date, so a
//! run that was interrupted is continued by the next.

mod apt;
mod initramfs;
mod kernel;
mod sources;
mod tools;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use vhostfs_tests::{
    artifacts::{Artifacts, Server},
    process::output_of,
    progress::{note, step},
};

/// What the guests are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The tour: a QEMU guest.
    Demo,
    /// The tests: also User-Mode Linux, test programs and a C project.
    Tests,
}

/// Makes everything present that `purpose` needs. `build` makes what the guests will talk to, once there are packages.
pub(crate) fn ensure(
    purpose: Purpose,
    build: impl FnOnce() -> anyhow::Result<Server>,
) -> anyhow::Result<Artifacts> {
    let cache = cache_dir()?;
    packages(purpose)?;
    let server = build()?;
    let kernel = kernel::ensure(&cache)?;
    let tour = sources::COREUTILS.ensure(&cache)?;
    let initramfs = initramfs::ensure(&cache, &tour)?;
    let run_dir = cache.join("run");
    fs::create_dir_all(&run_dir)?;
    let mut artifacts = Artifacts {
        kernel,
        initramfs,
        pjdfstest: tools::PJDFSTEST.path(&cache),
        fsx: tools::FSX.path(&cache),
        c_project: sources::ZLIB.path(&cache),
        run_dir,
        server,
    };
    if purpose == Purpose::Tests {
        tools::PJDFSTEST.ensure(&cache)?;
        tools::FSX.ensure(&cache)?;
        artifacts.c_project = sources::ZLIB.ensure(&cache)?;
    }
    print_versions(purpose, &artifacts.kernel);
    Ok(artifacts)
}

/// What benchmarks compare with.
#[derive(Debug)]
pub(crate) struct Peer {
    /// virtiofsd.
    pub(crate) program: PathBuf,
    /// How it differs from the released one.
    pub(crate) note: Option<&'static str>,
}

/// Installs the packages that benchmarks need.
pub(crate) fn ensure_benchmark_packages() -> anyhow::Result<()> {
    apt::ensure_installed(&[apt::BENCHMARKS])
}

/// Makes the peer of benchmarks present.
pub(crate) fn ensure_peer() -> anyhow::Result<Peer> {
    let cache = cache_dir()?;
    tools::VIRTIOFSD.ensure(&cache)?;
    Ok(Peer { program: tools::VIRTIOFSD.path(&cache), note: tools::VIRTIOFSD.note() })
}

/// Makes `cargo fuzz` present, and what its programs are built with. Returns its program.
pub(crate) fn ensure_fuzzer() -> anyhow::Result<PathBuf> {
    let cache = cache_dir()?;
    apt::ensure_installed(&[apt::FUZZING])?;
    tools::CARGO_FUZZ.ensure(&cache)?;
    Ok(tools::CARGO_FUZZ.path(&cache))
}

/// Installs the packages that `purpose` needs and that are missing.
fn packages(purpose: Purpose) -> anyhow::Result<()> {
    apt::ensure_installed(match purpose {
        Purpose::Demo => &[apt::GUESTS],
        Purpose::Tests => &[apt::GUESTS, apt::TESTS],
    })
}

/// `${XDG_CACHE_HOME:-~/.cache}/vhostfs`, created.
fn cache_dir() -> anyhow::Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    let cache = base.join("vhostfs");
    fs::create_dir_all(&cache).with_context(|| format!("create the cache {}", cache.display()))?;
    Ok(cache)
}

/// Calls `make` unless `result` exists and was made from `recipe`, a text that names everything the result depends on.
///
/// The recipe is written after the result, so an interrupted `make` is repeated.
fn made_from(
    result: &Path,
    recipe: &str,
    what: &str,
    make: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut stamp = result.as_os_str().to_owned();
    stamp.push(".made-from");
    let stamp = PathBuf::from(stamp);
    if result.exists() && fs::read_to_string(&stamp).is_ok_and(|made| made == recipe) {
        return Ok(());
    }
    step(what, make)?;
    fs::write(&stamp, recipe).with_context(|| format!("write {}", stamp.display()))
}

fn print_versions(purpose: Purpose, kernel: &Path) {
    let first_line = |program: &str, argument: &str| {
        let text = output_of(Command::new(program).arg(argument)).unwrap_or_default();
        text.lines().next().unwrap_or("unknown version").to_owned()
    };
    note(&first_line("qemu-system-x86_64", "--version"));
    note(&format!("guest kernel {}", kernel.file_name().unwrap_or_default().display()));
    note(&first_line("fio", "--version"));
    if purpose == Purpose::Tests {
        note(&format!("User-Mode Linux {}", first_line("linux.uml", "--version")));
    }
}
