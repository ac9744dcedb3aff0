//! A store in memory with a clock of its own, whose every request waits for its turn.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::Notify;

use crate::pg::SegmentSize;
use crate::repository::layout::{self, Key, WalName, WalRange};
use crate::repository::store::{Store, StoreSettings};

/// Objects of a page of a listing: few, so that every listing has several.
pub const PAGE: usize = 8;

/// What is to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done.
    Error,
    /// It is done, and an error is told.
    ErrorAfter,
    /// The store refuses, and says so.
    Refused,
    /// An object or a listing ends too early; what changes something fails as with [`Fault::Error`].
    Cut,
    /// No answer ever; what changes something is done some requests later.
    Hang,
    /// It is done and said, and done once more some requests later.
    Twice,
    /// Whoever asked is dead before the answer.
    Crash,
}

/// Requests until what is late lands.
const LATE: u64 = 3;

/// A request that changes something.
#[derive(Debug, Clone)]
pub enum Change {
    Put(Path, Bytes),
    Delete(Path),
}

#[derive(Debug, Default)]
pub struct State {
    pub objects: BTreeMap<Path, (Bytes, DateTime<Utc>)>,
    pub now: DateTime<Utc>,
    pub calls: u64,
    /// Requests to come to which something happens, by their number.
    pub faults: BTreeMap<u64, Fault>,
    /// Deletes of these keys are refused.
    pub locked: Option<fn(&str) -> bool>,
    /// The change that waits for its turn now.
    pub waiting: Option<Change>,
    pub at_gate: bool,
    pub crashed: bool,
    /// Whether anybody waits for a turn at all.
    pub gated: bool,
    /// Told once when somebody is dead.
    pub death: Arc<Notify>,
    /// Requests to come that take long, by their number.
    pub delays: BTreeMap<u64, Duration>,
    /// Changes that land with a request to come.
    late: BTreeMap<u64, Change>,
}

/// The store; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct SimStore(Arc<Mutex<State>>);

impl std::fmt::Display for SimStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a store in memory")
    }
}

impl State {
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Put(path, bytes) => drop(self.objects.insert(path, (bytes, self.now))),
            Change::Delete(path) => drop(self.objects.remove(&path)),
        }
    }

    /// A request comes in: its number, and what happens to it.
    fn count(&mut self) -> Option<Fault> {
        self.waiting = None;
        self.calls += 1;
        let to_come = self.late.split_off(&(self.calls + 1));
        for (_, change) in std::mem::replace(&mut self.late, to_come) {
            self.apply(change);
        }
        self.faults.remove(&self.calls)
    }

    fn meta(&self, path: &Path) -> Option<ObjectMeta> {
        let (bytes, at) = self.objects.get(path)?;
        let (location, last_modified, size) = (path.clone(), *at, bytes.len() as u64);
        Some(ObjectMeta { location, last_modified, size, e_tag: None, version: None })
    }

    fn page(&self, prefix: Option<&Path>, after: Option<&Path>) -> Vec<ObjectMeta> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = self.objects.range::<Path, _>((from, Bound::Unbounded));
        let below = range.filter(|(path, _)| prefix.is_none_or(|prefix| path.prefix_matches(prefix)));
        below.take(PAGE).filter_map(|(path, _)| self.meta(path)).collect()
    }
}

fn failed() -> Error {
    Error::Generic { store: "sim", source: "503 Slow Down".into() }
}

fn refused(path: &Path) -> Error {
    Error::PermissionDenied { path: path.to_string(), source: "403 Forbidden: AccessDenied".into() }
}

/// One thread, and a clock that jumps to the next timer when there is nothing to do. What blocks is done on `threads` others:
/// with a single one always in the same order.
pub fn jumping_clock(threads: usize) -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).max_blocking_threads(threads).build().expect("a runtime")
}

impl SimStore {
    /// One environment's folder in it. An operation is tried twice.
    pub fn open(&self) -> Store {
        let settings = StoreSettings { attempts_max: 2, ..StoreSettings::default() };
        Store::over(Arc::new(self.clone()), settings, PAGE)
    }

