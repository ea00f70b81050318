//! Space that runs out, at each step of every kind of operation.

use crate::operation::{Durability, NewKind, Operation, Target};
use crate::sequences::{base, every_kind};
use crate::workload::{Log, Workload};
use crate::world::{Geometry, World};

/// Fills the device until so many bytes are left, then does every kind of operation.
fn short_of_space(geometry: &Geometry, left: u64) -> Result<(), String> {
    let (image, state) = base(geometry, 1)?;
    let disk = geometry.disk(image, 1);
    let mut workload = Workload { world: World::mount(&disk, geometry, 10)?, log: Log::new(state) };
    let path = "ballast".to_owned();
    workload.perform(&Operation::Create { path: path.clone(), kind: NewKind::File, mode: 0o600 })?;
    while workload.world.available() > left {
        let before = workload.world.available();
        workload.perform(&Operation::Write {
            target: Target::Path(path.clone()),
            offset: 0,
            len: ((before - left) as usize).clamp(geometry.block as usize, 32 << 10),
            tag: 99,
            append: true,
            durability: Durability::Full,
            from_cache: false,
        })?;
        if workload.world.available() >= before {
            break;
        }
    }
    for operation in every_kind() {
        workload.perform(&operation)?;
    }
    workload.compare()?;
    workload.remount(geometry).map(drop)
}

#[test]
fn operations_on_a_device_short_of_space_agree_with_the_oracle() {
    for geometry in &Geometry::ALL {
        for left in (0..48).map(|blocks| blocks * u64::from(geometry.block)) {
            let result = short_of_space(geometry, left);
            result.unwrap_or_else(|problem| panic!("{geometry:?}, {left} bytes left: {problem}"));
        }
    }
}
