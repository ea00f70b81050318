//! Where the parts of a guest lie: kernel, root, test programs, sources, and the programs under test.

use std::path::{Path, PathBuf};

/// Everything the harness needs from outside. Filled in by `cargo xtask`, which downloads and builds what is missing.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// Linux kernel for QEMU guests (virtio-fs built in).
    pub kernel: PathBuf,
    /// Root of QEMU guests: an uncompressed cpio archive, which boots faster under emulation than a compressed one.
    pub initramfs: PathBuf,
    /// The `pjdfstest` program, run inside User-Mode Linux.
    pub pjdfstest: PathBuf,
    /// The `fsx` program, run inside User-Mode Linux.
    pub fsx: PathBuf,
    /// Source archive of a small C project with tests of its own (zlib).
    pub c_project: PathBuf,
    /// Folder for scratch folders of runs. Must allow socket paths: short, and on a local file system.
    pub run_dir: PathBuf,
    /// The file service under test.
    pub server: Server,
}

/// Which file service the guests talk to.
#[derive(Debug, Clone)]
pub enum Server {
    /// `vhostfs serve` on an image, and `blobfs` to check that image.
    Vhostfs {
        /// The daemon's program.
        vhostfs: PathBuf,
        /// The image tool.
        blobfs: PathBuf,
    },
    /// virtiofsd on a folder: tells a defect of ours from a defect of a test, and is the peer of benchmarks.
    Virtiofsd(PathBuf),
}

impl Server {
    /// How many request queues a guest can have, if `wanted` of them would be good: virtiofsd has one.
    pub fn request_queues(&self, wanted: u32) -> u32 {
        match self {
            Self::Vhostfs { .. } => wanted,
            Self::Virtiofsd(_) => 1,
        }
    }
}

/// Name, inside QEMU guests, of the source archive that the tour unpacks.
pub const GUEST_TOUR_ARCHIVE: &str = "/usr/src/tour.tar.xz";

/// Where guests mount the file system.
pub const MOUNT_POINT: &str = "/mnt/vhostfs";

/// The mount tag used throughout.
pub const TAG: &str = "myfs";

/// Longest path of a Unix socket: `sun_path` of unix(7) less its terminating NUL.
const SOCKET_PATH_MAX: usize = 107;

/// Returns `dir/name` if a socket can have that path.
pub fn socket_path(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    anyhow::ensure!(
        path.as_os_str().len() <= SOCKET_PATH_MAX,
        "socket path {} is longer than {SOCKET_PATH_MAX} bytes; set XDG_CACHE_HOME to a shorter folder",
        path.display()
    );
    Ok(path)
}
