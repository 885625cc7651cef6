//! The handle of an embedding model: texts in, one vector each out.

use super::{LoadError, Runtime};
use crate::{
    engine::{
        Command, ModelId,
        embed::{BATCH_TOKENS, Embedded, Encode, Encoder, Job},
        encoders::EncoderCommand,
        events::{Failure, Refusal},
        places::{Most, Places},
        stats::{Loaded, Stats},
    },
    kernels::texts::TextBatch,
    model::bert::{
        Bert,
        spec::{BertSpec, is_encoder},
    },
    report::EmbedTimeline,
    text::{TextError, encoder::TextEncoder},
    weights::{Tensors, WeightError, folder, safetensors::Checkpoint},
};
use candle_core::{Result as CandleResult, Tensor};
use std::{
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Numbers of four bytes that all requests of a model hold at most: tokens and vectors.
const HELD_MAX: u64 = 32 << 20;
const TOKENIZER: &str = "tokenizer.json";

/// Whether a source is a folder of a model that makes embeddings, for [`Runtime::load_embedder`].
pub fn is_embedder(source: &Path) -> Result<bool, LoadError> {
    let config = folder::read_json(&source.join("config.json"));
    // What is no folder is no encoder's.
    if source.is_dir() { Ok(config?.is_some_and(|config| is_encoder(&config))) } else { Ok(false) }
}

/// What an encoder's folder holds besides weights.
pub(crate) fn read_text_side(folder: &Path) -> Result<(BertSpec, TextEncoder), WeightError> {
    let spec = BertSpec::read(folder)?;
    let path = folder.join(TOKENIZER);
    let json = folder::read_text(&path)?.ok_or_else(|| WeightError::new(&path, "is missing"))?;
    let text = TextEncoder::new(&json, spec.vocab, spec.head.lower).map_err(|why| WeightError::new(&path, why))?;
    Ok((spec, text))
}

impl Runtime {
    /// Validates, loads and warms an embedding model: a folder in the layout of Hugging Face or sentence-transformers.
    /// Blocks until the model is ready: call it where blocking is allowed. Other models keep serving meanwhile.
    pub fn load_embedder(&self, name: &str, folder: &Path) -> Result<Embedder, LoadError> {
        let (spec, text) = read_text_side(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let (limit, vocab, dimensions) = (spec.head.limit, spec.vocab as u32, spec.hidden);
        // A text longer than a batch is one of its own.
        let memory = Bert::memory(&spec, &checkpoint, BATCH_TOKENS.max(limit))?;
        let resident = self.admit(name, folder, 0, memory)?;
        let bert = Bert::load(spec, &checkpoint)?;
        let mut files = BertSpec::files(folder);
        files.push(folder.join(TOKENIZER));
        files.extend(checkpoint.files());
        let digest = folder::digest(&files)?;

        let stats = Arc::clone(&resident.stats);
        stats.warming(Loaded { digest, weights: Vec::new(), exceptions: Vec::new() });
        let encoder = Box::new(Encoder::new(Box::new(bert), Arc::clone(&stats)));
        let id = self.0.next_model.fetch_add(1, Relaxed);
        let (ready, answer) = channel();
        let command = Command::Encoder(EncoderCommand::Add { id, encoder, resident, ready });
        self.0.commands.send(command).map_err(|_| LoadError::Stopped)?;
        let warmed = answer.recv().map_err(|_| LoadError::Stopped)?;
        warmed.map_err(|why| LoadError::Warm { folder: folder.to_owned(), why })?;
        Ok(Embedder(Arc::new(Served {
            id,
            commands: self.0.commands.clone(),
            waiting_max: self.0.settings.waiting_max,
            limit,
            vocab,
            dimensions,
            text,
            held: Arc::default(),
            stats,
        })))
    }
}

impl Encode for Bert {
    fn layers(&self) -> usize {
        self.spec().layers
    }

    fn begin(&self, batch: &Arc<TextBatch>) -> CandleResult<Tensor> {
        Bert::begin(self, batch)
    }

    fn layer(&self, number: usize, h: &Tensor, batch: &Arc<TextBatch>) -> CandleResult<Tensor> {
        Bert::layer(self, number, h, batch)
    }

    fn finish(&self, h: &Tensor, batch: &Arc<TextBatch>) -> CandleResult<Vec<Vec<f32>>> {
        Bert::finish(self, h, batch)
    }
}

/// A loaded embedding model. When the last clone is dropped no further request can come: running ones finish, then the
/// memory is freed.
#[derive(Clone)]
pub struct Embedder(Arc<Served>);

struct Served {
    id: ModelId,
    commands: Sender<Command>,
    waiting_max: usize,
    limit: usize,
    vocab: u32,
    dimensions: usize,
    text: TextEncoder,
    held: Arc<Places>,
    stats: Arc<Stats>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Encoder(EncoderCommand::Retire { id: self.id }));
    }
}

