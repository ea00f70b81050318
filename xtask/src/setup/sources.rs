//! Source archives from Debian that are unpacked and built in guests, pinned by checksum.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use vhostfs_tests::{process::output_of, progress::step};

/// An upstream source archive in Debian's pool.
#[derive(Debug)]
pub(super) struct Source {
    /// Below `debian/pool/main/`.
    pool_path: &'static str,
    sha256: &'static str,
}

/// The tree of the tour: some 1,500 files, text and binary.
pub(super) const COREUTILS: Source = Source {
    pool_path: "c/coreutils/coreutils_9.1.orig.tar.xz",
    sha256: "61a1f410d78ba7e7f37a5a4f50e6d1320aca33375484a3255eddf17a38580423",
};

/// A C project with tests of its own that builds in a minute.
pub(super) const ZLIB: Source = Source {
    pool_path: "z/zlib/zlib_1.2.13.dfsg.orig.tar.bz2",
    sha256: "71feb7947e3c00ef125f83b79a4e529bde31171e5babe48b391f06758d1ab0a1",
};

impl Source {
    /// Where the archive lies.
    pub(super) fn path(&self, cache: &Path) -> PathBuf {
        let name = self.pool_path.rsplit('/').next().unwrap_or(self.pool_path);
        cache.join("sources").join(name)
    }

    /// Downloads the archive if it is not there. apt's own helper does it: it checks the checksum and knows the proxy.
    pub(super) fn ensure(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        let path = self.path(cache);
        if path.exists() {
            return Ok(path);
        }
        fs::create_dir_all(cache.join("sources"))?;
        let part = path.with_extension("part");
        step(&format!("download {}", self.pool_path), || {
            output_of(
                Command::new("/usr/lib/apt/apt-helper")
                    .arg("download-file")
                    .arg(format!("http://deb.debian.org/debian/pool/main/{}", self.pool_path))
                    .arg(&part)
                    .arg(format!("SHA256:{}", self.sha256)),
            )
        })?;
        fs::rename(&part, &path)?;
        Ok(path)
    }
}
