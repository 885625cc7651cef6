//! The guard: a connection cannot be held for nothing, and bytes that could be read in two ways are not read at all.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, chat, chat_with, connect, long, metric};
use crate::support::{eventually, http};

fn listening(keys: &str) -> TestGateway {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "[listen]", &format!("[listen]\n{keys}"));
    setup.start()
}

/// Sends bytes and reads until the gateway closes the connection.
fn last_words(address: SocketAddr, bytes: &[u8]) -> String {
    let (mut stream, mut reader) = connect(address);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(bytes).unwrap();
    let mut said = Vec::new();
    reader.read_to_end(&mut said).expect("the gateway closes the connection");
    String::from_utf8(said).unwrap()
}

/// Checks that this is one refusal in OpenAI's shape, and the last thing on its connection.
fn assert_refused(said: &str, status: u16, codes: &[&str], what: &str) {
    assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "{what}: a second answer in {said}");
    assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {said}");
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    for header in ["connection: close", "x-request-id: ", "traceparent: ", "date: "] {
        assert!(head.contains(header), "{what}: no {header:?} in {head}");
    }
    let error = &serde_json::from_str::<serde_json::Value>(body).unwrap()["error"];
    assert!(codes.contains(&error["code"].as_str().unwrap()), "{what}: {error}");
    assert!(error["message"].is_string() && error["type"].is_string());
}

#[test]
fn bytes_that_two_servers_could_frame_differently_get_one_400_and_a_closed_connection() {
    let gateway = TestGateway::start();
    let key = gateway.key.clone();
    // What is smuggled: a good request with a good key, where somebody else may see the end of the first one.
    let hidden = String::from_utf8(http::get("/v1/models", Some(&key))).unwrap();
    let post = |lines: &str| format!("POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n{lines}\r\n\r\n");
    let get = |target: &str| format!("GET {target} HTTP/1.1\r\nhost: g\r\n\r\n");
    let length = hidden.len();
    let framing: Vec<String> = vec![
        post(&format!("content-length: {length}\r\ntransfer-encoding: chunked")) + "0\r\n\r\n",
        post("transfer-encoding: chunked\r\ncontent-length: 4") + "0\r\n\r\n",
        post("content-length: 0\r\ncontent-length: 0"),
        post(&format!("content-length: 0\r\ncontent-length: {length}")),
        post("content-length: 0, 0"),
        post("content-length: +0"),
        post("content-length: 00x"),
        post("transfer-encoding: gzip, chunked") + "0\r\n\r\n",
        post("transfer-encoding: xchunked") + "0\r\n\r\n",
        post("transfer-encoding: chunked\r\ntransfer-encoding: identity") + "0\r\n\r\n",
        post("transfer_encoding: chunked\r\ncontent-length: 0"),
        post(&format!("Content_Length: {length}")),
        post("content-length : 0"),
        post("x: y\r\n content-length: 5"),
        post(&format!("x: y\rcontent-length: {length}")),
        format!("GET /v1/models HTTP/1.1\nhost: g\nauthorization: Bearer {key}\n\n"),
        format!("GET /v1/models HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {key}\n\r\n"),
        "POST /v1/chat/completions HTTP/1.0\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        post("transfer-encoding: chunked") + "0;a\nb\r\n\r\n",
        post("transfer-encoding: chunked") + "0\r\nx: y\r\n\r\n",
        post("transfer-encoding: chunked") + "0\n\n",
        post("transfer-encoding: chunked") + "-1\r\n\r\n",
    ];
    let heads: Vec<String> = vec![
        get("/").replacen("GET", "get", 1),
        get("/").replacen("GET", "G\u{ae}T", 1),
        get("/").replacen(' ', "  ", 1),
        get("/").replacen("HTTP/1.1", "HTTP/1.2", 1),
        post("x: \0"),
        post("no colon"),
        "CONNECT g:443 HTTP/1.1\r\nhost: g:443\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
    ];
    let hosts: Vec<String> = vec![
        "GET /health HTTP/1.1\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nhost: x/admin?\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nhost: user@g\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nhost: a b\r\n\r\n".to_owned(),
        get("http://other/health"),
        get("http://g:80/health"),
    ];
    let paths: Vec<String> = [
        "/v1/../admin",
        "/v1//models",
        "/v1/%2e%2e/admin",
        "/v1%2fmodels",
        "/v1\\models",
        "/v1/models%00",
        "/v1/m\u{f6}dels",
        "*",
        "admin",
    ]
    .map(get)
    .to_vec();
    let all = [(framing, "bad_framing"), (heads, "bad_head"), (hosts, "bad_authority"), (paths, "bad_path")];
    for (payloads, code) in &all {
        for payload in payloads {
            let said = last_words(gateway.data, format!("{payload}{hidden}").as_bytes());
            assert_refused(&said, 400, &[code], payload);
        }
        let counted = gateway.metric("gateway_rejections_total", &[&format!("reason=\"{code}\"")]);
        assert_eq!(counted, payloads.len() as f64, "each {code} is counted");
    }
    assert!(ledger(&gateway).is_empty());
    assert!(!gateway.ask("12 + 34 = ?").is_empty(), "and the next good one is answered");
}

