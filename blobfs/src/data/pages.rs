//! The cached pages of one file.
//!
//! Pages are kept in chunks of 64, each with one word per state, so that ranges are tested and walked by
//! words.
//!
//! | state | meaning |
//! | --- | --- |
//! | present | has a slot |
//! | loaded | its bytes are valid; present but not loaded: being read |
//! | dirty | newer than the device |
//! | writing | being written; a page that changes meanwhile is dirty again |
//! | mapped | every block of it is in written extents: dirtying it needs no reservation |
//! | logged | dirty or being written, and the journal has bytes that its blocks do not have yet |
//! | synced | dirty, but the journal has its bytes as they are |
//!
//! Bytes of a loaded page behind the end of the file are zero.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::arena::Slot;

/// Pages of a chunk.
const CHUNK: u64 = 64;

/// One page's state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PageState {
    pub(super) slot: Option<Slot>,
    pub(super) loaded: bool,
    pub(super) dirty: bool,
    pub(super) writing: bool,
    pub(super) mapped: bool,
    pub(super) logged: bool,
    pub(super) synced: bool,
}

struct Chunk {
    slots: [Slot; CHUNK as usize],
    present: u64,
    loaded: u64,
    dirty: u64,
    writing: u64,
    mapped: u64,
    logged: u64,
    synced: u64,
}

impl Chunk {
    /// Pages that a sync has to see to.
    fn unsynced(&self) -> u64 {
        self.dirty & !self.synced
    }
}

/// Pages by their number in the file.
#[derive(Default)]
pub(super) struct PageMap {
    chunks: BTreeMap<u64, Box<Chunk>>,
    /// Chunks with [`Chunk::unsynced`] pages: a sync looks at no others.
    unsynced: BTreeSet<u64>,
    /// Pages being written.
    writing: usize,
}

/// The bits of `pages` inside chunk `chunk`.
fn mask(chunk: u64, pages: &Range<u64>) -> u64 {
    let first = chunk * CHUNK;
    let start = pages.start.max(first) - first;
    let end = pages.end.min(first + CHUNK).saturating_sub(first);
    if start >= end { 0 } else { (u64::MAX >> (CHUNK - (end - start))) << start }
}

fn chunk_range(pages: &Range<u64>) -> Range<u64> {
    pages.start / CHUNK..pages.end.div_ceil(CHUNK)
}

/// Numbers of the set bits.
fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (u64::from(bit) < CHUNK).then_some(u64::from(bit))
    })
}

impl PageMap {
    /// Whether no page has a slot.
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// State of a page.
    #[inline]
    pub(super) fn get(&self, page: u64) -> PageState {
        let Some(chunk) = self.chunks.get(&(page / CHUNK)) else { return PageState::default() };
        let bit = 1 << (page % CHUNK);
        PageState {
            slot: (chunk.present & bit != 0).then(|| chunk.slots[(page % CHUNK) as usize]),
            loaded: chunk.loaded & bit != 0,
            dirty: chunk.dirty & bit != 0,
            writing: chunk.writing & bit != 0,
            mapped: chunk.mapped & bit != 0,
            logged: chunk.logged & bit != 0,
            synced: chunk.synced & bit != 0,
        }
    }

    /// The first page of `pages` that is not loaded.
    #[inline]
    pub(super) fn first_missing(&self, pages: &Range<u64>) -> Option<u64> {
        for number in chunk_range(pages) {
            let wanted = mask(number, pages);
            let loaded = self.chunks.get(&number).map_or(0, |chunk| chunk.loaded);
            if wanted & !loaded != 0 {
                return Some(number * CHUNK + u64::from((wanted & !loaded).trailing_zeros()));
            }
        }
        None
    }

    /// Calls `each` for the slots of `pages`, all of which are loaded.
    #[inline]
    pub(super) fn each_slot(&self, pages: &Range<u64>, mut each: impl FnMut(Slot)) {
        for number in chunk_range(pages) {
            let Some(chunk) = self.chunks.get(&number) else { continue };
            for bit in bits(mask(number, pages) & chunk.loaded) {
                each(chunk.slots[bit as usize]);
            }
        }
    }

