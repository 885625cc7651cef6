//! What the upstream path is held against: pingora with nothing on top. It proxies everything to one origin, and is built
//! and set up as the gateway is: profile, allocator, threads, scheduler, buffers.
//!
//! `bare ADDRESS` prints the address that it listens on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark that cannot go on should stop")]

use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_core::Result;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::server::Fds;
use pingora_core::server::configuration::ServerConf;
use pingora_core::services::Service as _;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};
use tokio::sync::watch;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

struct Bare {
    origin: SocketAddr,
}

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.origin, false, String::new())))
    }
}

fn main() {
    let origin = std::env::args().nth(1).expect("the origin's address").parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // As many idle connections as the gateway keeps to one server.
    let conf = ServerConf { upstream_keepalive_pool_size: 512, ..ServerConf::default() };
    let mut service = http_proxy_service(&Arc::new(conf), Bare { origin });

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let name = listener.local_addr().unwrap().to_string();
    println!("{name}");
    service.add_listener(ListenerConfig::tcp(&name).l4_buffer(L4BufferSettings::new(8 << 10, 16 << 10)));
    let mut fds = Fds::new();
    fds.add(name, listener.into_raw_fd());
    let (_stop, stopped) = watch::channel(false);
    runtime.block_on(async { service.start_service(Some(Arc::new(Mutex::new(fds))), stopped, 1).await });
}
