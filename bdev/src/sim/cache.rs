//! The simulated disk's volatile write cache: what is durable, what is not yet, and what a power cut
//! leaves of it.
//!
//! Order in the cache is order of completion. A power cut leaves everything durable and, of each other
//! write in that order, any set of its blocks. For one block this gives every version since the last
//! durable one and nothing else: a disk may forget a new version, it never puts an old one over a new one.
//! Writes under way come last; they may be there as well, whole or in part.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Image;

/// A change of a device's content.
#[derive(Debug, Clone)]
pub struct Mutation {
    range: Range<u64>,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    /// Bytes from `start` of `data` on.
    Bytes {
        data: Rc<[u8]>,
        start: usize,
    },
    Zeroes,
    /// What a discard leaves.
    Garbage {
        seed: u64,
    },
}

impl Mutation {
    /// The range reads as `data` afterwards.
    pub fn write(offset: u64, data: Rc<[u8]>) -> Self {
        Self { range: offset..offset + data.len() as u64, content: Content::Bytes { data, start: 0 } }
    }

    /// The range reads as zeros afterwards.
    pub fn zeroes(range: Range<u64>) -> Self {
        Self { range, content: Content::Zeroes }
    }

    /// The range's content is undefined afterwards.
    pub fn discard(range: Range<u64>, seed: u64) -> Self {
        Self { range, content: Content::Garbage { seed } }
    }

    /// Where it changes the device.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Performs it.
    pub fn apply(&self, image: &mut Image) {
        match &self.content {
            Content::Bytes { data, start } => {
                let len = (self.range.end - self.range.start) as usize;
                image.write(self.range.start, &data[*start..start + len]);
            }
            Content::Zeroes => image.clear(self.range.clone()),
            Content::Garbage { seed } => image.scramble(self.range.clone(), *seed),
        }
    }

    /// The same content at another place.
    fn moved(&self, offset: u64) -> Self {
        let len = self.range.end - self.range.start;
        Self { range: offset..offset + len, content: self.content.clone() }
    }

    /// The part inside `range`, which lies inside its own.
    fn part(&self, range: Range<u64>) -> Self {
        let mut content = self.content.clone();
        if let Content::Bytes { start, .. } = &mut content {
            *start += (range.start - self.range.start) as usize;
        }
        Self { range, content }
    }

    /// The blocks for which `keep` says yes, as runs.
    fn torn(&self, block_size: u64, mut keep: impl FnMut() -> bool) -> Vec<Self> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = self.range.start;
        while at < self.range.end {
            let end = (at + block_size).min(self.range.end);
            if keep() {
                match runs.last_mut() {
                    Some(run) if run.end == at => run.end = end,
                    _ => runs.push(at..end),
                }
            }
            at = end;
        }
        runs.into_iter().map(|run| self.part(run)).collect()
    }
}

/// A change of the device as it was asked for.
#[derive(Debug, Clone)]
pub enum Request {
    /// A write, write-zeroes or discard.
    Change {
        /// What it does.
        mutation: Mutation,
        /// Durable at completion.
        fua: bool,
    },
    /// A flush.
    Flush,
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// As it should.
    Done,
    /// With an error. Which blocks of a write arrived, and which unflushed writes a failed flush lost,
    /// depends on the seed.
    Failed {
        /// Source of the choice.
        seed: u64,
    },
    /// Only the first `bytes` of it arrived.
    Cut {
        /// What arrived.
        bytes: u64,
    },
    /// It was acknowledged, and nothing happened.
    Lost,
    /// It was acknowledged, and went to another place.
    Misdirected {
        /// Where it went.
        offset: u64,
    },
    /// It was acknowledged and stays in the cache: the next so many flushes do not cover it.
    Delayed {
        /// How many.
        flushes: u32,
    },
}

/// One entry of a [`History`].
#[derive(Debug, Clone)]
pub enum Event {
    /// An operation began.
    Begin {
        /// Number of the operation.
        id: u64,
        /// What was asked for.
        request: Request,
    },
    /// An operation ended and was acknowledged.
    End {
        /// Number of the operation.
        id: u64,
        /// How it ended.
        fate: Fate,
    },
}

