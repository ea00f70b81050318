//! Memory of our own for direct transfers that cannot use the client's.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bdev::{AlignedBuf, IoBuffers};
use reactor::sync::Notify;

/// Alignment of the memory: no device asks for more.
const ALIGN: usize = 4096;

/// Bytes of a buffer that is kept for the next transfer: the largest request of most clients, and the most that a
/// transfer takes at a time.
pub(super) const BUFFER_LEN: usize = 1 << 20;

/// Buffers that are kept.
const KEPT_MAX: usize = 8;

/// Transfers from so many bytes on use such buffers. Fewer come from the heap, which has touched memory for them.
const KEPT_FROM: usize = 256 << 10;

/// Bytes that all transfers under way may have. Picked: more than a device needs to be busy with.
const IN_USE_MAX: usize = 64 << 20;

/// Bounce memory of a file system. Large buffers are kept when nothing uses them: touching new memory costs several
/// times what copying does.
#[derive(Default)]
pub(super) struct BounceMemory {
    kept: RefCell<Vec<Rc<AlignedBuf>>>,
    in_use: Cell<usize>,
    freed: Notify,
}

impl BounceMemory {
    /// A buffer of `len` bytes, which may hold anything, once there is memory for it. Whoever has one waits for the
    /// device and for space only, never for a range of a file.
    pub(super) async fn take(self: &Rc<Self>, len: usize) -> Bounce {
        let is_kept = (KEPT_FROM..=BUFFER_LEN).contains(&len);
        let size = if is_kept { BUFFER_LEN } else { len };
        while self.in_use.get() > 0 && self.in_use.get() + size > IN_USE_MAX {
            self.freed.notified().await;
        }
        self.in_use.set(self.in_use.get() + size);
        let kept = if is_kept { self.kept.borrow_mut().pop() } else { None };
        let buf = kept.unwrap_or_else(|| Rc::new(AlignedBuf::zeroed(size, ALIGN)));
        Bounce { buf, len, memory: self.clone() }
    }
}

/// Memory of our own for one transfer.
pub(super) struct Bounce {
    buf: Rc<AlignedBuf>,
    len: usize,
    memory: Rc<BounceMemory>,
}

impl Bounce {
    pub(super) fn buffers(&self) -> IoBuffers {
        IoBuffers::from_aligned(&self.buf).slice(0, self.len)
    }

    /// What it holds, when its transfer has ended.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buf[..self.len]
    }
}

impl Drop for Bounce {
    /// Keeps it, unless a device may still use it: whoever waited for the transfer has gone away.
    fn drop(&mut self) {
        self.memory.in_use.set(self.memory.in_use.get() - self.buf.len());
        let mut kept = self.memory.kept.borrow_mut();
        if self.buf.len() == BUFFER_LEN && kept.len() < KEPT_MAX && Rc::strong_count(&self.buf) == 1 {
            kept.push(self.buf.clone());
        }
        self.memory.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use reactor::sync::join_all;
    use reactor::{Reactor, VirtualClock};

    use super::*;

    #[test]
    fn transfers_wait_for_memory_and_all_get_it() {
        let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::ZERO)));
        let memory = Rc::new(BounceMemory::default());
        let most = Rc::new(Cell::new(0));
        let transfers = (0..400).map(|number: usize| {
            let (reactor, memory, most) = (reactor.clone(), memory.clone(), most.clone());
            async move {
                // One is larger than all of it.
                let len = if number == 150 { 2 * IN_USE_MAX } else { 4096 << (number % 10) };
                let bounce = memory.take(len).await;
                let is_alone = memory.in_use.get() == len;
                assert!(memory.in_use.get() <= IN_USE_MAX || is_alone, "{}", memory.in_use.get());
                assert_eq!((bounce.buffers().len(), bounce.bytes().len()), (len, len));
                most.set(most.get().max(memory.in_use.get()));
                reactor.sleep(Duration::from_millis(1)).await;
            }
        });
        reactor.block_on(join_all(transfers.collect::<Vec<_>>()));
        assert!(most.get() > IN_USE_MAX / 2);
        assert_eq!((memory.in_use.get(), memory.kept.borrow().len()), (0, KEPT_MAX));
    }
}
