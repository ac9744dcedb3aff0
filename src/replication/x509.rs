//! The few facts of a certificate that libpq looks at: its names, and the hash that binds SCRAM to it.
//!
//! Source: RFC 5280, RFC 5929 §4.1; `src/interfaces/libpq/fe-secure-common.c`
//! (`pq_verify_peer_name_matches_certificate`), `fe-secure-openssl.c` (`pgtls_get_peer_certificate_hash`), 14–18.

use std::net::IpAddr;

use aws_lc_rs::digest::{self, Algorithm};

const SEQUENCE: u8 = 0x30;
const OCTETS: u8 = 0x04;
const OID: u8 = 0x06;

const OID_RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01];
const OID_ECDSA: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04];
const OID_SHA2: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02];
const OID_SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1D, 0x11];
const OID_COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The names that a certificate claims.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) dns: Vec<String>,
    pub(super) ip: Vec<IpAddr>,
    pub(super) common: Option<String>,
}

impl Names {
    /// `None` when the bytes are no certificate.
    pub(super) fn decode(certificate: &[u8]) -> Option<Names> {
        let mut names = Names::default();
        let (tbs, _) = expect(SEQUENCE, expect(SEQUENCE, certificate)?.0)?;
        let (tag, _, after) = element(tbs)?;
        // version [0] is optional, then serial number, signature, issuer, validity.
        let mut rest = if tag == 0xA0 { after } else { tbs };
        for _ in 0..4 {
            rest = element(rest)?.2;
        }
        let (subject, rest) = expect(SEQUENCE, rest)?;
        names.common = common_name(subject);
        let extensions = elements(rest).find(|(tag, _)| *tag == 0xA3);
        if let Some((_, extensions)) = extensions {
            for (_, extension) in elements(expect(SEQUENCE, extensions)?.0) {
                let (oid, rest) = expect(OID, extension)?;
                if oid == OID_SUBJECT_ALT_NAME {
                    names.read_alternatives(rest)?;
                }
            }
        }
        Some(names)
    }

    fn read_alternatives(&mut self, extension: &[u8]) -> Option<()> {
        let (_, value) = elements(extension).find(|(tag, _)| *tag == OCTETS)?;
        for (tag, name) in elements(expect(SEQUENCE, value)?.0) {
            match tag {
                // A zero byte inside a name is a forgery attempt; `from_utf8` lets it pass, the comparison does not.
                0x82 => self.dns.extend(std::str::from_utf8(name).ok().map(str::to_owned)),
                0x87 => {
                    let four = <[u8; 4]>::try_from(name).map(IpAddr::from);
                    self.ip.extend(four.or_else(|_| <[u8; 16]>::try_from(name).map(IpAddr::from)).ok());
                }
                _ => {}
            }
        }
        Some(())
    }

    /// For a message: the names that count.
    pub(super) fn into_texts(self) -> Vec<String> {
        let mut texts = self.dns;
        texts.extend(self.ip.iter().map(IpAddr::to_string));
        if texts.is_empty() {
            texts.extend(self.common);
        }
        texts
    }

    /// Whether the certificate is for `host`. The common name counts only when there is no alternative name.
    pub(super) fn cover(&self, host: &str) -> bool {
        let address = host.parse::<IpAddr>().ok();
        if address.is_some_and(|address| self.ip.contains(&address)) {
            return true;
        }
        if !self.dns.is_empty() || !self.ip.is_empty() {
            return self.dns.iter().any(|name| name_matches(name, host));
        }
        self.common.as_deref().is_some_and(|name| name_matches(name, host))
    }
}

/// Equal without regard to case, or `*.rest` for exactly one more label.
fn name_matches(pattern: &str, host: &str) -> bool {
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let (Some(tail), Some((first, host_tail))) = (pattern.strip_prefix("*."), host.split_once('.')) else {
        return false;
    };
    !first.is_empty() && !tail.is_empty() && tail.eq_ignore_ascii_case(host_tail) && host.parse::<IpAddr>().is_err()
}

fn common_name(subject: &[u8]) -> Option<String> {
    let mut found = None;
    for (_, set) in elements(subject) {
        for (_, attribute) in elements(set) {
            let (oid, rest) = expect(OID, attribute)?;
            if oid == OID_COMMON_NAME {
                found = element(rest).and_then(|(_, text, _)| std::str::from_utf8(text).ok()).map(str::to_owned);
            }
        }
    }
    found
}

