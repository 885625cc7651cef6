//! The network and the servers that other tests break do break, in the way that was asked for.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::fault::{FaultProxy, Faults};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;

const SEED: u64 = 7;

/// A connection through a proxy: the proxy, the client's end, the server's.
fn connection() -> (FaultProxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = FaultProxy::start(listener.local_addr().unwrap(), SEED);
    let client = TcpStream::connect(proxy.address).unwrap();
    let server = listener.accept().unwrap().0;
    for end in [&client, &server] {
        end.set_nodelay(true).unwrap();
    }
    (proxy, client, server)
}

fn send(end: &mut TcpStream, bytes: &[u8]) {
    end.write_all(bytes).unwrap();
}

fn receive(end: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    end.read_exact(&mut bytes).unwrap();
    bytes
}

/// Whether nothing came in a while that is long beside what loopback takes.
fn is_silent(end: &mut TcpStream) -> bool {
    end.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let read = end.read(&mut [0; 64]);
    end.set_read_timeout(None).unwrap();
    matches!(read, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

fn sample(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 % 251) as u8).collect()
}

#[test]
fn without_a_fault_everything_passes_and_each_direction_ends_by_itself() {
    let (_proxy, mut client, mut server) = connection();
    let sent = sample(1 << 20);
    let writer = std::thread::spawn({
        let (mut client, sent) = (client.try_clone().unwrap(), sent.clone());
        move || {
            client.write_all(&sent).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        }
    });
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent);
    send(&mut server, b"still here");
    assert_eq!(receive(&mut client, 10), b"still here");
}

#[test]
fn latency_delays_its_direction_and_what_was_sent_together_arrives_together() {
    let (proxy, mut client, mut server) = connection();
    let latency = Duration::from_millis(150);
    proxy.to_client(Faults { latency, ..Faults::default() });
    send(&mut client, b"quick");
    assert_eq!(receive(&mut server, 5), b"quick");
    let began = Instant::now();
    for byte in b"slowly" {
        send(&mut server, &[*byte]);
    }
    assert_eq!(receive(&mut client, 6), b"slowly");
    assert!(began.elapsed() >= latency);
    // Six one after the other would take six times as long, and they are on their way at once.
    assert!(began.elapsed() < 6 * latency, "{:?}", began.elapsed());
}

#[test]
fn jitter_delays_one_more_than_the_other_and_none_overtakes() {
    let (proxy, mut client, mut server) = connection();
    proxy.to_server(Faults { jitter: Duration::from_millis(40), ..Faults::default() });
    let delays = (0..20u8).map(|number| {
        let began = Instant::now();
        send(&mut client, &[number]);
        assert_eq!(receive(&mut server, 1), [number]);
        began.elapsed()
    });
    let delays: Vec<Duration> = delays.collect();
    let (least, most) = (delays.iter().min().unwrap(), delays.iter().max().unwrap());
    assert!(*most >= *least + Duration::from_millis(20), "{delays:?}");
    let sent = sample(200);
    sent.iter().for_each(|byte| send(&mut client, &[*byte]));
    assert_eq!(receive(&mut server, 200), sent);
}

#[test]
fn a_narrow_line_takes_its_time() {
    let (proxy, mut client, mut server) = connection();
    proxy.to_server(Faults { bytes_per_second: Some(200_000), ..Faults::default() });
    let (began, sent) = (Instant::now(), sample(40_000));
    send(&mut client, &sent);
    assert!(receive(&mut server, 40_000) == sent);
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
}

#[test]
fn slices_arrive_apart_and_whole() {
    let (proxy, mut client, mut server) = connection();
    proxy.to_server(Faults { slice_bytes: Some(3), ..Faults::default() });
    let sent = sample(200);
    send(&mut client, &sent);
    let (mut received, mut reads) = (Vec::<u8>::new(), 0);
    while received.len() < sent.len() {
        let mut piece = [0; 256];
        let count = server.read(&mut piece).unwrap();
        received.extend(&piece[..count]);
        reads += 1;
    }
    assert_eq!(received, sent);
    assert!(reads >= 10, "{reads} reads");
}