#[test]
fn a_chunk_that_breaks_after_the_head_was_accepted_is_a_400_too() {
    let gateway = TestGateway::start();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n",
        gateway.key
    );
    let (mut stream, mut reader) = connect(gateway.data);
    stream.write_all(head.as_bytes()).unwrap();
    let mut line = [0; 25];
    reader.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"2;a\nb\r\n{}\r\n0\r\n\r\n").unwrap();
    let response = http::read_head(reader).unwrap().finish();
    assert_eq!((response.status, response.header("connection")), (400, Some("close")));
    assert_eq!(response.json()["error"]["code"], "bad_framing");
}

#[test]
fn a_head_of_too_many_bytes_or_fields_is_a_431() {
    let gateway = TestGateway::start();
    let many = "x: y\r\n".repeat(101);
    let large = format!("x: {}\r\n", "y".repeat(17 << 10));
    // One that never ends is refused when it is too large, not when it is too late.
    for head in [format!("{many}\r\n"), format!("{large}\r\n"), large[..17 << 10].to_owned()] {
        let said = last_words(gateway.data, format!("GET / HTTP/1.1\r\nhost: g\r\n{head}").as_bytes());
        assert_refused(&said, 431, &["head_too_large"], "a large head");
    }
    assert_eq!(gateway.metric("gateway_rejections_total", &["head_too_large"]), 3.0);
}

