//! TLS in front of the guard: a client's bytes as they were before they were encrypted.
//!
//! Here and not in pingora, because a handshake must have a slot and a deadline like everything else, and because a
//! certificate is to be renewed while connections with the old one go on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use pingora_core::protocols::{Shutdown, Stream};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A handshake is two round trips at the most.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What a client speaks through.
#[derive(Debug)]
pub enum Inner {
    Plain(Stream),
    Tls(Box<TlsStream<Stream>>),
}

/// Why there is nobody to talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoHandshake {
    Failed,
    TooSlow,
}

impl Inner {
    /// # Errors
    /// When the client says something else than TLS, has no certificate that we ask for, or takes too long.
    pub async fn accept(stream: Stream, config: Arc<ServerConfig>) -> Result<Inner, NoHandshake> {
        match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(config).accept(stream)).await {
            Ok(Ok(stream)) => Ok(Inner::Tls(Box::new(stream))),
            Ok(Err(_)) => Err(NoHandshake::Failed),
            Err(_) => Err(NoHandshake::TooSlow),
        }
    }

    /// The socket below.
    pub fn socket(&self) -> &Stream {
        match self {
            Inner::Plain(stream) => stream,
            Inner::Tls(stream) => stream.get_ref().0,
        }
    }

    pub async fn shutdown(&mut self) {
        match self {
            Inner::Plain(stream) => Shutdown::shutdown(&mut **stream).await,
            // Its goodbye; a client that is gone does not hear it.
            Inner::Tls(stream) => drop(AsyncWriteExt::shutdown(stream).await),
        }
    }
}

impl AsyncRead for Inner {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Inner::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Inner {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Inner::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Inner::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Inner::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Inner::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Inner::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Inner::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Inner::Plain(stream) => stream.is_write_vectored(),
            Inner::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
