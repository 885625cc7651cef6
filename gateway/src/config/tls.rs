//! `listen.tls` of `gateway.toml`: certificates, read and held against their key before anybody is served with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, WebPkiClientVerifier};

use super::reader::{At, Section};

/// What ALPN offers.
const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// `read` reads a file that is then watched: a certificate that is renewed counts like any other change.
pub(super) fn tls(
    listen: &Section<'_, '_>,
    http2: bool,
    folder: &Path,
    read: &mut impl FnMut(PathBuf) -> String,
) -> Option<Arc<ServerConfig>> {
    let section = listen.section("tls")?;
    let mut file =
        |key: &str| section.string(key).map(|name| At { value: read(folder.join(&name.value)), at: name.at });
    let (cert, key, client_ca) = (file("cert"), file("key"), file("client_ca"));
    let built = match (&cert, &key) {
        (Some(cert), Some(key)) => {
            build(&cert.value, &key.value, client_ca.as_ref().map(|ca| ca.value.as_str()), http2)
                .map_err(|why| section.problem_at(cert.at, format!("`listen.tls`: {why}")))
                .ok()
        }
        _ => {
            section.problem("`listen.tls` needs both `cert` and `key`");
            None
        }
    };
    section.finish();
    built.map(Arc::new)
}

fn build(cert: &str, key: &str, client_ca: Option<&str>, http2: bool) -> Result<ServerConfig, String> {
    let chain = certificates(cert).ok_or("`cert` must be a file with certificates in PEM, our own first")?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
    let key = key.map_err(|_| "`key` must be a file with a private key in PEM")?;
    // Passed and never the process's default, which another part of the program may want to set.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add_parsable_certificates(certificates(ca).unwrap_or_default());
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(
                verifier
                    .map_err(|_| "`client_ca` must be a file with certificates in PEM, which sign those of clients")?,
            )
        }
    };
    let mut config =
        builder.with_single_cert(chain, key).map_err(|error| format!("`cert` and `key` do not fit: {error}"))?;
    config.alpn_protocols = if http2 { vec![HTTP2.to_vec(), HTTP1.to_vec()] } else { vec![HTTP1.to_vec()] };
    // Clients come back without a whole handshake; what the tickets are sealed with changes every few hours.
    config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(|error| error.to_string())?;
    Ok(config)
}

fn certificates(pem: &str) -> Option<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    found.ok().filter(|chain| !chain.is_empty())
}
