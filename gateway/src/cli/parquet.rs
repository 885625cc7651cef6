//! Rows as a Parquet file: the ledger's columns, texts and 64-bit integers.

use std::io::Write;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::errors::{ParquetError, Result};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::ledger::columns;
use crate::accounting::reprice::Booked;
use crate::accounting::row::Cell;

/// Rows that are held in memory, and that a reader takes at once: some 20 MB.
const GROUP_ROWS: usize = 20_000;

/// A file that is being written.
pub struct File<W: Write + Send> {
    writer: SerializedFileWriter<W>,
    waiting: Vec<Booked>,
}

impl<W: Write + Send> File<W> {
    /// # Errors
    /// As all of these: when it cannot be written.
    pub fn begin(out: W) -> Result<File<W>> {
        let columns = columns().map(|(name, kind)| {
            let Kind { is_text, is_optional } = Kind::of(kind);
            let repetition = if is_optional { "OPTIONAL" } else { "REQUIRED" };
            if is_text {
                format!("{repetition} BYTE_ARRAY {name} (UTF8);")
            } else {
                format!("{repetition} INT64 {name};")
            }
        });
        let schema = parse_message_type(&format!("message ledger {{ {} }}", columns.collect::<String>()))?;
        let writer = SerializedFileWriter::new(out, Arc::new(schema), Arc::new(WriterProperties::builder().build()))?;
        Ok(File { writer, waiting: Vec::new() })
    }

    pub fn add(&mut self, row: Booked) -> Result<()> {
        self.waiting.push(row);
        if self.waiting.len() == GROUP_ROWS { self.write_group() } else { Ok(()) }
    }

    pub fn end(mut self) -> Result<()> {
        if !self.waiting.is_empty() {
            self.write_group()?;
        }
        self.writer.close().map(drop)
    }

    fn write_group(&mut self) -> Result<()> {
        let cells: Vec<_> = self.waiting.iter().map(Booked::cells).collect();
        let mut group = self.writer.next_row_group()?;
        for (at, (name, kind)) in columns().enumerate() {
            let kind = Kind::of(kind);
            let missing = || ParquetError::General(format!("there is no column for {name}"));
            let mut column = group.next_column()?.ok_or_else(missing)?;
            let column_cells = || cells.iter().map(|cells| cells[at]);
            // 1 where there is a value.
            let levels: Vec<i16> = column_cells().map(|cell| i16::from(cell != Cell::Null)).collect();
            let levels = kind.is_optional.then_some(&levels[..]);
            if kind.is_text {
                let text = |cell| if let Cell::Text(text) = cell { Some(ByteArray::from(text)) } else { None };
                let texts: Vec<ByteArray> = column_cells().filter_map(text).collect();
                column.typed::<ByteArrayType>().write_batch(&texts, levels, None)?;
            } else {
                let number = |cell| if let Cell::Integer(number) = cell { Some(number) } else { None };
                let numbers: Vec<i64> = column_cells().filter_map(number).collect();
                column.typed::<Int64Type>().write_batch(&numbers, levels, None)?;
            }
            column.close()?;
        }
        group.close()?;
        self.waiting.clear();
        Ok(())
    }
}

/// What a column holds.
#[derive(Clone, Copy)]
struct Kind {
    is_text: bool,
    is_optional: bool,
}

impl Kind {
    /// By its type in SQLite.
    fn of(kind: &str) -> Kind {
        Kind { is_text: kind.starts_with("TEXT"), is_optional: !kind.ends_with("NOT NULL") }
    }
}
