//! Chat templates, rendered where they can do no harm. A template is a program: a hundred bytes of it can ask for more
//! memory than there is, and a failed allocation is the end of whoever asked. So each model's template runs in a child of
//! ours with limits on memory and time, and a child that is lost costs the talk that killed it, and nobody else.
//!
//! One thread for each model owns its child and asks it for one talk at a time: whatever becomes of the child meanwhile
//! is that talk's. The others wait in the queue and notice nothing.

mod child;
mod frames;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use glassgate_runtime::{Message, TemplateSource};
use tokio::sync::oneshot;

pub use child::serve;
use frames::Until;

/// The hidden command by which this program is its own child.
pub const COMMAND: &str = "render-chats";

/// Address space on top of the program's own; the longest talks that fit into a body take about a tenth.
const MEMORY_BYTES: u64 = 512 << 20;
/// Most that one talk may take. What is usual are microseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// What a child says first.
const READY: &[u8] = b"ready";
/// Talks that wait for their turn.
const WAITING_MAX: usize = 256;
/// When a child that died between two talks is buried at the latest.
const REAPED_WITHIN: Duration = Duration::from_secs(1);

/// Why there is no text.
#[derive(Debug, PartialEq, Eq)]
pub enum Unrendered {
    /// The template says no to this talk, or fails on it, in its own words.
    Refused(String),
    /// This talk took more than it may, in words for the client.
    TooMuch(String),
    /// Others wait already.
    Busy,
    /// There is no child, and none can be started.
    Unavailable,
}

/// Renders one model's chat template. When it is dropped its child ends.
pub struct Templates {
    jobs: SyncSender<Job>,
}

struct Job {
    talk: Vec<Message>,
    /// Closed when nobody waits any more.
    reply: oneshot::Sender<Result<String, Unrendered>>,
}

impl Templates {
    /// Renders `model`'s template in children of `program`.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(program: &Path, model: &str, source: &TemplateSource) -> io::Result<Templates> {
        let owner = Owner {
            program: program.to_owned(),
            model: model.to_owned(),
            source: serde_json::to_vec(source)?,
            renderer: None,
        };
        let (jobs, queue) = sync_channel(WAITING_MAX);
        std::thread::Builder::new().name("templates".into()).spawn(move || owner.run(&queue))?;
        Ok(Templates { jobs })
    }

    /// The talk as the model reads it.
    ///
    /// # Errors
    /// Why there is no text; after any of them the next talk finds a child that works.
    pub async fn render(&self, talk: Vec<Message>) -> Result<String, Unrendered> {
        let (reply, answer) = oneshot::channel();
        match self.jobs.try_send(Job { talk, reply }) {
            Ok(()) => answer.await.unwrap_or(Err(Unrendered::Unavailable)),
            Err(TrySendError::Full(_)) => Err(Unrendered::Busy),
            Err(TrySendError::Disconnected(_)) => Err(Unrendered::Unavailable),
        }
    }
}

/// What the thread knows.
struct Owner {
    program: PathBuf,
    model: String,
    /// The template, as a child reads it.
    source: Vec<u8>,
    renderer: Option<Renderer>,
}

impl Owner {
    fn run(mut self, queue: &Receiver<Job>) {
        // The first talk need not wait for it. If it cannot be started, that talk is told.
        self.renderer = Renderer::start(&self.program, &self.source).ok();
        loop {
            match queue.recv_timeout(REAPED_WITHIN) {
                Ok(job) if job.reply.is_closed() => {}
                Ok(job) => {
                    let rendered = self.render(&job.talk);
                    // Whoever asked may have left.
                    let _ = job.reply.send(rendered);
                }
                Err(RecvTimeoutError::Timeout) => drop(self.renderer.take_if(|renderer| !renderer.is_alive())),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn render(&mut self, talk: &[Message]) -> Result<String, Unrendered> {
        let unavailable = |model: &str, error: &io::Error| {
            tracing::error!(%model, %error, "chat templates cannot be rendered");
            Unrendered::Unavailable
        };
        let talk = serde_json::to_vec(talk).map_err(|error| unavailable(&self.model, &error.into()))?;
        // A child may have been killed from outside. A talk that ends the next one too, started for it, is to blame.
        for _ in 0..2 {
            let mut renderer = match self.renderer.take() {
                Some(renderer) => renderer,
                None => {
                    Renderer::start(&self.program, &self.source).map_err(|error| unavailable(&self.model, &error))?
                }
            };
            match renderer.ask(&talk) {
                Ok(said) => {
                    self.renderer = Some(renderer);
                    return said.map_err(Unrendered::Refused);
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    tracing::warn!(model = %self.model, "a chat template took too long and was ended");
                    return Err(Unrendered::TooMuch(format!("takes more than {} seconds", PATIENCE.as_secs())));
                }
                Err(error) => tracing::warn!(model = %self.model, %error, "a chat template ended its process"),
            }
        }
        Err(Unrendered::TooMuch(format!("takes more than {} MiB of memory", MEMORY_BYTES >> 20)))
    }
}

/// A child that has the template.
struct Renderer {
    child: Child,
    stream: UnixStream,
}

impl Renderer {
    fn start(program: &Path, source: &[u8]) -> io::Result<Renderer> {
        let (stream, theirs) = UnixStream::pair()?;
        let child = Command::new(program)
            .arg0("glassgate")
            .arg(COMMAND)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A backtrace of an allocation that failed would have to allocate.
            .env("RUST_BACKTRACE", "0")
            // What is typed to end the gateway at a terminal lets it finish what runs.
            .process_group(0)
            .spawn()?;
        let renderer = Renderer { child, stream };
        let mut stream = Until::patience(&renderer.stream);
        frames::write(&mut stream, source)?;
        // From here on it is a talk's fault if it ends.
        frames::read(&mut stream, READY.len())?;
        Ok(renderer)
    }

    /// The template's text or its refusal. An error is the end of this child.
    fn ask(&mut self, talk: &[u8]) -> io::Result<Result<String, String>> {
        let mut stream = Until::patience(&self.stream);
        frames::write(&mut stream, talk)?;
        let said = frames::read(&mut stream, frames::said_bytes_max(talk.len()))?;
        Ok(serde_json::from_slice(&said)?)
    }

    fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        // It may have ended already; it is to leave no trace.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
