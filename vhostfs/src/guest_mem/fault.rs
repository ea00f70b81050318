//! SIGBUS in guest memory: one broken session instead of a dead process.
//!
//! Mapped regions stand in a fixed table of atomics, the only state that the handler reads. It replaces the
//! whole mapping with zero pages in one `mmap` (so that huge pages need no care and one fault is enough),
//! marks the slot, and returns; the faulting instruction then runs again on zeros. Any other SIGBUS goes to
//! whoever handled it before.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Regions of all sessions of the process. Picked: 16 sessions with full tables.
pub(super) const SLOTS: usize = 1024;

/// Start address of a slot that is being filled: no mapping starts there.
const CLAIMED: usize = 1;

struct Entry {
    /// 0: free. [`CLAIMED`]: being filled. Otherwise the mapping's first byte.
    start: AtomicUsize,
    len: AtomicUsize,
    broken: AtomicBool,
}

static TABLE: [Entry; SLOTS] = [const {
    Entry { start: AtomicUsize::new(0), len: AtomicUsize::new(0), broken: AtomicBool::new(false) }
}; SLOTS];

static FAULTS: AtomicU64 = AtomicU64::new(0);

/// Faults in guest memory since the start of the process. A poller that sees it move looks at its regions.
pub fn fault_count() -> u64 {
    FAULTS.load(Ordering::Acquire)
}

/// A region's place in the table.
#[derive(Debug)]
pub(super) struct Slot(usize);

impl Slot {
    pub(super) fn register(start: usize, len: usize) -> Option<Self> {
        let claim = |entry: &Entry| {
            entry.start.compare_exchange(0, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let index = TABLE.iter().position(claim)?;
        let entry = &TABLE[index];
        entry.len.store(len, Ordering::Relaxed);
        entry.broken.store(false, Ordering::Relaxed);
        entry.start.store(start, Ordering::Release);
        Some(Self(index))
    }

    pub(super) fn is_broken(&self) -> bool {
        TABLE[self.0].broken.load(Ordering::Acquire)
    }

    /// To be called before the mapping goes.
    pub(super) fn release(&self) {
        TABLE[self.0].start.store(0, Ordering::Release);
    }
}

struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once under `INSTALL`, before the handler that reads it can run.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::uninit()));
static INSTALL: Once = Once::new();

/// Installs the handler for the whole process; a second call does nothing.
///
/// # Errors
/// What `sigaction` reports.
pub fn install_fault_handler() -> io::Result<()> {
    let mut result = Ok(());
    INSTALL.call_once(|| {
        // SAFETY: an all-zero `sigaction` is valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let previous = PREVIOUS.0.get();
        // SAFETY: `previous` is written before the handler is installed (first call) and has room for one
        // `sigaction`; the handler has the signature that SA_SIGINFO asks for.
        let installed = unsafe {
            libc::sigaction(libc::SIGBUS, std::ptr::null(), (*previous).as_mut_ptr()) == 0
                && libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) == 0
        };
        if !installed {
            result = Err(io::Error::last_os_error());
        }
    });
    result
}

/// Async-signal-safe: atomics and two system calls, no allocation, no lock.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` to an SA_SIGINFO handler.
    let address = unsafe { (*info).si_addr() }.addr();
    for entry in &TABLE {
        let start = entry.start.load(Ordering::Acquire);
        let len = entry.len.load(Ordering::Relaxed);
        if start > CLAIMED && address >= start && address - start < len && put_zero_pages(start, len) {
            entry.broken.store(true, Ordering::Release);
            FAULTS.fetch_add(1, Ordering::AcqRel);
            return;
        }
    }
    // SAFETY: filled before this handler was installed. The instruction faults again, under that handler.
    unsafe { libc::sigaction(libc::SIGBUS, (*PREVIOUS.0.get()).as_ptr(), std::ptr::null_mut()) };
}

fn put_zero_pages(start: usize, len: usize) -> bool {
    // SAFETY: replaces exactly one region's mapping, which stays registered while it is mapped. Segments and
    // areas in it stay valid: the addresses remain mapped, readable and writable.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}
