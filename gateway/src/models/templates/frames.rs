//! What a renderer and its owner say to each other: a length in four bytes, and so much JSON.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::PATIENCE;

pub fn write(to: &mut impl Write, frame: &[u8]) -> io::Result<()> {
    let len = u32::try_from(frame.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    // At once: a reader should wake up once.
    to.write_all(&[&len.to_le_bytes(), frame].concat())
}

/// # Errors
/// `FileTooLarge` over `bytes_max`; `UnexpectedEof` when nobody is there any more.
pub fn read(from: &mut impl Read, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > bytes_max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut frame = vec![0; len];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

/// Most bytes that a template may make of so many: what it says is tokenised outside of its limits. Room for what it
/// says around each message, and for a long text of its own.
pub fn said_bytes_max(talk_bytes: usize) -> usize {
    talk_bytes.saturating_mul(8).saturating_add(512 << 10)
}

/// A stream on which all there is to say must be said in time.
pub struct Until<'s> {
    stream: &'s UnixStream,
    end: Instant,
}

impl<'s> Until<'s> {
    pub fn patience(stream: &'s UnixStream) -> Until<'s> {
        Until { stream, end: Instant::now() + PATIENCE }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(into)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
