//! What regular files must hold, by what their client wrote and was told.

use std::collections::HashMap;

use super::request::{Body, FATTR_SIZE};

/// Files longer than this are not followed: they are all holes.
const SIZE_MAX: u64 = 1 << 20;

const FALLOC_KEEP_SIZE: u8 = 1;
const FALLOC_PUNCH_HOLE: u8 = 2;
const FALLOC_ZERO_RANGE: u8 = 16;

const O_TRUNC: u32 = 0o1000;
const O_APPEND: u32 = 0o2000;

/// Place of the size in `struct fuse_attr`, of that struct in a reply that tells of a node, and in one of attributes.
const ATTR_SIZE: usize = 8;
const ENTRY_ATTR: usize = 40;
const ATTR_ATTR: usize = 16;
/// Place of the mode in `struct fuse_attr`.
const ATTR_MODE: usize = 60;

/// Contents by node id; a file that is not here may hold anything.
#[derive(Debug, Default)]
pub(super) struct Contents {
    files: HashMap<u64, Vec<u8>>,
}

fn word(reply: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*reply.get(at..)?.first_chunk()?))
}

fn long(reply: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*reply.get(at..)?.first_chunk()?))
}

impl Contents {
    /// Nothing is known for sure any more.
    pub(super) fn forget_all(&mut self) {
        self.files.clear();
    }

    /// A request failed: it may have done a part of what it was asked for.
    pub(super) fn failed(&mut self, body: &Body, node: u64, _errno: i32) {
        if matches!(body, Body::Write { .. } | Body::Fallocate { .. }) {
            self.files.remove(&node);
        }
    }

    /// A request succeeded: follows what it did, and compares what it says.
    pub(super) fn compare(&mut self, body: &Body, node: u64, reply: &[u8]) {
        if let Some(told) = body.told_node(reply) {
            self.told(body, told, &reply[ENTRY_ATTR..]);
            return;
        }
        match body {
            Body::Write { at, fill, flags, .. } => {
                let written = word(reply, 0).expect("WRITE tells how much") as usize;
                if flags & O_APPEND != 0 {
                    self.files.remove(&node);
                }
                self.change(node, at.get(), written as u64, true, *fill);
            }
            Body::SetAttr(attributes) => {
                if attributes.valid & FATTR_SIZE != 0 {
                    self.resize(node, attributes.size.get());
                }
                self.compare_size(node, &reply[ATTR_ATTR..]);
            }
            Body::GetAttr => self.compare_size(node, &reply[ATTR_ATTR..]),
            Body::Fallocate { mode, at, len } => self.allocated(*mode, node, at.get(), len.get()),
            Body::Read { at, len, .. } => self.compare_read(node, at.get(), *len, reply),
            _ => {}
        }
    }

    fn told(&mut self, body: &Body, node: u64, attr: &[u8]) {
        let (size, mode) = (long(attr, ATTR_SIZE), word(attr, ATTR_MODE));
        let is_file = mode.is_some_and(|mode| mode & 0o170_000 == 0o100_000);
        if matches!(body, Body::Create { flags, .. } if flags & O_TRUNC != 0) {
            self.files.remove(&node);
        }
        if is_file && size == Some(0) {
            assert!(self.files.get(&node).is_none_or(Vec::is_empty), "node {node} has lost its content");
            self.files.insert(node, Vec::new());
        }
        self.compare_size(node, attr);
    }

    fn compare_size(&self, node: u64, attr: &[u8]) {
        if let Some(content) = self.files.get(&node) {
            assert_eq!(long(attr, ATTR_SIZE), Some(content.len() as u64), "size of node {node}");
        }
    }

    fn resize(&mut self, node: u64, size: u64) {
        if size > SIZE_MAX {
            self.files.remove(&node);
        } else if let Some(content) = self.files.get_mut(&node) {
            content.resize(size as usize, 0);
        }
    }

    /// Fills a range, and grows the file to it if told so.
    fn change(&mut self, node: u64, at: u64, len: u64, grow: bool, fill: u8) {
        let end = at.saturating_add(len);
        let Some(content) = self.files.get(&node) else { return };
        if grow && len > 0 && end > content.len() as u64 {
            self.resize(node, end);
        }
        if let Some(content) = self.files.get_mut(&node) {
            let size = content.len() as u64;
            content[at.min(size) as usize..end.min(size) as usize].fill(fill);
        }
    }

    fn allocated(&mut self, mode: u8, node: u64, at: u64, len: u64) {
        let grow = mode & FALLOC_KEEP_SIZE == 0;
        if mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE) != 0 {
            self.change(node, at, len, grow, 0);
        } else if grow
            && self.files.get(&node).is_some_and(|content| content.len() as u64 <= at.saturating_add(len))
        {
            self.resize(node, at.saturating_add(len));
        }
    }

    fn compare_read(&self, node: u64, at: u64, len: u32, reply: &[u8]) {
        let Some(content) = self.files.get(&node) else { return };
        let size = content.len() as u64;
        let wanted = Body::Read { at: super::request::Place::Byte(0), len, flags: 0 }.reply_len() as u64;
        let expected = &content[at.min(size) as usize..at.saturating_add(wanted).min(size) as usize];
        let differs = expected.iter().zip(reply).position(|(expected, found)| expected != found);
        assert_eq!(differs, None, "node {node} read at {at}: other bytes than were written");
        assert_eq!(reply.len(), expected.len(), "node {node} read at {at}: bytes of {size}");
    }
}
