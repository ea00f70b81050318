//! Test programs and the peer of benchmarks from crates.io, built into the cache.
//!
//! A program is built as released, with the versions of its own lock file. It or one of its crates may be changed by a
//! patch from `xtask/patches`, which is part of what the program is made from: another patch makes another program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::ensure;
use vhostfs_tests::process::output_of;

use super::made_from;
use crate::build::cargo;

/// A program of the crate of the same name.
#[derive(Debug)]
pub(super) struct Tool {
    name: &'static str,
    version: &'static str,
    change: Option<Change>,
}

/// A change to a program's own crate, or to one of those that it is made of.
#[derive(Debug)]
struct Change {
    /// Ends the name of the program's folder.
    name: &'static str,
    /// For people, behind the program's version.
    note: &'static str,
    crate_name: &'static str,
    /// The version in the program's lock file: no other would become part of the program.
    crate_version: &'static str,
    /// Unified, with paths of the form `a/src/...`.
    patch: &'static str,
}

/// POSIX conformance tests.
pub(super) const PJDFSTEST: Tool = Tool { name: "pjdfstest", version: "0.2.2", change: None };

/// File system exerciser.
pub(super) const FSX: Tool = Tool {
    name: "fsx",
    version: "0.3.2",
    change: Some(Change {
        name: "unmap",
        note: "mappings of mapped reads are given back, else long runs get slower and slower and end at the limit of mappings",
        crate_name: "fsx",
        crate_version: "0.3.2",
        patch: include_str!("../../patches/fsx-unmap.patch"),
    }),
};

/// Builds fuzz targets.
pub(super) const CARGO_FUZZ: Tool = Tool { name: "cargo-fuzz", version: "0.13.2", change: None };

/// The peer of the benchmarks: the virtio-fs daemon that exports a folder of the host.
pub(super) const VIRTIOFSD: Tool = Tool {
    name: "virtiofsd",
    version: "1.14.0",
    change: Some(Change {
        name: "mem-table",
        note: "one check of its vhost crate relaxed, else it refuses User-Mode Linux guests (length of SET_MEM_TABLE, \
               once per connection: its speed is not touched)",
        crate_name: "vhost",
        crate_version: "0.16.0",
        patch: include_str!("../../patches/vhost-mem-table.patch"),
    }),
};

impl Tool {
    /// Where the program lies. Version and change are in the path, so that another one is another program.
    pub(super) fn path(&self, cache: &Path) -> PathBuf {
        self.root(cache).join("bin").join(self.name)
    }

    /// How the program differs from the released one.
    pub(super) fn note(&self) -> Option<&'static str> {
        self.change.as_ref().map(|change| change.note)
    }

    /// Builds the program if it is not there, or was made with another patch.
    pub(super) fn ensure(&self, cache: &Path) -> anyhow::Result<()> {
        let note = self.note().map_or(String::new(), |note| format!(", {note}"));
        let what = format!("build {} {}{note}", self.name, self.version);
        let recipe = self.change.as_ref().map_or("", |change| change.patch);
        made_from(&self.path(cache), recipe, &what, || self.build(&self.root(cache)))
    }

    fn root(&self, cache: &Path) -> PathBuf {
        let change = self.change.as_ref().map_or(String::new(), |change| format!("+{}", change.name));
        cache.join("tools").join(format!("{}-{}{change}", self.name, self.version))
    }

    fn build(&self, root: &Path) -> anyhow::Result<()> {
        let scratch = tempfile::tempdir()?;
        let mut install = install_command(root, &scratch.path().join("target"));
        let released = [self.name, "--version", self.version];
        let Some(change) = &self.change else {
            return output_of(install.args(released)).map(drop);
        };
        let source = change.changed_source(&scratch.path().canonicalize()?)?;
        if change.crate_name == self.name {
            return output_of(install.arg("--path").arg(source)).map(drop);
        }
        install
            .args(released)
            .arg("--config")
            .arg(format!("patch.crates-io.{}.path={source:?}", change.crate_name));
        let messages = output_of(install.arg("--message-format=json-render-diagnostics"))?;
        // If the lock file has another version of the crate, cargo builds without the change and only warns.
        let is_used = messages.contains(&format!("\"manifest_path\":{:?}", source.join("Cargo.toml")));
        ensure!(is_used, "{} was built without the changed {}", self.name, change.crate_name);
        Ok(())
    }
}

fn install_command(root: &Path, target: &Path) -> Command {
    let mut command = cargo();
    command.args(["install", "--locked", "--quiet", "--force", "--root"]);
    command.arg(root).arg("--target-dir").arg(target);
    command
}

impl Change {
    /// The crate's sources from the registry, with the patch applied, in a folder below `scratch`.
    fn changed_source(&self, scratch: &Path) -> anyhow::Result<PathBuf> {
        let folder = scratch.join("sources");
        self.fetch(scratch, &folder)?;
        let source = folder.join(self.crate_name);
        let patch = scratch.join("patch");
        fs::write(&patch, self.patch)?;
        output_of(
            Command::new("patch")
                .args(["--strip=1", "--forward", "--fuzz=0", "--batch", "--input"])
                .arg(&patch)
                .arg("--directory")
                .arg(&source),
        )?;
        Ok(source)
    }

    /// Puts the crate's sources below `folder`: cargo vendors the dependencies of a package that has only this one.
    fn fetch(&self, scratch: &Path, folder: &Path) -> anyhow::Result<()> {
        // In a folder of its own: what is below a workspace has to be part of it.
        let asking = scratch.join("asking");
        fs::create_dir(&asking)?;
        let manifest = asking.join("Cargo.toml");
        fs::write(
            &manifest,
            format!(
                "[workspace]\n[package]\nname = \"sources\"\n[lib]\npath = \"none\"\n[dependencies]\n{} = \"={}\"\n",
                self.crate_name, self.crate_version
            ),
        )?;
        output_of(cargo().args(["vendor", "--quiet", "--manifest-path"]).arg(manifest).arg(folder)).map(drop)
    }
}