#[test]
fn a_reset_comes_after_its_bytes_to_both_ends_and_to_who_is_silent_too() {
    let (proxy, mut client, mut server) = connection();
    proxy.to_server(Faults { reset_after: Some(10), ..Faults::default() });
    send(&mut client, &sample(25));
    assert_eq!(receive(&mut server, 10), sample(10));
    for end in [&mut server, &mut client] {
        assert_eq!(end.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let (proxy, mut client, _server) = connection();
    proxy.both(Faults { reset_after: Some(0), ..Faults::default() });
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_half_close_ends_one_direction_and_leaves_the_other() {
    let (proxy, mut client, mut server) = connection();
    proxy.to_server(Faults { close_after: Some(5), ..Faults::default() });
    send(&mut client, &sample(20));
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    assert_eq!(received, sample(5));
    send(&mut server, b"an answer");
    assert_eq!(receive(&mut client, 9), b"an answer");
    send(&mut client, b"heard by nobody");
}

#[test]
fn a_blackhole_holds_everything_until_it_is_lifted_the_end_too() {
    let (proxy, mut client, mut server) = connection();
    proxy.to_server(Faults { blackhole: true, ..Faults::default() });
    send(&mut client, b"held");
    client.shutdown(Shutdown::Write).unwrap();
    assert!(is_silent(&mut server));
    send(&mut server, b"the other way is open");
    assert_eq!(receive(&mut client, 21), b"the other way is open");
    proxy.heal();
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"held");
}

#[test]
fn garbage_comes_in_place_of_what_was_sent_and_is_the_same_for_a_seed() {
    let noise = || {
        let (proxy, mut client, mut server) = connection();
        proxy.to_client(Faults { garbage_after: Some(4), ..Faults::default() });
        send(&mut server, &[0; 36]);
        let received = receive(&mut client, 36);
        assert_eq!(received[..4], [0; 4]);
        received[4..].to_vec()
    };
    let first = noise();
    assert!(first.iter().filter(|byte| **byte != 0).count() > 20, "{first:?}");
    assert_eq!(noise(), first);
}

#[test]
fn where_no_server_is_the_client_is_sent_away() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = FaultProxy::start(nobody, SEED);
    let mut client = TcpStream::connect(proxy.address).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(proxy.connections(), 1);
}

#[test]
fn a_redis_freezes_thaws_dies_and_comes_back_with_nothing() {
    let mut redis = Redis::start();
    assert_eq!(redis.ask(&["set", "name", "value"]), "OK");
    let mut client = TcpStream::connect(("127.0.0.1", redis.server.port)).unwrap();
    redis.server.freeze();
    send(&mut client, b"get name\r\n");
    assert!(is_silent(&mut client));
    redis.server.thaw();
    assert_eq!(receive(&mut client, 11), b"$5\r\nvalue\r\n");
    redis.server.kill();
    assert!(TcpStream::connect(("127.0.0.1", redis.server.port)).is_err());
    redis.server.restart();
    assert_eq!(redis.ask(&["exists", "name"]), "0");
}

#[test]
fn a_postgres_freezes_thaws_dies_and_comes_back_with_what_it_had() {
    let mut postgres = Postgres::start();
    postgres.ask("CREATE TABLE kept AS SELECT 42 AS answer");
    postgres.ask("CHECKPOINT");
    let asked = std::thread::scope(|scope| {
        postgres.server.freeze();
        let asked = scope.spawn(|| postgres.ask("SELECT answer FROM kept"));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!asked.is_finished(), "a frozen server answers nobody");
        postgres.server.thaw();
        asked.join().unwrap()
    });
    assert_eq!(asked, "42");
    postgres.server.kill();
    postgres.server.restart();
    assert_eq!(postgres.ask("SELECT answer FROM kept"), "42");
}
