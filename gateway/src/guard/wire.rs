//! A client's connection as pingora sees it: the bytes of one request and no more.
//!
//! pingora gets a head that was checked, and of what follows only what belongs to that message. What a client sends
//! beyond it waits here, unread by anybody, until the answer is out. So pingora never has to find out where a request
//! ends, and a byte too many is never taken for a hang-up.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::tls::SslDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::slots::Slot;
use super::tls::Inner;
use crate::api::head::Framing;

/// What may wait here while an answer is under way. More is left to the kernel, which tells the client to stop.
const AHEAD_BYTES_MAX: usize = 16 << 10;
/// Most heads are smaller.
const READ_BYTES: usize = 4 << 10;
const PROBE_BYTES: usize = 256;

/// Which bytes the reader may have.
#[derive(Debug)]
enum Flow {
    /// The rest of one HTTP/1 message.
    Message(Framing),
    /// Everything: HTTP/2 frames itself.
    Everything,
}

#[derive(Debug)]
pub struct Wire {
    inner: Inner,
    /// Read, and not yet anybody's.
    ahead: BytesMut,
    flow: Flow,
    stall: Duration,
    /// Runs while the client takes none of our bytes.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Given back with the connection, whoever drops it.
    _slot: Slot,
}

impl Wire {
    pub fn new(inner: Inner, slot: Slot, stall: Duration) -> Wire {
        let flow = Flow::Message(Framing::Length(0));
        Wire { inner, ahead: BytesMut::new(), flow, stall, stalled: None, _slot: slot }
    }

    /// What has arrived and belongs to no message yet.
    pub fn ahead(&self) -> &[u8] {
        &self.ahead
    }

    /// Waits for more bytes; 0 is the end of the connection.
    pub async fn read_ahead(&mut self) -> io::Result<usize> {
        self.ahead.reserve(READ_BYTES);
        self.inner.read_buf(&mut self.ahead).await
    }

    pub fn skip(&mut self, bytes: usize) {
        self.ahead.advance(bytes);
    }

    /// Takes out a message's head with what has arrived of its body; the rest of the body is read from here.
    pub fn begin(&mut self, head: usize, body: usize, rest: Framing) -> BytesMut {
        self.flow = Flow::Message(rest);
        let bytes = head + body;
        // The common case leaves the buffer whole: to split it would make it a shared one.
        if bytes == self.ahead.len() { std::mem::take(&mut self.ahead) } else { self.ahead.split_to(bytes) }
    }

    /// From now on everything is passed through, beginning with what has arrived.
    pub fn open(&mut self) {
        self.flow = Flow::Everything;
    }

    /// Nothing more of this message: what is read now would only tell that the client left.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.ahead.len() < AHEAD_BYTES_MAX {
            // Nearly always there is nothing to read; a stream must not hold a buffer for that.
            let mut probe = [0; PROBE_BYTES];
            let mut read = ReadBuf::new(&mut probe);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.ahead.extend_from_slice(read.filled());
        }
        Poll::Pending
    }

    fn poll_ahead(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<()> {
        let offered = &self.ahead[..self.ahead.len().min(buf.remaining())];
        let taken = match &mut self.flow {
            Flow::Everything => offered.len(),
            Flow::Message(framing) => framing.take(offered).map_err(broken)?,
        };
        buf.put_slice(&offered[..taken]);
        self.ahead.advance(taken);
        Ok(())
    }

    /// A write that waits is given `stall`; every byte that the client takes starts it anew.
    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.stall)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes none of our bytes")))
    }
}

/// `InvalidData` tells the body's reader that it was the framing.
fn broken(refusal: crate::refusal::Refusal) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, refusal.message())
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        if matches!(&wire.flow, Flow::Message(framing) if framing.is_done()) {
            return wire.poll_end(cx);
        }
        if !wire.ahead.is_empty() {
            return Poll::Ready(wire.poll_ahead(buf));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut wire.inner).poll_read(cx, buf))?;
        if let Flow::Message(framing) = &mut wire.flow {
            let read = &buf.filled()[before..];
            let taken = framing.take(read).map_err(broken)?;
            wire.ahead.extend_from_slice(&read[taken..]);
            buf.set_filled(before + taken);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        let written = Pin::new(&mut wire.inner).poll_write(cx, bytes);
        wire.watch(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let flushed = Pin::new(&mut wire.inner).poll_flush(cx);
        wire.watch(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let shut = Pin::new(&mut wire.inner).poll_shutdown(cx);
        wire.watch(cx, shut)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        let written = Pin::new(&mut wire.inner).poll_write_vectored(cx, bytes);
        wire.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[async_trait]
impl Shutdown for Wire {
    async fn shutdown(&mut self) {
        self.inner.shutdown().await;
    }
}

impl UniqueID for Wire {
    fn id(&self) -> UniqueIDType {
        self.inner.socket().id()
    }
}

impl Ssl for Wire {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.socket().get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.socket().selected_alpn_proto()
    }
}

impl GetTimingDigest for Wire {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.socket().get_timing_digest()
    }
}

impl GetProxyDigest for Wire {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner.socket().get_proxy_digest()
    }
}

impl GetSocketDigest for Wire {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.socket().get_socket_digest()
    }
}

/// Bytes are looked at before pingora gets the connection, not by it.
impl Peek for Wire {}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::super::slots::Slots;
    use super::*;

    const STALL: Duration = Duration::from_millis(200);

    fn wire(capacity: usize) -> (DuplexStream, Wire) {
        let slot = Slots::new(1, 1).take(None).unwrap();
        let (client, server) = duplex(capacity);
        (client, Wire::new(Inner::Plain(Box::new(server)), slot, STALL))
    }

    #[tokio::test]
    async fn a_reader_gets_one_message_and_the_rest_waits() {
        let (mut client, mut wire) = wire(1024);
        client.write_all(b"HEAD12345NEXT").await.unwrap();
        assert_eq!(wire.read_ahead().await.unwrap(), 13);
        assert_eq!(wire.begin(4, 3, Framing::Length(5)).as_ref(), b"HEAD123");
        let mut body = [0; 64];
        assert_eq!(wire.read(&mut body).await.unwrap(), 5, "what the framing says is left, although more is there");
        let more = tokio::time::timeout(Duration::from_millis(20), wire.read(&mut body)).await;
        assert!(more.is_err(), "the next message is nobody's yet");
        assert_eq!(wire.ahead(), b"T");
        drop(client);
        assert_eq!(wire.read(&mut body).await.unwrap(), 0, "but a hang-up is seen");
    }

    #[tokio::test]
    async fn a_bad_chunk_is_an_error_that_names_the_framing() {
        let (mut client, mut wire) = wire(1024);
        client.write_all(b"1;\nx").await.unwrap();
        wire.begin(0, 0, Framing::Chunked(crate::api::head::Chunks::default()));
        let error = wire.read(&mut [0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn who_takes_nothing_is_cut_and_who_takes_little_is_not() {
        let (mut client, mut wire) = wire(16);
        let slow = tokio::spawn(async move {
            let mut taken = [0; 4];
            for _ in 0..8 {
                tokio::time::sleep(STALL / 4).await;
                client.read_exact(&mut taken).await.unwrap();
            }
            client
        });
        wire.write_all(&[0; 48]).await.expect("a slow reader is served");
        let _client = slow.await.unwrap();
        let began = std::time::Instant::now();
        let error = wire.write_all(&[0; 48]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= STALL);
    }
}
