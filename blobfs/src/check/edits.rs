//! Changes laid over the items: those of the journal, then those of a repair.
//!
//! Neither changes the tree. A pass over the tree gives each of its items to a [`Merge`], which calls back
//! with what the item becomes and with what is new between two items, in key order. The checker reads a
//! journal that was not replayed this way; a repair checks what it is about to write this way before it
//! writes it.

use std::borrow::Cow;
use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;

use hashbrown::{HashMap, HashSet};

use super::journal::{BlockPlace, Overlaid};
use super::remedy::{Change, ItemEdit, NameRule};
use crate::ondisk::{DirentRef, Key, Kind, encode_dirent};

/// Changes that a repair makes.
#[derive(Debug, Default)]
pub(super) struct Edits {
    items: BTreeMap<Key, ItemEdit>,
    /// Rules for the names that tree and journal hold.
    names: HashMap<u64, NameRule>,
    /// By inode, the items that name it and are made by an edit.
    new_names: HashMap<u64, Vec<Key>>,
    /// Maps whose extents and checksums in tree and journal go.
    without_extents: HashSet<u64>,
}

impl Edits {
    /// Adds a change, on top of those that are there: what is added later is not touched by it.
    pub(super) fn add(&mut self, change: Change) {
        match change {
            Change::Item(key, edit) => self.edit(key, edit),
            Change::Names(inode, rule) => self.rule(inode, rule),
            Change::DropExtents(map) => self.drop_extents(map),
            Change::CopyExtent(..) | Change::SumAnew { .. } | Change::Attach { .. } => {
                debug_assert!(false, "a repair turns these into items");
            }
        }
    }

    fn rule(&mut self, inode: u64, rule: NameRule) {
        self.names.entry(inode).or_default().merge(rule);
        for key in self.new_names.get(&inode).into_iter().flatten() {
            let Some(edit) = self.items.get_mut(key) else { continue };
            let (ItemEdit::Put(value) | ItemEdit::Insert(value)) = edit else { continue };
            match rule.apply(inode, key, value).map(Cow::into_owned) {
                Some(new) => *value = new,
                None if matches!(edit, ItemEdit::Put(_)) => *edit = ItemEdit::Delete,
                None => drop(self.items.remove(key)),
            }
        }
    }

    fn drop_extents(&mut self, map: u64) {
        self.without_extents.insert(map);
        let (from, to) = (Key::new(map, Kind::Extent, 0), Key::new(map, Kind::Checksum, u64::MAX));
        for (_, edit) in self.items.range_mut(from..=to) {
            *edit = ItemEdit::Delete;
        }
    }

    fn edit(&mut self, key: Key, edit: ItemEdit) {
        if let ItemEdit::Put(value) | ItemEdit::Insert(value) = &edit
            && key.kind == Kind::Dirent
            && let Some(entry) = DirentRef::decode(value)
        {
            self.new_names.entry(entry.inode.0).or_default().push(key);
        }
        let merged = match (self.items.remove(&key), edit) {
            (Some(ItemEdit::Delete), ItemEdit::Inode(_)) => ItemEdit::Delete,
            (Some(ItemEdit::Put(value)), ItemEdit::Inode(edit)) => ItemEdit::Put(edit.apply(&value)),
            (Some(ItemEdit::Insert(value)), ItemEdit::Inode(edit)) => ItemEdit::Insert(edit.apply(&value)),
            (Some(ItemEdit::Inode(mut earlier)), ItemEdit::Inode(edit)) => {
                earlier.merge(edit);
                ItemEdit::Inode(earlier)
            }
            (Some(ItemEdit::Delete), ItemEdit::Insert(value)) => ItemEdit::Put(value),
            (Some(earlier), ItemEdit::Insert(_)) => earlier,
            (_, edit) => edit,
        };
        self.items.insert(key, merged);
    }

    /// What the rules make of an item that no edit of its own names.
    fn by_rules<'v>(&self, key: &Key, value: &'v [u8]) -> Option<Cow<'v, [u8]>> {
        match key.kind {
            Kind::Extent | Kind::Checksum if self.without_extents.contains(&key.owner) => None,
            Kind::Dirent if !self.names.is_empty() => self.name(key, value),
            _ => Some(Cow::Borrowed(value)),
        }
    }

    fn name<'v>(&self, key: &Key, value: &'v [u8]) -> Option<Cow<'v, [u8]>> {
        let entry = DirentRef::decode(value);
        match entry.and_then(|entry| Some((entry.inode.0, self.names.get(&entry.inode.0)?))) {
            Some((inode, rule)) => rule.apply(inode, key, value),
            None => Some(Cow::Borrowed(value)),
        }
    }
}

