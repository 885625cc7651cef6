//! What our own HTTP clients go out through: TLS with ring, passed and never the process's default, which another part of
//! the program may want to set.

use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;

pub type Connector = HttpsConnector<HttpConnector>;

/// Connects to `to` and its like; the system's certificates are only looked for where TLS needs them.
///
/// # Errors
/// When TLS is needed and this machine has no root certificates.
pub fn connector(to: &Uri, connect_max: Duration) -> Result<Connector, String> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect_max));
    let tls = tls(to.scheme_str() == Some("https"))?;
    Ok(HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(connector))
}

pub fn tls(wanted: bool) -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    if wanted {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err("no root certificates were found; install ca-certificates or set SSL_CERT_FILE".into());
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// An error with what brought it about: hyper's own words are only "client error (Connect)".
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        said = format!("{said}: {cause}");
        source = cause.source();
    }
    said
}
