//! TLS for clients: certificates that are renewed, clients that must have one, and handshakes that never end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedKey, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, chat, long};
use crate::support::http;

/// Answers that are under way while a certificate is renewed.
const STREAMS: usize = 100;
const STREAM_TOKENS: u32 = 500;

type Certified = CertifiedKey<KeyPair>;

fn certificate() -> Certified {
    rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap()
}

fn write(setup: &Setup, made: &Certified) {
    std::fs::write(setup.path("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(setup.path("key.pem"), made.signing_key.serialize_pem()).unwrap();
}

/// With this certificate, and more in `listen.tls`, and in `[listen]`.
fn serving(made: &Certified, more: &str, listen: &str) -> TestGateway {
    let setup = Setup::shipped();
    write(&setup, made);
    let tls = format!("[listen]\n{listen}\ntls = {{ cert = \"cert.pem\", key = \"key.pem\"{more} }}");
    setup.replace("gateway.toml", "[listen]", &tls);
    setup.start()
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A client that trusts this certificate, and who it says it is.
fn client(trusted: &CertificateDer<'static>, own: Option<Identity>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    Arc::new(match own {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
    })
}

type TlsClient = BufReader<StreamOwned<ClientConnection, TcpStream>>;

fn open(address: SocketAddr, config: &Arc<ClientConfig>, bytes: &[u8]) -> std::io::Result<TlsClient> {
    let session = ClientConnection::new(config.clone(), "localhost".try_into().unwrap()).unwrap();
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut stream = StreamOwned::new(session, stream);
    stream.write_all(bytes)?;
    Ok(BufReader::new(stream))
}

/// The status, and everything up to the end of the connection.
fn ask(address: SocketAddr, config: &Arc<ClientConfig>, bytes: &[u8]) -> std::io::Result<String> {
    let mut said = String::new();
    open(address, config, bytes)?.read_to_string(&mut said)?;
    Ok(said)
}

fn closing(bytes: &[u8]) -> Vec<u8> {
    String::from_utf8(bytes.to_vec()).unwrap().replacen("\r\n", "\r\nconnection: close\r\n", 1).into_bytes()
}

#[test]
fn a_renewed_certificate_counts_for_those_who_come_and_cuts_nobody() {
    let (old, new) = (certificate(), certificate());
    let gateway = serving(&old, "", "");
    let ask_models = closing(&http::get("/v1/models", Some(&gateway.key)));
    let trusts = |made: &Certified| client(made.cert.der(), None);
    assert!(ask(gateway.data, &trusts(&old), &ask_models).unwrap().starts_with("HTTP/1.1 200"));
    assert!(ask(gateway.data, &trusts(&new), &ask_models).is_err(), "a stranger's certificate is none");

    let stream = closing(&gateway.chat_bytes(&long(STREAM_TOKENS), &[]));
    let mut running: Vec<TlsClient> = (0..STREAMS)
        .map(|_| {
            let mut running = open(gateway.data, &trusts(&old), &stream).unwrap();
            let mut line = String::new();
            running.read_line(&mut line).unwrap();
            if !line.starts_with("HTTP/1.1 200") {
                running.read_to_string(&mut line).unwrap();
                panic!("{line}");
            }
            running
        })
        .collect();

    // Half a pair is no pair, and changes nothing.
    std::fs::write(gateway.config("key.pem"), new.signing_key.serialize_pem()).unwrap();
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 422);
    assert!(ask(gateway.data, &trusts(&old), &ask_models).unwrap().starts_with("HTTP/1.1 200"));
    std::fs::write(gateway.config("cert.pem"), new.cert.pem()).unwrap();
    // Saving is enough.
    eventually("the new certificate", || ask(gateway.data, &trusts(&new), &ask_models).ok());
    assert!(gateway.metric("gateway_in_flight_requests", &[]) > 0.0, "all had ended before: this proved nothing");
    assert!(ask(gateway.data, &trusts(&old), &ask_models).is_err());
    for running in &mut running {
        let mut rest = String::new();
        running.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("data: [DONE]"), "a stream that ran goes on to its end");
    }
    assert!(gateway.metric("gateway_tls_handshakes_total", &["accepted"]) >= STREAMS as f64 + 3.0);
}

