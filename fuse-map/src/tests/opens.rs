//! OPEN, OPENDIR, FLUSH, RELEASE, and what is not served.

use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::op;

fn open(client: &Client, opcode: u32, nodeid: u64) -> Result<u32, i32> {
    let args = fuse_open_in::new_zeroed();
    client.get::<fuse_open_out>(opcode, nodeid, &[args.as_bytes()]).map(|out| out.open_flags)
}

#[test]
fn an_exclusive_client_stops_asking() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    assert_eq!(open(&client, op::FUSE_OPEN, file), Err(libc::ENOSYS));
    assert_eq!(open(&client, op::FUSE_OPENDIR, ROOT), Err(libc::ENOSYS));
    assert_eq!(client.done(op::FUSE_FLUSH, file, &[&[0; 24]]), Err(libc::ENOSYS));
    assert_eq!(client.done(op::FUSE_RELEASE, file, &[&[0; 24]]), Ok(()));
    let created = client.open_new(ROOT, "new", 0, 0).unwrap();
    assert_eq!((created.open.fh, created.open.open_flags), (0, FOPEN_KEEP_CACHE));
}

#[test]
fn a_kernel_that_must_open_is_let_to_keep_its_cache() {
    let world = World::new();
    let client = world.connect(EXCLUSIVE);
    let unneeded = InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
    client.init(InitFlags::all() - unneeded).unwrap();
    let file = client.file(ROOT, "file");
    assert_eq!(open(&client, op::FUSE_OPEN, file), Ok(FOPEN_KEEP_CACHE));
    assert_eq!(open(&client, op::FUSE_OPENDIR, ROOT), Ok(FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR));
}

#[test]
fn a_client_without_a_cache_opens_and_closes() {
    let (_world, client) = uncached();
    let created = client.open_new(ROOT, "file", 0, 0).unwrap();
    let (file, flags) = (created.entry.nodeid, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES);
    assert_eq!(created.open.open_flags, flags);
    assert_eq!(open(&client, op::FUSE_OPEN, file), Ok(flags));
    assert_eq!(open(&client, op::FUSE_OPENDIR, ROOT), Ok(0));
    assert_eq!(client.done(op::FUSE_FLUSH, file, &[&[0; 24]]), Ok(()));
    assert_eq!(client.done(op::FUSE_RELEASE, file, &[&[0; 24]]), Ok(()));
    assert_eq!(client.done(op::FUSE_RELEASEDIR, ROOT, &[&[0; 24]]), Ok(()));
    assert_eq!(open(&client, op::FUSE_OPEN, ROOT), Err(libc::EISDIR));
    assert_eq!(open(&client, op::FUSE_OPENDIR, file), Err(libc::ENOTDIR));
}

#[test]
fn what_is_not_served_is_refused_as_linux_expects() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let refused = [
        // The kernel copies itself.
        (op::FUSE_COPY_FILE_RANGE, libc::EOPNOTSUPP),
        (op::FUSE_COPY_FILE_RANGE_64, libc::EOPNOTSUPP),
        // FS_IOC_GETFLAGS and such: there are no such flags.
        (op::FUSE_IOCTL, libc::ENOTTY),
        // The kernel checks permissions and keeps locks itself, and does not ask again.
        (op::FUSE_ACCESS, libc::ENOSYS),
        (op::FUSE_INTERRUPT, libc::ENOSYS),
        (31, libc::ENOSYS), // GETLK
        (32, libc::ENOSYS), // SETLK
        (33, libc::ENOSYS), // SETLKW
        (37, libc::ENOSYS), // BMAP
        (40, libc::ENOSYS), // POLL
        (48, libc::ENOSYS), // SETUPMAPPING
        (49, libc::ENOSYS), // REMOVEMAPPING
        (0, libc::ENOSYS),
        (7, libc::ENOSYS),
        (54, libc::ENOSYS),
        (4096, libc::ENOSYS), // CUSE_INIT
        (u32::MAX, libc::ENOSYS),
    ];
    for (opcode, errno) in refused {
        assert_eq!(client.call(opcode, file, &[&[0; 64]]), Err(errno), "{opcode}");
    }
}
