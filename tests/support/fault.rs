//! A network that misbehaves as it is told: a TCP proxy on loopback between a client and a server, each direction with faults
//! of its own, which may change while connections live.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

const CHUNK_BYTES: usize = 16 << 10;
const SLICES_APART: Duration = Duration::from_millis(1);
/// Chunks of a direction that may be on their way.
const FLIGHT_MAX: usize = 64;

/// What one direction of every connection suffers. By default nothing.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// How long every byte takes …
    pub latency: Duration,
    /// … and up to this more; none overtakes another.
    pub jitter: Duration,
    pub bytes_per_second: Option<u32>,
    /// Everything comes in pieces of at most so many bytes, a millisecond apart.
    pub slice_bytes: Option<usize>,
    /// After so many bytes both ends see the connection reset. Counted on each connection since the fault was set, as below.
    pub reset_after: Option<u64>,
    /// After so many bytes the receiver sees this direction end, and the sender sees nothing.
    pub close_after: Option<u64>,
    /// After so many bytes come as many of noise as there were to come.
    pub garbage_after: Option<u64>,
    /// Nothing arrives until the fault is lifted; then all of it does.
    pub blackhole: bool,
}

pub struct FaultProxy {
    pub address: SocketAddr,
    to_server: watch::Sender<Faults>,
    to_client: watch::Sender<Faults>,
    connections: Arc<AtomicUsize>,
    /// Dropped with all connections.
    _runtime: Runtime,
}

impl FaultProxy {
    /// The same seed makes the same jitter, slices and noise of each connection.
    pub fn start(server: SocketAddr, seed: u64) -> FaultProxy {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (to_server, to_client) = (watch::Sender::default(), watch::Sender::default());
        let connections: Arc<AtomicUsize> = Arc::default();
        let (there, back, count) = (to_server.clone(), to_client.clone(), connections.clone());
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::SeqCst) as u64;
                let seed = |direction| Noise(seed ^ number << 1 ^ direction);
                let (there, back) = ((there.subscribe(), seed(0)), (back.subscribe(), seed(1)));
                tokio::spawn(connection(client, server, there, back));
            }
        });
        FaultProxy { address, to_server, to_client, connections, _runtime: runtime }
    }

    pub fn to_server(&self, faults: Faults) {
        self.to_server.send_replace(faults);
    }

    pub fn to_client(&self, faults: Faults) {
        self.to_client.send_replace(faults);
    }

    pub fn both(&self, faults: Faults) {
        self.to_server(faults.clone());
        self.to_client(faults);
    }

    /// Lifts all faults. Connections that broke stay broken.
    pub fn heal(&self) {
        self.both(Faults::default());
    }

    /// How many were ever made.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// The connection is to be reset at both ends.
struct Reset;

impl From<std::io::Error> for Reset {
    fn from(_: std::io::Error) -> Reset {
        Reset
    }
}

type Direction = (watch::Receiver<Faults>, Noise);

async fn connection(mut client: TcpStream, server: SocketAddr, there: Direction, back: Direction) {
    let Ok(mut server) = TcpStream::connect(server).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ended = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        tokio::try_join!(pump(from_client, to_server, there), pump(from_server, to_client, back))
    };
    if ended.is_err() {
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// Carries one direction to its end.
async fn pump(from: ReadHalf<'_>, to: WriteHalf<'_>, (faults, noise): Direction) -> Result<(), Reset> {
    let (sender, receiver) = mpsc::channel(FLIGHT_MAX);
    tokio::try_join!(read(from, sender), write(to, receiver, faults, noise)).map(|_| ())
}

async fn read(mut from: ReadHalf<'_>, flight: mpsc::Sender<(Instant, Vec<u8>)>) -> Result<(), Reset> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = from.read(&mut chunk).await?;
        if count == 0 || flight.send((Instant::now(), chunk[..count].to_vec())).await.is_err() {
            return Ok(());
        }
    }
}

async fn write(
    mut to: WriteHalf<'_>,
    mut flight: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut set: watch::Receiver<Faults>,
    mut noise: Noise,
) -> Result<(), Reset> {
    let mut faults = set.borrow_and_update().clone();
    let mut passed = 0;
    let mut arrives = Instant::now();
    // What is on its way, and what of it is not yet through.
    let mut chunk: (Instant, Vec<u8>) = (arrives, Vec::new());
    loop {
        if faults.reset_after.is_some_and(|bytes| passed >= bytes) {
            return Err(Reset);
        }
        if faults.close_after.is_some_and(|bytes| passed >= bytes) {
            to.shutdown().await?;
            while flight.recv().await.is_some() {}
            return Ok(());
        }
        let can_pass = !chunk.1.is_empty() && !faults.blackhole;
        tokio::select! {
            biased;
            changed = set.changed() => {
                if changed.is_err() {
                    return Err(Reset);
                }
                (faults, passed) = (set.borrow_and_update().clone(), 0);
                // Once more through the conditions above.
                continue;
            }
            came = flight.recv(), if chunk.1.is_empty() && !faults.blackhole => {
                let Some(came) = came else {
                    to.shutdown().await?;
                    return Ok(());
                };
                let late = noise.below(faults.jitter.as_micros() as u64 + 1);
                arrives = arrives.max(came.0 + faults.latency + Duration::from_micros(late));
                chunk = came;
                continue;
            }
            () = sleep_until(arrives), if can_pass => {}
        }
        let bound = faults.slice_bytes.map_or(CHUNK_BYTES as u64, |bytes| 1 + noise.below(bytes as u64));
        // A hundredth of a second's worth, so that what is slow is so evenly.
        let bound = faults.bytes_per_second.map_or(bound, |rate| bound.min(u64::from(rate / 100).max(1)));
        let until = |after: Option<u64>| after.map(|bytes| bytes - passed.min(bytes)).filter(|left| *left > 0);
        let bounds = [Some(bound), until(faults.reset_after), until(faults.close_after), until(faults.garbage_after)];
        let piece = bounds.into_iter().flatten().min().unwrap_or(bound).min(chunk.1.len() as u64);
        let mut bytes: Vec<u8> = chunk.1.drain(..piece as usize).collect();
        if faults.garbage_after.is_some_and(|after| passed >= after) {
            bytes.iter_mut().for_each(|byte| *byte = noise.next() as u8);
        }
        to.write_all(&bytes).await?;
        passed += piece;
        if let Some(rate) = faults.bytes_per_second {
            sleep(Duration::from_secs_f64(piece as f64 / f64::from(rate.max(1)))).await;
        } else if faults.slice_bytes.is_some() {
            sleep(SLICES_APART).await;
        }
    }
}

/// SplitMix64: numbers that look like chance and are the same again.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}
