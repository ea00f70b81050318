//! Requests, as a kernel makes them (`linux/fuse.h`): arguments as data, and their bytes.

use arbitrary::Arbitrary;

/// Bytes of a request's header.
pub(super) const HEADER_LEN: usize = 40;

/// Node id of the root.
const ROOT: u64 = 1;

/// Bytes of a READ or WRITE, at most: small beside the device.
const TRANSFER_MAX: u32 = 64 << 10;

/// A node that the client was told of, by number.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum Node {
    Root,
    Known(u8),
    Any(u64),
}

impl Node {
    pub(super) const ROOT: Self = Self::Root;
}

/// Node ids that the client was told of.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: Vec<u64>,
}

impl Nodes {
    pub(super) fn get(&self, node: Node) -> u64 {
        match node {
            Node::Root => ROOT,
            // The newest first: they are of most interest.
            Node::Known(number) => match usize::from(number).checked_rem(self.known.len()) {
                Some(index) => self.known[self.known.len() - 1 - index],
                None => ROOT,
            },
            Node::Any(id) => id,
        }
    }

    /// Takes the node out of a reply that has one.
    pub(super) fn learn(&mut self, body: &Body, reply: &[u8]) {
        if let Some(id) = body.told_node(reply)
            && !self.known.contains(&id)
        {
            self.known.push(id);
        }
    }
}

/// A name, mostly one of few.
#[derive(Debug, Clone, Arbitrary)]
pub(super) enum Name {
    Usual(u8),
    Bytes(Vec<u8>),
    Long(u8),
}

impl Name {
    fn encode(&self) -> Vec<u8> {
        const USUAL: [&[u8]; 10] = [b"a", b"b", b"c", b"d", b"file", b"dir", b"other", b".", b"..", b""];
        let mut bytes = match self {
            Self::Usual(number) => USUAL[usize::from(*number) % USUAL.len()].to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
            Self::Long(more) => vec![b'n'; 240 + usize::from(*more)],
        };
        bytes.push(0);
        bytes
    }
}

/// A place in a file.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub(super) enum Place {
    Byte(u16),
    Block(u8),
    Any(u64),
    Top(u16),
}

impl Place {
    pub(super) fn get(self) -> u64 {
        match self {
            Self::Byte(at) => at.into(),
            Self::Block(number) => u64::from(number) * 4096,
            Self::Any(at) => at,
            Self::Top(below) => i64::MAX as u64 - u64::from(below),
        }
    }
}

/// Security context or group that comes with a creation.
#[derive(Debug, Clone, Arbitrary)]
pub(super) enum Extension {
    Group(u32),
    Context { name: Vec<u8>, value: Vec<u8> },
    Bytes { kind: u8, bytes: Vec<u8> },
}

impl Extension {
    fn encode(&self) -> Vec<u8> {
        let (kind, mut payload) = match self {
            Self::Group(group) => (32, words(&[1, *group])),
            Self::Context { name, value } => {
                let mut payload = words(&[value.len() as u32, 0]);
                payload.extend(name.iter().filter(|byte| **byte != 0));
                payload.push(0);
                payload.extend(value);
                payload.resize(payload.len().next_multiple_of(8), 0);
                (1, payload)
            }
            Self::Bytes { kind, bytes } => (u32::from(*kind), bytes.clone()),
        };
        payload.resize(payload.len().next_multiple_of(8), 0);
        let mut bytes = words(&[8 + payload.len() as u32, kind]);
        bytes.extend(payload);
        bytes
    }
}

/// Attributes that SETATTR changes.
#[derive(Debug, Clone, Arbitrary)]
pub(super) struct Attributes {
    pub(super) valid: u16,
    pub(super) size: Place,
    mode: u16,
    uid: u8,
    gid: u8,
    time: u64,
    nanoseconds: u32,
}

pub(super) const FATTR_SIZE: u16 = 1 << 3;

/// What a request asks, beside its node.
#[derive(Debug, Clone, Arbitrary)]
pub(super) enum Body {
    Lookup(Name),
    Forget(u8),
    BatchForget { nodes: Vec<(Node, u8)>, more: u8 },
    GetAttr,
    SetAttr(Attributes),
    ReadLink,
    Symlink { name: Name, target: Vec<u8> },
    MkNod { name: Name, mode: u16, rdev: u32, umask: u16, extension: Option<Extension> },
    MkDir { name: Name, mode: u16, umask: u16, extension: Option<Extension> },
    Unlink(Name),
    RmDir(Name),
    Rename { name: Name, new_dir: Node, new_name: Name },
    Rename2 { name: Name, new_dir: Node, new_name: Name, flags: u8 },
    Link { node: Node, name: Name },
    Open(u32),
    Read { at: Place, len: u32, flags: u32 },
    Write { at: Place, len: u16, fill: u8, write_flags: u8, flags: u32 },
    StatFs,
    Release,
    FSync { data_only: bool },
    SetXattr { name: u8, len: u32, fill: u8, flags: u8, kill: bool },
    GetXattr { name: u8, room: u32 },
    ListXattr { room: u32 },
    RemoveXattr { name: u8 },
    SetAcl { default: bool, entries: Vec<(u8, u8, u8)> },
    Flush,
    Init { minor: u8, flags: u32, flags2: u32 },
    OpenDir,
    ReadDir { at: u64, len: u32, plus: bool },
    FSyncDir,
    Create { name: Name, flags: u32, mode: u16, umask: u16, open_flags: u8, extension: Option<Extension> },
    TmpFile { mode: u16 },
    Destroy,
    Fallocate { mode: u8, at: Place, len: Place },
    LSeek { at: Place, whence: u8 },
    SyncFs,
    StatX,
    Other { opcode: u8, arguments: Vec<u8> },
}

