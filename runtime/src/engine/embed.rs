//! Embedding models on the engine's thread. Waiting texts are gathered into one flat batch; a batch is computed layer by
//! layer, in turns with the models that write: nobody's next token waits for more than a turn.

mod rota;

use super::{
    events::Failure,
    message,
    places::Place,
    stats::{Snapshot, Stats},
};
use crate::{
    kernels::texts::TextBatch,
    report::{EmbedTimeline, Sink, StepRecord},
};
use candle_core::Tensor;
use rota::Rota;
use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// A turn ends with the layer in which this has passed.
const TURN: Duration = Duration::from_millis(5);

/// A batch is full with so many tokens. (A text is never split, so one alone may have more.) Weights are read once for
/// all of them, and what is between two products still fits into a cache.
pub(crate) const BATCH_TOKENS: usize = 512;

/// What the engine needs of an embedding model.
pub(crate) trait Encode: Send {
    fn layers(&self) -> usize;
    fn begin(&self, batch: &Arc<TextBatch>) -> candle_core::Result<Tensor>;
    fn layer(&self, number: usize, h: &Tensor, batch: &Arc<TextBatch>) -> candle_core::Result<Tensor>;
    /// One vector a text.
    fn finish(&self, h: &Tensor, batch: &Arc<TextBatch>) -> candle_core::Result<Vec<Vec<f32>>>;
}

/// What a caller gets back.
#[derive(Debug)]
pub struct Embedded {
    /// One vector a text, in the order of the request.
    pub vectors: Result<Vec<Vec<f32>>, Failure>,
    pub timeline: EmbedTimeline,
}

/// One request on its way.
pub(crate) struct Job {
    texts: Vec<Vec<u32>>,
    vectors: Vec<Vec<f32>>,
    tenant: u64,
    /// In the queue, until a batch takes its first text.
    place: Option<Place>,
    /// In memory.
    _held: Place,
    /// Texts that no batch has taken yet begin here.
    next: usize,
    deadline: Option<Instant>,
    timeline: EmbedTimeline,
    /// Tokens of texts that a batch has taken.
    read: Arc<AtomicU64>,
    reply: oneshot::Sender<Embedded>,
}

impl Job {
    pub fn new(
        texts: Vec<Vec<u32>>,
        tenant: u64,
        [place, held]: [Place; 2],
        deadline: Option<Instant>,
        timeline: EmbedTimeline,
        read: Arc<AtomicU64>,
        reply: oneshot::Sender<Embedded>,
    ) -> Job {
        let vectors = vec![Vec::new(); texts.len()];
        Job { texts, vectors, tenant, place: Some(place), _held: held, next: 0, deadline, timeline, read, reply }
    }

    fn end(mut self, vectors: Result<Vec<Vec<f32>>, Failure>) {
        self.timeline.finished = Instant::now();
        let _ = self.reply.send(Embedded { vectors, timeline: self.timeline });
    }
}

/// A batch between two of its layers.
struct Running {
    batch: Arc<TextBatch>,
    /// Whose text each is: (job, its place there).
    owners: Vec<(u64, usize)>,
    /// None before the first layer.
    h: Option<Tensor>,
    layer: usize,
    spent: Duration,
}

/// One embedding model's engine.
pub(crate) struct Encoder {
    model: Box<dyn Encode>,
    stats: Arc<Stats>,
    /// In the order of submission.
    jobs: BTreeMap<u64, Job>,
    /// Jobs of which no batch has a text.
    waiting: usize,
    /// Jobs with texts that wait, and some that are over.
    rota: Rota,
    next_job: u64,
    running: Option<Running>,
}

impl Encoder {
    pub fn new(model: Box<dyn Encode>, stats: Arc<Stats>) -> Encoder {
        Encoder { model, stats, jobs: BTreeMap::new(), waiting: 0, rota: Rota::default(), next_job: 0, running: None }
    }

    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// One token through the model, to touch what a first request would otherwise wait for.
    pub fn warm(&mut self) -> Result<(), String> {
        let mut running = Running::new(vec![(0, 0)], TextBatch::new([[0].as_slice()]));
        loop {
            if let Some(vectors) = self.advance(&mut running)? {
                let is_finite = vectors.iter().flatten().all(|x| x.is_finite());
                return if is_finite { Ok(()) } else { Err("its vector is not finite".to_owned()) };
            }
        }
    }

