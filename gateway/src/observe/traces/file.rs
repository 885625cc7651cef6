//! Spans into `traces.jsonl`: what there is to look at without any backend.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;

use super::Tally;
use crate::exchange::Record;
use crate::observe::spans::{self, Origin};
use crate::observe::writer::Writer;

const QUEUE_RECORDS: usize = 4096;
/// When the file has grown to this it becomes `….1`, and the one before it goes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Starts the thread that writes: a line is one `ExportTraceServiceRequest`, as OpenTelemetry's file exporter writes it.
///
/// # Errors
/// When the file cannot be opened.
pub fn open(path: &Path, origin: Origin, tally: Tally) -> std::io::Result<Writer<Arc<Record>>> {
    let mut file = Rotating::open(path)?;
    let resource = (&origin.resource()).into();
    let lost = tally.clone();
    let write = move |records: &[Arc<Record>]| {
        let began = Instant::now();
        let (mut lines, mut count) = (Vec::new(), 0);
        for record in records {
            let spans = origin.spans(record);
            count += spans.len() as u64;
            let resource_spans = group_spans_by_resource_and_scope(spans, &resource);
            // Plain structs into memory: this has no way to fail.
            let _ = serde_json::to_writer(&mut lines, &ExportTraceServiceRequest { resource_spans });
            lines.push(b'\n');
        }
        let written = file.write(&lines);
        tally.queued(-(records.len() as i64));
        tally.took(began.elapsed());
        match written {
            Ok(()) => tally.add("exported", count),
            Err(error) => {
                tracing::warn!(%error, "spans could not be written");
                tally.add("failed", count);
            }
        }
    };
    let lost = move |records: &[Arc<Record>]| {
        lost.queued(-(records.len() as i64));
        lost.add("dropped", records.iter().map(|record| spans::count(record)).sum());
    };
    Writer::start("traces", QUEUE_RECORDS, write, lost)
}

struct Rotating {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Rotating {
    fn open(path: &Path) -> std::io::Result<Rotating> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let written = file.metadata()?.len();
        Ok(Rotating { path: path.to_owned(), file, written })
    }

    /// Writes all of it or nothing: what a full disk took of it goes again, so that whoever counts it as lost is right and
    /// no line is cut.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.written > 0 && self.written + bytes.len() as u64 > FILE_BYTES_MAX {
            std::fs::rename(&self.path, self.path.with_extension("jsonl.1"))?;
            *self = Rotating::open(&self.path)?;
        }
        if let Err(error) = self.file.write_all(bytes) {
            self.file.set_len(self.written)?;
            return Err(error);
        }
        self.written += bytes.len() as u64;
        Ok(())
    }
}
