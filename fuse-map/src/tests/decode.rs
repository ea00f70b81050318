//! What a hostile client may send to the decoder.

use std::rc::Rc;

use bdev::{AlignedBuf, IoBuffers};
use zerocopy::{FromZeros, IntoBytes};

use super::client::repeated;
use crate::abi::*;
use crate::decode::{self, Args};
use crate::errno::Errno;

/// A request of these argument bytes whose header states `extra` bytes more than there are.
fn with_args<T>(body: &[u8], extra: u32, check: impl FnOnce(Result<Args<'_>, Errno>) -> T) -> T {
    let mut header = fuse_in_header::new_zeroed();
    header.len = (size_of::<fuse_in_header>() + body.len()) as u32 + extra;
    let memory = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(40 + body.len(), 8)));
    memory.copy_from(0, header.as_bytes());
    memory.copy_from(40, body);
    check(Args::new(&memory, &header))
}

fn name(body: &[u8]) -> Result<Vec<u8>, i32> {
    with_args(body, 0, |args| args?.name()).map(|name| name.to_vec()).map_err(|errno| errno.0)
}

#[test]
fn names_are_checked() {
    assert_eq!(name(b"file\0"), Ok(b"file".to_vec()));
    for bad in [&b""[..], b"\0", b"file", b"a/b\0", b".\0", b"..\0"] {
        assert_eq!(name(bad), Err(libc::EINVAL), "{bad:?}");
    }
    assert_eq!(name(&[&[b'x'; 255][..], b"\0"].concat()).map(|name| name.len()), Ok(255));
    assert_eq!(name(&[&[b'x'; 256][..], b"\0"].concat()), Err(libc::ENAMETOOLONG));
}

#[test]
fn lengths_do_not_leave_the_memory() {
    assert!(with_args(b"", 1, |args| args.is_err()));
    assert!(with_args(&[0; 39], 0, |args| args.unwrap().take::<fuse_read_in>().is_err()));
    assert!(with_args(&[0; 8], 0, |args| args.unwrap().data(9).is_err()));
    assert!(with_args(&[0; 8], 0, |args| args.unwrap().xattr_value(u32::MAX).is_err()));
}

#[test]
fn no_request_is_longer_than_the_limit_whatever_memory_is_named() {
    let len_max = decode::REQUEST_LEN_MAX;
    let memory = repeated(&[0; 40], &[0; 4096], 4096);
    let accepted = |len: usize| {
        let header = fuse_in_header { len: len as u32, ..fuse_in_header::new_zeroed() };
        Args::new(&memory, &header).map(|args| args.left()).map_err(|errno| errno.0)
    };
    assert_eq!(accepted(len_max), Ok(len_max - 40));
    assert_eq!(accepted(len_max + 1), Err(libc::EINVAL));
    assert_eq!(accepted(memory.len()), Err(libc::EINVAL));
}

#[test]
fn arguments_over_many_buffers_are_read_in_order() {
    let units = 2000;
    let memory = repeated(&[0; 40], b"ab\0c", units);
    let header = fuse_in_header { len: (40 + 4 * units) as u32, ..fuse_in_header::new_zeroed() };
    let mut args = Args::new(&memory, &header).unwrap();
    for _ in 0..units / 2 {
        assert_eq!(args.name().unwrap().as_slice(), b"ab");
        assert_eq!(args.copied(1).unwrap(), b"c");
        assert_eq!(args.take::<u32>().unwrap().to_le_bytes(), *b"ab\0c");
    }
    assert_eq!(args.left(), 0);
    assert_eq!(args.name().err(), Some(Errno::INVALID));
}

#[test]
fn extensions_do_not_leave_the_request() {
    let extension = |size: u32, kind: u32, rest: &[u8]| {
        let body = [size.as_bytes(), kind.as_bytes(), rest].concat();
        with_args(&body, 0, |args| {
            args.unwrap().extensions().map(|found| found.group).map_err(|errno| errno.0)
        })
    };
    let groups = [1u32, 77];
    assert_eq!(extension(16, FUSE_EXT_GROUPS, groups.as_bytes()), Ok(Some(77)));
    for (size, kind) in [(0, FUSE_EXT_GROUPS), (24, FUSE_EXT_GROUPS), (u32::MAX, 1), (16, 31), (16, 33)] {
        assert_eq!(extension(size, kind, groups.as_bytes()), Err(libc::EINVAL), "{size} {kind}");
    }
    assert_eq!(extension(16, FUSE_EXT_GROUPS, [u32::MAX, 77].as_bytes()), Err(libc::EINVAL));
}

/// Each extension has as many contexts as it may have, but there is no end of extensions.
#[test]
fn security_contexts_are_few_and_have_different_names() {
    let extension = |name: &str| {
        let context = [[1_u32, 0].as_bytes(), name.as_bytes(), b"\0x"].concat();
        let mut bytes = [[8 + context.len().next_multiple_of(8) as u32, 1].as_bytes(), &context].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let found = |names: &[String]| {
        let body: Vec<u8> = names.iter().flat_map(|name| extension(name)).collect();
        with_args(&body, 0, |args| args.unwrap().extensions().map(|found| found.security.len()))
    };
    let names: Vec<String> = (0..32).map(|number| format!("security.{number}")).collect();
    assert_eq!(found(&names[..31]), Ok(31));
    assert_eq!(found(&names), Err(Errno::INVALID));
    assert_eq!(found(&[names[0].clone(), names[1].clone(), names[0].clone()]), Err(Errno::INVALID));
}

#[test]
fn ranges_stay_below_the_largest_position() {
    assert!(decode::check_range(0, 1 << 20).is_ok());
    assert_eq!(decode::check_range(i64::MAX as u64, 1), Err(Errno(libc::EFBIG)));
    assert_eq!(decode::check_range(u64::MAX, 1), Err(Errno::INVALID));
}
