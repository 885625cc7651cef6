//! How far a download is, on stderr: a bar that moves on a terminal, a line a file elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const WIDTH: usize = 30;
const REDRAW: Duration = Duration::from_millis(100);

pub(super) struct Progress {
    moves: bool,
    name: String,
    bytes: Option<u64>,
    have: u64,
    drawn: Option<Instant>,
}

impl Progress {
    pub fn on_stderr() -> Progress {
        let moves = std::io::stderr().is_terminal();
        Progress { moves, name: String::new(), bytes: None, have: 0, drawn: None }
    }

    /// A file begins, or goes on after a break.
    pub fn file(&mut self, name: &str, bytes: Option<u64>, have: u64) {
        let is_new = self.name != name;
        (self.name, self.bytes, self.have, self.drawn) = (name.to_owned(), bytes, have, None);
        if self.moves {
            self.draw();
        } else if is_new {
            eprintln!("{name}: {}", bytes.map_or("of unknown size".to_owned(), human));
        }
    }

    pub fn came(&mut self, bytes: u64) {
        self.have += bytes;
        if self.moves && self.drawn.is_none_or(|drawn| drawn.elapsed() > REDRAW) {
            self.draw();
        }
    }

    /// The file is whole.
    pub fn done(&mut self) {
        if self.moves {
            self.draw();
            eprintln!();
        }
    }

    fn draw(&mut self) {
        self.drawn = Some(Instant::now());
        let total = self.bytes.unwrap_or(self.have).max(1);
        let filled = (WIDTH as u64 * self.have.min(total) / total) as usize;
        let bar = "█".repeat(filled) + &"░".repeat(WIDTH - filled);
        // A bar that cannot be drawn is no reason to stop.
        let _ = write!(std::io::stderr(), "\r{bar} {:>9} of {} {}\x1b[K", human(self.have), human(total), self.name);
    }
}

/// In the largest unit that leaves a number above one.
pub fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut shown = (bytes as f64, "B");
    for unit in units.into_iter().take_while(|_| bytes >= 1024) {
        if shown.0 < 1024.0 {
            break;
        }
        shown = (shown.0 / 1024.0, unit);
    }
    if shown.1 == "B" { format!("{bytes} B") } else { format!("{:.1} {}", shown.0, shown.1) }
}
