//! A store in memory with a clock of its own, whose every request waits for its turn.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

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
    /// Whoever asked is dead before the answer.
    Crash,
}

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

impl SimStore {
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
        let fault = {
            let mut state = self.state();
            state.waiting = None;
            state.calls += 1;
            let call = state.calls;
            state.faults.remove(&call)
        };
        if fault == Some(Fault::Crash) {
            if let Some(change) = change.filter(|_| self.state().calls.is_multiple_of(2)) {
                self.state().apply(change);
            }
            self.state().crashed = true;
            std::future::pending::<()>().await;
        }
        fault
    }

    async fn change(&self, path: &Path, change: Change) -> Result<()> {
        let locked =
            matches!(change, Change::Delete(_)) && self.state().locked.is_some_and(|locked| locked(path.as_ref()));
        match self.turn(Some(change.clone())).await {
            _ if locked => Err(refused(path)),
            Some(Fault::Error) => Err(failed()),
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

    async fn read(&self) -> Result<()> {
        match self.turn(None).await {
            Some(Fault::Error | Fault::ErrorAfter | Fault::Refused) => Err(failed()),
            _ => Ok(()),
        }
    }

    fn list_from(&self, prefix: Option<&Path>, after: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned());
        let pages = futures::stream::unfold(Some(after), move |after| {
            let (store, prefix) = (store.clone(), prefix.clone());
            async move {
                let after = after?;
                if let Err(error) = store.read().await {
                    return Some((vec![Err(error)], None));
                }
                let page = store.state().page(prefix.as_ref(), after.as_ref());
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
        self.read().await?;
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
        let data = bytes.slice(at(range.start)..at(range.end));
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
        self.read().await?;
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