    /// Gives an absent page a slot; it is not loaded yet.
    pub(super) fn insert(&mut self, page: u64, slot: Slot) {
        let chunk = self.chunks.entry(page / CHUNK).or_insert_with(|| {
            Box::new(Chunk {
                slots: [Slot(u32::MAX); CHUNK as usize],
                present: 0,
                loaded: 0,
                dirty: 0,
                writing: 0,
                mapped: 0,
                logged: 0,
                synced: 0,
            })
        });
        let bit = 1 << (page % CHUNK);
        debug_assert!(chunk.present & bit == 0);
        chunk.present |= bit;
        chunk.slots[(page % CHUNK) as usize] = slot;
    }

    /// Takes a page out, whatever its state.
    pub(super) fn remove(&mut self, page: u64) -> Option<Slot> {
        let number = page / CHUNK;
        let chunk = self.chunks.get_mut(&number)?;
        let bit = 1 << (page % CHUNK);
        if chunk.present & bit == 0 {
            return None;
        }
        let slot = chunk.slots[(page % CHUNK) as usize];
        self.writing -= usize::from(chunk.writing & bit != 0);
        for word in [
            &mut chunk.present,
            &mut chunk.loaded,
            &mut chunk.dirty,
            &mut chunk.writing,
            &mut chunk.mapped,
            &mut chunk.logged,
            &mut chunk.synced,
        ] {
            *word &= !bit;
        }
        if chunk.unsynced() == 0 {
            self.unsynced.remove(&number);
        }
        if chunk.present == 0 {
            self.chunks.remove(&number);
        }
        Some(slot)
    }

    /// Takes a page out if nothing needs it: loaded, neither dirty nor being written.
    pub(super) fn evict(&mut self, page: u64) -> Option<Slot> {
        let state = self.get(page);
        if !state.loaded || state.dirty || state.writing { None } else { self.remove(page) }
    }

    #[inline]
    fn update(&mut self, page: u64, change: impl FnOnce(&mut Chunk, u64)) {
        let (number, bit) = (page / CHUNK, 1 << (page % CHUNK));
        let chunk = self.chunks.get_mut(&number).expect("a page with a slot");
        let (was_unsynced, was_written) = (chunk.unsynced() != 0, chunk.writing & bit != 0);
        change(chunk, bit);
        match (was_unsynced, chunk.unsynced() != 0) {
            (false, true) => drop(self.unsynced.insert(number)),
            (true, false) => drop(self.unsynced.remove(&number)),
            (false, false) | (true, true) => {}
        }
        self.writing = self.writing + usize::from(chunk.writing & bit != 0) - usize::from(was_written);
    }

    /// The bytes of a page are valid.
    pub(super) fn set_loaded(&mut self, page: u64, mapped: bool) {
        self.update(page, |chunk, bit| {
            chunk.loaded |= bit;
            if mapped {
                chunk.mapped |= bit;
            }
        });
    }

    /// Some blocks of a page may have lost their mapping.
    pub(super) fn clear_mapped(&mut self, page: u64) {
        self.update(page, |chunk, bit| chunk.mapped &= !bit);
    }

    /// A page has changed; its bytes are valid. True if it was clean.
    pub(super) fn set_dirty(&mut self, page: u64) -> bool {
        let mut was_clean = false;
        self.update(page, |chunk, bit| {
            was_clean = chunk.dirty & bit == 0;
            chunk.loaded |= bit;
            chunk.dirty |= bit;
            chunk.synced &= !bit;
        });
        was_clean
    }

    /// A dirty page is being written from now on.
    pub(super) fn begin_writing(&mut self, page: u64) {
        self.update(page, |chunk, bit| {
            chunk.dirty &= !bit;
            chunk.writing |= bit;
        });
    }