#[test]
fn an_upgrade_is_never_made_and_trace_is_not_served() {
    let gateway = TestGateway::start();
    for upgrade in ["h2c", "websocket"] {
        let (mut stream, reader) = connect(gateway.data);
        let head = format!(
            "GET /health HTTP/1.1\r\nhost: g\r\nconnection: upgrade, http2-settings\r\nupgrade: {upgrade}\r\nhttp2-settings: AAMAAABk\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let response = http::read_head(reader).unwrap().finish();
        assert_eq!((response.status, response.header("upgrade")), (200, None), "the request is answered as it is");
    }
    let trace = gateway.send(b"TRACE /v1/models HTTP/1.1\r\nhost: g\r\n\r\n");
    assert_eq!((trace.status, trace.json()["error"]["code"].as_str().unwrap()), (405, "method_not_allowed"));
}

#[test]
fn a_head_has_one_deadline_however_its_bytes_drip() {
    let gateway = listening("head_timeout = \"400ms\"");
    let (mut stream, mut reader) = connect(gateway.data);
    let began = Instant::now();
    let dripping = std::thread::spawn(move || {
        for byte in b"GET / HTTP/1.1\r\nhost: gateway\r\nx-more: and more and more and more and more".iter().cycle() {
            if stream.write_all(&[*byte]).is_err() || began.elapsed() > Duration::from_secs(10) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut said = String::new();
    // After the answer the connection ends; a reset is an end.
    let _ = reader.read_to_string(&mut said);
    dripping.join().unwrap();
    assert_refused(&said, 408, &["head_too_slow"], "a dripping head");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(400) && took < Duration::from_secs(5), "{took:?}");

    // A connection that never says anything is closed without a word, and seen.
    let (_silent, mut reader) = connect(gateway.data);
    let mut said = Vec::new();
    reader.read_to_end(&mut said).unwrap();
    assert!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
    assert_eq!(gateway.metric("gateway_rejections_total", &["head_too_slow"]), 2.0);

    // One that has been served may rest longer than a head may take.
    let (mut stream, mut reader) = connect(gateway.data);
    for _ in 0..2 {
        stream.write_all(&http::get("/health", None)).unwrap();
        let response = http::read_head(reader).unwrap().finish();
        assert_eq!(response.status, 200);
        reader = std::io::BufReader::new(stream.try_clone().unwrap());
        std::thread::sleep(Duration::from_millis(600));
    }
}

#[test]
fn a_body_that_drips_is_a_408() {
    let gateway = TestGateway::start();
    let (mut stream, reader) = connect(gateway.data);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n",
        gateway.key
    );
    stream.write_all(head.as_bytes()).unwrap();
    let began = Instant::now();
    std::thread::spawn(move || {
        while began.elapsed() < Duration::from_secs(20) && stream.write_all(b"{").is_ok() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let response = http::read_head(reader).unwrap().finish();
    assert_eq!((response.status, response.json()["error"]["code"].as_str().unwrap()), (408, "body_too_slow"));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// A connection from another loopback address.
fn connect_from(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stream = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((source, 0))).unwrap();
        socket.connect(to).await.unwrap().into_std().unwrap()
    });
    stream.set_nonblocking(false).unwrap();
    stream
}

/// Asks for the health, and gives the status.
fn ask(stream: &mut TcpStream) -> u16 {
    // Over a cap it may be closed before we have written.
    let _ = stream.write_all(&http::get("/health", None));
    let response = http::read_head(std::io::BufReader::new(stream.try_clone().unwrap())).unwrap().finish();
    if response.status == 503 {
        assert_eq!(response.json()["error"]["code"], "too_many_connections");
        assert_eq!(response.header("connection"), Some("close"));
        assert!(response.header("retry-after").is_some() && response.header("x-request-id").is_some());
    }
    response.status
}

#[test]
fn connections_are_capped_for_each_address_and_in_all_and_probes_are_not() {
    let gateway = listening("connections_max = 5\nconnections_per_ip = 3");
    let served = |source| {
        let mut stream = connect_from(source, gateway.data);
        (ask(&mut stream) == 200).then_some(stream)
    };
    // (The harness holds none: its probes go to the other listener.)
    let here: Vec<_> = (0..3).map(|_| served([127, 0, 0, 1]).expect("under the cap")).collect();
    assert!(served([127, 0, 0, 1]).is_none(), "the fourth from one address");
    let there: Vec<_> = (0..2).map(|_| served([127, 0, 0, 2]).expect("another address")).collect();
    assert!(served([127, 0, 0, 3]).is_none(), "the sixth in all");
    for probe in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(gateway.admin_get(probe).status, 200, "{probe}");
    }
    assert_eq!(gateway.metric("gateway_rejections_total", &["too_many_connections"]), 2.0);
    drop(here);
    let again = eventually("a slot to come back", || served([127, 0, 0, 1]));
    // Who was let in stays in.
    for mut stream in there.into_iter().chain([again]) {
        assert_eq!(ask(&mut stream), 200);
    }
}

#[test]
fn more_strangers_than_we_answer_are_still_closed() {
    let gateway = listening("connections_max = 1");
    let mut first = connect_from([127, 0, 0, 1], gateway.data);
    assert_eq!(ask(&mut first), 200);
    let crowd: Vec<_> = (0..300).map(|_| TcpStream::connect(gateway.data).unwrap()).collect();
    for stream in &crowd {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // A reset is an end as well; that nothing ever comes would be a hang.
        match (&mut &*stream).read_to_end(&mut Vec::new()) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("a connection hangs"),
            _ => {}
        }
    }
    eventually("all to be counted", || {
        (gateway.metric("gateway_rejections_total", &["too_many_connections"]) == 300.0).then_some(())
    });
    assert_eq!(ask(&mut first), 200);
}