    pub fn submit(&mut self, job: Job) {
        self.rota.push(job.tenant, self.next_job);
        self.jobs.insert(self.next_job, job);
        self.waiting += 1;
        self.next_job += 1;
        self.publish();
        self.stats.leave_entrance(1);
    }

    /// Computes for a turn, if there is anything to compute. False: nothing was.
    pub fn turn(&mut self, sink: Option<&Arc<dyn Sink>>) -> bool {
        let began = Instant::now();
        self.sweep(began);
        let next = self.running.take().or_else(|| self.gather(began));
        self.publish();
        let Some(mut running) = next else { return false };
        let outcome = loop {
            match self.advance(&mut running) {
                Ok(None) if began.elapsed() < TURN => {}
                outcome => break outcome,
            }
        };
        running.spent += began.elapsed();
        match outcome {
            Ok(None) => self.running = Some(running),
            Ok(Some(vectors)) => self.finish(&running, vectors, sink),
            Err(why) => self.fail(&running, &why, sink),
        }
        true
    }

    /// One layer; the vectors after the last.
    fn advance(&self, running: &mut Running) -> Result<Option<Vec<Vec<f32>>>, String> {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let h = match &running.h {
                None => self.model.begin(&running.batch)?,
                Some(h) => self.model.layer(running.layer, h, &running.batch)?,
            };
            running.layer += usize::from(running.h.is_some());
            let is_last = running.layer == self.model.layers();
            let vectors = is_last.then(|| self.model.finish(&h, &running.batch)).transpose();
            running.h = Some(h);
            vectors
        }));
        outcome.map_err(|panic| message(&*panic))?.map_err(|error| error.to_string())
    }

    /// Forgets whoever has left, and fails whoever was not begun in time.
    fn sweep(&mut self, now: Instant) {
        let is_gone = |job: &Job| job.reply.is_closed();
        let is_late = |job: &Job| job.timeline.started.is_none() && job.deadline.is_some_and(|at| at <= now);
        let over: Vec<u64> =
            self.jobs.iter().filter(|(_, job)| is_gone(job) || is_late(job)).map(|(&id, _)| id).collect();
        for id in over {
            self.end(id, Err(Failure::DeadlineExceeded));
        }
        // What nobody waits for need not be finished.
        if self.running.as_ref().is_some_and(|running| running.owners.iter().all(|(id, _)| !self.jobs.contains_key(id)))
        {
            self.running = None;
        }
    }

    /// The next batch: a text of each tenant in turn, and of each of its jobs, so that many delay the others by little.
    fn gather(&mut self, now: Instant) -> Option<Running> {
        let (mut owners, mut tokens) = (Vec::new(), 0);
        while let Some(id) = self.rota.first() {
            let Some(job) = self.jobs.get_mut(&id) else {
                self.rota.pop();
                continue;
            };
            let length = job.texts[job.next].len();
            if tokens > 0 && tokens + length > BATCH_TOKENS {
                break;
            }
            tokens += length;
            owners.push((id, job.next));
            job.next += 1;
            job.read.fetch_add(length as u64, Relaxed);
            if job.timeline.started.is_none() {
                job.timeline.started = Some(now);
                job.place = None;
                self.waiting -= 1;
            }
            self.rota.pop();
            if job.next < job.texts.len() {
                self.rota.push(job.tenant, id);
            }
        }
        let texts = owners.iter().filter_map(|(id, at)| Some(self.jobs.get(id)?.texts[*at].as_slice()));
        let batch = TextBatch::new(texts);
        (tokens > 0).then(|| Running::new(owners, batch))
    }

    fn finish(&mut self, running: &Running, vectors: Vec<Vec<f32>>, sink: Option<&Arc<dyn Sink>>) {
        let tokens = running.batch.tokens();
        self.stats.prompt_tokens.fetch_add(tokens as u64, Relaxed);
        for (&(id, at), vector) in running.owners.iter().zip(vectors) {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let timeline = &mut job.timeline;
            timeline.compute += running.spent.mul_f64(job.texts[at].len() as f64 / tokens as f64);
            // A job may have several texts in a batch.
            timeline.batches += u32::from(running.is_first_of(id, at));
            timeline.texts_max = timeline.texts_max.max(running.owners.len() as u32);
            if vector.iter().any(|x| !x.is_finite()) {
                self.end(id, Err(Failure::NotFinite));
                continue;
            }
            job.vectors[at] = vector;
            if job.vectors.iter().all(|vector| !vector.is_empty()) {
                self.stats.note_pace(job.timeline.compute);
                let vectors = std::mem::take(&mut job.vectors);
                self.end(id, Ok(vectors));
            }
        }
        self.tell(running, 0, sink);
    }

    /// Ends the jobs of a batch that went wrong, and no others.
    fn fail(&mut self, running: &Running, why: &str, sink: Option<&Arc<dyn Sink>>) {
        tracing::error!(model = %self.stats.name, %why, "a batch of texts failed");
        let before = self.jobs.len();
        for (id, _) in &running.owners {
            self.end(*id, Err(Failure::Step(why.to_owned())));
        }
        self.tell(running, (before - self.jobs.len()) as u32, sink);
    }

    pub fn fail_all(&mut self, failure: &Failure) {
        self.running = None;
        for id in self.jobs.keys().copied().collect::<Vec<_>>() {
            self.end(id, Err(failure.clone()));
        }
    }

    /// How many jobs wait, and how many have begun.
    fn places(&self) -> (u32, u32) {
        (self.waiting as u32, (self.jobs.len() - self.waiting) as u32)
    }

    fn publish(&self) {
        let (waiting, running) = self.places();
        self.stats.publish(Snapshot { running, waiting: [waiting, 0, 0], ..Snapshot::default() });
    }

    fn tell(&self, running: &Running, failed: u32, sink: Option<&Arc<dyn Sink>>) {
        self.stats.steps.fetch_add(1, Relaxed);
        let places = self.places();
        let record = StepRecord {
            forward: running.spent,
            prefill_tokens: running.batch.tokens() as u32,
            sequences: running.batch.texts() as u32,
            running: places.1,
            waiting: places.0,
            failed,
            at: self.stats.since_load(Instant::now()).saturating_sub(running.spent),
            ..StepRecord::default()
        };
        self.stats.record(record);
        // Not our code: it must not end the one thread that serves every model.
        let told = sink.map(|sink| catch_unwind(AssertUnwindSafe(|| sink.step(&self.stats.name, &record))));
        if told.is_some_and(|told| told.is_err()) {
            tracing::error!(model = %self.stats.name, "whoever receives the engine's records panicked");
        }
    }

    fn end(&mut self, id: u64, vectors: Result<Vec<Vec<f32>>, Failure>) {
        let Some(job) = self.jobs.remove(&id) else { return };
        self.waiting -= usize::from(job.timeline.started.is_none());
        // Whoever has left did not fail.
        if vectors.is_err() && !job.reply.is_closed() {
            self.stats.failures.fetch_add(1, Relaxed);
        }
        // Whoever hears of the end and then asks for a report should not find itself in it.
        self.publish();
        job.end(vectors);
    }
}

impl Running {
    fn new(owners: Vec<(u64, usize)>, batch: TextBatch) -> Running {
        Running { batch: Arc::new(batch), owners, h: None, layer: 0, spent: Duration::ZERO }
    }

    fn is_first_of(&self, id: u64, at: usize) -> bool {
        self.owners.iter().find(|(owner, _)| *owner == id) == Some(&(id, at))
    }
}

#[cfg(test)]
mod tests;
