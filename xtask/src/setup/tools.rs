//! Test programs and the peer of benchmarks from crates.io, built into the cache.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use vhostfs_tests::{process::output_of, progress::step};

use crate::build::cargo;

/// A program of the crate of the same name.
#[derive(Debug)]
pub(super) struct Tool {
    name: &'static str,
    version: &'static str,
}

/// POSIX conformance tests.
pub(super) const PJDFSTEST: Tool = Tool { name: "pjdfstest", version: "0.2.2" };

/// File system exerciser.
pub(super) const FSX: Tool = Tool { name: "fsx", version: "0.3.2" };

/// The peer of the benchmarks: the virtio-fs daemon that exports a folder of the host.
pub(super) const VIRTIOFSD: Tool = Tool { name: "virtiofsd", version: "1.14.0" };

impl Tool {
    /// Where the program lies. The version is in the path, so that another version is another program.
    pub(super) fn path(&self, cache: &Path) -> PathBuf {
        self.root(cache).join("bin").join(self.name)
    }

    /// Builds the program if it is not there.
    pub(super) fn ensure(&self, cache: &Path) -> anyhow::Result<()> {
        if self.path(cache).exists() {
            return Ok(());
        }
        step(&format!("build {} {}", self.name, self.version), || {
            let target = tempfile::tempdir()?;
            output_of(&mut self.install_command(&self.root(cache), target.path())).map(drop)
        })
    }

    fn root(&self, cache: &Path) -> PathBuf {
        cache.join("tools").join(format!("{}-{}", self.name, self.version))
    }

    fn install_command(&self, root: &Path, target: &Path) -> Command {
        let mut command = cargo();
        command.args([
            "install",
            self.name,
            "--version",
            self.version,
            "--locked",
            "--quiet",
            "--force",
            "--root",
        ]);
        command.arg(root).arg("--target-dir").arg(target);
        command
    }
}
