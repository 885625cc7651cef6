//! Spans over OTLP/HTTP, in batches, from a thread with a runtime of its own.
//!
//! Not the SDK's batch processor: it would poll an async client where no reactor runs, and tell of its first drop only.
//! The SDK's exporter encodes and compresses; waiting, trying again and counting are ours.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use opentelemetry_otlp::{Compression, Protocol, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use super::Tally;
use super::http::{Client, Outcome};
use crate::config::OtlpConfig;
use crate::exchange::Record;
use crate::observe::spans::{self, Origin};
use crate::observe::writer::GATHER;

/// A batch is sent when it has this many spans, …
const BATCH_SPANS: usize = 512;
/// … or when its first has waited so long.
const BATCH_WAIT: Duration = Duration::from_secs(1);
/// How long the end may take: what a backend has not taken by then is dropped, and counted.
const FLUSH_MAX: Duration = Duration::from_secs(5);
/// Beyond it the thread itself is stuck, which nothing in it should bring about.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Exporter {
    queue: mpsc::Sender<Arc<Record>>,
    stop: watch::Sender<Option<Instant>>,
    ended: Mutex<Receiver<()>>,
}

impl Exporter {
    /// # Errors
    /// When there is no thread, runtime or root certificate to be had.
    pub fn start(to: &OtlpConfig, origin: Origin, tally: Tally) -> Result<Exporter, String> {
        let client = Client::new(to)?;
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client.clone())
            .with_protocol(Protocol::HttpBinary)
            .with_compression(Compression::Gzip)
            .with_endpoint(&to.endpoint)
            // Its own would sleep on the runtime's only thread.
            .with_retry_policy(RetryPolicy::disabled())
            .build()
            .map_err(|error| error.to_string())?;
        exporter.set_resource(&origin.resource());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // For name resolution.
            .max_blocking_threads(1)
            .thread_name("otlp-dns")
            .build()
            .map_err(|error| error.to_string())?;
        let (queue, records) = mpsc::channel(to.queue_max);
        let (stop, stopping) = watch::channel(None);
        let (end, ended) = sync_channel(1);
        let worker = Worker { records, stopping, exporter, client, origin, tally, pending: 0, trouble: None };
        std::thread::Builder::new()
            .name("otlp".into())
            .spawn(move || {
                runtime.block_on(worker.run(&end));
                // A name that is still being resolved must not hold up the end.
                runtime.shutdown_background();
            })
            .map_err(|error| error.to_string())?;
        Ok(Exporter { queue, stop, ended: Mutex::new(ended) })
    }

    /// # Errors
    /// The record, when the queue is full or the end has come.
    pub fn write(&self, record: Arc<Record>) -> Result<(), Arc<Record>> {
        self.queue.try_send(record).map_err(mpsc::error::TrySendError::into_inner)
    }

    pub fn end(&self) {
        self.stop.send_replace(Some(Instant::now() + FLUSH_MAX));
    }

    pub fn ended(&self) {
        if self.ended.lock().recv_timeout(FLUSH_MAX + PATIENCE).is_err() {
            tracing::warn!("a trace sink did not end in time");
        }
    }
}

struct Worker {
    records: mpsc::Receiver<Arc<Record>>,
    /// When the end must be over, once it has come.
    stopping: watch::Receiver<Option<Instant>>,
    exporter: SpanExporter,
    client: Client,
    origin: Origin,
    tally: Tally,
    /// Spans that left the queue and are not accounted for yet.
    pending: u64,
    /// What is wrong with the backend, to be said once and not for every batch.
    trouble: Option<String>,
}

impl Worker {
    async fn run(mut self, end: &SyncSender<()>) {
        let mut stopping = self.stopping.clone();
        let too_late = async move {
            // An error means that nobody is left who could want more time.
            let deadline = stopping.wait_for(Option::is_some).await.ok().and_then(|deadline| *deadline);
            tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now).into()).await;
        };
        tokio::select! {
            () = self.follow() => {}
            () = too_late => {}
        }
        drop(self);
        // Nobody may be waiting.
        let _ = end.send(());
    }

    /// Sends batch after batch, until the end has come and the queue is empty.
    async fn follow(&mut self) {
        loop {
            let batch = self.batch().await;
            if batch.is_empty() {
                return;
            }
            self.export(batch).await;
        }
    }

    /// The next batch; empty only at the end.
    async fn batch(&mut self) -> Vec<SpanData> {
        let mut batch = Vec::new();
        let Worker { records, stopping, origin, pending, tally, .. } = self;
        let mut full = tokio::time::Instant::now();
        loop {
            tokio::select! {
                biased;
                // From now on nothing is added, and what is queued comes without waiting.
                _ = stopping.wait_for(Option::is_some), if !records.is_closed() => records.close(),
                record = records.recv(), if batch.is_empty() => {
                    let Some(record) = record else { return batch };
                    full = tokio::time::Instant::now() + BATCH_WAIT;
                    tally.queued(-1);
                    batch.extend(origin.spans(&record));
                }
                // Not woken for every one of them, which would cost more than they do.
                () = tokio::time::sleep(GATHER), if !batch.is_empty() && !records.is_closed() => {}
            }
            while batch.len() < BATCH_SPANS
                && let Ok(record) = records.try_recv()
            {
                tally.queued(-1);
                batch.extend(origin.spans(&record));
            }
            *pending = batch.len() as u64;
            let is_over = records.is_closed() || tokio::time::Instant::now() >= full;
            if batch.len() >= BATCH_SPANS || (is_over && !batch.is_empty()) {
                return batch;
            }
        }
    }

    async fn export(&mut self, batch: Vec<SpanData>) {
        let began = Instant::now();
        let encoded = self.exporter.export(batch).await.err().map(|error| error.to_string());
        // No outcome: it did not come so far as to be sent.
        let outcome = self.client.outcome().unwrap_or_else(|| Outcome::Failed(encoded.unwrap_or_default()));
        self.tally.took(began.elapsed());
        let spans = std::mem::take(&mut self.pending);
        match outcome {
            Outcome::Accepted { rejected, message } => {
                let rejected = rejected.min(spans);
                self.tally.add("exported", spans - rejected);
                self.tally.add("rejected", rejected);
                self.say((rejected > 0).then(|| "it rejects some spans".into()), &message);
            }
            Outcome::Failed(why) => {
                self.tally.add("failed", spans);
                self.say(Some(why), "");
            }
        }
    }

    /// Says what changed. The counters say how much. What others sent is quoted, so that it cannot pass for a line of ours.
    fn say(&mut self, trouble: Option<String>, message: &str) {
        if trouble == self.trouble {
            return;
        }
        let sink = self.tally.sink.as_str();
        match &trouble {
            Some(why) => tracing::warn!(sink, ?why, ?message, "spans are being lost"),
            None => tracing::info!(sink, "spans are being taken again"),
        }
        self.trouble = trouble;
    }
}

impl Drop for Worker {
    /// What is left is lost, and counted: at the end, and if we should ever panic.
    fn drop(&mut self) {
        self.records.close();
        let mut left = self.pending;
        while let Ok(record) = self.records.try_recv() {
            self.tally.queued(-1);
            left += spans::count(&record);
        }
        self.tally.add("dropped", left);
        if left > 0 {
            tracing::warn!(sink = %self.tally.sink, spans = left, "spans were not taken before the end and are dropped");
        }
    }
}
