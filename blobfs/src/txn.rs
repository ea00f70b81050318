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
}

/// Changes in the order in which they are applied. Built while preparing, applied by `Store::commit`.
///
/// A transaction can be cleared and used again: its buffers keep their capacity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    origin: Origin,
    changes: Vec<Change>,
    values: Vec<u8>,
    promised: bool,
    attributes_only: bool,
}

impl Txn {
    /// An empty transaction.
    pub fn new(origin: Origin) -> Self {
        Self { origin, ..Self::default() }
    }

    /// Empties the transaction for another operation.
    pub fn clear(&mut self, origin: Origin) {
        self.origin = origin;
        self.changes.clear();
        self.values.clear();
        self.promised = false;
        self.attributes_only = false;
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

    /// Marks the transaction as one that changes attributes, but neither a size nor where data is: it may become
    /// durable before data that was written ahead of it.
    pub fn change_attributes_only(&mut self) {
        self.attributes_only = true;
    }

    /// Whether it changes attributes only.
    pub fn is_attributes_only(&self) -> bool {
        self.attributes_only
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

    /// Adds the changes of `other` behind those that are there.
    pub fn append(&mut self, other: &Txn) {
        let shift = self.values.len() as u32;
        self.values.extend_from_slice(&other.values);
        self.changes.extend(other.changes.iter().cloned().map(|change| match change {
            Change::Put { key, value } => Change::Put { key, value: value.start + shift..value.end + shift },
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

    /// The bytes that `Put` changes refer to.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The value of a `Put`.
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
