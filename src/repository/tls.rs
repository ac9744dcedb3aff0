//! TLS to a store whose certificates come from a file.
//!
//! Beside the certificate authorities of the host, those of the file are trusted. A server certificate that is itself in
//! the file is trusted as it is, when it names the host: stores of one's own often carry a self-signed certificate, which
//! curl and OpenSSL take as its own authority and webpki refuses ("CA used as end entity").

use std::path::Path;
use std::sync::Arc;

use object_store::client::{HttpClient, HttpConnector};
use object_store::{ClientOptions, Error};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::location::{CONNECT_TIMEOUT, READ_TIMEOUT};

/// Makes HTTP clients that trust the certificates of a file.
#[derive(Debug)]
pub(super) struct Connector {
    client: HttpClient,
}

impl Connector {
    /// # Errors
    /// When the file cannot be read or holds no certificate; the text names the file.
    pub(super) fn new(ca_file: &Path, allow_http: bool) -> Result<Connector, String> {
        let read = || CertificateDer::pem_file_iter(ca_file)?.collect::<Result<Vec<_>, _>>();
        let pinned = read().map_err(|e| format!("read certificates from {}: {e}", ca_file.display()))?;
        if pinned.is_empty() {
            return Err(format!("{} holds no certificate in PEM form", ca_file.display()));
        }
        let tls = client_config(pinned).map_err(|e| format!("use the certificates of {}: {e}", ca_file.display()))?;
        let client = reqwest::Client::builder()
            .user_agent(concat!("pgrecall/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .https_only(!allow_http)
            .tls_backend_preconfigured(tls)
            .build()
            .map_err(|e| e.to_string())?;
        Ok(Connector { client: HttpClient::new(client) })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> Result<HttpClient, Error> {
        Ok(self.client.clone())
    }
}

fn client_config(pinned: Vec<CertificateDer<'static>>) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots.add_parsable_certificates(pinned.iter().cloned());
    let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let authorities = authorities.build().map_err(|e| e.to_string())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { pinned, authorities }));
    Ok(builder.with_no_client_auth())
}

#[derive(Debug)]
struct Verifier {
    pinned: Vec<CertificateDer<'static>>,
    authorities: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.pinned.iter().any(|pinned| pinned.as_ref() == end_entity.as_ref()) {
            rustls::client::verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            return Ok(ServerCertVerified::assertion());
        }
        self.authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.authorities.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.authorities.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authorities.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    /// As `openssl req -x509` makes one: its own authority, and marked as such.
    fn self_signed() -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["store.example".to_owned()]).expect("a name");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").der().clone()
    }

    #[test]
    fn a_self_signed_certificate_of_the_file_is_trusted_for_its_own_name_only() {
        let (own, stranger) = (self_signed(), self_signed());
        let mut roots = RootCertStore::empty();
        roots.add(own.clone()).expect("a root");
        let provider = Arc::new(aws_lc_rs::default_provider());
        let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
        let verifier = Verifier { pinned: vec![own.clone()], authorities: authorities.expect("a verifier") };
        let check = |certificate: &CertificateDer<'_>, name: &'static str| {
            let name = ServerName::try_from(name).expect("a host name");
            verifier.verify_server_cert(certificate, &[], &name, &[], UnixTime::now()).map(drop)
        };
        assert_eq!(check(&own, "store.example"), Ok(()));
        assert!(check(&own, "other.example").is_err());
        assert!(check(&stranger, "store.example").is_err());
    }
}
