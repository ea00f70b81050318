//! `cargo xtask install`: the programs, below a prefix.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use vhostfs_tests::artifacts::Server;

use crate::build;

/// Builds for release and copies to `prefix/bin`.
pub(crate) fn run(prefix: &Path) -> anyhow::Result<()> {
    let Server::Vhostfs { vhostfs, blobfs } = build::programs()? else { bail!("no programs were built") };
    let directory = prefix.join("bin");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    for program in [vhostfs, blobfs] {
        let installed = install(&program, &directory)
            .with_context(|| format!("install to {}; choose another with --prefix", directory.display()))?;
        println!("installed {}", installed.display());
    }
    Ok(())
}

/// Replaces by rename: a program that runs keeps its old file, and there is never half a file.
fn install(program: &Path, directory: &Path) -> anyhow::Result<PathBuf> {
    let name = program.file_name().context("no file name")?;
    let installed = directory.join(name);
    let mut copy = tempfile::NamedTempFile::new_in(directory)?;
    std::io::copy(&mut fs::File::open(program)?, copy.as_file_mut())?;
    fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755))?;
    copy.persist(&installed)?;
    Ok(installed)
}