#[test]
fn pipelined_requests_are_answered_in_order_wherever_their_bytes_are_cut() {
    let gateway = TestGateway::start();
    let models = http::get("/v1/models", Some(&gateway.key));
    let chat = gateway.chat_bytes(&chat("12 + 34 = ?"), &[]);
    let chunked = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\n{{}}\r\n0\r\n\r\n",
        gateway.key
    );
    let stream = gateway.chat_bytes(&chat_with("12 + 34 = ?", json!({"stream": true, "max_tokens": 5})), &[]);
    let health = http::get("/health", None);
    let all = [&models[..], &chat, b"\r\n", chunked.as_bytes(), &stream, &models, &health].concat();
    for piece in [all.len(), 1000, 97] {
        let (mut connection, mut reader) = connect(gateway.data);
        let bytes = all.clone();
        let sender = std::thread::spawn(move || {
            for piece in bytes.chunks(piece) {
                connection.write_all(piece).unwrap();
            }
            connection
        });
        let mut statuses = Vec::new();
        for _ in 0..6 {
            let (response, rest) = http::read_head(reader).unwrap().finish_and_keep();
            assert!(response.complete);
            statuses.push(response.status);
            reader = rest;
        }
        assert_eq!(statuses, [200, 200, 400, 200, 200, 200], "in pieces of {piece}");
        sender.join().unwrap().shutdown(Shutdown::Write).unwrap();
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0, "nothing else was said");
    }
}

#[test]
fn a_hang_up_is_noticed_behind_a_pipelined_request() {
    let gateway = TestGateway::start();
    let mut bytes = gateway.chat_bytes(&long(900), &[]);
    bytes.extend_from_slice(b"GET /health HT");
    let mut open = gateway.open(&bytes);
    open.chunk().unwrap();
    drop(open);
    let row = eventually("the row", || ledger(&gateway).pop());
    assert_eq!(row.outcome, "aborted");
    assert!(row.output < 900);
}

mod http2 {
    use super::*;
    use ::http::{Request, Response, StatusCode};
    use h2::client::SendRequest;
    use h2::{Reason, RecvStream};

    /// A connection of our own, driven in the background.
    async fn open(gateway: &TestGateway) -> SendRequest<bytes::Bytes> {
        let socket = tokio::net::TcpStream::connect(gateway.data).await.unwrap();
        // Windows that no answer here fills: streams are read one after the other.
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(1 << 24).initial_connection_window_size(1 << 24);
        let (client, connection) = builder.handshake(socket).await.unwrap();
        tokio::spawn(connection);
        client.ready().await.unwrap()
    }

    fn request(gateway: &TestGateway, method: &str, path: &str) -> Request<()> {
        Request::builder()
            .method(method)
            .uri(format!("http://gateway{path}"))
            .header("authorization", format!("Bearer {}", gateway.key))
            .header("content-type", "application/json")
            .body(())
            .unwrap()
    }

    async fn ask(client: &mut SendRequest<bytes::Bytes>, request: Request<()>, body: &str) -> Response<RecvStream> {
        let (response, mut send) = client.send_request(request, body.is_empty()).unwrap();
        if !body.is_empty() {
            send.send_data(body.to_owned().into(), true).unwrap();
        }
        response.await.unwrap()
    }

