//! The terminal as a wire: every key goes through, nothing is echoed or interpreted here.

use std::io;

use form_api::exec;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::Terminal;
use crate::failure::Failure;

/// Puts the terminal back as it was when it is dropped.
pub struct RawMode {
    before: Termios,
}

impl Terminal {
    /// # Errors
    /// When standard input is no terminal.
    pub fn raw_mode(&self) -> Result<RawMode, Failure> {
        let failed = |error: rustix::io::Errno| Failure::failed(format!("the terminal cannot be switched: {error}"));
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(RawMode { before })
    }

    /// The size and kind of the user's terminal, for a pseudo-terminal that looks the same.
    pub fn as_exec_terminal(&self) -> exec::Terminal {
        let (rows, columns) = self.size().unwrap_or((24, 80));
        let kind = std::env::var("TERM").ok().filter(|kind| !kind.is_empty()).unwrap_or_else(|| "xterm".to_owned());
        exec::Terminal { rows, columns, kind }
    }

    /// Rows and columns.
    pub fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(io::stdin()).or_else(|_| tcgetwinsize(io::stdout())).ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to put back.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}
