//! TLS 1.3 for exports, with X.509 certificates as the NBD clients of others read them from a directory. Each export and each client has an
//! authority of its own, whose key is forgotten as soon as it has signed one certificate; the server lets in the one certificate that it was
//! told of. No private key ever travels.

use std::{fs, io, net::IpAddr, path::Path, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError, RootCertStore, ServerConfig,
    SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

/// The files of a client's directory, as libnbd and QEMU name them.
pub const AUTHORITY_FILE: &str = "ca-cert.pem";
pub const CERTIFICATE_FILE: &str = "client-cert.pem";
pub const KEY_FILE: &str = "client-key.pem";

/// The longest certificate that is read, in bytes of PEM.
pub const MAX_CERTIFICATE: usize = 16 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no certificate could be made")]
    Issue(#[from] rcgen::Error),
    #[error("this is no certificate in PEM")]
    Certificate,
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] TlsError),
    #[error("{path}: {source}")]
    File { path: String, source: io::Error },
}

/// A certificate with its key and the authority that signed it, all in PEM.
#[derive(Clone)]
pub struct Credentials {
    pub authority: String,
    pub certificate: String,
    /// Secret.
    pub key: String,
}

impl Credentials {
    /// Of a server that clients reach at this address.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn for_server(address: IpAddr) -> Result<Self, Error> {
        Self::issue("server", ExtendedKeyUsagePurpose::ServerAuth, vec![SanType::IpAddress(address)])
    }

    /// Of a client.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn for_client() -> Result<Self, Error> {
        Self::issue("client", ExtendedKeyUsagePurpose::ClientAuth, Vec::new())
    }

    fn issue(whose: &str, purpose: ExtendedKeyUsagePurpose, names: Vec<SanType>) -> Result<Self, Error> {
        let named = |name: String| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params
        };
        let mut authority = named(format!("Formation NBD {whose} authority"));
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let signed = authority.self_signed(&authority_key)?;
        let issuer = Issuer::from_params(&authority, &authority_key);
        let mut params = named(format!("Formation NBD {whose}"));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.subject_alt_names = names;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Self { authority: signed.pem(), certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificate(pem: &str) -> Result<CertificateDer<'static>, Error> {
    if pem.len() > MAX_CERTIFICATE {
        return Err(Error::Certificate);
    }
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| Error::Certificate)
}

fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|_| Error::Certificate)
}

/// Whether this is a certificate that a server can be told of.
///
/// # Errors
/// When it is none.
pub fn check_certificate(pem: &str) -> Result<(), Error> {
    let certificate = certificate(pem)?;
    // It reads as one, with a public key in it.
    rustls::server::ParsedCertificate::try_from(&certificate).map(drop).map_err(|_| Error::Certificate)
}

/// A server that shows `own` and lets in who has the key of `client` (a certificate in PEM), and nobody else.
///
/// # Errors
/// When one of them is no certificate.
pub fn server(own: &Credentials, client: &str) -> Result<Arc<ServerConfig>, Error> {
    check_certificate(client)?;
    let verifier = OnlyOne { client: certificate(client)?, provider: provider() };
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![certificate(&own.certificate)?], key(own.key.as_bytes())?)?;
    Ok(Arc::new(config))
}

/// A client that knows the authorities of `directory` ([`AUTHORITY_FILE`]) and shows its certificate, when there is one.
///
/// # Errors
/// When a file cannot be read, or is not what its name says.
pub fn client(directory: &Path) -> Result<Arc<ClientConfig>, Error> {
    let read = |name: &str| {
        let path = directory.join(name);
        fs::read(&path).map_err(|source| Error::File { path: path.display().to_string(), source })
    };
    let bad = |name: &str| Error::File { path: directory.join(name).display().to_string(), source: io::ErrorKind::InvalidData.into() };
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(&read(AUTHORITY_FILE)?) {
        roots.add(authority.map_err(|_| bad(AUTHORITY_FILE))?).map_err(|_| bad(AUTHORITY_FILE))?;
    }
    let config =
        ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?.with_root_certificates(roots);
    let own = directory.join(CERTIFICATE_FILE).exists();
    let config = if own {
        let chain =
            CertificateDer::pem_slice_iter(&read(CERTIFICATE_FILE)?).collect::<Result<_, _>>().map_err(|_| bad(CERTIFICATE_FILE))?;
        config.with_client_auth_cert(chain, key(&read(KEY_FILE)?).map_err(|_| bad(KEY_FILE))?)?
    } else {
        config.with_no_client_auth()
    };
    Ok(Arc::new(config))
}

/// Lets in one certificate. Who signed it does not matter, nor until when: that its key is there does.
#[derive(Debug)]
struct OnlyOne {
    client: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for OnlyOne {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        if *end_entity == self.client {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
