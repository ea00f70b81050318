//! The command line.

use bdev::open::ByteSize;
use clap::{Args, Parser, Subcommand};

const ABOUT: &str = "Make, show and check blobfs images.

blobfs is the file system that vhostfs serves to virtual machines. It lives on a block device or in an image file of \
its own. This tool works on an image that nobody serves at the same time.";

const IMAGE_HELP: &str = "\
IMAGE
  An image file or a block device. memory:SIZE is a device that vanishes with the program.

SIZE
  Bytes, or a number with K, M, G or T for powers of 1024.";

const EXIT_STATUS: &str = "\
EXIT STATUS
  0 done, 1 failed, 2 usage. A failure is one line on standard error.";

const MKFS_ABOUT: &str = "Make an empty file system.

IMAGE is a block device, a file, or, with --size, a file that does not exist yet: it is made sparse and takes room on \
disk only as it fills. Whatever IMAGE held is lost; something that looks like a file system, a partition table or \
another known content is refused without --force.";

const MKFS_EXAMPLES: &str = "\
EXAMPLES
  A new image file of 4 GiB:

    blobfs mkfs --size 4G --label scratch disk.img

  A whole block device, whatever it held:

    blobfs mkfs --force /dev/sdX

SIZE
  Bytes, or a number with K, M, G or T for powers of 1024.

EXIT STATUS
  0 done, 1 failed, 2 usage. A failure is one line on standard error and leaves no new file behind.";

const INFO_ABOUT: &str =
    "Show what a file system is: identity, sizes, and the state that its newest checkpoint is in.

Only the two copies of the superblock are read. IMAGE is not changed.";

const FSCK_ABOUT: &str = "Check a file system without changing it.

Every structure is read and compared with every other one that it must agree with: superblocks, chunk map, tree \
nodes, journal, bitmaps, inodes, directories, extended attributes and extents. A journal that was not replayed yet is \
replayed in memory. File data has no checksums and is not read. Each finding is one line on standard output: the \
structure, where it is, and what is wrong.";

const FSCK_STATUS: &str = "\
EXIT STATUS
  The sum of: 0 nothing found, 4 damage found, 8 the check could not be done (no such image, in use, unreadable, not
  a blobfs image), 16 usage, 32 cancelled by SIGINT or SIGTERM.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "blobfs", version, about = "Make, show and check blobfs images", long_about = ABOUT)]
#[command(after_long_help = EXIT_STATUS)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an empty file system
    #[command(long_about = MKFS_ABOUT, after_long_help = MKFS_EXAMPLES)]
    Mkfs(MkfsArgs),
    /// Show what a file system is
    #[command(long_about = INFO_ABOUT, after_long_help = format!("{IMAGE_HELP}\n\n{EXIT_STATUS}"))]
    Info(InfoArgs),
    /// Check a file system
    #[command(long_about = FSCK_ABOUT, after_long_help = FSCK_STATUS)]
    Fsck(FsckArgs),
}

/// Options of `blobfs mkfs`.
#[derive(Debug, Args)]
pub(crate) struct MkfsArgs {
    /// Image file or block device
    pub(crate) image: String,

    /// Size of the file system: of the file to create, or of the part of IMAGE to use
    ///
    /// Needed if IMAGE does not exist. The default is all of IMAGE.
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,

    /// Name for people, at most 32 bytes
    #[arg(long, default_value = "", hide_default_value = true, value_parser = parse_label)]
    pub(crate) label: String,

    /// Bytes of a block, a power of two from 512 to 16384 [default: 4096, or the device's if larger]
    #[arg(long, value_name = "N", value_parser = parse_block_size)]
    pub(crate) block_size: Option<u32>,

    /// Format IMAGE although it holds something known
    #[arg(long)]
    pub(crate) force: bool,
}

/// Options of `blobfs info`.
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Image file or block device
    pub(crate) image: String,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `blobfs fsck`.
#[derive(Debug, Args)]
pub(crate) struct FsckArgs {
    /// Image file or block device
    pub(crate) image: String,

    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_label(text: &str) -> Result<String, String> {
    match text.len() {
        0..=32 => Ok(text.to_owned()),
        len => Err(format!("a label has at most 32 bytes, not {len}")),
    }
}

fn parse_block_size(text: &str) -> Result<u32, String> {
    match text.parse::<ByteSize>().map(|size| size.0) {
        Ok(size @ 512..=16_384) if size.is_power_of_two() => Ok(size as u32),
        _ => Err("a block is a power of two from 512 to 16384 bytes".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