const XATTRS: [&[u8]; 8] = [
    b"user.a\0",
    b"user.b\0",
    b"user.a longer name than the others\0",
    b"trusted.t\0",
    b"security.capability\0",
    b"system.posix_acl_access\0",
    b"system.posix_acl_default\0",
    b"other.c\0",
];

fn xattr(number: u8) -> &'static [u8] {
    XATTRS[usize::from(number) % XATTRS.len()]
}

/// Opcodes whose replies begin with a node.
const LOOKUP: u32 = 1;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const LINK: u32 = 13;
const CREATE: u32 = 35;
const TMPFILE: u32 = 51;

impl Body {
    /// Offers everything that Linux has.
    pub(super) const INIT: Self = Self::Init { minor: 45, flags: u32::MAX, flags2: u32::MAX };

    /// Whether what the client knows may end with this request.
    pub(super) fn begins_anew(&self) -> bool {
        matches!(self, Self::Init { .. } | Self::Destroy | Self::Other { .. })
    }

    /// Bytes that a reply may have beside what every reply finds room for.
    pub(super) fn reply_len(&self) -> usize {
        let len = match self {
            Self::Read { len, .. } | Self::ReadDir { len, .. } => len % (TRANSFER_MAX + 1),
            Self::GetXattr { room, .. } | Self::ListXattr { room } => room % (TRANSFER_MAX + 1),
            _ => 0,
        };
        len as usize
    }

    /// Node that a successful reply tells of.
    pub(super) fn told_node(&self, reply: &[u8]) -> Option<u64> {
        let tells = matches!(
            self.encode(&Nodes::default()).0,
            LOOKUP | SYMLINK | MKNOD | MKDIR | LINK | CREATE | TMPFILE
        );
        let id = u64::from_le_bytes(*reply.first_chunk()?);
        (tells && id != 0).then_some(id)
    }