impl NameRule {
    /// What the rule for an inode makes of an entry.
    fn apply<'v>(&self, inode: u64, key: &Key, value: &'v [u8]) -> Option<Cow<'v, [u8]>> {
        let Some(entry) = DirentRef::decode(value).filter(|entry| entry.inode.0 == inode) else {
            return Some(Cow::Borrowed(value));
        };
        if self.drop || self.only.is_some_and(|only| only != (key.owner, key.offset)) {
            return None;
        }
        match self.file_type {
            Some(file_type) if file_type != entry.file_type => {
                let mut out = Vec::with_capacity(value.len());
                encode_dirent(DirentRef { file_type, ..entry }, &mut out);
                Some(Cow::Owned(out))
            }
            _ => Some(Cow::Borrowed(value)),
        }
    }
}

/// Where an item that a [`Merge`] gives comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// It is in the tree as it is.
    Tree,
    /// It is new, or another than in the tree.
    Changed,
}

/// The merge of the tree's items with a journal and edits.
pub(super) struct Merge<'a> {
    journal: Peekable<btree_map::Iter<'a, Key, Overlaid>>,
    edits: &'a Edits,
    items: Peekable<btree_map::Iter<'a, Key, ItemEdit>>,
    /// Journal blocks that delete what does not exist.
    pub(super) missing: Vec<BlockPlace>,
    /// Items of the tree that went or changed.
    pub(super) changed: u64,
}

impl<'a> Merge<'a> {
    /// Nothing merged yet.
    pub(super) fn new(journal: &'a BTreeMap<Key, Overlaid>, edits: &'a Edits) -> Self {
        let (journal, items) = (journal.iter().peekable(), edits.items.iter().peekable());
        Self { journal, edits, items, missing: Vec::new(), changed: 0 }
    }

    /// The next item of the tree.
    pub(super) fn item(&mut self, key: &Key, value: &[u8], out: &mut impl FnMut(&Key, &[u8], Origin)) {
        self.journal_before(Some(key), out);
        match self.journal.next_if(|(new, _)| *new == key) {
            None => self.edited(key, value, Origin::Tree, out),
            Some((_, change)) => {
                self.changed += 1;
                if let Some(value) = &change.value {
                    self.edited(key, value, Origin::Changed, out);
                }
            }
        }
    }

    /// There are no more items in the tree.
    pub(super) fn end(&mut self, out: &mut impl FnMut(&Key, &[u8], Origin)) {
        self.journal_before(None, out);
        self.edits_before(None, out);
    }

    /// Items of the journal before the next one of the tree.
    fn journal_before(&mut self, next: Option<&Key>, out: &mut impl FnMut(&Key, &[u8], Origin)) {
        while let Some((key, change)) = self.journal.next_if(|(new, _)| next.is_none_or(|next| *new < next)) {
            if change.must_exist {
                self.missing.push(change.block);
            }
            if let Some(value) = &change.value {
                self.edited(key, value, Origin::Changed, out);
            }
        }
    }

    /// An item of tree or journal, as the edits have it.
    fn edited(&mut self, key: &Key, value: &[u8], from: Origin, out: &mut impl FnMut(&Key, &[u8], Origin)) {
        self.edits_before(Some(key), out);
        let value = match self.items.next_if(|(new, _)| *new == key) {
            None | Some((_, ItemEdit::Insert(_))) => self.edits.by_rules(key, value),
            Some((_, ItemEdit::Delete)) => None,
            Some((_, ItemEdit::Put(value))) => Some(Cow::Owned(value.clone())),
            Some((_, ItemEdit::Inode(edit))) => Some(Cow::Owned(edit.apply(value))),
        };
        let origin = if matches!(value, Some(Cow::Borrowed(_))) { from } else { Origin::Changed };
        if origin == Origin::Changed && from == Origin::Tree {
            self.changed += 1;
        }
        if let Some(value) = value {
            out(key, &value, origin);
        }
    }

