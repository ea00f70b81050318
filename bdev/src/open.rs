//! A device by its name, as users write it: a path, `memory:SIZE` or `null:SIZE`.

use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;

use reactor::Reactor;
use rustix::io::Errno;

use crate::Bdev;
use crate::memory::Memory;
use crate::null::Null;
use crate::uring::UringDevice;

/// Block size of `memory:` and `null:` devices: a page, as real devices have it.
const MADE_UP_BLOCK: u32 = 4096;

/// What an image name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSpec {
    /// A regular file or block device.
    Path(PathBuf),
    /// `memory:SIZE`
    Memory(ByteSize),
    /// `null:SIZE`
    Null(ByteSize),
}

impl FromStr for ImageSpec {
    type Err = OpenError;

    fn from_str(image: &str) -> Result<Self, OpenError> {
        let size = |text: &str| {
            let size = text.parse::<ByteSize>();
            size.map_err(|error| OpenError::BadSize { image: image.to_owned(), error })
        };
        if let Some(text) = image.strip_prefix("memory:") {
            return Ok(Self::Memory(size(text)?));
        }
        if let Some(text) = image.strip_prefix("null:") {
            return Ok(Self::Null(size(text)?));
        }
        if image.is_empty() {
            return Err(OpenError::NotFound { image: image.to_owned() });
        }
        Ok(Self::Path(image.into()))
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Memory(size) => write!(f, "memory:{size}"),
            Self::Null(size) => write!(f, "null:{size}"),
        }
    }
}

/// How to open an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Only for reading: writes fail, and others may read at the same time.
    pub read_only: bool,
    /// Bytes of the sparse file to make if there is nothing at the path.
    pub create: Option<u64>,
}

/// Opens the device that `image` names.
///
/// # Errors
/// See [`OpenError`]. Nothing is changed then, and nothing stays locked.
pub fn open(image: &ImageSpec, options: &OpenOptions, reactor: &Reactor) -> Result<Rc<dyn Bdev>, OpenError> {
    match image {
        ImageSpec::Path(path) => {
            let uring = reactor.uring().map_err(|error| OpenError::NoUring { error })?;
            Ok(UringDevice::open(path, options, uring)?)
        }
        ImageSpec::Memory(size) => {
            let device = Memory::try_new(made_up_size(image, *size)?, MADE_UP_BLOCK);
            Ok(device.map_err(|error| OpenError::from_errno(&image.to_string(), error))?)
        }
        ImageSpec::Null(size) => Ok(Null::new(made_up_size(image, *size)?, MADE_UP_BLOCK)),
    }
}

/// Whole blocks of the size of a device in memory, if such a device can be.
fn made_up_size(image: &ImageSpec, size: ByteSize) -> Result<u64, OpenError> {
    let whole = size.0 - size.0 % u64::from(MADE_UP_BLOCK);
    if whole == 0 {
        return Err(OpenError::Empty { image: image.to_string() });
    }
    // Half of the address space is the kernel's.
    if matches!(image, ImageSpec::Memory(_)) && whole > MEMORY_MAX {
        let error = SizeError::TooLarge { text: size.to_string() };
        return Err(OpenError::BadSize { image: image.to_string(), error });
    }
    Ok(whole)
}

/// Largest device in memory: an eighth of the address space of a process.
const MEMORY_MAX: u64 = 1 << 44;

/// Why an image cannot be opened, as "what: why; what to do".
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing of that name.
    #[error("{image}: no such file or device; check the name, or give a size to create it")]
    NotFound {
        /// The image.
        image: String,
    },
    /// Somebody else has it open.
    #[error("{image}: in use by another program; stop that program or use another image")]
    InUse {
        /// The image.
        image: String,
    },
    /// The process may not open it.
    #[error("{image}: permission denied; check the owner and mode of the file and its folders")]
    Denied {
        /// The image.
        image: String,
    },
    /// It or its file system cannot be written.
    #[error("{image}: read-only; open it with --readonly")]
    ReadOnly {
        /// The image.
        image: String,
    },
    /// It is a folder, a socket or something else without blocks.
    #[error("{image}: neither a regular file nor a block device; give one of those")]
    NotADevice {
        /// The image.
        image: String,
    },
    /// It has no room for a single block.
    #[error("{image}: smaller than one block; give it a size")]
    Empty {
        /// The image.
        image: String,
    },
    /// `memory:` or `null:` with something that is no size.
    #[error("{image}: {error}; write bytes or a number with K, M, G or T")]
    BadSize {
        /// The image.
        image: String,
        /// What is wrong with the size.
        #[source]
        error: SizeError,
    },
    /// The kernel has no io_uring for this process.
    #[error("io_uring: {error}; use Linux 5.11 or later and allow it (sysctl kernel.io_uring_disabled=0)")]
    NoUring {
        /// The kernel's answer.
        #[source]
        error: std::io::Error,
    },
    /// Anything else.
    #[error("{image}: {}; check the device and the kernel's log", std::io::Error::from(*.error))]
    Io {
        /// The image.
        image: String,
        /// The kernel's answer.
        #[source]
        error: Errno,
    },
}

