//! `blobfs mkfs`.

use std::path::Path;
use std::process::ExitCode;

use bdev::open::{ImageSpec, OpenOptions};
use blobfs::Fs;
use blobfs::fs::MountOptions;
use blobfs::ondisk::superblock::Superblock;
use blobfs::store::{self, MkfsOptions, OpenError, Store};

use crate::cli::MkfsArgs;
use crate::failure::Failure;
use crate::image::Image;
use crate::signature;

/// Makes a file system.
pub(crate) fn run(args: &MkfsArgs) -> Result<ExitCode, Failure> {
    let new_file = match args.image.parse() {
        Ok(ImageSpec::Path(path)) if !path.exists() => Some(path),
        _ => None,
    };
    let create = args.size.filter(|_| new_file.is_some()).map(|size| size.0);
    let image = Image::open(&args.image, &OpenOptions { read_only: false, create })?;
    let made = make(args, &image);
    if made.is_err()
        && let Some(path) = new_file
    {
        remove(&path);
    }
    let superblock = made?;
    println!(
        "{}: blobfs {}, {} blocks of {} bytes",
        args.image,
        uuid::Uuid::from_bytes(superblock.uuid),
        superblock.block_count,
        superblock.block_size
    );
    Ok(ExitCode::SUCCESS)
}

/// Leaves nothing of a file that was created for an image that cannot be made.
fn remove(path: &Path) {
    // The failure that led here is the one to report.
    let _ = std::fs::remove_file(path);
}

fn make(args: &MkfsArgs, image: &Image) -> Result<Superblock, Failure> {
    let device = image.device.clone();
    let limits = device.limits();
    let size = args.size.map_or(limits.size, |size| size.0);
    if size > limits.size {
        let why = format!("has {} bytes, fewer than --size", limits.size);
        return Err(Failure::new(&args.image, why, "give a smaller --size, or make the image larger"));
    }
    let default = MkfsOptions::for_device(limits);
    let block_size = args.block_size.unwrap_or(default.block_size);
    if !args.force {
        refuse_known_content(args, image)?;
    }
    let options = MkfsOptions {
        size,
        label: args.label.clone(),
        block_size,
        data_checksum: args.data_checksum,
        ..default
    };
    let made = image.reactor.block_on(async move { store::mkfs(&device, &options).await });
    let superblock =
        made.map_err(|error| Failure::new(&args.image, error, "change the size or the options"))?;
    make_root(image).map_err(|error| Failure::new(&args.image, error, "check the device"))?;
    Ok(superblock)
}

/// The first mount makes the root directory; done here, later ones may be for reading only.
fn make_root(image: &Image) -> Result<(), OpenError> {
    let (device, reactor) = (image.device.clone(), image.reactor.clone());
    image.reactor.block_on(async move {
        let store = Store::open(device, reactor, store::OpenOptions::default()).await?;
        let fs = Fs::mount(store, MountOptions { cache_size: 0, ..MountOptions::default() }).await?;
        Ok(fs.unmount().await?)
    })
}

fn refuse_known_content(args: &MkfsArgs, image: &Image) -> Result<(), Failure> {
    let device = image.device.clone();
    let found = image.reactor.block_on(async move { signature::find(&device).await });
    match found {
        Ok(None) => Ok(()),
        Ok(Some(content)) => {
            let why = format!("holds {content}");
            Err(Failure::new(&args.image, why, "give --force to lose it, or use another image"))
        }
        Err(error) => Err(Failure::new(&args.image, error, "check the device")),
    }
}