    /// A page has been written; `mapped`: to where it belongs.
    pub(super) fn end_writing(&mut self, page: u64, mapped: bool) {
        self.update(page, |chunk, bit| {
            chunk.writing &= !bit;
            chunk.logged &= !bit;
            chunk.synced &= !bit;
            if mapped {
                chunk.mapped |= bit;
            }
        });
    }

    /// The journal has a dirty page as it is; `mapped`: all of its blocks are mapped.
    pub(super) fn set_logged(&mut self, page: u64, mapped: bool) {
        self.update(page, |chunk, bit| {
            chunk.logged |= bit;
            chunk.synced |= bit;
            if mapped {
                chunk.mapped |= bit;
            }
        });
    }

    /// No page has to be written for the journal's sake any more.
    pub(super) fn forget_logged(&mut self) {
        for (number, chunk) in &mut self.chunks {
            chunk.logged = 0;
            chunk.synced = 0;
            if chunk.unsynced() != 0 {
                self.unsynced.insert(*number);
            }
        }
    }

    /// The first page of `pages` that is logged.
    pub(super) fn first_logged(&self, pages: &Range<u64>) -> Option<u64> {
        self.first(pages, |chunk| chunk.logged)
    }

    /// Dirty pages that the journal does not have as they are, with their slots. `None` if there are more than
    /// `most`, or if any page is being written.
    pub(super) fn unsynced(&self, most: usize) -> Option<Vec<(u64, Slot)>> {
        if self.writing != 0 {
            return None;
        }
        let mut pages = Vec::new();
        for number in &self.unsynced {
            let chunk = &self.chunks[number];
            pages.extend(bits(chunk.unsynced()).map(|bit| (number * CHUNK + bit, chunk.slots[bit as usize])));
            if pages.len() > most {
                return None;
            }
        }
        Some(pages)
    }

    /// Present pages of `pages`, lowest first.
    pub(super) fn present(&self, pages: &Range<u64>) -> Vec<u64> {
        self.collect(pages, |chunk| chunk.present)
    }

    fn collect(&self, pages: &Range<u64>, word: impl Fn(&Chunk) -> u64) -> Vec<u64> {
        self.chunks
            .range(chunk_range(pages))
            .flat_map(|(number, chunk)| {
                bits(word(chunk) & mask(*number, pages)).map(move |bit| number * CHUNK + bit)
            })
            .collect()
    }

    fn any(&self, pages: &Range<u64>, word: impl Fn(&Chunk) -> u64) -> bool {
        self.chunks.range(chunk_range(pages)).any(|(number, chunk)| word(chunk) & mask(*number, pages) != 0)
    }

    /// Whether a page of `pages` is newer than the device, or on its way there.
    pub(super) fn is_unwritten(&self, pages: &Range<u64>) -> bool {
        self.any(pages, |chunk| chunk.dirty | chunk.writing)
    }

    /// The first page of `pages` that is newer than the device, or on its way there.
    pub(super) fn first_unwritten(&self, pages: &Range<u64>) -> Option<u64> {
        self.first(pages, |chunk| chunk.dirty | chunk.writing)
    }

    /// The first page of `pages` that neither the device nor the journal has as it is.
    pub(super) fn first_unsynced(&self, pages: &Range<u64>) -> Option<u64> {
        self.first(pages, |chunk| (chunk.dirty | chunk.writing) & !chunk.synced)
    }

    fn first(&self, pages: &Range<u64>, word: impl Fn(&Chunk) -> u64) -> Option<u64> {
        self.chunks.range(chunk_range(pages)).find_map(|(number, chunk)| {
            bits(word(chunk) & mask(*number, pages)).next().map(|bit| number * CHUNK + bit)
        })
    }