impl OpenError {
    pub(crate) fn from_errno(image: &str, error: Errno) -> Self {
        let image = image.to_owned();
        match error {
            Errno::NOENT | Errno::NOTDIR => Self::NotFound { image },
            Errno::BUSY | Errno::AGAIN | Errno::TXTBSY => Self::InUse { image },
            Errno::ACCESS | Errno::PERM => Self::Denied { image },
            Errno::ROFS => Self::ReadOnly { image },
            Errno::ISDIR | Errno::NXIO | Errno::NODEV => Self::NotADevice { image },
            error => Self::Io { image, error },
        }
    }
}

/// A number of bytes as users write it: plain, or with K, M, G or T for powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// The suffixes, with how far they shift.
const SUFFIXES: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is not a number with at most one suffix.
    #[error("'{text}' is not a size")]
    Malformed {
        /// The text.
        text: String,
    },
    /// The number of bytes is too large.
    #[error("size '{text}' is too large")]
    TooLarge {
        /// The text.
        text: String,
    },
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let upper = text.to_ascii_uppercase();
        let suffix = SUFFIXES.iter().find(|(letter, _)| upper.ends_with(*letter));
        let (digits, shift) = match suffix {
            Some((letter, shift)) => (upper.trim_end_matches(*letter), *shift),
            None => (&*upper, 0),
        };
        let one_suffix = digits.len() + usize::from(suffix.is_some()) == upper.len();
        if !one_suffix || digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(SizeError::Malformed { text: text.to_owned() });
        }
        let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
        number.map(Self).ok_or_else(|| SizeError::TooLarge { text: text.to_owned() })
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: u32| self.0 != 0 && self.0.trailing_zeros() >= shift;
        match SUFFIXES.iter().find(|(_, shift)| fits(*shift)) {
            Some((letter, shift)) => write!(f, "{}{letter}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::SystemClock;

    #[test]
    fn sizes_take_binary_suffixes_and_nothing_else() {
        let parse = |text: &str| text.parse::<ByteSize>().map(|size| size.0);
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("4k"), Ok(4096));
        assert_eq!(parse("3G"), Ok(3 << 30));
        assert_eq!(parse("2T"), Ok(2 << 40));
        for bad in ["", "K", "1KK", "1KM", "-1", "+1", "1.5G", "0x10", "1 G", "1GiB", "é"] {
            assert_eq!(parse(bad), Err(SizeError::Malformed { text: bad.to_owned() }), "{bad}");
        }
        for large in ["99999999999999999999", "16777216T"] {
            assert_eq!(parse(large), Err(SizeError::TooLarge { text: large.to_owned() }), "{large}");
        }
    }

    #[test]
    fn sizes_print_as_they_are_read() {
        for text in ["0", "1", "1000", "1K", "1025", "3M", "5G", "7T"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn names_mean_what_they_say() {
        assert_eq!("memory:1M".parse::<ImageSpec>().unwrap(), ImageSpec::Memory(ByteSize(1 << 20)));
        assert_eq!("null:2G".parse::<ImageSpec>().unwrap(), ImageSpec::Null(ByteSize(2 << 30)));
        assert_eq!("./memory:1M".parse::<ImageSpec>().unwrap(), ImageSpec::Path("./memory:1M".into()));
        assert!(matches!("memory:lots".parse::<ImageSpec>(), Err(OpenError::BadSize { .. })));
        assert!(matches!("".parse::<ImageSpec>(), Err(OpenError::NotFound { .. })));
    }

    #[test]
    fn devices_without_room_or_beyond_reason_are_refused() {
        let reactor = Reactor::new(Rc::new(SystemClock::new()));
        let open = |name: &str| open(&name.parse().unwrap(), &OpenOptions::default(), &reactor);
        assert!(matches!(open("memory:4095"), Err(OpenError::Empty { .. })));
        assert!(matches!(open("memory:1000T"), Err(OpenError::BadSize { .. })));
        assert_eq!(open("null:1000T").unwrap().limits().size, 1000 << 40);
        // Far more than this machine has: no page is touched.
        assert_eq!(open("memory:1T").unwrap().limits().size, 1 << 40);
    }
}