/// The certificate's hash for `tls-server-end-point`; `None` when its signature has no hash (Ed25519).
pub(super) fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let (inner, _) = expect(SEQUENCE, certificate)?;
    let (_, rest) = expect(SEQUENCE, inner)?;
    let (algorithm, _) = expect(SEQUENCE, rest)?;
    let algorithm = signature_hash(algorithm)?;
    Some(digest::digest(algorithm, certificate).as_ref().to_vec())
}

/// MD5 and SHA-1 are replaced by SHA-256, as the RFC says.
fn signature_hash(identifier: &[u8]) -> Option<&'static Algorithm> {
    let (oid, parameters) = expect(OID, identifier)?;
    if let Some([last]) = oid.strip_prefix(OID_RSA) {
        return match last {
            4 | 5 | 11 => Some(&digest::SHA256),
            12 => Some(&digest::SHA384),
            13 => Some(&digest::SHA512),
            14 => Some(&digest::SHA224),
            10 => pss_hash(parameters),
            _ => None,
        };
    }
    match oid.strip_prefix(OID_ECDSA)? {
        [1] | [3, 2] => Some(&digest::SHA256),
        [3, 1] => Some(&digest::SHA224),
        [3, 3] => Some(&digest::SHA384),
        [3, 4] => Some(&digest::SHA512),
        _ => None,
    }
}

fn pss_hash(parameters: &[u8]) -> Option<&'static Algorithm> {
    let (parameters, _) = expect(SEQUENCE, parameters)?;
    let Some((_, hash)) = elements(parameters).find(|(tag, _)| *tag == 0xA0) else {
        // The default is SHA-1.
        return Some(&digest::SHA256);
    };
    let (oid, _) = expect(OID, expect(SEQUENCE, hash)?.0)?;
    match oid.strip_prefix(OID_SHA2) {
        Some([1]) => Some(&digest::SHA256),
        Some([2]) => Some(&digest::SHA384),
        Some([3]) => Some(&digest::SHA512),
        Some([4]) => Some(&digest::SHA224),
        Some(_) => None,
        None => Some(&digest::SHA256),
    }
}

/// Tag, content and what follows.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7F => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7F))?;
            (digits.iter().fold(0usize, |sum, digit| sum << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
}

fn expect(wanted: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (tag, content, after) = element(bytes)?;
    (tag == wanted).then_some((content, after))
}

fn elements(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (tag, content, after) = element(bytes)?;
        bytes = after;
        Some((tag, content))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(alternatives: &[&str], common: &str) -> Vec<u8> {
        let names: Vec<String> = alternatives.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, common);
        let key = KeyPair::generate().expect("key");
        params.self_signed(&key).expect("certificate").der().to_vec()
    }

    #[test]
    fn names_of_a_certificate() {
        let der = certificate(&["db.example.org", "*.pg.example.org", "10.1.2.3", "::1"], "other");
        let names = Names::decode(&der).expect("a certificate");
        assert_eq!(names.common.as_deref(), Some("other"));
        for good in ["db.example.org", "DB.Example.org", "a.pg.example.org", "10.1.2.3", "::1"] {
            assert!(names.cover(good), "{good}");
        }
        for bad in ["other", "pg.example.org", "a.b.pg.example.org", "10.1.2.4", "example.org"] {
            assert!(!names.cover(bad), "{bad}");
        }
    }

    #[test]
    fn the_common_name_counts_when_it_is_alone() {
        let names = Names::decode(&certificate(&[], "db")).expect("a certificate");
        assert!(names.cover("db") && !names.cover("d"));
    }

    #[test]
    fn an_ecdsa_certificate_is_bound_by_its_sha256() {
        let der = certificate(&["db"], "db");
        assert_eq!(end_point_hash(&der), Some(digest::digest(&digest::SHA256, &der).as_ref().to_vec()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_names_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Names::decode(&bytes);
            let _ = end_point_hash(&bytes);
        }

        #[test]
        fn a_damaged_certificate_does_no_harm(at in 0usize..300, value in any::<u8>()) {
            let mut der = certificate(&["db.example.org"], "x");
            let length = der.len();
            der[at % length] = value;
            let _ = Names::decode(&der);
            let _ = end_point_hash(&der);
        }
    }
}