    /// Dirty pages of `pages` that are not being written, the first `most` of them, as runs; either logged ones or
    /// others, as the first one is.
    pub(super) fn dirty_runs(&self, pages: &Range<u64>, most: usize, runs_max: usize) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut count = 0;
        let mut kind = None;
        for (number, chunk) in self.chunks.range(chunk_range(pages)) {
            for bit in bits(chunk.dirty & !chunk.writing & mask(*number, pages)) {
                let page = number * CHUNK + bit;
                let is_logged = chunk.logged & (1 << bit) != 0;
                if *kind.get_or_insert(is_logged) != is_logged {
                    return runs;
                }
                let full = runs.len() == runs_max;
                match runs.last_mut() {
                    Some(run) if run.end == page => run.end += 1,
                    _ if full => return runs,
                    _ => runs.push(page..page + 1),
                }
                count += 1;
                if count == most {
                    return runs;
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn masks_cover_what_they_should() {
        assert_eq!(mask(0, &(0..64)), u64::MAX);
        assert_eq!(mask(0, &(63..64)), 1 << 63);
        assert_eq!(mask(1, &(0..64)), 0);
        assert_eq!(mask(1, &(60..66)), 0b11);
        assert_eq!(mask(0, &(60..66)), 0b1111 << 60);
        assert_eq!(mask(0, &(5..5)), 0);
        assert_eq!(mask(0, &(0..u64::MAX)), u64::MAX);
    }

    /// What [`PageMap::unsynced`] tells, looked for in every chunk.
    fn unsynced_by_looking(map: &PageMap) -> Option<Vec<(u64, Slot)>> {
        let is_writing = map.chunks.values().any(|chunk| chunk.writing != 0);
        let pages = map.present(&(0..u64::MAX)).into_iter().map(|page| (page, map.get(page)));
        let unsynced = pages.filter(|(_, state)| state.dirty && !state.synced);
        (!is_writing).then(|| unsynced.filter_map(|(page, state)| Some((page, state.slot?))).collect())
    }

    proptest! {
        #[test]
        fn what_a_sync_looks_at_is_what_is_unsynced(
            steps in proptest::collection::vec((0..6_u8, 0..200_u64), 0..200),
        ) {
            let mut map = PageMap::default();
            for (step, page) in steps {
                let state = map.get(page);
                match step {
                    _ if state.slot.is_none() => {
                        map.insert(page, Slot(page as u32));
                        map.set_loaded(page, true);
                    }
                    0 => drop(map.set_dirty(page)),
                    1 if state.dirty && !state.writing => map.begin_writing(page),
                    2 if state.writing => map.end_writing(page, true),
                    3 if state.dirty && !state.writing => map.set_logged(page, true),
                    4 => drop(map.remove(page)),
                    5 if page == 0 => map.forget_logged(),
                    _ => {}
                }
                prop_assert_eq!(map.unsynced(usize::MAX), unsynced_by_looking(&map));
            }
            let all = unsynced_by_looking(&map).unwrap_or_default();
            prop_assert!(all.is_empty() || map.unsynced(all.len() - 1).is_none());
        }
    }

    #[test]
    fn runs_join_over_chunks_and_stop_at_their_limits() {
        let mut map = PageMap::default();
        for page in [3, 62, 63, 64, 65, 200] {
            map.insert(page, Slot(page as u32));
            assert!(map.set_dirty(page));
        }
        assert_eq!(map.dirty_runs(&(0..u64::MAX), 100, 100), [3..4, 62..66, 200..201]);
        assert_eq!(map.dirty_runs(&(0..u64::MAX), 3, 100), [3..4, 62..64]);
        assert_eq!(map.dirty_runs(&(0..u64::MAX), 100, 2), [3..4, 62..66]);
        assert_eq!(map.dirty_runs(&(63..65), 100, 100).first(), Some(&(63..65)));
        map.begin_writing(63);
        assert_eq!(map.dirty_runs(&(62..66), 100, 100), [62..63, 64..66]);
        assert!(map.is_unwritten(&(63..64)) && !map.get(63).dirty);
        assert_eq!(map.evict(63), None);
        map.end_writing(63, true);
        assert!(map.get(63).mapped);
        assert_eq!(map.evict(63), Some(Slot(63)));
        assert_eq!(map.first_missing(&(62..66)), Some(63));
        assert_eq!(map.first_missing(&(64..66)), None);
        assert_eq!(map.present(&(0..64)), [3, 62]);
    }
}
