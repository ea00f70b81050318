//! Scripts about a real source tree in a QEMU guest: unpack it with checksums, verify them later.

use crate::artifacts::{GUEST_TOUR_ARCHIVE, MOUNT_POINT};

/// Checksums of every file of the unpacked tree, relative to the mount point, kept on the file system itself.
pub const CHECKSUM_LIST: &str = "tour.sha256";

/// Unpacks the source archive into `tour/` on the mount, writes [`CHECKSUM_LIST`] and makes all of it durable.
///
/// The checksums are of an independent copy unpacked in the guest's memory, so that they are not merely what the
/// file system under test gave back.
pub fn unpack_script() -> String {
    format!(
        "set -e; mkdir -p /tmp/reference {MOUNT_POINT}/tour\n\
         tar -xJf {GUEST_TOUR_ARCHIVE} -C /tmp/reference --strip-components=1\n\
         tar -xJf {GUEST_TOUR_ARCHIVE} -C {MOUNT_POINT}/tour --strip-components=1\n\
         (cd /tmp/reference && find . -type f -print0 | sort -z | xargs -0 sha256sum) >{MOUNT_POINT}/{CHECKSUM_LIST}\n\
         rm -rf /tmp/reference\n\
         sync"
    )
}

/// Drops the guest's caches and verifies every checksum of [`unpack_script`]'s tree. Prints the number of files.
pub fn verify_script() -> String {
    format!(
        "set -e; sync; echo 3 >/proc/sys/vm/drop_caches; cd {MOUNT_POINT}/tour\n\
         test $(find . -type f | wc -l) = $(wc -l <../{CHECKSUM_LIST})\n\
         sha256sum --quiet -c ../{CHECKSUM_LIST}\n\
         echo $(wc -l <../{CHECKSUM_LIST}) files verified"
    )
}
