//! The HTTP client of a collector.

use std::{sync::Arc, time::Duration};

use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

use crate::config::OpenTelemetry;

/// Of a whole exchange.
const LIMIT: Duration = Duration::from_secs(10);

/// Why something was not taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub message: String,
    /// The same may be taken later.
    pub again: bool,
}

pub struct Collector {
    agent: Agent,
    /// Without a slash at its end.
    endpoint: String,
    headers: Vec<(String, String)>,
}

impl Collector {
    /// # Errors
    /// When this machine trusts no authority, and the collector is reached over TLS.
    pub fn new(settings: &OpenTelemetry) -> Result<Self, String> {
        let mut config = Agent::config_builder()
            .timeout_global(Some(LIMIT))
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("form-agent/", env!("CARGO_PKG_VERSION")));
        let endpoint = settings.endpoint.as_str();
        if endpoint.starts_with("https:") {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                return Err("this machine trusts no certificates: install ca-certificates".to_owned());
            }
            let certificates: Vec<_> = found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let tls =
                TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).unversioned_rustls_crypto_provider(provider);
            config = config.tls_config(tls.build());
        }
        let headers = settings.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        Ok(Self { agent: Agent::new_with_config(config.build()), endpoint: endpoint.trim_end_matches('/').to_owned(), headers })
    }

    /// Blocks until it is taken or refused.
    pub fn post(&self, path: &str, body: &[u8]) -> Result<(), Refusal> {
        let url = format!("{}{path}", self.endpoint);
        let mut request = self.agent.post(&url).header("content-type", "application/x-protobuf");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        match request.send(body) {
            Ok(response) if response.status().is_success() => Ok(()),
            // Which statuses may be tried again: OTLP, "Retryable Response Codes".
            Ok(response) => Err(Refusal {
                message: format!("{url} answers {}", response.status()),
                again: matches!(response.status().as_u16(), 429 | 502 | 503 | 504),
            }),
            Err(error) => Err(Refusal { message: format!("{url}: {error}"), again: true }),
        }
    }
}
