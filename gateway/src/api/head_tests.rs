use proptest::prelude::*;

use super::*;

fn verdict(head: &[u8]) -> Result<Framing, Refusal> {
    let end = end(head, &mut 0)?.expect("a whole head");
    assert_eq!(end, head.len());
    check(head)
}

/// The code of the refusal, or `""`.
fn code(head: &str) -> &'static str {
    verdict(head.as_bytes()).map_or_else(|refusal| refusal.describe().code, |_| "")
}

fn with(line: &str) -> String {
    format!("POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\n{line}\r\n\r\n")
}

fn to(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: gateway\r\n\r\n")
}

fn host(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

#[test]
fn ordinary_heads_pass_and_say_how_their_body_is_framed() {
    let length = |n| Ok(Framing::Length(n));
    assert_eq!(verdict(with("content-length: 12").as_bytes()), length(12));
    assert_eq!(verdict(with("Content-Length:\t007 ").as_bytes()), length(7));
    assert_eq!(verdict(with("x-empty:").as_bytes()), length(0));
    assert_eq!(verdict(with("x-name: caf\u{e9}").as_bytes()), length(0));
    assert_eq!(verdict(with("Transfer-Encoding: Chunked").as_bytes()), Ok(Framing::Chunked(Chunks::default())));
    assert_eq!(verdict(b"GET / HTTP/1.0\r\n\r\n"), length(0), "HTTP/1.0 needs no Host");
    for target in ["/", "/v1/models/glimmer-1", "/v1/", "/a%20b?x=%2e&y=/../", "http://gateway/x", "HTTPS://gateway/"] {
        assert_eq!(code(&to(target)), "", "{target}");
    }
    for good in ["a", "127.0.0.1:8080", "[::1]:80", "[2001:db8::1]", "my_host.example:65535"] {
        assert_eq!(code(&host(good)), "", "{good}");
    }
}

#[test]
fn whatever_two_servers_could_frame_differently_is_refused() {
    for line in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Content-Length: -1",
        "Content-Length: 0x5",
        "Content-Length: 5 5",
        "Content-Length:",
        "Content-Length: 1234567890123456789",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: identity",
        "Transfer-Encoding:",
        "Transfer-Encoding: \u{b}chunked",
        "Transfer_Encoding: chunked",
        "Content_Length: 5",
        "content-length : 5",
        "Content-Length\t: 5",
        "x-a: 1\r\n folded: 2",
        "x-a: 1\r\n\tfolded",
        "x-a: 1\rContent-Length: 5",
        "x-a: 1\r",
        "\r",
    ] {
        let code = code(&with(line));
        // A name or value that no message may have is as good a reason.
        assert!(["bad_framing", "bad_head"].contains(&code), "{line:?}: {code:?}");
    }
    assert_eq!(code("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), "bad_framing");
    for head in ["GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\r\nHost: a\n", "\n"] {
        let refusal = end(head.as_bytes(), &mut 0).expect_err("refused before it is complete");
        assert_eq!(refusal.describe().code, "bad_framing", "{head:?}");
    }
}

#[test]
fn whatever_is_no_request_is_refused() {
    for line in [
        "get / HTTP/1.1",
        "Get / HTTP/1.1",
        "G=T / HTTP/1.1",
        " GET / HTTP/1.1",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "GET\t/\tHTTP/1.1",
        "GET /",
        "GET / HTTP/1.2",
        "GET / HTTP/2.0",
        "GET / http/1.1",
        "GET / HTTP/1.1 x",
        "CONNECT gateway:443 HTTP/1.1",
        "PRI * HTTP/2.0",
        "",
    ] {
        assert_eq!(code(&format!("{line}\r\nHost: gateway\r\n\r\n")), "bad_head", "{line:?}");
    }
    for line in ["no colon", ": empty", "a b: c", "n\u{e9}: v", "x: \0", "x: \u{7f}", "x: a\u{1b}[2J"] {
        assert_eq!(code(&with(line)), "bad_head", "{line:?}");
    }
}

#[test]
fn a_request_names_exactly_one_plain_host() {
    assert_eq!(code("GET / HTTP/1.1\r\n\r\n"), "bad_authority");
    assert_eq!(code("GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n"), "bad_authority");
    for bad in [
        "",
        "x/admin?",
        "user@x",
        "a b",
        "a:b",
        "a:",
        "a:65536",
        "a:+1",
        "[::1",
        "[]",
        "[::1]x",
        "[::1%25eth0]",
        "a,b",
        "a#b",
        "%61",
        "h\u{e9}",
        ":80",
    ] {
        assert_eq!(code(&host(bad)), "bad_authority", "{bad:?}");
    }
    for target in ["http://other/", "http://gateway:80/", "http://user@gateway/", "http:///", "http://gateway\\@x/"] {
        assert_eq!(code(&to(target)), "bad_authority", "{target}");
    }
}

#[test]
fn a_path_has_exactly_one_spelling() {
    for target in [
        "*",
        "v1",
        "../v1",
        "/..",
        "/v1/../admin",
        "/v1/./x",
        "//v1",
        "/v1//x",
        "/%2e%2e/admin",
        "/v1%2fadmin",
        "/v1%2Fa",
        "/v1%5cadmin",
        "/v1\\admin",
        "/%00",
        "/a%0d%0a",
        "/%7f",
        "/%",
        "/%4",
        "/%zz",
        "/v1/m\u{f6}dels",
        "/a\0b",
        "/a#b",
        "/a|b",
        "/?a\\b",
        "/?<x>",
        "/?\u{f6}",
        "ftp://gateway/",
        "http:/gateway",
        "http://gateway?x",
    ] {
        assert_eq!(code(&to(target)), "bad_path", "{target:?}");
    }
}

#[test]
fn what_was_refused_is_still_told_but_never_its_query() {
    assert_eq!(guess(b"GET /v1//x?key=secret HTTP/1.1\r\n"), Some(("GET", "/v1//x")));
    assert_eq!(guess(b"GET /v1\0 HTTP/1.1\r\n"), Some(("GET", "/v1")));
    assert_eq!(guess(b"\x16\x03\x01 tls"), None);
    assert_eq!(guess(b""), None);
}

#[test]
fn a_head_is_bounded_in_bytes_and_fields() {
    let fields = |count: usize| with(&vec!["a: b"; count - 1].join("\r\n"));
    assert_eq!(code(&fields(FIELDS_MAX)), "");
    assert_eq!(code(&fields(FIELDS_MAX + 1)), "head_too_large");
    let sized = |bytes: usize| with(&format!("x: {}", "y".repeat(bytes - with("x: ").len())));
    assert_eq!(code(&sized(HEAD_BYTES_MAX)), "");
    assert_eq!(code(&sized(HEAD_BYTES_MAX + 1)), "head_too_large");
    let endless = vec![b'x'; HEAD_BYTES_MAX + 1];
    assert_eq!(end(&endless, &mut 0), Err(Refusal::HeadTooLarge));
}

fn chunked(body: &[u8]) -> Result<(usize, bool), &'static str> {
    let mut framing = Framing::Chunked(Chunks::default());
    match framing.take(body) {
        Ok(taken) => Ok((taken, framing.is_done())),
        Err(refusal) => Err(refusal.describe().code),
    }
}

#[test]
fn a_chunked_body_ends_where_it_says_and_nowhere_else() {
    assert_eq!(chunked(b"3\r\nabc\r\n0\r\n\r\nGET /"), Ok((13, true)));
    assert_eq!(chunked(b"3;name=value\r\nabc\r\n000\r\n\r\n"), Ok((26, true)));
    assert_eq!(chunked(b"3\r\nab"), Ok((5, false)));
    for bad in [
        &b"3\nabc\r\n0\r\n\r\n"[..],
        b"3;a\nb\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3 \r\nabc\r\n",
        b"0x3\r\nabc\r\n",
        b"-3\r\nabc\r\n",
        b"\r\nabc",
        b"zz\r\n",
        b"123456789\r\n",
        b"0\r\n\n",
        b"0\r\nTrailer: x\r\n\r\n",
        b"3\rabc",
        b"3;\0\r\nabc",
    ] {
        assert_eq!(chunked(bad), Err("bad_framing"), "{:?}", String::from_utf8_lossy(bad));
    }
    let extensions = [b"1;".as_slice(), &vec![b'x'; EXTENSION_BYTES_MAX + 1]].concat();
    assert_eq!(chunked(&extensions), Err("bad_framing"));
}

/// Bytes that often are a head, and otherwise nearly.
fn nearly_a_head() -> impl Strategy<Value = Vec<u8>> {
    let mostly = |right: &'static str, other: &'static str| prop_oneof![9 => right, 1 => other];
    let first = (
        mostly("GET|POST|DELETE|[A-Z]{1,16}", "get|PRI|CONNECT|\\PC{0,3}"),
        mostly(" ", "  |\t|"),
        mostly("/|/v1/models|/[!-~]{0,12}|http://gateway/[!-~]{0,6}", "\\*|//|/\\.\\.|/%2e|/\\PC{0,4}|[ -~]{0,8}"),
        mostly(" HTTP/1\\.[01]\r\n", " HTTP/2\\.0\r\n| HTTP/1\\.1\n|\r\n| HTTP/1\\.1 \r\n"),
    );
    let line = (
        mostly(
            "Content-Length|Transfer-Encoding|Upgrade|Connection|Expect|[a-zA-Z!-~]{1,9}",
            "content_length|Host| x||\\PC{1,3}",
        ),
        mostly(": ?", " : |:\t|"),
        mostly("[0-9]{1,3}|chunked|close|websocket|100-continue|[ -~]{0,12}", "5, 5|[\\x00-\\x1f]|\\PC{0,4}"),
        mostly("\r\n", "\n|\r|\r\n "),
    );
    let glue = |(a, b, c, d): (String, String, String, String)| format!("{a}{b}{c}{d}");
    let host = mostly("Host: gateway\r\n", "Host: [ -~]{0,8}\r\n|Host: a\r\nHost: b\r\n|");
    (first.prop_map(glue), host, proptest::collection::vec(line.prop_map(glue), 0..4))
        .prop_map(|(first, host, lines)| format!("{first}{host}{}\r\n", lines.concat()).into_bytes())
}

/// What pingora makes of the same bytes.
async fn pingora(bytes: &[u8]) -> Option<(String, String, Vec<u8>, bool)> {
    use tokio::io::AsyncWriteExt;
    let (mut client, server) = tokio::io::duplex(1 << 20);
    client.write_all(bytes).await.unwrap();
    drop(client);
    let mut session = pingora_core::protocols::http::v1::server::HttpSession::new(Box::new(server));
    session.read_request().await.ok()??;
    let (method, path) = (session.req_header().method.to_string(), session.req_header().uri.path().to_owned());
    let mut body = Vec::new();
    while let Some(bytes) = session.read_body_bytes().await.ok()? {
        body.extend_from_slice(&bytes);
    }
    Some((method, path, body, session.req_header().headers.contains_key("transfer-encoding")))
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever we let through, pingora takes, and reads the same request in it.
    #[test]
    fn what_passes_here_passes_there(bytes in nearly_a_head()) {
        let mut scanned = 0;
        if let Ok(Some(end)) = end(&bytes, &mut scanned)
            && let Ok(framing) = check(&bytes[..end])
        {
            let head = std::str::from_utf8(&bytes[..end]).unwrap_or("");
            let bytes = match framing {
                Framing::Length(length) => [&bytes[..end], &vec![b'x'; length as usize]].concat(),
                Framing::Chunked(_) => [&bytes[..end], b"1\r\nx\r\n0\r\n\r\n"].concat(),
            };
            let (method, path, body, chunked) = run(pingora(&bytes)).expect("pingora takes it too");
            let line = head.split("\r\n").next().unwrap_or("");
            if !head.is_empty() {
                prop_assert_eq!(Some(method.as_str()), line.split(' ').next());
                prop_assert!(line.contains(&path) || path == "/", "{} is not in {}", path, line);
            }
            prop_assert_eq!(chunked, matches!(framing, Framing::Chunked(_)));
            let length = if let Framing::Length(length) = framing { length as usize } else { 1 };
            prop_assert_eq!(body, vec![b'x'; length]);
        }
    }

    /// Where a head ends does not depend on how its bytes arrive.
    #[test]
    fn any_split_finds_the_same_end(bytes in nearly_a_head(), cuts in proptest::collection::vec(1_usize..9, 1..20)) {
        let whole = end(&bytes, &mut 0);
        let (mut scanned, mut arrived, mut found) = (0, 0, Ok(None));
        let mut cuts = cuts.iter().cycle();
        while arrived < bytes.len() && found == Ok(None) {
            arrived = (arrived + cuts.next().unwrap()).min(bytes.len());
            found = end(&bytes[..arrived], &mut scanned);
        }
        prop_assert_eq!(found, whole);
    }

    /// A chunked body ends at the same byte however it arrives, and its data is never looked at.
    #[test]
    fn any_split_of_a_chunked_body_ends_at_the_same_byte(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
        cuts in proptest::collection::vec(1_usize..9, 1..20),
    ) {
        let mut bytes = Vec::new();
        for chunk in &chunks {
            bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            bytes.extend_from_slice(chunk);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        let end = bytes.len();
        bytes.extend_from_slice(b"GET / HTTP/1.1\r\n");
        let mut framing = Framing::Chunked(Chunks::default());
        let mut cuts = cuts.iter().cycle();
        let mut taken = 0;
        while !framing.is_done() {
            let to = (taken + cuts.next().unwrap()).min(bytes.len());
            taken += framing.take(&bytes[taken..to]).unwrap();
        }
        prop_assert_eq!(taken, end);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = end(&bytes, &mut 0);
        let _ = (check(&bytes), guess(&bytes));
        let _ = Chunks::default().take(&bytes);
    }
}
