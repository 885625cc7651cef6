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
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep, sleep_until};

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
    /// Told while the queue is at least half full.
    crowded: Arc<Notify>,
    stop: watch::Sender<Option<Instant>>,
    ended: Mutex<Receiver<()>>,
}

impl Exporter {
    /// # Errors
    /// When there is no thread, runtime or root certificate to be had.
    pub fn start(to: &OtlpConfig, origin: Origin, tally: Tally) -> Result<Exporter, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // For name resolution.
            .max_blocking_threads(1)
            .thread_name("otlp-dns")
            .build()
            .map_err(|error| error.to_string())?;
        let (exporter, worker) = Exporter::with_worker(to, origin, tally)?;
        std::thread::Builder::new()
            .name("otlp".into())
            .spawn(move || {
                runtime.block_on(worker.run());
                // A name that is still being resolved must not hold up the end.
                runtime.shutdown_background();
            })
            .map_err(|error| error.to_string())?;
        Ok(exporter)
    }

    /// Both ends of the queue.
    fn with_worker(to: &OtlpConfig, origin: Origin, tally: Tally) -> Result<(Exporter, Worker), String> {
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
        let (queue, records) = mpsc::channel(to.queue_max);
        let (stop, stopping) = watch::channel(None);
        let (end, ended) = sync_channel(1);
        let crowded = Arc::new(Notify::new());
        let worker = Worker {
            records,
            crowded: crowded.clone(),
            stopping,
            end,
            exporter,
            client,
            origin,
            tally,
            pending: 0,
            trouble: None,
        };
        Ok((Exporter { queue, crowded, stop, ended: Mutex::new(ended) }, worker))
    }

    /// # Errors
    /// The record, when the queue is full or the end has come.
    pub fn write(&self, record: Arc<Record>) -> Result<(), Arc<Record>> {
        let taken = self.queue.try_send(record).map_err(mpsc::error::TrySendError::into_inner);
        if self.queue.capacity() <= self.queue.max_capacity() / 2 {
            self.crowded.notify_one();
        }
        taken
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
    crowded: Arc<Notify>,
    /// When the end must be over, once it has come.
    stopping: watch::Receiver<Option<Instant>>,
    end: SyncSender<()>,
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
    async fn run(mut self) {
        let mut stopping = self.stopping.clone();
        let too_late = async move {
            // An error means that nobody is left who could want more time.
            let deadline = stopping.wait_for(Option::is_some).await.ok().and_then(|deadline| *deadline);
            sleep_until(deadline.unwrap_or_else(Instant::now).into()).await;
        };
        tokio::select! {
            () = self.follow() => {}
            () = too_late => {}
        }
        let end = self.end.clone();
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
        let Worker { records, crowded, stopping, origin, pending, tally, .. } = self;
        let mut due = tokio::time::Instant::now();
        loop {
            let mut next = tokio::select! {
                biased;
                // From now on nothing is added, and what is queued comes without waiting.
                _ = stopping.wait_for(Option::is_some), if !records.is_closed() => {
                    records.close();
                    continue;
                }
                record = records.recv() => record,
                () = sleep_until(due), if !batch.is_empty() => return batch,
            };
            if next.is_none() {
                return batch;
            }
            if batch.is_empty() {
                due = tokio::time::Instant::now() + BATCH_WAIT;
            }
            let mut found = 0;
            while let Some(record) = next {
                found += 1;
                tally.queued(-1);
                batch.extend(origin.spans(&record));
                *pending = batch.len() as u64;
                if batch.len() >= BATCH_SPANS {
                    return batch;
                }
                next = records.try_recv().ok();
            }
            // While they come quickly it is not woken for every one of them, which would cost more than they do.
            if found > 1 && !records.is_closed() {
                tokio::select! {
                    () = sleep(GATHER) => {}
                    () = crowded.notified() => {}
                    _ = stopping.wait_for(Option::is_some) => {}
                }
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

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::exchange::Exchange;
    use crate::observe::metrics::Metrics;

    fn exporter(queue_max: usize) -> (Exporter, Worker) {
        let to = OtlpConfig {
            endpoint: "http://localhost/v1/traces".into(),
            headers: Vec::new(),
            timeout: Duration::from_secs(1),
            retry_for: Duration::from_secs(1),
            queue_max,
        };
        let tally = Tally { sink: "otlp".into(), metrics: Arc::new(Metrics::new()) };
        Exporter::with_worker(&to, Origin { environment: None }, tally).unwrap()
    }

    fn record() -> Arc<Record> {
        Arc::new(Exchange::for_tests().record().unwrap().clone())
    }

    #[tokio::test]
    async fn a_small_queue_is_emptied_as_it_fills_also_while_records_are_gathered() {
        let (exporter, mut worker) = exporter(4);
        let spans = tokio::spawn(async move { worker.batch().await.len() });
        for burst in 0..20 {
            for _ in 0..3 {
                assert!(exporter.write(record()).is_ok(), "dropped in burst {burst}");
            }
            // The other task's turn, and no time for it to sleep.
            tokio::task::yield_now().await;
        }
        exporter.end();
        assert_eq!(spans.await.unwrap(), 60);
    }

    #[tokio::test]
    async fn a_record_that_comes_alone_wakes_its_thread_once_more_when_it_is_due() {
        let (exporter, mut worker) = exporter(100);
        exporter.write(record()).unwrap();
        let (mut polls, mut batch) = (0, pin!(worker.batch()));
        let spans = std::future::poll_fn(|context| {
            polls += 1;
            batch.as_mut().poll(context)
        });
        assert_eq!(spans.await.len(), 1);
        assert!(polls <= 3, "woken {polls} times");
    }

    #[tokio::test]
    async fn an_exporter_that_is_dropped_leaves_what_it_had_and_then_the_end() {
        let (exporter, mut worker) = exporter(100);
        (0..3).for_each(|_| exporter.write(record()).unwrap());
        let lengths = tokio::spawn(async move { [worker.batch().await.len(), worker.batch().await.len()] });
        tokio::task::yield_now().await;
        drop(exporter);
        assert_eq!(lengths.await.unwrap(), [3, 0]);
    }
}
