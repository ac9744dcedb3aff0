//! `postgresql://user:password@host:port,host:port/database?key=value`, after the scheme.

use super::conninfo::{ConninfoError, Pairs};

/// # Errors
/// When the text has no such form; the message quotes neither user nor password.
pub(super) fn pairs(rest: &str) -> Result<Pairs, ConninfoError> {
    let mut pairs = Pairs::default();
    let (main, query) = rest.split_once('?').unwrap_or((rest, ""));
    // A password may hold "/" only as %2F, as in libpq.
    let (authority, database) = main.split_once('/').unwrap_or((main, ""));
    let (login, hosts) = match authority.rsplit_once('@') {
        Some((login, hosts)) => (login, hosts),
        None => ("", authority),
    };
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let mut push = |key: &str, text: &str| -> Result<(), ConninfoError> {
        if !text.is_empty() {
            let value = decode(text).ok_or_else(|| ConninfoError::one(format!("{key}: wrong percent-encoding")))?;
            pairs.0.push((key.to_owned(), value));
        }
        Ok(())
    };
    push("user", user)?;
    push("password", password)?;
    push("dbname", database)?;
    if !hosts.is_empty() {
        let split: Option<Vec<(&str, &str)>> = hosts.split(',').map(host_and_port).collect();
        let split = split.ok_or_else(|| ConninfoError::one("host: wrong brackets around an IPv6 address"))?;
        let names: Vec<&str> = split.iter().map(|(host, _)| *host).collect();
        push("host", &names.join(","))?;
        if split.iter().any(|(_, port)| !port.is_empty()) {
            let ports: Vec<&str> = split.iter().map(|(_, port)| *port).collect();
            push("port", &ports.join(","))?;
        }
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = decode(key).ok_or_else(|| ConninfoError::one("a key has wrong percent-encoding"))?;
        let value = decode(value).ok_or_else(|| ConninfoError::one(format!("{key}: wrong percent-encoding")))?;
        pairs.0.push((key, value));
    }
    Ok(pairs)
}

fn host_and_port(text: &str) -> Option<(&str, &str)> {
    let Some(bracketed) = text.strip_prefix('[') else {
        return Some(text.split_once(':').unwrap_or((text, "")));
    };
    let (address, after) = bracketed.split_once(']')?;
    match after.strip_prefix(':') {
        Some(port) => Some((address, port)),
        None => after.is_empty().then_some((address, "")),
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let value = digit(rest.next()?)? << 4 | digit(rest.next()?)?;
        // A zero byte would end the text on its way to the server.
        bytes.push(Some(value).filter(|v| *v != 0)?);
    }
    String::from_utf8(bytes).ok()
}