    /// Opcode and arguments, extensions at the end.
    pub(super) fn encode(&self, nodes: &Nodes) -> (u32, Vec<u8>) {
        let extended = |arguments: Vec<u8>, extension: &Option<Extension>| {
            [arguments, extension.as_ref().map_or(Vec::new(), Extension::encode)].concat()
        };
        match self {
            Self::Lookup(name) => (LOOKUP, name.encode()),
            Self::Forget(count) => (2, u64::from(*count).to_le_bytes().to_vec()),
            Self::BatchForget { nodes: forgotten, more } => {
                let mut arguments = words(&[forgotten.len() as u32 + u32::from(*more), 0]);
                for (node, count) in forgotten {
                    arguments.extend(nodes.get(*node).to_le_bytes());
                    arguments.extend(u64::from(*count).to_le_bytes());
                }
                (42, arguments)
            }
            Self::GetAttr => (3, vec![0; 16]),
            Self::SetAttr(attributes) => (4, attributes.encode()),
            Self::ReadLink => (5, Vec::new()),
            Self::Symlink { name, target } => {
                let target: Vec<u8> = target.iter().copied().filter(|byte| *byte != 0).collect();
                (SYMLINK, [name.encode(), target, vec![0]].concat())
            }
            Self::MkNod { name, mode, rdev, umask, extension } => {
                let head = words(&[(*mode).into(), *rdev, (*umask).into(), 0]);
                (MKNOD, extended([head, name.encode()].concat(), extension))
            }
            Self::MkDir { name, mode, umask, extension } => {
                let head = words(&[(*mode).into(), (*umask).into()]);
                (MKDIR, extended([head, name.encode()].concat(), extension))
            }
            Self::Unlink(name) => (10, name.encode()),
            Self::RmDir(name) => (11, name.encode()),
            Self::Rename { name, new_dir, new_name } => {
                let head = nodes.get(*new_dir).to_le_bytes().to_vec();
                (12, [head, name.encode(), new_name.encode()].concat())
            }
            Self::Rename2 { name, new_dir, new_name, flags } => {
                let head = nodes.get(*new_dir).to_le_bytes().to_vec();
                let flags = words(&[(*flags).into(), 0]);
                (45, [head, flags, name.encode(), new_name.encode()].concat())
            }
            Self::Link { node, name } => {
                (LINK, [nodes.get(*node).to_le_bytes().to_vec(), name.encode()].concat())
            }
            Self::Open(flags) => (14, words(&[*flags, 0])),
            Self::Read { at, len, flags } => (15, transfer(at.get(), len % (TRANSFER_MAX + 1), 0, *flags)),
            Self::Write { at, len, fill, write_flags, flags } => {
                let head = transfer(at.get(), (*len).into(), (*write_flags).into(), *flags);
                (16, [head, vec![*fill; usize::from(*len)]].concat())
            }
            Self::StatFs => (17, Vec::new()),
            Self::Release => (18, vec![0; 24]),
            Self::FSync { data_only } => (20, words(&[0, 0, (*data_only).into(), 0])),
            Self::SetXattr { name, len, fill, flags, kill } => {
                let len = len % (TRANSFER_MAX + 2);
                let head = words(&[len, (*flags).into(), (*kill).into(), 0]);
                (21, [head, xattr(*name).to_vec(), vec![*fill; len as usize]].concat())
            }
            Self::SetAcl { default, entries } => {
                let mut value = words(&[2]);
                for (tag, permissions, id) in entries {
                    value.extend(u16::from(*tag).to_le_bytes());
                    value.extend(u16::from(*permissions).to_le_bytes());
                    value.extend(if *id == 0 { u32::MAX } else { (*id).into() }.to_le_bytes());
                }
                let head = words(&[value.len() as u32, 0, 0, 0]);
                (21, [head, xattr(5 + u8::from(*default)).to_vec(), value].concat())
            }
            Self::GetXattr { name, room } => {
                (22, [words(&[room % (TRANSFER_MAX + 1), 0]), xattr(*name).to_vec()].concat())
            }
            Self::ListXattr { room } => (23, words(&[room % (TRANSFER_MAX + 1), 0])),
            Self::RemoveXattr { name } => (24, xattr(*name).to_vec()),
            Self::Flush => (25, vec![0; 24]),
            Self::Init { minor, flags, flags2 } => {
                let mut arguments = words(&[7, (*minor).into(), 4096, *flags, *flags2]);
                arguments.resize(64, 0);
                (26, arguments)
            }
            Self::OpenDir => (27, vec![0; 8]),
            Self::ReadDir { at, len, plus } => {
                (if *plus { 44 } else { 28 }, transfer(*at, len % (TRANSFER_MAX + 1), 0, 0))
            }
            Self::FSyncDir => (30, vec![0; 16]),
            Self::Create { name, flags, mode, umask, open_flags, extension } => {
                let head = words(&[*flags, (*mode).into(), (*umask).into(), (*open_flags).into()]);
                (CREATE, extended([head, name.encode()].concat(), extension))
            }
            Self::TmpFile { mode } => {
                (TMPFILE, [words(&[0, (*mode).into(), 0, 0]), b"/\0".to_vec()].concat())
            }
            Self::Destroy => (38, Vec::new()),
            Self::Fallocate { mode, at, len } => {
                let (at, len) = (at.get().to_le_bytes(), len.get().to_le_bytes());
                (43, [&[0; 8], &at[..], &len, &words(&[(*mode).into(), 0])].concat())
            }
            Self::LSeek { at, whence } => {
                (46, [&[0; 8], &at.get().to_le_bytes()[..], &words(&[(*whence).into(), 0])].concat())
            }
            Self::SyncFs => (50, vec![0; 8]),
            Self::StatX => (52, vec![0; 24]),
            Self::Other { opcode, arguments } => ((*opcode).into(), arguments.clone()),
        }
    }

    /// Extensions at the end of the arguments, in bytes.
    fn extensions_len(&self) -> usize {
        match self {
            Self::MkNod { extension, .. }
            | Self::MkDir { extension, .. }
            | Self::Create { extension, .. } => {
                extension.as_ref().map_or(0, |extension| extension.encode().len())
            }
            _ => 0,
        }
    }

    /// What the header states about extensions, in units of eight bytes.
    pub(super) fn extensions(&self) -> u16 {
        (self.extensions_len() / 8) as u16
    }
}

impl Attributes {
    /// `struct fuse_setattr_in`.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = words(&[self.valid.into(), 0, 0, 0]);
        for value in [self.size.get(), 0, self.time, self.time, self.time] {
            bytes.extend(value.to_le_bytes());
        }
        let times = [self.nanoseconds; 3];
        bytes.extend(words(&times));
        bytes.extend(words(&[self.mode.into(), 0, self.uid.into(), self.gid.into(), 0]));
        bytes
    }
}

/// `struct fuse_read_in` and `struct fuse_write_in`.
fn transfer(offset: u64, size: u32, transfer_flags: u32, flags: u32) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(words(&[size, transfer_flags, 0, 0, flags, 0]));
    bytes
}

pub(super) fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A whole request. `extensions` are the last bytes of the arguments, in units of eight.
pub(super) fn request(opcode: u32, unique: u64, node: u64, arguments: &[u8], extensions: u16) -> Vec<u8> {
    let mut bytes = words(&[(HEADER_LEN + arguments.len()) as u32, opcode]);
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend(words(&[0, 0, 1]));
    bytes.extend(extensions.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(arguments);
    bytes
}
