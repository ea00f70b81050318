//! What the daemon is asked to do: the command line, checked.

use std::os::fd::RawFd;
use std::path::PathBuf;

use bdev::open::ByteSize;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use vhostfs::device::fs::{REQUEST_QUEUES_MAX, TAG_LEN};
use vhostfs::poller::PollMode;

const ABOUT: &str = "A file system for virtual machines, on an image file or a block device of its own.

vhostfs serves one image to one guest at a time as a standard virtio-fs device. The guest needs nothing but \
its own kernel: it mounts the device by its tag.";

const SERVE_ABOUT: &str = "Serve an image to a virtual machine as a virtio-fs device.

IMAGE is a file, a block device, or memory:SIZE for a file system that vanishes with the daemon. A file that does \
not exist is created and formatted when --size is given; it takes room on disk only as it fills. A block device, or a \
file that exists, is formatted once with 'blobfs mkfs IMAGE' before it can be served. The daemon serves \
one guest after the other until it gets SIGTERM or SIGINT; it then finishes the requests under way, writes \
everything to the image and exits. It needs no root.";

const EXAMPLES: &str = "\
EXAMPLES
  Serve a new 4 GiB file system:

    vhostfs serve --socket /tmp/fs.sock --tag myfs --size 4G disk.img

  Start a QEMU guest with it. The guest's memory must be shared with the daemon:

    qemu-system-x86_64 -M q35,accel=kvm -cpu host -m 1G \\
      -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem \\
      -chardev socket,id=fs,path=/tmp/fs.sock \\
      -device vhost-user-fs-pci,chardev=fs,tag=myfs,queue-size=1024,num-request-queues=4 ...

  num-request-queues is at most what --queues says here. In the guest:

    mount -t virtiofs myfs /mnt

  The same in libvirt's XML (the daemon is started by you; give the socket to libvirt's group with
  --socket-group):

    <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
    <filesystem type='mount'>
      <driver type='virtiofs' queue='1024'/>
      <source socket='/tmp/fs.sock'/>
      <target dir='myfs'/>
    </filesystem>

EXIT STATUS
  0 done, 1 failed, 2 usage. A failure is one line on standard error.";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "vhostfs", version, about = "A file system for virtual machines", long_about = ABOUT)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// Print what this program can do as JSON (as QEMU's vhost-user specification asks) and exit
    #[arg(long)]
    pub(crate) print_capabilities: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve an image to a virtual machine
    #[command(long_about = SERVE_ABOUT, after_long_help = EXAMPLES)]
    Serve(Box<ServeArgs>),
}

/// Options of `vhostfs serve`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("endpoint").args(["socket", "fd"]))]
pub(crate) struct ServeArgs {
    /// Image file, block device, or memory:SIZE
    #[arg(value_name = "IMAGE", required_unless_present = "print_capabilities")]
    pub(crate) image: Option<String>,

    /// Listen for the virtual machine on this Unix socket
    ///
    /// A socket file that nobody listens on any more is replaced; one in use is refused.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Use this inherited descriptor: a listening socket, or one that is connected to the virtual machine
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub(crate) fd: Option<RawFd>,

    /// Name by which the guest mounts the file system (at most 36 bytes)
    #[arg(long, value_parser = parse_tag, required_unless_present = "print_capabilities")]
    pub(crate) tag: Option<String>,

    /// Create IMAGE with this size if it does not exist
    ///
    /// SIZE is in bytes, or with K, M, G or T for powers of 1024. It changes nothing for an image that exists.
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,

    /// Request queues to offer; a guest's kernel uses one per virtual CPU [default: one per CPU, up to 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(REQUEST_QUEUES_MAX)))]
    pub(crate) queues: Option<u16>,

    /// Memory for file data, at most
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_cache_size)]
    pub(crate) cache_size: ByteSize,

    /// Memory for metadata, at most
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_cache_size)]
    pub(crate) metadata_cache_size: ByteSize,

    /// What the guest may keep in its own caches
    #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
    pub(crate) guest_cache: GuestCache,

    /// How to wait for requests
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) poll: Poll,

    /// Run on this CPU only
    #[arg(long, value_name = "N")]
    pub(crate) cpu: Option<usize>,

    /// Refuse every change
    #[arg(long)]
    pub(crate) readonly: bool,

    /// Serve this directory of the file system as the guest's root
    #[arg(long, value_name = "SUBDIR")]
    pub(crate) root: Option<String>,

    /// Exit when the first virtual machine has disconnected
    #[arg(long)]
    pub(crate) once: bool,

    /// Give the socket to this group (name or number) and let it connect
    #[arg(long, value_name = "GROUP", requires = "socket")]
    pub(crate) socket_group: Option<String>,

    /// Permissions of the socket, in octal [default: 0600, with --socket-group 0660]
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "socket")]
    pub(crate) socket_mode: Option<u32>,

    /// What to log to standard error: a level, or targets with levels as in "info,blobfs=debug"
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,

    /// Print what this program can do as JSON (as QEMU's vhost-user specification asks) and exit
    #[arg(long)]
    pub(crate) print_capabilities: bool,
}

/// Cache policy of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum GuestCache {
    /// The guest is the only client and caches everything, written data too
    #[default]
    Exclusive,
    /// The guest caches nothing
    None,
}

/// [`PollMode`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Poll {
    /// Spin while there is work, sleep when idle
    #[default]
    Adaptive,
    /// Always spin: needs a CPU of its own
    Busy,
    /// Always sleep until woken
    Interrupt,
}

impl From<Poll> for PollMode {
    fn from(poll: Poll) -> Self {
        match poll {
            Poll::Adaptive => Self::Adaptive,
            Poll::Busy => Self::Busy,
            Poll::Interrupt => Self::Interrupt,
        }
    }
}

/// Largest cache. Picked: far more than a machine has, and small enough to be counted in pages.
const CACHE_MAX: ByteSize = ByteSize(1 << 42);

fn parse_cache_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size.0 > CACHE_MAX.0 => Err(format!("a cache has at most {CACHE_MAX}")),
        other => other.map_err(|error| error.to_string()),
    }
}

fn parse_tag(text: &str) -> Result<String, String> {
    match text.len() {
        1..=TAG_LEN => Ok(text.to_owned()),
        len => Err(format!("a tag has 1 to {TAG_LEN} bytes, not {len}")),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("permissions are octal, like 0660".into()),
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

    #[test]
    fn out_of_range_options_are_refused() {
        let accepts = |options: &str| {
            let line = format!("vhostfs serve --socket s --tag t {options} image");
            Cli::try_parse_from(line.split_whitespace()).is_ok()
        };
        assert!(accepts(""));
        assert!(accepts("--queues 8 --poll busy --cpu 0 --readonly --once --guest-cache none"));
        for wrong in [
            "--queues 0",
            "--queues 129",
            "--poll maybe",
            "--guest-cache shared",
            "--socket-mode 999",
            "--fd 4",
            "--size 1X",
            "--cache-size 5T",
            "--metadata-cache-size 1.5G",
            "--mount /mnt",
            "--config f",
        ] {
            assert!(!accepts(wrong), "{wrong}");
        }
    }
}
