//! The two copies of the superblock.

use std::rc::Rc;

use bdev::{Bdev, BdevError};

use super::finding::{Finding, Findings};
use super::remedy::Remedy;
use crate::ondisk::node::{Expected, Node};
use crate::ondisk::superblock::{SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS, Superblock, SuperblockError};
use crate::store::{OpenError, check_features, choose_superblock, read};

/// What a check goes on with.
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub(super) enum Choice {
    /// A copy that can be used.
    Usable {
        superblock: Superblock,
        /// Which one.
        copy: usize,
        /// The other one can be used, too, and each is where its generation belongs: so this one is the newest.
        both: bool,
    },
    /// Both are damaged, or they contradict each other.
    Neither,
}

/// Checks both copies; gives the one that counts, or the one that is left.
pub(super) async fn choose(bdev: &Rc<dyn Bdev>, findings: &mut Findings) -> Result<Choice, OpenError> {
    let copies = read_copies(bdev, findings).await;
    for copy in &copies {
        // What a later version has written must not be judged, let alone overwritten.
        if let Err(Unusable::Wrong(error @ SuperblockError::Version { .. })) = copy {
            return Err(OpenError::BadSuperblock { error: error.clone() });
        }
    }
    for (copy, result) in copies.iter().enumerate() {
        match result {
            Ok(superblock) if superblock.generation % 2 != copy as u64 => {
                let finding = Finding::SuperblockPlace { copy, generation: superblock.generation };
                findings.push(finding, Remedy::safe("both copies written anew"));
            }
            Ok(_) | Err(Unusable::Unreadable) => {}
            Err(Unusable::Wrong(error)) => {
                // It may have been the newer one.
                let remedy = Remedy::lossy("written anew from the other copy");
                findings.push(Finding::Superblock { copy, problem: error.to_string() }, remedy);
            }
        }
    }
    if let [Ok(a), Ok(b)] = &copies {
        compare_copies(a, b, findings);
        if a.uuid != b.uuid {
            return Ok(choose_by_root(bdev, [a, b]).await);
        }
    }
    let in_place = |(copy, result): (usize, &Result<Superblock, _>)| {
        result.as_ref().is_ok_and(|superblock| superblock.generation % 2 == copy as u64)
    };
    let both = copies.iter().enumerate().all(in_place);
    let second_counts = match &copies {
        [Ok(a), Ok(b)] => b.generation >= a.generation,
        [first, _] => first.is_err(),
    };
    let as_errors = copies.map(|copy| copy.map_err(Unusable::into_error));
    match choose_superblock(as_errors, true) {
        Ok(superblock) => Ok(Choice::Usable { superblock, copy: usize::from(second_counts), both }),
        // Damage, not another program's data.
        Err(OpenError::BadSuperblock {
            error: SuperblockError::Checksum { .. } | SuperblockError::Geometry(_) | SuperblockError::NoMagic,
        }) => Ok(Choice::Neither),
        Err(error) => Err(error),
    }
}

/// Why a copy is not used.
enum Unusable {
    Wrong(SuperblockError),
    /// The device does not give it, which is reported already.
    Unreadable,
}

impl Unusable {
    fn into_error(self) -> SuperblockError {
        match self {
            Self::Wrong(error) => error,
            Self::Unreadable => SuperblockError::Geometry("cannot be read"),
        }
    }
}

async fn read_copies(bdev: &Rc<dyn Bdev>, findings: &mut Findings) -> [Result<Superblock, Unusable>; 2] {
    let [first, second] = SUPERBLOCK_OFFSETS;
    let copies = [read_copy(bdev, first).await, read_copy(bdev, second).await];
    let mut number = 0;
    copies.map(|copy| {
        let this = number;
        number += 1;
        copy.unwrap_or_else(|error| {
            let finding = Finding::Superblock { copy: this, problem: error.to_string() };
            findings.push(finding, Remedy::lossy("written anew from the other copy"));
            Err(Unusable::Unreadable)
        })
    })
}

async fn read_copy(bdev: &Rc<dyn Bdev>, offset: u64) -> Result<Result<Superblock, Unusable>, BdevError> {
    let len = SUPERBLOCK_LEN.next_multiple_of(bdev.limits().block_size as usize);
    if offset + len as u64 > bdev.limits().size {
        return Ok(Err(Unusable::Wrong(SuperblockError::NoMagic)));
    }
    let bytes = read(bdev, offset, len).await?;
    let copy = bytes.first_chunk::<SUPERBLOCK_LEN>().ok_or(SuperblockError::NoMagic);
    Ok(copy.and_then(Superblock::decode).map_err(Unusable::Wrong))
}

/// Of two copies with different UUIDs, the one whose tree is there, if that is true for one of them.
async fn choose_by_root(bdev: &Rc<dyn Bdev>, copies: [&Superblock; 2]) -> Choice {
    let [first, second] = copies;
    let (first_has, second_has) = (has_root(bdev, first).await, has_root(bdev, second).await);
    match (first_has, second_has) {
        (true, false) => Choice::Usable { superblock: first.clone(), copy: 0, both: false },
        (false, true) => Choice::Usable { superblock: second.clone(), copy: 1, both: false },
        _ => Choice::Neither,
    }
}

async fn has_root(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> bool {
    let ptr = superblock.root;
    let end = ptr.addr.checked_add(superblock.node_blocks());
    if check_features(superblock, bdev, true).is_err() || end.is_none_or(|end| end > superblock.block_count) {
        return false;
    }
    let offset = ptr.addr * u64::from(superblock.block_size);
    let Ok(page) = read(bdev, offset, superblock.node_size as usize).await else { return false };
    let expected = Expected { ptr, level: superblock.root_level, uuid: superblock.uuid };
    Node::decode(&page, &expected).is_ok()
}

/// Checks what a checkpoint never changes.
fn compare_copies(a: &Superblock, b: &Superblock, findings: &mut Findings) {
    let fields = [
        ("the UUID", a.uuid == b.uuid),
        ("the generation by more than one", a.generation.abs_diff(b.generation) == 1),
        ("the block size", a.block_size == b.block_size),
        ("the node size", a.node_size == b.node_size),
        ("the group size", a.group_blocks == b.group_blocks),
        ("the place of the journal", {
            (a.journal_start, a.journal_blocks) == (b.journal_start, b.journal_blocks)
        }),
        ("the hash key", a.hash_key == b.hash_key),
        ("features", (a.compat, a.ro_compat, a.incompat) == (b.compat, b.ro_compat, b.incompat)),
    ];
    for (field, _) in fields.into_iter().filter(|(_, same)| !same) {
        let remedy = Remedy::lossy("both copies written anew from one");
        findings.push(Finding::SuperblockCopies { field }, remedy);
    }
}
