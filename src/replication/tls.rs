//! TLS as libpq's `sslmode` understands it, on rustls.
//!
//! A chain is verified when root certificates are there, whatever the mode; `verify-ca` and `verify-full` need them.
//! A server certificate that is byte-equal to a configured root is trusted as it is: many servers carry a self-signed
//! certificate, which libpq accepts as its own root and webpki does not. Revocation lists are not read.
//! Source: `src/interfaces/libpq/fe-secure-openssl.c` (`initialize_SSL`), 14–18.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::conninfo::{ConnectConfig, RootCertificates, SslMode};
use super::x509;

/// How to speak TLS with one host, or why that cannot be set up.
pub(super) fn client_config(config: &ConnectConfig, host: &str) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let checked = matches!(config.sslmode, SslMode::VerifyCa | SslMode::VerifyFull);
    let trust = match (roots(config)?, checked) {
        (Some(roots), _) => Some(Trust {
            name: (config.sslmode == SslMode::VerifyFull).then(|| host.to_owned()),
            ..Trust::new(roots, &provider)
        }),
        (None, false) => None,
        (None, true) => {
            return Err("no root certificate: put one into ~/.postgresql/root.crt, or give sslrootcert a file or the \
                        word system"
                .to_owned());
        }
    };
    let verifier = Arc::new(Verifier { trust, provider: provider.clone() });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let tls = match client_certificate(config)? {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(|e| format!("use sslcert: {e}"))?,
        None => builder.with_no_client_auth(),
    };
    Ok(Arc::new(tls))
}

/// The name for SNI; an address gets none.
pub(super) fn server_name(host: &str) -> ServerName<'static> {
    let unknown = std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::IpAddress(unknown.into()))
}

/// Configured roots; `None` when nothing is configured and nothing lies at the default place.
fn roots(config: &ConnectConfig) -> Result<Option<Vec<CertificateDer<'static>>>, String> {
    let path = match &config.sslrootcert {
        RootCertificates::System => {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                return Err("this host has no root certificates (sslrootcert=system)".to_owned());
            }
            return Ok(Some(found.certs));
        }
        RootCertificates::File(path) => path.clone(),
        RootCertificates::Default => match default_file("root.crt") {
            Some(path) => path,
            None => return Ok(None),
        },
    };
    let read = || CertificateDer::pem_file_iter(&path)?.collect::<Result<Vec<_>, _>>();
    let certificates = read().map_err(|e| format!("read root certificates from {}: {e}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!("{} holds no certificate", path.display()));
    }
    Ok(Some(certificates))
}

fn default_file(name: &str) -> Option<PathBuf> {
    let path = std::env::home_dir()?.join(".postgresql").join(name);
    path.is_file().then_some(path)
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client_certificate(config: &ConnectConfig) -> Result<Option<ClientCertificate>, String> {
    let Some(path) = config.sslcert.clone().or_else(|| default_file("postgresql.crt")) else { return Ok(None) };
    let Some(key_path) = config.sslkey.clone().or_else(|| default_file("postgresql.key")) else {
        return Err(format!("sslcert {} has no sslkey", path.display()));
    };
    check_key_file(&key_path)?;
    let read = || CertificateDer::pem_file_iter(&path)?.collect::<Result<Vec<_>, _>>();
    let chain = read().map_err(|e| format!("read sslcert {}: {e}", path.display()))?;
    let key = PrivateKeyDer::from_pem_file(&key_path);
    let key =
        key.map_err(|e| format!("read sslkey {} (it must be PEM without passphrase): {e}", key_path.display()))?;
    Ok(Some((chain, key)))
}

/// As libpq: ours and private, or root's and at most readable by its group.
fn check_key_file(path: &Path) -> Result<(), String> {
    let meta = fs::metadata(path).map_err(|e| format!("read sslkey {}: {e}", path.display()))?;
    let forbidden = if meta.uid() == 0 && !rustix::process::geteuid().is_root() { 0o037 } else { 0o077 };
    if meta.permissions().mode() & forbidden != 0 {
        return Err(format!("sslkey {} may be read by others (chmod 0600 it)", path.display()));
    }
    Ok(())
}

/// What a server certificate must be.
#[derive(Debug)]
struct Trust {
    /// As configured, for the byte-equal comparison.
    pinned: Vec<CertificateDer<'static>>,
    store: RootCertStore,
    /// For the signatures of a chain.
    algorithms: rustls::crypto::WebPkiSupportedAlgorithms,
    /// The host that the certificate must be for.
    name: Option<String>,
}

impl Trust {
    fn new(roots: Vec<CertificateDer<'static>>, provider: &CryptoProvider) -> Self {
        let mut store = RootCertStore::empty();
        // A self-signed end entity of version 1 is no trust anchor for webpki; it still counts as pinned.
        let _ = store.add_parsable_certificates(roots.iter().cloned());
        let algorithms = provider.signature_verification_algorithms;
        Trust { pinned: roots, store, algorithms, name: None }
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        if !self.pinned.iter().any(|root| root.as_ref() == leaf.as_ref()) {
            let parsed = ParsedCertificate::try_from(leaf)?;
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &self.store,
                chain,
                now,
                self.algorithms.all,
            )?;
        }
        let Some(name) = &self.name else { return Ok(()) };
        let names = x509::Names::decode(leaf).ok_or(CertificateError::BadEncoding)?;
        if names.cover(name) {
            return Ok(());
        }
        let presented = names.into_texts();
        Err(CertificateError::NotValidForNameContext { expected: server_name(name), presented }.into())
    }
}

#[derive(Debug)]
struct Verifier {
    /// `None`: encrypted, but with whomever.
    trust: Option<Trust>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(trust) = &self.trust {
            trust.check(end_entity, intermediates, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
