//! A narrow interface to the object store: put, get, head, list, delete, each bounded in time and retried here.
//!
//! Every attempt has a time limit that grows with the bytes it moves, every operation a limit on attempts. What can
//! only be cured by a person (access denied, no such bucket, a skewed clock) is never retried. Safety never rests on
//! create-only writes: names carry content, so writing one twice is harmless.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use super::layout::Key;
use super::location::Location;
use crate::util::retry::Backoff;
use crate::util::throttle::Throttle;

const CUT: &str = "the answer was cut";
/// What is said of an object that ends before the bytes that were asked for: by us, by the local store, by S3.
const SHORT: [&str; 3] = [CUT, "Requested range was invalid", "InvalidRange"];
/// An answer that was cut on its way is whole the next time.
const ATTEMPTS_SHORT: u32 = 3;
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Objects in a page of a listing; S3 gives no more in one answer.
const PAGE_OBJECTS: usize = 1000;

/// How long and how often an operation may try.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    pub attempts_max: u32,
    /// Limit of one attempt, without the time for its bytes.
    pub attempt_timeout: Duration,
    /// Slowest transfer that is still waited for.
    pub bytes_per_second_min: u64,
}

impl Default for StoreSettings {
    fn default() -> Self {
        StoreSettings { attempts_max: 5, attempt_timeout: Duration::from_secs(10), bytes_per_second_min: 256 << 10 }
    }
}

/// Why an operation on the store did not work.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{0}")]
    Settings(String),
    #[error("{action} {key}: the object does not exist")]
    NotFound { action: &'static str, key: String },
    /// A person must act: credentials, rights, bucket, clock, a header that the store does not take.
    #[error("{action} {key}: the store refuses: {reason}")]
    Refused { action: &'static str, key: String, reason: String, hint: &'static str },
    #[error("{action} {key}: {reason} (after {attempts} attempts)")]
    Unavailable { action: &'static str, key: String, reason: String, attempts: u32 },
    /// It ends before the bytes that were asked for, however often.
    #[error("{action} {key}: the object is too short: {reason}")]
    TooShort { action: &'static str, key: String, reason: String },
    #[error("{action} {key}: the object has {bytes} bytes, more than the {limit} that it may have")]
    TooLarge { action: &'static str, key: String, bytes: u64, limit: u64 },
}

impl StoreError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, StoreError::NotFound { .. })
    }

    /// Whether the same call may work later without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. })
    }

    /// What is stored has not the length that it should have.
    pub fn is_wrong_length(&self) -> bool {
        matches!(self, StoreError::TooShort { .. } | StoreError::TooLarge { .. })
    }

    pub fn hint(&self) -> Option<&'static str> {
        match self {
            StoreError::Refused { hint, .. } => Some(hint),
            _ => None,
        }
    }
}

/// What a listing or a HEAD says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub key: Key,
    pub bytes: u64,
    /// By the store's clock.
    pub last_modified: DateTime<Utc>,
    pub e_tag: Option<String>,
}

/// What the store says of the time, and of what it does with a name that is written again or deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreClock {
    /// By the store's clock, not later than it is now.
    pub now: DateTime<Utc>,
    /// The bucket keeps versions: what is deleted goes on taking space.
    pub keeps_versions: bool,
}

/// One environment's folder in a store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    root: Path,
    settings: StoreSettings,
    place: String,
    checksums: bool,
    /// Objects of a page of a listing; `None` where listings come in no order.
    page_objects: Option<usize>,
    reads: Arc<AtomicU64>,
    errors: Arc<AtomicU64>,
    throttle: Option<Arc<Throttle>>,
}

impl Store {
    /// # Errors
    /// [`StoreError::Settings`] when the location's settings cannot be used. Nothing is sent yet.
    pub fn open(location: &Location, environment: &str, settings: StoreSettings) -> Result<Store, StoreError> {
        let (inner, root) = location.open()?;
        let place = format!("{location}/{environment}");
        let checksums = matches!(location, Location::S3(s3) if s3.checksum);
        let page_objects = matches!(location, Location::S3(_)).then_some(PAGE_OBJECTS);
        let (root, reads) = (root.join(environment), Arc::default());
        let errors = Arc::default();
        Ok(Store { inner, root, settings, place, checksums, page_objects, reads, errors, throttle: None })
    }

    /// Any store, for tests.
    #[cfg(test)]
    pub fn over(inner: Arc<dyn ObjectStore>, settings: StoreSettings, page_objects: usize) -> Store {
        let (root, place, page_objects) = (Path::from("shop"), "a test's store".to_owned(), Some(page_objects));
        let (reads, errors) = (Arc::default(), Arc::default());
        Store { inner, root, settings, place, checksums: false, page_objects, reads, errors, throttle: None }
    }

