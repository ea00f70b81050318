//! Requests that were damaged at random: each gets a reply of the right form, and nothing panics.

use std::collections::BTreeSet;

use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::{Export, Handled, op};

/// Requests per run: enough for every kind to succeed, too. `FUSE_MAP_HOSTILE_REQUESTS` asks for more.
const REQUESTS: u64 = 100_000;

/// A small generator (splitmix64), so that a seed gives the same requests for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// A request of every kind that succeeds on some node.
fn templates() -> Vec<(u32, Vec<u8>)> {
    let zeros = |len| vec![0_u8; len];
    let with = |head: &[u8], tail: &[u8]| [head, tail].concat();
    let read = fuse_read_in { size: 4096, ..fuse_read_in::new_zeroed() };
    let write = fuse_write_in { size: 10, offset: 3, ..fuse_write_in::new_zeroed() };
    let create = fuse_create_in { flags: 0, mode: 0o644, umask: 0o022, open_flags: 0 };
    let mknod = fuse_mknod_in { mode: libc::S_IFIFO | 0o644, ..fuse_mknod_in::new_zeroed() };
    let setattr = fuse_setattr_in {
        valid: SetattrValid::all().bits(),
        size: 5000,
        mode: 0o644,
        ..fuse_setattr_in::new_zeroed()
    };
    let fallocate = fuse_fallocate_in { length: 10_000, ..fuse_fallocate_in::new_zeroed() };
    let lseek = fuse_lseek_in { whence: libc::SEEK_HOLE.cast_unsigned(), ..fuse_lseek_in::new_zeroed() };
    let setxattr = fuse_setxattr_in { size: 5, ..fuse_setxattr_in::new_zeroed() };
    let getxattr = fuse_getxattr_in { size: 200, padding: 0 };
    let forget = [1_u64, ROOT, 1, 2, 1];
    let extensions = [24_u32, FUSE_EXT_GROUPS, 1, 5, 0, 0, 32, 1, 5, 0];
    let extensions = with(extensions.as_bytes(), b"security.a\0label");
    vec![
        (op::FUSE_LOOKUP, b"file\0".to_vec()),
        (op::FUSE_LOOKUP, b"..\0".to_vec()),
        (op::FUSE_FORGET, 1_u64.to_le_bytes().to_vec()),
        (op::FUSE_BATCH_FORGET, forget.as_bytes().to_vec()),
        (op::FUSE_GETATTR, zeros(16)),
        (op::FUSE_SETATTR, setattr.as_bytes().to_vec()),
        (op::FUSE_READLINK, zeros(0)),
        (op::FUSE_SYMLINK, b"link\0target\0".to_vec()),
        (op::FUSE_MKNOD, [mknod.as_bytes(), b"fifo\0", &extensions].concat()),
        (op::FUSE_MKDIR, with(&zeros(8), b"dir\0")),
        (op::FUSE_UNLINK, b"file\0".to_vec()),
        (op::FUSE_RMDIR, b"dir\0".to_vec()),
        (op::FUSE_RENAME, with(ROOT.as_bytes(), b"file\0other\0")),
        (op::FUSE_RENAME2, [ROOT.as_bytes(), &zeros(8), b"other\0file\0"].concat()),
        (op::FUSE_LINK, with(2_u64.as_bytes(), b"other\0")),
        (op::FUSE_OPEN, zeros(8)),
        (op::FUSE_READ, read.as_bytes().to_vec()),
        (op::FUSE_WRITE, with(write.as_bytes(), b"0123456789")),
        (op::FUSE_STATFS, zeros(0)),
        (op::FUSE_RELEASE, zeros(24)),
        (op::FUSE_FSYNC, zeros(16)),
        (op::FUSE_SETXATTR, with(setxattr.as_bytes(), b"user.a\0value")),
        (op::FUSE_GETXATTR, with(getxattr.as_bytes(), b"user.a\0")),
        (op::FUSE_LISTXATTR, getxattr.as_bytes().to_vec()),
        (op::FUSE_REMOVEXATTR, b"user.a\0".to_vec()),
        (op::FUSE_FLUSH, zeros(24)),
        (op::FUSE_INIT, with([7_u32, 45, 4096, u32::MAX, u32::MAX].as_bytes(), &zeros(44))),
        (op::FUSE_OPENDIR, zeros(8)),
        (op::FUSE_READDIR, read.as_bytes().to_vec()),
        (op::FUSE_RELEASEDIR, zeros(24)),
        (op::FUSE_FSYNCDIR, zeros(16)),
        (op::FUSE_ACCESS, zeros(8)),
        (op::FUSE_CREATE, [create.as_bytes(), b"file\0", &extensions].concat()),
        (op::FUSE_INTERRUPT, zeros(8)),
        (op::FUSE_DESTROY, zeros(0)),
        (op::FUSE_IOCTL, zeros(32)),
        (op::FUSE_FALLOCATE, fallocate.as_bytes().to_vec()),
        (op::FUSE_READDIRPLUS, read.as_bytes().to_vec()),
        (op::FUSE_LSEEK, lseek.as_bytes().to_vec()),
        (op::FUSE_COPY_FILE_RANGE, zeros(56)),
        (op::FUSE_SYNCFS, zeros(8)),
        (op::FUSE_TMPFILE, with(create.as_bytes(), b"/\0")),
        (op::FUSE_STATX, zeros(24)),
    ]
}