    /// New items of the edits before the next one.
    fn edits_before(&mut self, next: Option<&Key>, out: &mut impl FnMut(&Key, &[u8], Origin)) {
        while let Some((key, edit)) = self.items.next_if(|(new, _)| next.is_none_or(|next| *new < next)) {
            if let ItemEdit::Put(value) | ItemEdit::Insert(value) = edit {
                out(key, value, Origin::Changed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{InodeId, MapId};

    fn key(owner: u64) -> Key {
        Key::new(owner, Kind::Xattr, 0)
    }

    fn merged(tree: &[u64], edits: &Edits) -> (Vec<(u64, Vec<u8>)>, u64) {
        let journal = BTreeMap::new();
        let mut merge = Merge::new(&journal, edits);
        let mut found = Vec::new();
        let mut out = |key: &Key, value: &[u8], _: Origin| found.push((key.owner, value.to_vec()));
        tree.iter().for_each(|owner| merge.item(&key(*owner), b"old", &mut out));
        merge.end(&mut out);
        (found, merge.changed)
    }

    #[test]
    fn edits_are_merged_in_key_order() {
        let mut edits = Edits::default();
        edits.add(Change::Item(key(3), ItemEdit::Put(b"new".into())));
        edits.add(Change::Item(key(2), ItemEdit::Delete));
        edits.add(Change::Item(key(4), ItemEdit::Insert(b"kept out".into())));
        edits.add(Change::Item(key(9), ItemEdit::Insert(b"last".into())));
        let (found, changed) = merged(&[1, 2, 4, 5], &edits);
        let text = |owner: u64, value: &str| (owner, value.as_bytes().to_vec());
        assert_eq!(found, [text(1, "old"), text(3, "new"), text(4, "old"), text(5, "old"), text(9, "last")]);
        assert_eq!(changed, 1);
    }

    #[test]
    fn a_deleted_item_stays_deleted_until_it_is_made_again() {
        let mut edits = Edits::default();
        let inode = Key::inode(InodeId(7));
        edits.add(Change::Item(inode, ItemEdit::Delete));
        edits.add(Change::Item(inode, ItemEdit::Inode(Default::default())));
        assert_eq!(edits.items[&inode], ItemEdit::Delete);
        edits.add(Change::Item(inode, ItemEdit::Insert(vec![1])));
        assert_eq!(edits.items[&inode], ItemEdit::Put(vec![1]));
    }

    #[test]
    fn what_comes_after_a_rule_is_not_touched_by_it() {
        let value = |inode: u64| {
            let mut out = Vec::new();
            encode_dirent(DirentRef { inode: InodeId(inode), file_type: 8, name: b"n" }, &mut out);
            out
        };
        let at = |offset: u64| Key::dirent(InodeId(1), offset);
        let mut edits = Edits::default();
        edits.add(Change::Item(at(1), ItemEdit::Put(value(5))));
        edits.add(Change::Item(at(2), ItemEdit::Insert(value(5))));
        edits.add(Change::Item(Key::extent(MapId(9), 3), ItemEdit::Put(vec![1])));
        edits.add(Change::Names(5, NameRule { drop: true, ..NameRule::default() }));
        edits.add(Change::DropExtents(9));
        edits.add(Change::Item(at(3), ItemEdit::Insert(value(5))));
        edits.add(Change::Item(Key::extent(MapId(9), 4), ItemEdit::Put(vec![2])));
        for kind in [Kind::Extent, Kind::Checksum] {
            assert!(edits.by_rules(&Key::new(9, kind, 64), &[1]).is_none());
            assert!(edits.by_rules(&Key::new(8, kind, 64), &[1]).is_some());
        }
        let items: Vec<_> = edits.items.into_iter().collect();
        let expected = [
            (at(1), ItemEdit::Delete),
            (at(3), ItemEdit::Insert(value(5))),
            (Key::extent(MapId(9), 3), ItemEdit::Delete),
            (Key::extent(MapId(9), 4), ItemEdit::Put(vec![2])),
        ];
        assert_eq!(items, expected);
    }

    #[test]
    fn rules_for_names_hold_for_every_name_of_the_inode() {
        let mut edits = Edits::default();
        edits.add(Change::Names(5, NameRule { file_type: Some(8), ..NameRule::default() }));
        let entry = |inode: u64, file_type: u8| {
            let mut out = Vec::new();
            encode_dirent(DirentRef { inode: InodeId(inode), file_type, name: b"n" }, &mut out);
            out
        };
        let key = Key::dirent(InodeId(1), 512);
        assert_eq!(edits.by_rules(&key, &entry(5, 4)).unwrap(), entry(5, 8));
        assert_eq!(edits.by_rules(&key, &entry(6, 4)).unwrap(), entry(6, 4));
        edits.add(Change::Names(5, NameRule { only: Some((1, 512)), ..NameRule::default() }));
        assert!(edits.by_rules(&key, &entry(5, 8)).is_some());
        assert!(edits.by_rules(&Key::dirent(InodeId(1), 513), &entry(5, 8)).is_none());
        edits.add(Change::Names(5, NameRule { drop: true, ..NameRule::default() }));
        assert!(edits.by_rules(&key, &entry(5, 8)).is_none());
    }
}
