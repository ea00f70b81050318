//! Opening the image that a command works on.

use std::rc::Rc;

use bdev::Bdev;
use bdev::open::{ImageSpec, OpenError, OpenOptions, open};
use reactor::{Reactor, SystemClock};

use crate::failure::Failure;

/// An open device and the reactor that its operations complete on.
pub(crate) struct Image {
    pub(crate) device: Rc<dyn Bdev>,
    pub(crate) reactor: Rc<Reactor>,
}

impl Image {
    /// Opens the image of that name.
    pub(crate) fn open(name: &str, options: &OpenOptions) -> Result<Self, Failure> {
        let failed = |error: OpenError| Failure::complete(&error);
        let spec: ImageSpec = name.parse().map_err(failed)?;
        let reactor = Reactor::new(Rc::new(SystemClock::new()));
        let device = open(&spec, options, &reactor).map_err(failed)?;
        Ok(Self { device, reactor })
    }

    /// Opens an image that exists, for changes.
    pub(crate) fn open_to_change(name: &str) -> Result<Self, Failure> {
        Self::open(name, &OpenOptions { read_only: false, create: None })
    }

    /// Opens an image that exists, for reading only.
    pub(crate) fn open_to_read(name: &str) -> Result<Self, Failure> {
        Self::open(name, &OpenOptions { read_only: true, create: None })
    }
}