    /// Does `work` until it ends or its process is dead; `None` then. Time passes as soon as there is nothing to do.
    pub fn process<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.process_on(jumping_clock(8), work)
    }

    /// As [`SimStore::process`], in this runtime: of what it had begun nothing goes on afterwards.
    pub fn process_on<T>(&self, runtime: tokio::runtime::Runtime, work: impl Future<Output = T>) -> Option<T> {
        let death = self.state().death.clone();
        let ended = runtime.block_on(async {
            tokio::select! {
                biased;
                () = death.notified() => None,
                ended = work => Some(ended),
            }
        });
        drop(runtime);
        let mut state = self.state();
        state.crashed = false;
        state.faults.clear();
        ended
    }

    /// From now on the `call`th request has this fault, and with `for_good` all later ones.
    pub fn fail(&self, call: u64, fault: Fault, for_good: bool) {
        let mut state = self.state();
        let first = state.calls + call;
        let last = if for_good { first + 10_000 } else { first };
        state.faults = (first..=last).map(|call| (call, fault)).collect();
    }

    /// The ranges of WAL that are stored now.
    pub fn wal(&self, size: SegmentSize) -> Vec<WalRange> {
        let state = self.state();
        let keys = state.objects.keys().filter_map(|path| path.as_ref().strip_prefix("shop/"));
        let names = keys.filter(|key| key.contains("/wal/")).map(|key| Key::listed(key.to_owned()));
        let range = |key| match layout::parse_wal(&key, size) {
            Some(WalName::Range(range)) => Some(range),
            _ => None,
        };
        names.filter_map(range).collect()
    }

    /// What is stored, without the times.
    pub fn contents(&self) -> BTreeMap<Path, Bytes> {
        self.state().objects.iter().map(|(path, (bytes, _))| (path.clone(), bytes.clone())).collect()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds this")
    }

    /// Waits for the turn, then says what happens to the request.
    async fn turn(&self, change: Option<Change>) -> Option<Fault> {
        let mut passed = !self.state().gated;
        std::future::poll_fn(|context| {
            if passed {
                return Poll::Ready(());
            }
            passed = true;
            let mut state = self.state();
            state.at_gate = true;
            state.waiting.clone_from(&change);
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        let (call, fault, delay) = {
            let mut state = self.state();
            let fault = state.count();
            let call = state.calls;
            (call, fault, state.delays.remove(&call))
        };
        if let Some(delay) = delay.filter(|_| fault != Some(Fault::Crash)) {
            tokio::time::sleep(delay).await;
        }
        let ends = match fault {
            // Whoever is dead asks for nothing any more.
            _ if self.state().crashed => true,
            Some(Fault::Crash) => {
                self.die(change.filter(|_| call.is_multiple_of(2)));
                true
            }
            Some(Fault::Hang) => {
                self.state().late.extend(change.map(|change| (call + LATE, change)));
                true
            }
            Some(Fault::Twice) => {
                self.state().late.extend(change.map(|change| (call + LATE, change)));
                false
            }
            _ => false,
        };
        if ends {
            std::future::pending::<()>().await;
        }
        fault
    }

    fn die(&self, last: Option<Change>) {
        let mut state = self.state();
        if let Some(change) = last {
            state.apply(change);
        }
        state.crashed = true;
        state.death.notify_one();
    }

    async fn change(&self, path: &Path, change: Change) -> Result<()> {
        let locked =
            matches!(change, Change::Delete(_)) && self.state().locked.is_some_and(|locked| locked(path.as_ref()));
        match self.turn(Some(change.clone())).await {
            _ if locked => Err(refused(path)),
            Some(Fault::Error | Fault::Cut) => Err(failed()),
            Some(Fault::Refused) => Err(refused(path)),
            Some(Fault::ErrorAfter) => {
                self.state().apply(change);
                Err(failed())
            }
            _ => {
                self.state().apply(change);
                Ok(())
            }
        }
    }

    /// Whether the answer is cut.
    async fn read(&self, path: &Path) -> Result<bool> {
        match self.turn(None).await {
            Some(Fault::Error | Fault::ErrorAfter) => Err(failed()),
            Some(Fault::Refused) => Err(refused(path)),
            fault => Ok(fault == Some(Fault::Cut)),
        }
    }

    fn list_from(&self, prefix: Option<&Path>, after: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned());
        let pages = futures::stream::unfold(Some(after), move |after| {
            let (store, prefix) = (store.clone(), prefix.clone());
            async move {
                let after = after?;
                let cut = match store.read(&prefix.clone().unwrap_or_default()).await {
                    Ok(cut) => cut,
                    Err(error) => return Some((vec![Err(error)], None)),
                };
                let page = store.state().page(prefix.as_ref(), after.as_ref());
                if cut {
                    let half = page.len() / 2;
                    let seen = page.into_iter().take(half).map(Ok);
                    return Some((seen.chain([Err(failed())]).collect(), None));
                }
                let next = (page.len() == PAGE).then(|| page.last().map(|meta| meta.location.clone()));
                Some((page.into_iter().map(Ok).collect::<Vec<_>>(), next))
            }
        });
        pages.flat_map(futures::stream::iter).boxed()
    }
}

#[async_trait]
impl ObjectStore for SimStore {
    async fn put_opts(&self, path: &Path, payload: PutPayload, _: PutOptions) -> Result<PutResult> {
        self.change(path, Change::Put(path.clone(), payload.into())).await?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(failed())
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let cut = self.read(path).await?;
        let state = self.state();
        let missing = || Error::NotFound { path: path.to_string(), source: "no such key".into() };
        let meta = state.meta(path).ok_or_else(missing)?;
        let (bytes, _) = state.objects.get(path).ok_or_else(missing)?;
        let range = match options.range {
            Some(range) => {
                range.as_range(meta.size).map_err(|source| Error::Generic { store: "sim", source: source.into() })?
            }
            None => 0..meta.size,
        };
        let at = |offset: u64| usize::try_from(offset).expect("small");
        let end = if cut { range.start.midpoint(range.end) } else { range.end };
        let data = bytes.slice(at(range.start)..at(end));
        let payload = GetResultPayload::Stream(futures::stream::once(futures::future::ready(Ok(data))).boxed());
        Ok(GetResult { payload, meta, range, attributes: Default::default(), extensions: Default::default() })
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        paths
            .then(move |path| {
                let store = store.clone();
                async move {
                    let path = path?;
                    store.change(&path, Change::Delete(path.clone())).await.map(|()| path)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_from(prefix, None)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_from(prefix, Some(offset.clone()))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        if self.read(&prefix.cloned().unwrap_or_default()).await? {
            return Err(failed());
        }
        let state = self.state();
        let depth = prefix.map_or(0, |prefix| prefix.parts().count());
        let below = state.objects.keys().filter(|path| prefix.is_none_or(|prefix| path.prefix_matches(prefix)));
        let folders = below.filter(|path| path.parts().count() > depth + 1);
        let mut common_prefixes: Vec<Path> = folders.map(|path| path.parts().take(depth + 1).collect()).collect();
        common_prefixes.dedup();
        Ok(ListResult { common_prefixes, objects: Vec::new(), extensions: Default::default() })
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(failed())
    }
}