/// Which of the writes that are not durable a power cut leaves. Numbers count those writes from the oldest
/// ([`WriteCache::undecided`] of them).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashChoice {
    /// None.
    Nothing,
    /// All.
    Everything,
    /// The first so many: the disk wrote in order.
    First(usize),
    /// All but this one.
    Without(usize),
    /// This one alone.
    Only(usize),
    /// A random set, each write whole, absent or torn at block boundaries.
    Random {
        /// Source of the choice.
        seed: u64,
    },
    /// A random set of whole writes: a disk that tears nothing.
    Whole {
        /// Source of the choice.
        seed: u64,
    },
    /// The first so many, and of the next one a random part: a disk that writes in order, and tears.
    TornAfter {
        /// Writes before the torn one.
        count: usize,
        /// Source of the choice.
        seed: u64,
    },
}

enum Survival {
    Whole,
    Absent,
    Torn,
}

impl CrashChoice {
    fn seed(self) -> u64 {
        match self {
            Self::Random { seed } | Self::Whole { seed } | Self::TornAfter { seed, .. } => seed,
            Self::Nothing | Self::Everything | Self::First(_) | Self::Without(_) | Self::Only(_) => 0,
        }
    }

    fn survival(self, number: usize, rng: &mut SmallRng) -> Survival {
        let whole = match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::First(count) => number < count,
            Self::Without(one) => number != one,
            Self::Only(one) => number == one,
            Self::Whole { .. } => rng.random(),
            Self::TornAfter { count, .. } if number == count => return Survival::Torn,
            Self::TornAfter { count, .. } => number < count,
            // Tearing is the rarer event: most states should differ in which writes are there.
            Self::Random { .. } => match rng.random_range(0..5) {
                0 => return Survival::Torn,
                choice => choice < 3,
            },
        };
        if whole { Survival::Whole } else { Survival::Absent }
    }
}

#[derive(Debug, Clone)]
struct Completed {
    /// Rank in the order of completion.
    rank: u64,
    mutation: Mutation,
    durable: bool,
    /// Flushes that do not cover it.
    delayed: u32,
}

#[derive(Debug, Clone)]
enum Running {
    Change {
        mutation: Mutation,
        fua: bool,
    },
    /// Covers what had completed before it began.
    Flush {
        before: u64,
    },
}

/// Durable content and the changes on their way there.
#[derive(Debug, Clone)]
pub struct WriteCache {
    /// What a power cut does not tear, in bytes.
    tear_unit: u64,
    durable: Image,
    next_rank: u64,
    /// In order of completion. Never starts with a durable one: those go to `durable` at once.
    completed: Vec<Completed>,
    running: BTreeMap<u64, Running>,
}

impl WriteCache {
    /// An empty cache over durable content.
    pub fn new(durable: Image, block_size: u32) -> Self {
        Self {
            tear_unit: u64::from(block_size),
            durable,
            next_rank: 0,
            completed: Vec::new(),
            running: BTreeMap::new(),
        }
    }

    /// What a power cut does not tear, in bytes.
    pub(super) fn tear_unit(&self) -> u64 {
        self.tear_unit
    }

    /// Sets what a power cut does not tear, in bytes.
    pub(super) fn set_tear_unit(&mut self, bytes: u32) {
        self.tear_unit = u64::from(bytes);
    }

    /// What no power cut can take away.
    pub fn durable(&self) -> &Image {
        &self.durable
    }

    /// Changes durable content behind the cache's back.
    pub(super) fn durable_mut(&mut self) -> &mut Image {
        &mut self.durable
    }

    /// An operation begins.
    pub fn begin(&mut self, id: u64, request: Request) {
        let running = match request {
            Request::Change { mutation, fua } => Running::Change { mutation, fua },
            Request::Flush => Running::Flush { before: self.next_rank },
        };
        self.running.insert(id, running);
    }

    /// An operation ends; returns what it changed, as a reader sees it from now on.
    pub fn end(&mut self, id: u64, fate: Fate) -> Vec<Mutation> {
        match self.running.remove(&id) {
            Some(Running::Change { mutation, fua }) => self.end_change(mutation, fua, fate),
            Some(Running::Flush { before }) => {
                self.end_flush(before, fate);
                Vec::new()
            }
            None => Vec::new(),
        }
    }

    fn end_change(&mut self, mutation: Mutation, fua: bool, fate: Fate) -> Vec<Mutation> {
        let effect = match fate {
            Fate::Done | Fate::Delayed { .. } => vec![mutation],
            Fate::Lost => Vec::new(),
            Fate::Misdirected { offset } => vec![mutation.moved(offset)],
            Fate::Cut { bytes } => {
                let end = (mutation.range.start + bytes).min(mutation.range.end);
                vec![mutation.part(mutation.range.start..end)]
            }
            Fate::Failed { seed } => {
                let mut rng = SmallRng::seed_from_u64(seed);
                mutation.torn(self.tear_unit, || rng.random())
            }
        };
        let durable = fua && fate == Fate::Done;
        let delayed = if let Fate::Delayed { flushes } = fate { flushes } else { 0 };
        for mutation in &effect {
            let (rank, mutation) = (self.next_rank, mutation.clone());
            self.completed.push(Completed { rank, mutation, durable, delayed });
            self.next_rank += 1;
        }
        self.settle();
        effect
    }

