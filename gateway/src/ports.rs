//! The small traits that stages share. They keep what decides free of what acts: a test passes its own.

use std::any::Any;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;

use crate::accounting::row::UsageSource;
use crate::refusal::Refusal;

/// Wall time for records, monotonic time for waiting. Passed in, so that tests own it.
pub trait Clock: Send + Sync {
    /// Nanoseconds since the Unix epoch.
    fn now_ns(&self) -> i64;
    fn instant(&self) -> Instant;
}

/// The machine's clock.
#[derive(Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ns(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    }

    fn instant(&self) -> Instant {
        Instant::now()
    }
}

/// A request as the stages see it: a head that is there, and a body that is read when somebody asks for it.
pub trait Inbound: Send {
    fn head(&self) -> &http::request::Parts;

    /// Who is asking: the peer, or whom a proxy of ours heard.
    fn client(&self) -> IpAddr;

    /// What the path asks of a caller.
    fn scope(&self) -> Scope;

    /// Reads the whole body, at most `limit` bytes.
    ///
    /// # Errors
    /// `Refusal::BodyTooLarge` over the limit, `Refusal::BodyCut` when the client went away or sent too slowly.
    fn read_body(&mut self, limit: usize) -> impl Future<Output = Result<Bytes, Refusal>> + Send;

    /// Resolves when the client hangs up, or when we have to leave, with what to say then; to be asked once the body is
    /// read.
    fn gone(&mut self) -> impl Future<Output = Refusal> + Send;
}

/// What a caller may be allowed to do. Every path that is not open to everybody asks for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// To have text written.
    Inference,
    Embeddings,
    /// To judge answers.
    Feedback,
    /// To see what there is.
    Models,
}

impl Scope {
    pub const ALL: [Scope; 4] = [Scope::Inference, Scope::Embeddings, Scope::Feedback, Scope::Models];

    pub fn parse(word: &str) -> Option<Scope> {
        Scope::ALL.into_iter().find(|scope| scope.as_str() == word)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Inference => "inference",
            Scope::Embeddings => "embeddings",
            Scope::Feedback => "feedback",
            Scope::Models => "models",
        }
    }
}

/// Counts what a running backend has produced so far.
pub trait Meter: Send + Sync {
    /// Tokens produced, the end token included.
    fn produced(&self) -> u64;

    /// How good the count is.
    fn source(&self) -> UsageSource {
        UsageSource::Counted
    }
}

/// One message of a conversation, whatever dialect it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub role: String,
    pub content: String,
}

/// What a model is asked to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, to be put into the model's chat template.
    Turns(Vec<Turn>),
    /// Text as it is.
    Text(String),
    /// Text of which the model reads as much as it can.
    Cut(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// What there is to tokenise.
    pub fn bytes(&self) -> usize {
        match self {
            Prompt::Turns(turns) => turns.iter().map(|turn| turn.content.len()).sum(),
            Prompt::Text(text) | Prompt::Cut(text) => text.len(),
            Prompt::Tokens(_) => 0,
        }
    }
}

/// The form that an answer must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// JSON of this schema.
    JsonSchema(String),
    /// Text that this expression matches as a whole.
    Regex(String),
    Choice(Vec<String>),
    /// Text of this grammar, in Lark.
    Lark(String),
}

/// A form that a model has made ready, for its own use.
pub type Prepared = Arc<dyn Any + Send + Sync>;

/// Turns a prompt into the exact tokens that a model will read.
#[async_trait]
pub trait Tokenize: Send + Sync {
    /// A conversation as text, in the model's chat template.
    ///
    /// # Errors
    /// When the template refuses it, takes more than it may, or cannot be asked.
    async fn render(&self, turns: &[Turn]) -> Result<String, Refusal>;

    /// Turns are rendered before.
    ///
    /// # Errors
    /// What about the prompt the model does not allow, in words for the client.
    fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, String>;

    /// Makes a form ready. Works for up to a second on what strangers wrote: to be called where blocking is allowed.
    ///
    /// # Errors
    /// What about the form the model cannot do, in words for the client.
    fn prepare(&self, form: &Form) -> Result<Prepared, String>;

    /// Tokens that prompt and answer may have together.
    fn context(&self) -> u64;
}

/// Who is served first when an engine of ours is full. The later one may wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    #[default]
    Interactive,
    Batch,
}

impl Priority {
    pub const WORDS: [&str; 2] = ["interactive", "batch"];

    pub fn parse(word: &str) -> Option<Priority> {
        match word {
            "interactive" => Some(Priority::Interactive),
            "batch" => Some(Priority::Batch),
            _ => None,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Priority::Interactive => "interactive",
            Priority::Batch => "batch",
        }
    }
}
