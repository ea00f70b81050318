//! A FUSE server that answers every request with a bare header, at once or when it is told to.

use std::cell::Cell;
use std::rc::Rc;

use reactor::sync::Notify;
use vhostfs::device::fs::{FuseHandler, Handled, Request};

/// Opcode of a request that is answered later.
pub(super) const LATER: u32 = 2;

/// Bytes of a request's header, and of a reply's.
const HEADER_LEN: usize = 40;
const REPLY_LEN: usize = 16;

/// See the module. Clones are the same server.
#[derive(Clone, Default)]
pub(super) struct Echo {
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    /// Grows with each release.
    round: Cell<u64>,
    /// Nothing waits any more.
    is_prompt: Cell<bool>,
    released: Notify,
}

impl Echo {
    /// Answers what waits.
    pub(super) fn release(&self) {
        self.state.round.set(self.state.round.get() + 1);
        self.state.released.notify_all();
    }

    /// Answers what waits, and from now on everything at once.
    pub(super) fn become_prompt(&self) {
        self.state.is_prompt.set(true);
        self.release();
    }
}

impl FuseHandler for Echo {
    fn handle(&self, request: Request) -> Handled {
        let mut header = [0; HEADER_LEN];
        if request.readable.copy_to(0, &mut header) < 16 {
            return request.refuse(22);
        }
        if request.writable.len() < REPLY_LEN {
            return Handled::Unanswerable;
        }
        let reply = move || {
            request.writable.copy_from(0, &(REPLY_LEN as u32).to_le_bytes());
            request.writable.copy_from(4, &[0; 4]);
            request.writable.copy_from(8, &header[8..16]);
            REPLY_LEN
        };
        if header[4..8] != LATER.to_le_bytes() || self.state.is_prompt.get() {
            return Handled::Done(reply());
        }
        let state = self.state.clone();
        let round = state.round.get();
        Handled::Pending(Box::pin(async move {
            while state.round.get() == round {
                state.released.notified().await;
            }
            reply()
        }))
    }

    fn reset(&self) {}
}