impl Embedder {
    pub fn name(&self) -> &str {
        &self.0.stats.name
    }

    /// Hex blake3 over the folder's files.
    pub fn digest(&self) -> &str {
        self.0.stats.digest()
    }

    /// As [`crate::Model::drain`].
    pub fn drain(&self, cut_at: Instant) {
        let _ = self.0.commands.send(Command::Encoder(EncoderCommand::Drain { id: self.0.id, cut_at }));
    }

    /// Most tokens of one text, those that [`Embedder::tokenize`] adds included.
    pub fn context(&self) -> u32 {
        self.0.limit as u32
    }

    /// When a request that finds no place now is likely to find one.
    pub fn retry_after(&self) -> Duration {
        self.0.stats.retry_after()
    }

    /// Numbers in a vector.
    pub fn dimensions(&self) -> u32 {
        self.0.dimensions as u32
    }

    /// Ids of a text, with the tokens that the model wants around it; however many there are.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.0.text.encode(text)
    }

    /// Cuts what [`Embedder::tokenize`] gave to what the model reads: words go from the end, the tokens around the text stay.
    pub fn truncate(&self, ids: &mut Vec<u32>) {
        self.0.text.cut(ids, self.0.limit);
    }

    /// Queues a request; never blocks. What can never be answered is refused here. `tenant`: requests with the same number
    /// share one turn, and one tenant holds at most half of the queue. `deadline`: fails the request if it is still queued
    /// then.
    pub fn embed(&self, texts: Vec<Vec<u32>>, tenant: u64, deadline: Option<Instant>) -> Result<Embedding, Refusal> {
        let served = &self.0;
        self.check(&texts)?;
        let numbers: usize = texts.iter().map(|text| text.len() + served.dimensions).sum();
        let overloaded = || Refusal::Overloaded { retry_after: served.stats.retry_after() };
        let held = served.held.take(tenant, numbers as u64, Most::halves(HELD_MAX)).ok_or_else(overloaded)?;
        let most = Most::halves(served.waiting_max as u64);
        let place = served.stats.enter_queue(tenant, 1, most).ok_or_else(overloaded)?;
        let (reply, answer) = oneshot::channel();
        let timeline = EmbedTimeline::begin(&texts);
        let read = Arc::<AtomicU64>::default();
        let job =
            Box::new(Job::new(texts, tenant, [place, held], deadline, timeline.clone(), Arc::clone(&read), reply));
        if served.commands.send(Command::Encoder(EncoderCommand::Submit { id: served.id, job })).is_err() {
            served.stats.leave_entrance(1);
            return Err(Refusal::Draining);
        }
        Ok(Embedding { answer, timeline, read })
    }

    fn check(&self, texts: &[Vec<u32>]) -> Result<(), Refusal> {
        let (vocab, context) = (self.0.vocab, self.context());
        for text in texts {
            if let Some(&id) = text.iter().find(|&&id| id >= vocab) {
                return Err(Refusal::UnknownToken { id, vocab });
            }
            let prompt = u32::try_from(text.len()).unwrap_or(u32::MAX);
            if prompt > context {
                return Err(Refusal::OverContext { prompt, max_tokens: 0, context });
            }
        }
        if texts.is_empty() || texts.iter().any(Vec::is_empty) { Err(Refusal::EmptyPrompt) } else { Ok(()) }
    }
}

/// One request's vectors, as they will be. Dropping it cancels the request.
#[derive(Debug)]
pub struct Embedding {
    answer: oneshot::Receiver<Embedded>,
    timeline: EmbedTimeline,
    read: Arc<AtomicU64>,
}

impl Embedding {
    /// Tokens of those texts that were computed or are being computed.
    pub fn read(&self) -> u64 {
        self.read.load(Relaxed)
    }
}

impl Future for Embedding {
    type Output = Embedded;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Embedded> {
        let answer = ready!(Pin::new(&mut self.answer).poll(context));
        // The engine is gone without an ending. The caller still gets one, with what is known on this side.
        Poll::Ready(answer.unwrap_or_else(|_| {
            let timeline = EmbedTimeline { finished: Instant::now(), ..self.timeline.clone() };
            Embedded { vectors: Err(Failure::EngineStopped), timeline }
        }))
    }
}
