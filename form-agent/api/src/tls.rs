//! TLS 1.3 with raw Ed25519 public keys on both sides (RFC 7250): no certificates, no authorities. The server takes any key and tells the
//! router which one it was; the client takes exactly the key it knows.

use std::sync::{Arc, Mutex, PoisonError};

use form_types::{PublicKey, SecretKey, Signature};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};

/// What comes before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What comes before the 32 bytes of an Ed25519 secret in a PKCS#8 v1 structure (RFC 8410, section 7).
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the key cannot be used for TLS")]
    Key(#[source] Error),
    #[error("TLS 1.3 cannot be set up")]
    Setup(#[source] Error),
    #[error("TLS has no cipher suite that QUIC can begin with")]
    Suite(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

fn spki(key: &PublicKey) -> Vec<u8> {
    [SPKI_PREFIX.as_slice(), key.as_bytes()].concat()
}

/// The key in a SubjectPublicKeyInfo, when it is an Ed25519 one.
pub(crate) fn key_of(end_entity: &CertificateDer<'_>) -> Option<PublicKey> {
    let raw: [u8; 32] = end_entity.as_ref().strip_prefix(&SPKI_PREFIX)?.try_into().ok()?;
    PublicKey::from_bytes(raw).ok()
}

fn certified(key: &SecretKey) -> Result<Arc<CertifiedKey>, TlsError> {
    let pkcs8 = PrivatePkcs8KeyDer::from([PKCS8_PREFIX.as_slice(), &key.to_bytes()].concat());
    let signing = rustls::crypto::ring::sign::any_eddsa_type(&pkcs8).map_err(TlsError::Key)?;
    Ok(Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki(&key.public()))], signing)))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Checks the handshake's signature strictly, as every other signature of ours.
fn verify_handshake(
    message: &[u8],
    end_entity: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let signature = <[u8; 64]>::try_from(signed.signature()).map_err(|_| bad_signature())?;
    let key = key_of(end_entity).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
    if signed.scheme == SignatureScheme::ED25519 && key.verify(message, &Signature::from_bytes(signature)) {
        Ok(HandshakeSignatureValid::assertion())
    } else {
        Err(bad_signature())
    }
}

fn bad_signature() -> Error {
    Error::InvalidCertificate(CertificateError::BadSignature)
}

/// TLS 1.2 is never offered: QUIC has none.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
}

/// Any Ed25519 key may connect: what it may do is the router's business.
#[derive(Debug)]
struct AnyClientKey;

impl ClientCertVerifier for AnyClientKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match key_of(end_entity) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_handshake(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the host shows another key than the one that is known")]
struct AnotherKey;

/// The key that a host showed instead of the expected one, kept for the error message.
#[derive(Clone, Debug, Default)]
pub struct SeenKey(Arc<Mutex<Option<PublicKey>>>);

impl SeenKey {
    pub fn take(&self) -> Option<PublicKey> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[derive(Debug)]
struct PinnedHostKey {
    expected: PublicKey,
    seen: SeenKey,
}

impl ServerCertVerifier for PinnedHostKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match key_of(end_entity) {
            Some(key) if key == self.expected => Ok(ServerCertVerified::assertion()),
            Some(key) => {
                *self.seen.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(key);
                Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(AnotherKey)))))
            }
            None => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_handshake(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The server's side: shows `key`, asks for a key, takes any.
///
/// # Errors
/// When the TLS library refuses the key or the set-up.
pub fn server(key: &SecretKey, alpn: &[&[u8]]) -> Result<quinn::crypto::rustls::QuicServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .with_client_cert_verifier(Arc::new(AnyClientKey))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(key)?)));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    // Both keys are checked on every connection; a resumed session would skip that.
    config.send_tls13_tickets = 0;
    Ok(config.try_into()?)
}

/// The client's side: shows `identity`, takes `host` and nobody else.
///
/// # Errors
/// When the TLS library refuses the key or the set-up.
pub fn client(identity: &SecretKey, host: PublicKey, alpn: &[u8]) -> Result<(quinn::crypto::rustls::QuicClientConfig, SeenKey), TlsError> {
    let seen = SeenKey::default();
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedHostKey { expected: host, seen: seen.clone() }))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(identity)?)));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok((config.try_into()?, seen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_spki_form() {
        let key = SecretKey::from_bytes([5; 32]).public();
        let encoded = spki(&key);
        assert_eq!(encoded.len(), 44);
        assert_eq!(key_of(&CertificateDer::from(encoded.clone())), Some(key));
        assert_eq!(key_of(&CertificateDer::from(encoded[1..].to_vec())), None);
        assert_eq!(key_of(&CertificateDer::from([encoded, vec![0]].concat())), None);
    }
}