    /// The same store, for work whose bytes are held to a rate; who has the store itself is not held back.
    pub fn throttled(&self, throttle: Option<Arc<Throttle>>) -> Store {
        Store { throttle, ..self.clone() }
    }

    /// The same store; each attempt that fails is counted there. That an object is not there is an answer, no failure.
    pub fn counting(self, errors: Arc<AtomicU64>) -> Store {
        Store { errors, ..self }
    }

    async fn wait_turn(&self, bytes: u64) {
        if let Some(throttle) = &self.throttle {
            throttle.take(bytes).await;
        }
    }

    /// The location and the environment, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// How many reads were asked for, whole objects and ranges; of all clones together.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Writes an object. Writing the same name again is harmless by the way names are made. Returns the store's tag.
    pub async fn put(&self, key: &Key, bytes: impl Into<PutPayload>) -> Result<Option<String>, StoreError> {
        let (path, payload) = (self.path(key), bytes.into());
        let size = payload.content_length() as u64;
        self.wait_turn(size).await;
        let result = self.attempt("store", key.as_str(), size, || self.inner.put(&path, payload.clone())).await?;
        Ok(result.e_tag)
    }

    /// Writes an object as pieces that are not copied together.
    pub async fn put_pieces(&self, key: &Key, pieces: Vec<Bytes>) -> Result<Option<String>, StoreError> {
        self.put(key, PutPayload::from_iter(pieces)).await
    }

    /// Writes an object that does not exist yet; `false` when it does, also when an attempt of this call made it. Not
    /// every store can do it.
    pub(super) async fn create(&self, key: &Key, bytes: impl Into<PutPayload>) -> Result<bool, StoreError> {
        let (path, payload) = (self.path(key), bytes.into());
        let attempt = || async {
            match self.inner.put_opts(&path, payload.clone(), PutMode::Create.into()).await {
                Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
                result => result.map(|_| true),
            }
        };
        self.attempt("store", key.as_str(), payload.content_length() as u64, attempt).await
    }

    /// Whether writes carry a checksum for the store to compare.
    pub(super) fn sends_checksums(&self) -> bool {
        self.checksums
    }