#[test]
fn who_does_not_speak_tls_or_does_not_finish_is_gone_in_five_seconds() {
    let made = certificate();
    let gateway = serving(&made, "", "");
    let began = Instant::now();
    let stalled: Vec<TcpStream> = (0..100).map(|_| gateway.open_unread(b"\x16\x03\x01\x02\x00\x01")).collect();
    let mut plain = gateway.open_unread(&http::get("/health", None));
    let mut said = Vec::new();
    let _ = plain.read_to_end(&mut said);
    assert!(!said.starts_with(b"HTTP"), "nothing is said in the clear");
    let health = closing(&http::get("/health", None));
    assert!(ask(gateway.data, &client(made.cert.der(), None), &health).unwrap().starts_with("HTTP/1.1 200"));
    for mut stream in stalled {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    eventually("all to be counted", || {
        (gateway.metric("gateway_tls_handshakes_total", &["too_slow"]) == 100.0).then_some(())
    });
    assert_eq!(gateway.metric("gateway_tls_handshakes_total", &["failed"]), 1.0);
}

#[test]
fn where_clients_need_a_certificate_only_one_that_our_authority_signed_will_do() {
    let made = certificate();
    let authority = |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap(), Issuer::new(params, key))
    };
    let signed = |by: &Issuer<'_, KeyPair>| -> Identity {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec!["client".to_owned()]).unwrap().signed_by(&key, by).unwrap();
        (vec![cert.der().clone()], key.serialize_der().try_into().unwrap())
    };
    let ((ours, ours_signs), (_, others_sign)) = (authority("ours"), authority("theirs"));
    let setup = Setup::shipped();
    write(&setup, &made);
    std::fs::write(setup.path("ca.pem"), ours.pem()).unwrap();
    let tls = "[listen]\ntls = { cert = \"cert.pem\", key = \"key.pem\", client_ca = \"ca.pem\" }";
    setup.replace("gateway.toml", "[listen]", tls);
    let gateway = setup.start();
    let ask_models = closing(&http::get("/v1/models", Some(&gateway.key)));
    let ask_as = |own: Option<Identity>| ask(gateway.data, &client(made.cert.der(), own), &ask_models);
    assert!(ask_as(Some(signed(&ours_signs))).unwrap().starts_with("HTTP/1.1 200"));
    assert!(ask_as(Some(signed(&others_sign))).is_err());
    assert!(ask_as(None).is_err());
    let failed = || gateway.metric("gateway_tls_handshakes_total", &["failed"]);
    eventually("both to be counted", || (failed() == 2.0).then_some(()));
}

#[test]
fn http2_is_spoken_over_tls_where_both_want_it() {
    let made = certificate();
    for (allowed, spoken) in [("http2 = true", Some(&b"h2"[..])), ("", None)] {
        let gateway = serving(&made, "", allowed);
        let mut config = ClientConfig::clone(&client(made.cert.der(), None));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            let stream = tokio::net::TcpStream::connect(gateway.data).await.unwrap();
            let stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
            let alpn = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
            let Some(spoken) = spoken else {
                assert_eq!(alpn.as_deref(), Some(&b"http/1.1"[..]));
                return;
            };
            assert_eq!(alpn.as_deref(), Some(spoken));
            let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            let body = chat("12 + 34 = ?").to_string();
            let request = ::http::Request::post("https://localhost/v1/chat/completions")
                .header("authorization", format!("Bearer {}", gateway.key))
                .header("content-type", "application/json")
                .body(())
                .unwrap();
            let (response, mut send) = client.send_request(request, false).unwrap();
            send.send_data(body.into(), true).unwrap();
            assert_eq!(response.await.unwrap().status(), 200);
        });
    }
}

#[test]
fn a_pair_that_could_not_serve_is_a_mistake_with_its_line() {
    let (made, other) = (certificate(), certificate());
    for (tls, hint) in [
        ("cert = \"cert.pem\"", "needs both `cert` and `key`"),
        ("cert = \"cert.pem\", key = \"nothing.pem\"", "nothing.pem: cannot be read"),
        ("cert = \"key.pem\", key = \"key.pem\"", "`cert` must be a file with certificates"),
        ("cert = \"cert.pem\", key = \"cert.pem\"", "`key` must be a file with a private key"),
        ("cert = \"cert.pem\", key = \"other.pem\"", "do not fit"),
        (
            "cert = \"cert.pem\", key = \"key.pem\", client_ca = \"key.pem\"",
            "`client_ca` must be a file with certificates",
        ),
        ("cert = \"cert.pem\", key = \"key.pem\", ca = \"cert.pem\"", "unknown key `listen.tls.ca`"),
    ] {
        let setup = Setup::shipped();
        write(&setup, &made);
        std::fs::write(setup.path("other.pem"), other.signing_key.serialize_pem()).unwrap();
        setup.replace("gateway.toml", "[listen]", &format!("[listen]\ntls = {{ {tls} }}"));
        let output = setup.run(&["check"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(hint), "{tls}: {hint:?} is not in:\n{said}");
        assert!(!said.contains("PRIVATE KEY"), "{said}");
    }
}