    async fn read(response: Response<RecvStream>) -> Result<String, h2::Error> {
        let mut stream = response.into_body();
        let mut body = Vec::new();
        while let Some(data) = stream.data().await {
            let data = data?;
            stream.flow_control().release_capacity(data.len()).unwrap();
            body.extend_from_slice(&data);
        }
        Ok(String::from_utf8(body).unwrap())
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn http2_gives_the_same_answers_as_http1_on_the_same_port() {
        let gateway = listening("http2 = true");
        let expected = gateway.ask("12 + 34 = ?");
        run(async {
            let mut client = open(&gateway).await;
            let body = chat("12 + 34 = ?").to_string();
            let chat = || request(&gateway, "POST", "/v1/chat/completions");
            let response = ask(&mut client, chat(), &body).await;
            assert_eq!(response.status(), StatusCode::OK);
            assert!(response.headers().contains_key("x-request-id"));
            let answer: serde_json::Value = serde_json::from_str(&read(response).await.unwrap()).unwrap();
            assert_eq!(answer["choices"][0]["message"]["content"], expected);

            let body = chat_with("12 + 34 = ?", json!({"stream": true})).to_string();
            let response = ask(&mut client, chat(), &body).await;
            assert_eq!(response.headers()["content-type"], "text/event-stream");
            let events = read(response).await.unwrap();
            assert!(events.ends_with("data: [DONE]\n\n"), "{events}");

            let models = ask(&mut client, request(&gateway, "GET", "/v1/models"), "").await;
            assert_eq!(models.status(), StatusCode::OK);
            for (path, code) in
                [("/v1//models", "bad_path"), ("/v1/%2e%2e/admin", "bad_path"), ("/nothing", "unknown_path")]
            {
                let refused = ask(&mut client, request(&gateway, "GET", path), "").await;
                let body = read(refused).await.unwrap();
                assert!(body.contains(&format!("\"code\":\"{code}\"")), "{path}: {body}");
            }
            let mut many = request(&gateway, "GET", "/v1/models");
            for i in 0..101 {
                many.headers_mut()
                    .insert(::http::HeaderName::try_from(format!("x-{i}")).unwrap(), "y".parse().unwrap());
            }
            assert_eq!(ask(&mut client, many, "").await.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        });
        eventually("three rows", || (ledger(&gateway).len() == 3).then_some(()));
    }

    #[test]
    fn a_reset_stream_stops_its_answer_and_no_other() {
        let gateway = listening("http2 = true");
        run(async {
            let mut client = open(&gateway).await;
            let chat = || request(&gateway, "POST", "/v1/chat/completions");
            let kept = ask(&mut client, chat(), &long(300).to_string()).await;
            let (response, mut send) = client.send_request(chat(), false).unwrap();
            send.send_data(long(900).to_string().into(), true).unwrap();
            let mut events = response.await.unwrap().into_body();
            events.data().await.unwrap().unwrap();
            send.send_reset(Reason::CANCEL);
            drop(events);
            assert!(read(kept).await.unwrap().ends_with("data: [DONE]\n\n"));
        });
        let rows = eventually("both rows", || Some(ledger(&gateway)).filter(|rows| rows.len() == 2));
        let mut outcomes: Vec<_> = rows.iter().map(|row| (row.outcome.as_str(), row.output)).collect();
        outcomes.sort_unstable();
        assert_eq!((outcomes[0].0, outcomes[1]), ("aborted", ("answered", 300)));
        assert!(outcomes[0].1 < 900, "the engine stopped");
    }

    #[test]
    fn a_body_that_does_not_come_is_a_408_on_http2_too() {
        let gateway = listening("http2 = true");
        run(async {
            let mut client = open(&gateway).await;
            let (response, mut send) =
                client.send_request(request(&gateway, "POST", "/v1/chat/completions"), false).unwrap();
            send.send_data("{".into(), false).unwrap();
            let response = response.await.unwrap();
            assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
            let other = ask(&mut client, request(&gateway, "GET", "/v1/models"), "").await;
            assert_eq!(other.status(), StatusCode::OK, "the connection serves others");
        });
    }

    #[test]
    fn a_cut_stream_ends_with_a_reset_and_never_cleanly() {
        let setup = Setup::shipped();
        setup.replace("gateway.toml", "[listen]", "[listen]\nhttp2 = true");
        setup.replace("gateway.toml", "device = \"auto\"", "device = \"auto\"\nthreads = 1");
        setup.replace("routes.toml", "total = \"120s\"", "total = \"150ms\"");
        let gateway = setup.start();
        run(async {
            let mut client = open(&gateway).await;
            let body = long(1000).to_string();
            let mut waiting = Vec::new();
            for _ in 0..8 {
                let (response, mut send) =
                    client.send_request(request(&gateway, "POST", "/v1/chat/completions"), false).unwrap();
                send.send_data(body.clone().into(), true).unwrap();
                waiting.push(response);
            }
            let mut cut = 0;
            for response in waiting {
                let response = response.await.unwrap();
                if response.status() == StatusCode::OK {
                    let error = read(response).await.expect_err("a cut stream must not look complete");
                    assert!(error.is_reset(), "{error}");
                    cut += 1;
                }
            }
            assert!(cut > 0, "no stream had begun: this proved nothing");
        });
    }

    #[test]
    fn a_connection_has_so_many_streams_and_heads_so_many_bytes() {
        let gateway = listening("http2 = true");
        run(async {
            let socket = tokio::net::TcpStream::connect(gateway.data).await.unwrap();
            let (client, mut connection) = h2::client::handshake(socket).await.unwrap();
            let mut client = client.ready().await.unwrap();
            let (response, _) = client.send_request(request(&gateway, "GET", "/v1/models"), true).unwrap();
            let (mut response, mut settled) = (Box::pin(response), None);
            // The settings have come when the first answer has.
            let response = std::future::poll_fn(|cx| {
                use std::task::Poll;
                if let Poll::Ready(ended) = std::pin::Pin::new(&mut connection).poll(cx) {
                    settled = Some(ended);
                }
                response.as_mut().poll(cx)
            })
            .await;
            assert_eq!(response.unwrap().status(), StatusCode::OK);
            assert_eq!(connection.max_concurrent_send_streams(), 64);
            tokio::spawn(connection);
            let mut large = request(&gateway, "GET", "/v1/models");
            large.headers_mut().insert("x-large", "y".repeat(20 << 10).parse().unwrap());
            let (refused, _) = client.send_request(large, true).unwrap();
            assert!(refused.await.map_or(true, |response| response.status().as_u16() == 431));
        });
    }

    #[test]
    fn http2_is_off_unless_it_is_asked_for() {
        let gateway = TestGateway::start();
        let said = last_words(gateway.data, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
        assert_refused(&said, 400, &["bad_head"], "the preface");
    }
}

#[test]
fn strangers_who_speak_no_http_cannot_flood_the_log() {
    let mut gateway = TestGateway::start();
    for _ in 0..50 {
        last_words(gateway.data, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 a TLS hello\r\n\r\n");
    }
    let metrics = gateway.metrics();
    assert_eq!(metric(&metrics, "gateway_rejections_total", &["bad_head"]), 50.0);
    let suppressed = metric(&metrics, "gateway_access_log_lines_total", &["suppressed"]);
    gateway.stop();
    let lines = gateway.stdout().lines().count();
    assert!(suppressed >= 40.0 && lines as f64 + suppressed == 50.0, "{lines} lines, {suppressed} suppressed");
}

#[test]
fn an_operator_sees_what_was_refused() {
    let mut gateway = TestGateway::start();
    last_words(gateway.data, b"GET /v1//models?token=secret HTTP/1.1\r\nhost: g\r\n\r\n");
    gateway.stop();
    let line: serde_json::Value = serde_json::from_str(gateway.stdout().lines().next().unwrap()).unwrap();
    let said = ["method", "path", "error_type", "outcome"].map(|name| line[name].as_str().unwrap().to_owned());
    assert_eq!(said, ["GET", "/v1//models", "bad_path", "refused"]);
}