    fn end_flush(&mut self, before: u64, fate: Fate) {
        match fate {
            Fate::Done => {
                for entry in self.completed.iter_mut().filter(|entry| entry.rank < before) {
                    entry.durable |= entry.delayed == 0;
                    entry.delayed = entry.delayed.saturating_sub(1);
                }
            }
            // As Linux after a failed write-back: pages count as clean, their content never arrives.
            Fate::Failed { seed } => {
                let mut rng = SmallRng::seed_from_u64(seed);
                self.completed.retain(|entry| entry.durable || rng.random());
            }
            Fate::Lost | Fate::Misdirected { .. } | Fate::Cut { .. } | Fate::Delayed { .. } => {}
        }
        self.settle();
    }

    /// Moves the durable beginning of the list into the durable image.
    fn settle(&mut self) {
        let count = self.completed.iter().take_while(|entry| entry.durable).count();
        for entry in self.completed.drain(..count) {
            entry.mutation.apply(&mut self.durable);
        }
    }

    /// The cache of a disk whose host has died while the power stayed on: what had begun ends as it should.
    pub fn after_the_host(&self) -> Self {
        let mut cache = self.clone();
        while let Some((&id, _)) = cache.running.first_key_value() {
            cache.end(id, Fate::Done);
        }
        cache
    }

    /// What a reader sees.
    pub fn visible(&self) -> Image {
        let mut image = self.durable.clone();
        for entry in &self.completed {
            entry.mutation.apply(&mut image);
        }
        image
    }

    /// Number of changes that a power cut may take or leave: completed but not durable, then under way.
    pub fn undecided(&self) -> usize {
        let running = self.running.values().filter(|running| matches!(running, Running::Change { .. }));
        self.completed.iter().filter(|entry| !entry.durable).count() + running.count()
    }

    /// What a power cut leaves.
    pub fn crash(&self, choice: CrashChoice) -> Image {
        let seed = choice.seed();
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut image = self.durable.clone();
        let mut number = 0;
        let completed = self.completed.iter().map(|entry| (&entry.mutation, entry.durable));
        let running = self.running.values().filter_map(|running| match running {
            Running::Change { mutation, .. } => Some((mutation, false)),
            Running::Flush { .. } => None,
        });
        for (mutation, durable) in completed.chain(running) {
            if durable {
                mutation.apply(&mut image);
                continue;
            }
            match choice.survival(number, &mut rng) {
                Survival::Whole => mutation.apply(&mut image),
                Survival::Absent => {}
                Survival::Torn => {
                    for part in mutation.torn(self.tear_unit, || rng.random()) {
                        part.apply(&mut image);
                    }
                }
            }
            number += 1;
        }
        image
    }
}

/// Everything that happened to a disk while it was recorded, and the states that a power cut at any point
/// of it can leave.
///
/// A *point* is a number of events. In a disk without latency every operation has two: begun (it may be
/// there, whole or torn) and ended. States of rising points are cheap; going back replays from the start.
#[derive(Debug, Clone)]
pub struct History {
    start: WriteCache,
    events: Vec<Event>,
    cursor: (usize, WriteCache),
}

impl History {
    pub(super) fn new(start: WriteCache, events: Vec<Event>) -> Self {
        Self { cursor: (0, start.clone()), start, events }
    }

    /// What happened.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The last point: the number of events.
    pub fn last_point(&self) -> usize {
        self.events.len()
    }

    /// The write cache as it was at `point` (at most [`History::last_point`]).
    pub fn cache_at(&mut self, point: usize) -> &WriteCache {
        if point < self.cursor.0 {
            self.cursor = (0, self.start.clone());
        }
        let (at, cache) = &mut self.cursor;
        for event in self.events.iter().take(point).skip(*at) {
            match event {
                Event::Begin { id, request } => cache.begin(*id, request.clone()),
                Event::End { id, fate } => drop(cache.end(*id, *fate)),
            }
        }
        *at = point.min(self.events.len());
        cache
    }

    /// What a power cut at `point` leaves.
    pub fn state_at(&mut self, point: usize, choice: CrashChoice) -> Image {
        self.cache_at(point).crash(choice)
    }
}
