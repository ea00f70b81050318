//! `blobfs info`.

use std::process::ExitCode;

use blobfs::ondisk::superblock::{FORMAT_VERSION, Superblock};
use blobfs::store::{choose_superblock, read_superblocks};
use serde::Serialize;

use crate::cli::InfoArgs;
use crate::failure::Failure;
use crate::image::Image;

/// What is shown, under the names that `--json` has.
#[derive(Serialize)]
struct Info {
    uuid: String,
    label: String,
    format_version: u32,
    size: u64,
    block_size: u32,
    block_count: u64,
    node_size: u32,
    group_blocks: u32,
    journal_start: u64,
    journal_blocks: u64,
    compatible_features: u64,
    readonly_features: u64,
    incompatible_features: u64,
    data_checksums: bool,
    generation: u64,
    epoch: u64,
    last_transaction: u64,
    next_id: u64,
    tree_levels: u8,
    clean: bool,
    /// Why one of the two copies cannot be used; what is shown may then be out of date.
    damaged_copy: Option<String>,
}

impl From<&Superblock> for Info {
    fn from(superblock: &Superblock) -> Self {
        Self {
            uuid: uuid::Uuid::from_bytes(superblock.uuid).to_string(),
            label: superblock.label_text(),
            format_version: FORMAT_VERSION,
            size: superblock.block_count * u64::from(superblock.block_size),
            block_size: superblock.block_size,
            block_count: superblock.block_count,
            node_size: superblock.node_size,
            group_blocks: superblock.group_blocks,
            journal_start: superblock.journal_start,
            journal_blocks: superblock.journal_blocks,
            compatible_features: superblock.compat,
            readonly_features: superblock.ro_compat,
            incompatible_features: superblock.incompat,
            data_checksums: superblock.has_data_sums(),
            generation: superblock.generation,
            epoch: superblock.epoch,
            last_transaction: superblock.last_txn,
            next_id: superblock.next_id,
            tree_levels: superblock.root_level + 1,
            clean: superblock.clean,
            damaged_copy: None,
        }
    }
}

/// Shows what the superblock says.
pub(crate) fn run(args: &InfoArgs) -> Result<ExitCode, Failure> {
    let image = Image::open_to_read(&args.image)?;
    let device = image.device.clone();
    let read = image.reactor.block_on(async move { read_superblocks(&device).await });
    let copies = read.map_err(|error| Failure::new(&args.image, error, "check the device"))?;
    let damaged_copy = copies.iter().find_map(|copy| copy.as_ref().err().map(ToString::to_string));
    let superblock = choose_superblock(copies, true).map_err(|error| {
        Failure::new(&args.image, error, "use an image that blobfs made, undamaged and whole")
    })?;
    let info = Info { damaged_copy, ..Info::from(&superblock) };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&info).expect("plain data"));
    } else {
        print!("{}", text(&info));
    }
    Ok(ExitCode::SUCCESS)
}

fn text(info: &Info) -> String {
    let state = match (&info.damaged_copy, info.clean) {
        (Some(problem), _) => format!("damaged superblock ({problem}): run 'blobfs fsck'"),
        (None, true) => "closed".to_owned(),
        (None, false) => "not closed: the next mount replays the journal".to_owned(),
    };
    let rows = [
        ("UUID", info.uuid.clone()),
        ("label", info.label.clone()),
        ("format version", info.format_version.to_string()),
        ("state", state),
        ("size", format!("{} bytes in {} blocks of {}", info.size, info.block_count, info.block_size)),
        ("tree", format!("nodes of {} bytes, {} levels", info.node_size, info.tree_levels)),
        ("allocation group", format!("{} blocks", info.group_blocks)),
        ("journal", format!("{} blocks from block {}", info.journal_blocks, info.journal_start)),
        (
            "features",
            format!(
                "compatible {:#x}, read-only {:#x}, incompatible {:#x}",
                info.compatible_features, info.readonly_features, info.incompatible_features
            ),
        ),
        ("data checksums", if info.data_checksums { "CRC-32C of each block" } else { "none" }.to_owned()),
        ("checkpoint", format!("{}, up to transaction {}", info.generation, info.last_transaction)),
        ("epoch", info.epoch.to_string()),
        ("next inode", info.next_id.to_string()),
    ];
    rows.iter().map(|(name, value)| format!("{name:<18}{value}\n")).collect()
}