    /// Reads a whole object of at most `limit` bytes.
    pub async fn get(&self, key: &Key, limit: u64) -> Result<Bytes, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let path = self.path(key);
        let attempt = || async {
            let result = self.inner.get(&path).await?;
            if result.meta.size > limit {
                return Ok(Err(result.meta.size));
            }
            let declared = result.meta.size;
            let bytes = result.bytes().await?;
            if bytes.len() as u64 == declared { Ok(Ok(bytes)) } else { Err(cut(declared, bytes.len())) }
        };
        let read = self.attempt_known("read", key.as_str(), limit.min(64 << 20), attempt).await?;
        match read {
            Ok(bytes) => {
                // Its length was not known before: whoever reads next waits for it.
                self.wait_turn(bytes.len() as u64).await;
                Ok(bytes)
            }
            Err(bytes) => Err(StoreError::TooLarge { action: "read", key: key.as_str().into(), bytes, limit }),
        }
    }

    /// Reads `[start, end)` of an object; fewer bytes than asked for are an error.
    pub async fn get_range(&self, key: &Key, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let path = self.path(key);
        let wanted = range.end.saturating_sub(range.start);
        self.wait_turn(wanted).await;
        let attempt = || async {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
            let bytes = self.inner.get_opts(&path, options).await?.bytes().await?;
            if bytes.len() as u64 == wanted { Ok(bytes) } else { Err(cut(wanted, bytes.len())) }
        };
        self.attempt_known("read", key.as_str(), wanted, attempt).await
    }

    /// Size, time and tag, or `None` when the object does not exist.
    pub async fn head(&self, key: &Key) -> Result<Option<Object>, StoreError> {
        let path = self.path(key);
        match self.attempt("ask for", key.as_str(), 0, || self.inner.head(&path)).await {
            Ok(meta) => Ok(self.object(meta)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Every object below `prefix` (a folder, without a slash at its end), sorted by key.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Object>, StoreError> {
        let path = Path::parse(format!("{}/{prefix}", self.root)).map_err(|e| StoreError::Settings(e.to_string()))?;
        let attempt = || self.inner.list(Some(&path)).try_collect::<Vec<_>>();
        // A listing has no length known beforehand: its limit is that of a large object.
        let listed = self.attempt("list", prefix, 64 << 20, attempt).await?;
        let mut objects: Vec<Object> = listed.into_iter().filter_map(|meta| self.object(meta)).collect();
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    /// Every object below `prefix`, page by page in the order of keys: memory stays flat however many there are. A store whose
    /// listings come in no order (a directory) gives all of them as one page.
    pub fn pages(&self, prefix: &str) -> Result<Pages, StoreError> {
        let path = Path::parse(format!("{}/{prefix}", self.root)).map_err(|e| StoreError::Settings(e.to_string()))?;
        Ok(Pages { store: self.clone(), prefix: prefix.to_owned(), path, after: None, ended: false })
    }

    /// Writes an object and asks for its time.
    pub(super) async fn clock(&self, key: &Key, bytes: &'static [u8]) -> Result<StoreClock, StoreError> {
        let path = self.path(key);
        let written = self.attempt("store", key.as_str(), 0, || self.inner.put(&path, bytes.into())).await?;
        let seen = match self.head(key).await? {
            Some(seen) => seen,
            None => return Err(StoreError::NotFound { action: "ask for", key: key.as_str().to_owned() }),
        };
        // Servers that keep no versions answer with none, or with the word null.
        let keeps_versions = written.version.is_some_and(|version| !version.is_empty() && version != "null");
        Ok(StoreClock { now: seen.last_modified, keeps_versions })
    }

    /// The names of the folders directly below `prefix` (empty for the root).
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let path = Path::parse(format!("{}/{prefix}", self.root)).map_err(|e| StoreError::Settings(e.to_string()))?;
        let listed = self.attempt("list", prefix, 0, || self.inner.list_with_delimiter(Some(&path))).await?;
        Ok(listed.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned)).collect())
    }

    /// Deletes an object; one that is not there counts as deleted.
    pub async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let path = self.path(key);
        match self.attempt("delete", key.as_str(), 0, || self.inner.delete(&path)).await {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }

    fn path(&self, key: &Key) -> Path {
        Path::from_iter(self.root.parts().chain(Path::from(key.as_str()).parts()))
    }

    fn object(&self, meta: ObjectMeta) -> Option<Object> {
        let relative: Vec<_> = meta.location.prefix_match(&self.root)?.collect();
        let name = relative.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/");
        let (bytes, last_modified, e_tag) = (meta.size, meta.last_modified, meta.e_tag);
        Some(Object { key: Key::listed(name), bytes, last_modified, e_tag })
    }

    /// As [`Store::attempt`], of an object that somebody knows of: one that was just written may not be there at once.
    async fn attempt_known<T, F, R>(&self, action: &'static str, key: &str, bytes: u64, run: F) -> Result<T, StoreError>
    where
        F: Fn() -> R,
        R: Future<Output = object_store::Result<T>>,
    {
        match self.attempt(action, key, bytes, &run).await {
            Err(error) if error.is_not_found() => {
                tokio::time::sleep(BACKOFF_MIN).await;
                self.attempt(action, key, bytes, run).await
            }
            result => result,
        }
    }

    async fn attempt<T, F, R>(&self, action: &'static str, key: &str, bytes: u64, run: F) -> Result<T, StoreError>
    where
        F: Fn() -> R,
        R: Future<Output = object_store::Result<T>>,
    {
        let moving = Duration::from_secs(bytes / self.settings.bytes_per_second_min.max(1));
        let limit = self.settings.attempt_timeout + moving;
        let mut backoff = Backoff::new(BACKOFF_MIN, BACKOFF_MAX);
        let mut attempts = 0;
        loop {
            attempts += 1;
            let reason = match tokio::time::timeout(limit, run()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => match classify(action, key, error) {
                    Ok(reason) => reason,
                    Err(missing) if missing.is_not_found() => return Err(missing),
                    Err(fatal) => {
                        self.errors.fetch_add(1, Ordering::Relaxed);
                        return Err(fatal);
                    }
                },
                Err(_) => format!("no answer within {} s", limit.as_secs()),
            };
            self.errors.fetch_add(1, Ordering::Relaxed);
            let short = SHORT.iter().any(|text| reason.contains(text));
            if short && attempts >= ATTEMPTS_SHORT {
                return Err(StoreError::TooShort { action, key: key.to_owned(), reason });
            }
            if attempts >= self.settings.attempts_max {
                return Err(StoreError::Unavailable { action, key: key.to_owned(), reason, attempts });
            }
            tracing::debug!(object = key, attempt = attempts, error = %reason, "store operation will be retried");
            tokio::time::sleep(backoff.delay()).await;
        }
    }
}

/// A listing that is read page by page.
pub struct Pages {
    store: Store,
    prefix: String,
    path: Path,
    after: Option<Path>,
    ended: bool,
}

impl Pages {
    /// The next objects, sorted by key; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Vec<Object>>, StoreError> {
        if self.ended {
            return Ok(None);
        }
        let limit = self.store.page_objects;
        let attempt = || {
            let listing = match &self.after {
                Some(after) => self.store.inner.list_with_offset(Some(&self.path), after),
                None => self.store.inner.list(Some(&self.path)),
            };
            listing.take(limit.unwrap_or(usize::MAX)).try_collect::<Vec<_>>()
        };
        let mut listed = self.store.attempt("list", &self.prefix, 64 << 20, attempt).await?;
        self.ended = limit.is_none_or(|limit| listed.len() < limit);
        let rising = listed.iter().zip(listed.iter().skip(1)).all(|(one, next)| one.location < next.location);
        if !rising && limit.is_some() {
            // A store that sorts otherwise than S3: its pages cannot be told apart.
            let all = || self.store.inner.list(Some(&self.path)).try_collect::<Vec<_>>();
            listed = self.store.attempt("list", &self.prefix, 64 << 20, all).await?;
            listed.retain(|meta| self.after.as_ref().is_none_or(|after| meta.location > *after));
            self.ended = true;
        }
        self.after = listed.last().map(|meta| meta.location.clone()).or(self.after.take());
        let mut objects: Vec<Object> = listed.into_iter().filter_map(|meta| self.store.object(meta)).collect();
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Some(objects))
    }
}

