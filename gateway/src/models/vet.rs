//! A look at a model's text files before they come into this process: a chat template of a hundred bytes can ask for
//! more memory than there is, and a failed allocation is the end of whoever asked. So a child of ours with limits on
//! memory and time reads them first, and tries the template on a few short talks. That finds accidents and clumsy attacks
//! before the model serves; for a template that waits for a talk of another length or content, see `templates`.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::Resource;

use super::limits;

/// The hidden command by which this program is its own child.
pub const COMMAND: &str = "vet-model";

/// Several times what the largest known tokenizer takes.
const MEMORY_BYTES: u64 = 2 << 30;
const CPU_SECONDS: u64 = 30;
/// A child that waits for ever uses no processor.
const PATIENCE: Duration = Duration::from_secs(60);
/// More of what it says is not read.
const WORDS_BYTES_MAX: u64 = 16 << 10;

/// Has `program` validate the model at `path`.
///
/// # Errors
/// What the child says, or what became of it.
pub fn vet(program: &Path, path: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot validate {}: {error}", path.display());
    let mut command = Command::new(program);
    command.arg(COMMAND).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // A backtrace of an allocation that failed would have to allocate.
    let mut child = command.env("RUST_BACKTRACE", "0").spawn().map_err(failed)?;
    let stderr = child.stderr.take();
    let (told, words) = mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        let read = stderr.map(|stderr| stderr.take(WORDS_BYTES_MAX).read_to_end(&mut said));
        // Nobody listens any more when it took too long.
        let _ = told.send(read.map(|_| String::from_utf8_lossy(&said).into_owned()).unwrap_or_default());
    });
    let said = words.recv_timeout(PATIENCE);
    if said.is_err() {
        child.kill().map_err(failed)?;
    }
    let status = child.wait().map_err(failed)?;
    match (status.signal(), status.success(), said) {
        (None, true, Ok(_)) => Ok(()),
        (None, false, Ok(said)) => Err(said.trim().trim_start_matches("glassgate: ").to_owned()),
        _ => Err(format!(
            "{}: its tokenizer or chat template takes more than {} GiB of memory or {CPU_SECONDS} seconds",
            path.display(),
            MEMORY_BYTES >> 30
        )),
    }
}

/// The child's side: from here on this process gets no more than the limits.
///
/// # Errors
/// When the limits cannot be set, or what is wrong with the model.
pub fn limited(path: &Path) -> Result<(), String> {
    limits::set(&[(Resource::As, MEMORY_BYTES), (Resource::Cpu, CPU_SECONDS)])?;
    glassgate_runtime::check_text(path).map_err(|error| error.to_string())
}
