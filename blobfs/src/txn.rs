//! A transaction: the list of changes that become visible and durable together.

use crate::ondisk::Key;
use crate::units::{BlockRange, InodeId};

/// Who asked for a transaction; kept in its journal record so that a restarted daemon can tell a request
/// that was already carried out from one that was not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origin {
    /// The client's session; 0 for the file system itself.
    pub session: u64,
    /// The client's number for the request; 0 for none.
    pub request: u64,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Inserts or replaces an item.
    Put {
        /// Its key.
        key: Key,
        /// Its value: the bytes of [`Txn::values`] in this range.
        value: std::ops::Range<u32>,
    },
    /// Removes an item that exists.
    Delete {
        /// Its key.
        key: Key,
    },
    /// Marks blocks as used; they came from `Store::allocate`.
    Alloc(BlockRange),
    /// Gives blocks back. They can be allocated again once this transaction is durable and every device
    /// operation that began before it has ended.
    Free(BlockRange),
    /// Logs bytes of a file: its blocks need not hold them when the transaction is durable.
    Log {
        /// The file.
        inode: InodeId,
        /// Where in the file the bytes begin.
        offset: u64,
        /// The bytes: those of [`Txn::values`] in this range.
        bytes: std::ops::Range<u32>,
    },
    /// What was logged of these bytes of a file counts no longer.
    Settle {
        /// The file.
        inode: InodeId,
        /// Its bytes.
        bytes: std::ops::Range<u64>,
    },
}

/// Changes in the order in which they are applied. Built while preparing, applied by `Store::commit`.
///
/// A transaction can be cleared and used again: its buffers keep their capacity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Txn {
    origin: Origin,
    changes: Vec<Change>,
    values: Vec<u8>,
    promised: bool,
    shows_data: bool,
}

impl Txn {
    /// An empty transaction.
    pub fn new(origin: Origin) -> Self {
        Self { origin, changes: Vec::new(), values: Vec::new(), promised: false, shows_data: true }
    }

    /// Empties the transaction for another operation.
    pub fn clear(&mut self, origin: Origin) {
        self.origin = origin;
        self.changes.clear();
        self.values.clear();
        self.promised = false;
        self.shows_data = true;
    }

    /// Marks the transaction as one that carries out what a client was promised already: it may use metadata
    /// space that is otherwise kept for deletions.
    pub fn keep_promise(&mut self) {
        self.promised = true;
    }

    /// Whether it carries out a promise.
    pub fn is_promised(&self) -> bool {
        self.promised
    }

    /// Marks the transaction as one that says nothing about data which was written to the device ahead of it: it
    /// may become durable before that. Others, for all that is known, map such data or make it visible under
    /// a name or up to a size.
    pub fn show_no_data(&mut self) {
        self.shows_data = false;
    }

    /// Whether data that was written ahead of it has to be durable before it.
    pub fn shows_data(&self) -> bool {
        self.shows_data
    }

    /// Inserts or replaces an item.
    pub fn put(&mut self, key: Key, value: &[u8]) {
        let start = self.values.len() as u32;
        self.values.extend_from_slice(value);
        self.changes.push(Change::Put { key, value: start..self.values.len() as u32 });
    }

    /// Inserts or replaces an item whose bytes `encode` appends.
    pub fn put_with(&mut self, key: Key, encode: impl FnOnce(&mut Vec<u8>)) {
        let start = self.values.len() as u32;
        encode(&mut self.values);
        self.changes.push(Change::Put { key, value: start..self.values.len() as u32 });
    }

    /// Removes an item; it must exist.
    pub fn delete(&mut self, key: Key) {
        self.changes.push(Change::Delete { key });
    }

    /// Marks blocks as used.
    pub fn alloc(&mut self, range: BlockRange) {
        self.changes.push(Change::Alloc(range));
    }

    /// Gives blocks back.
    pub fn free(&mut self, range: BlockRange) {
        self.changes.push(Change::Free(range));
    }

    /// Logs `len` bytes of a file, which `fill` writes.
    pub fn log(&mut self, inode: InodeId, offset: u64, len: usize, fill: impl FnOnce(&mut [u8])) {
        let start = self.values.len();
        self.values.resize(start + len, 0);
        fill(&mut self.values[start..]);
        self.changes.push(Change::Log { inode, offset, bytes: start as u32..self.values.len() as u32 });
    }

    /// Settles what was logged of a file's bytes by earlier changes.
    pub fn settle(&mut self, inode: InodeId, bytes: std::ops::Range<u64>) {
        self.changes.push(Change::Settle { inode, bytes });
    }

    /// Adds the changes of `other` behind those that are there.
    pub fn append(&mut self, other: &Txn) {
        let shift = self.values.len() as u32;
        self.values.extend_from_slice(&other.values);
        self.changes.extend(other.changes.iter().cloned().map(|change| match change {
            Change::Put { key, value } => Change::Put { key, value: value.start + shift..value.end + shift },
            Change::Log { inode, offset, bytes } => {
                Change::Log { inode, offset, bytes: bytes.start + shift..bytes.end + shift }
            }
            other => other,
        }));
    }

    /// Puts an inode item.
    pub fn put_inode(&mut self, id: InodeId, item: &crate::ondisk::InodeItem) {
        self.put(Key::inode(id), &item.encode());
    }

    /// Who asked.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The changes in order.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// The bytes that `Put` and `Log` changes refer to.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The bytes of a `Put` or `Log`.
    pub fn value(&self, range: &std::ops::Range<u32>) -> &[u8] {
        &self.values[range.start as usize..range.end as usize]
    }

    /// Whether nothing would change.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Bytes that the transaction takes in the journal, at most.
    pub fn journal_bytes(&self) -> usize {
        64 + self.changes.len() * 32 + self.values.len()
    }
}