/// Changes some bytes: a bit, a byte of special meaning, or a word at one of its limits.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(bytes.len());
        match random.below(5) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.pick(&[0, b'/', b'.', 0x7f, 0x80, 0xff]),
            2 => bytes.truncate(at),
            3 => {
                let word = random.pick(&[0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, 1 << 20, (1 << 20) + 1]);
                let end = bytes.len().min(at / 4 * 4 + 4);
                let start = at / 4 * 4;
                bytes[start..end].copy_from_slice(&word.to_le_bytes()[..end - start]);
            }
            _ => bytes.extend((0..random.below(40)).map(|_| random.pick(&[0, b'x', b'/', 0xff]))),
        }
    }
}

/// Checks what came of a request, whatever it was; its body when it succeeded.
fn check(client: &Client, sent: Sent, room: usize) -> Option<Vec<u8>> {
    match sent.handled {
        Handled::NoReply => Some(Vec::new()),
        Handled::Unanswerable => {
            assert!(room < 16, "an answer was possible");
            None
        }
        // The form is checked by the client.
        Handled::Done(_) | Handled::Pending(_) => client.finish(sent).ok(),
    }
}

/// Nodes that the client is asked about, mostly those that it was told of last.
struct Nodes {
    told: [u64; 16],
    next: usize,
}

impl Nodes {
    fn add(&mut self, opcode: u32, body: &[u8]) {
        let tells = matches!(
            opcode,
            op::FUSE_LOOKUP
                | op::FUSE_CREATE
                | op::FUSE_MKNOD
                | op::FUSE_MKDIR
                | op::FUSE_SYMLINK
                | op::FUSE_LINK
        );
        if let (true, Some(nodeid)) = (tells, body.first_chunk()) {
            self.told[self.next % self.told.len()] = u64::from_le_bytes(*nodeid);
            self.next += 1;
        }
    }

    fn pick(&self, random: &mut Random) -> u64 {
        match random.below(8) {
            0 => random.next(),
            1..=3 => ROOT,
            _ => random.pick(&self.told),
        }
    }
}

/// Sends damaged requests; gives the opcodes of those that succeeded all the same.
fn run(export: Export, seed: u64, requests: u64) -> BTreeSet<u32> {
    let mut succeeded = BTreeSet::new();
    let mut random = Random(seed);
    let world = World::new();
    let client = world.client(export);
    let observer = world.client(EXCLUSIVE);
    let templates = templates();
    let mut nodes = Nodes { told: [ROOT; 16], next: 0 };
    for _ in 0..requests {
        if random.one_in(100) {
            // A client that was sent away comes again.
            client.init(InitFlags::all()).unwrap();
            for name in ["file", "dir", "link", "fifo", "other"] {
                if let Ok(nodeid) = client.find(ROOT, name) {
                    nodes.add(op::FUSE_LOOKUP, &nodeid.to_le_bytes());
                }
            }
        }
        let (opcode, mut body) = templates[random.below(templates.len())].clone();
        if matches!(opcode, op::FUSE_INIT | op::FUSE_DESTROY) && !random.one_in(20) {
            continue;
        }
        damage(&mut body, &mut random);
        let nodeid = nodes.pick(&mut random);
        if opcode == op::FUSE_LINK && body.len() > 8 && random.one_in(2) {
            body[..8].copy_from_slice(&nodes.pick(&mut random).to_le_bytes());
        }
        let opcode = if random.one_in(50) { random.below(60) as u32 } else { opcode };
        let header = client.header(opcode, nodeid, body.len());
        let mut head = fuse_in_header { total_extlen: 0, ..header };
        if random.one_in(20) {
            head.len = random.pick(&[0, 39, 40, head.len - 1, head.len + 1, u32::MAX]);
            head.total_extlen = random.pick(&[0, 1, 5, u16::MAX]);
        }
        let mut bytes = [head.as_bytes(), &body].concat();
        if random.one_in(100) {
            bytes.truncate(random.below(bytes.len()));
        }
        let room = match random.below(10) {
            0 => random.below(300),
            1 => 16,
            _ => 8192,
        };
        let unique = if bytes.len() < 16 { 0 } else { header.unique };
        let sent = client.send_bytes(&bytes, unique, room);
        if let Some(body) = check(&client, sent, room) {
            succeeded.insert(opcode);
            nodes.add(opcode, &body);
        }
    }
    // Others were not disturbed.
    assert!(observer.getattr(ROOT).is_ok());
    observer.mkdir(ROOT, "after all this").unwrap();
    observer.fsync(ROOT).unwrap();
    drop((client, observer));
    world.assert_sound();
    succeeded
}

#[test]
fn damaged_requests_get_a_reply_and_harm_nobody() {
    let requests = std::env::var("FUSE_MAP_HOSTILE_REQUESTS").ok();
    let requests = requests.map_or(REQUESTS, |requests| requests.parse().expect("a number of requests"));
    let mut succeeded = BTreeSet::new();
    for (seed, export) in [(1, EXCLUSIVE), (2, NO_CACHE), (3, Export { readonly: true, ..EXCLUSIVE })] {
        succeeded.extend(run(export, seed, requests));
    }
    // The damage leaves enough whole: each kind of request was carried out.
    let refused = [op::FUSE_ACCESS, op::FUSE_INTERRUPT, op::FUSE_IOCTL, op::FUSE_COPY_FILE_RANGE];
    for (opcode, _) in templates() {
        assert!(succeeded.contains(&opcode) || refused.contains(&opcode), "{opcode}");
    }
}
