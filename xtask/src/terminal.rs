//! The user's terminal, for the shell in the guest.

use std::io::{IsTerminal as _, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether there is a user to talk to.
pub(crate) fn is_interactive() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// Rows and columns.
pub(crate) fn size() -> anyhow::Result<(u16, u16)> {
    let size = tcgetwinsize(stdin())?;
    Ok((size.ws_row, size.ws_col))
}

/// Raw mode while this lives: every key, also Ctrl-C, goes to the guest.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Sets raw mode.
    pub(crate) fn enter() -> anyhow::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may have been closed; then there is nothing to restore.
        let _closed = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}
