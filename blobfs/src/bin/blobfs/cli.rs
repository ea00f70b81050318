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

const FSCK_ABOUT: &str = "Check a file system, and repair it if asked to.

Every structure is read and compared with every other one that it must agree with: superblocks, chunk map, tree \
nodes, journal, bitmaps, inodes, directories, extended attributes and extents. A journal that was not replayed yet is \
replayed in memory. Each finding is one line on standard output: the structure, where it is, and what is wrong. File \
data is not read: see 'blobfs scrub'.

Without an option that says so nothing is written. IMAGE must not be in use.";

const FSCK_DETAILS: &str = "\
REPAIR
  --repair makes a file system that a check finds clean, without asking. Each line says what was wrong and what was \
done about it. It keeps what can be kept:

  - a damaged superblock is written anew from the other copy, even if the damaged one was the newer one;
  - a damaged journal ends in front of the damage;
  - tree nodes that cannot be read are dropped with what they held; what is below a lost inner node is found again;
  - bitmaps, counters, link counts, sizes and flags are set to what was counted;
  - entries that lead nowhere are removed; inodes that no name leads to are named in /lost+found by their number;
  - content, entries and attributes whose inode is lost get a new one, which only root can read;
  - of two files with the same blocks the second one gets a copy of them.

  The repaired tree is worked out in memory and checked, then written to free places, and only then put in place of \
the old one. A repair that is interrupted, by a power cut too, has changed nothing that counts and can be done again. \
If the device is failing, copy it to another one first and repair the copy.

  -p does only what gives nothing up: counters, counts, bitmaps, flags and the like. If anything else is needed, \
nothing is changed and the exit status says that damage is left. This is for checks at boot: linked as fsck.blobfs, the program is what fsck(8) looks for.

JSON
  --json prints one object:

  findings: a list of objects with finding (the kind), the fields of its place, text, repaired and action
  findings_left_out: how many more there were
  complete: everything could be read
  changed: something was written
  refused: why nothing was repaired, or null
  left: number of findings after a repair
  counts: inodes, blocks and the like, as they are now

EXIT STATUS
  The sum of: 0 nothing found, 1 damage was repaired, 4 damage is left, 8 the work could not be done (no such image, \
in use, unreadable, not a blobfs image), 16 usage, 32 cancelled by SIGINT or SIGTERM.

EXAMPLES
  Look, then repair:

    blobfs fsck disk.img
    blobfs fsck --repair disk.img

  In a script, with the number of findings:

    blobfs fsck --json disk.img | jq '.findings | length'";

const SCRUB_ABOUT: &str = "Read and verify everything on an image.

A check of all metadata, as 'blobfs fsck' does it, and then every block of file data, in the order in which it lies on \
the device. What cannot be read is reported by the name of the file and the place in it. Blocks that are allocated but \
were never written are not read. IMAGE is not changed, and must not be in use.

On a terminal a bar shows how far it is, how fast, and how long it takes.";

const SCRUB_DETAILS: &str = "\
JSON
  --json prints one object:

  check: findings, findings_left_out, complete and counts as 'blobfs fsck --json' has them
  unreadable: a list of objects with inode, path (or null), xattr, offset, len, block, error and text
  unreadable_left_out: how many more there were
  data_bytes: bytes of data that were read

EXIT STATUS
  The sum of: 0 everything is there and right, 4 damage was found, 8 the work could not be done (no such image, in \
use, not a blobfs image), 16 usage, 32 cancelled by SIGINT or SIGTERM.

EXAMPLES
  Which files are damaged?

    blobfs scrub --json disk.img | jq -r '.unreadable[].path'";

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
    /// Check a file system, and repair it if asked to
    #[command(long_about = FSCK_ABOUT, after_long_help = FSCK_DETAILS)]
    Fsck(FsckArgs),
    /// Read and verify everything on an image
    #[command(long_about = SCRUB_ABOUT, after_long_help = SCRUB_DETAILS)]
    Scrub(ScrubArgs),
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

    /// Keep a checksum of each block of file data, and verify it whenever the block is read
    ///
    /// A block that does not have its checksum is an error for its reader and a line in the log, never wrong data.
    /// Costs some speed, and room: no block is overwritten in place, so a full device refuses overwrites, too.
    #[arg(long)]
    pub(crate) data_checksum: bool,

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

    /// Repair what is wrong, without asking, even if something must be given up
    #[arg(short = 'y', long, group = "mode")]
    pub(crate) repair: bool,

    /// Repair only what can be repaired without giving anything up; -a is the same
    #[arg(short = 'p', visible_short_alias = 'a', group = "mode")]
    pub(crate) preen: bool,

    /// Change nothing: the default
    #[arg(short = 'n', group = "mode")]
    pub(crate) no_changes: bool,

    /// Check although the file system was closed cleanly: always done, taken because other programs pass it
    #[arg(short = 'f', hide = true)]
    pub(crate) force: bool,

    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `blobfs scrub`.
#[derive(Debug, Args)]
pub(crate) struct ScrubArgs {
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