fn cut(declared: u64, got: usize) -> object_store::Error {
    let source = format!("{CUT}: {got} of {declared} bytes").into();
    object_store::Error::Generic { store: "store", source }
}

/// Error codes of S3 that only a person can cure, with what to do.
const REFUSALS: [(&str, &str); 12] = [
    ("NoSuchBucket", "Create the bucket, or correct `repository` in the configuration."),
    ("RequestTimeTooSkewed", "Set this host's clock (NTP): the store refuses requests from another time."),
    ("ExpiredToken", "Renew the credentials: the session token has expired."),
    ("TokenRefreshRequired", "Renew the credentials: the session token has expired."),
    ("InvalidAccessKeyId", "Correct the access key in the configuration: the store does not know it."),
    ("SignatureDoesNotMatch", "Correct the secret key in the configuration: it does not belong to the access key."),
    ("AuthorizationHeaderMalformed", "Correct `region` in the configuration."),
    ("PermanentRedirect", "Correct `region` or `endpoint` in the configuration: the bucket lives elsewhere."),
    ("InvalidBucketName", "Correct the bucket's name in the configuration."),
    ("AccessDenied", "Grant the credentials the right to do this, or use others."),
    ("x-amz-checksum", "Set `checksum = false` for this store: it does not take checksum headers."),
    ("x-amz-sdk-checksum", "Set `checksum = false` for this store: it does not take checksum headers."),
];

/// The reason when another attempt makes sense, else the error.
fn classify(action: &'static str, key: &str, error: object_store::Error) -> Result<String, StoreError> {
    let reason = chain(&error);
    let refusal = REFUSALS.iter().find(|(code, _)| reason.contains(code)).map(|(_, hint)| *hint);
    let denied =
        matches!(error, object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. });
    let key = key.to_owned();
    if let Some(hint) = refusal {
        return Err(StoreError::Refused { action, key, reason, hint });
    }
    if matches!(error, object_store::Error::NotFound { .. }) {
        return Err(StoreError::NotFound { action, key });
    }
    let passing = ["RequestTimeout", "IncompleteBody", "BadDigest"];
    if reason.contains("400 Bad Request") && !passing.iter().any(|code| reason.contains(code)) {
        let hint = "The store does not understand the request; where it does not take checksum headers, set `checksum = false`.";
        return Err(StoreError::Refused { action, key, reason, hint });
    }
    if denied || reason.contains("403 Forbidden") || reason.contains("401 Unauthorized") {
        let hint = "Check the credentials and what they may do with the bucket or directory.";
        return Err(StoreError::Refused { action, key, reason, hint });
    }
    Ok(reason)
}

/// The error with its causes: the innermost one often says the most (a certificate, a host name).
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    without_markup(&text)
}

/// An S3 error document shortened to its code and message, on one line.
fn without_markup(text: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(content, _)| content)
    };
    let begin = text.find("<?xml").or_else(|| text.find("<Error>"));
    let (Some((before, _)), Some(code)) = (begin.and_then(|at| text.split_at_checked(at)), element("Code")) else {
        return text.to_owned();
    };
    match element("Message") {
        Some(message) if !message.is_empty() => format!("{before}{code} ({message})"),
        _ => format!("{before}{code}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_document_is_told_by_its_code_and_message() {
        let check = |text: &str, expected: &str| assert_eq!(without_markup(text), expected, "{text}");
        let body =
            "<?xml version=\"1.0\"?>\n<Error><Code>NoSuchBucket</Code><Message>It is not there</Message></Error>";
        check(&format!("404 Not Found: {body}"), "404 Not Found: NoSuchBucket (It is not there)");
        check("403: <Error><Code>AccessDenied</Code><Message></Message></Error>", "403: AccessDenied");
        check("no answer within 10 s", "no answer within 10 s");
        check("502: <Error><Code>cut", "502: <Error><Code>cut");
    }
}
