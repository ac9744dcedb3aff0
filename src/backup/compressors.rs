//! Threads that compress and hash frames; results come back in the order in which the frames were given.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::error::BackupError;
use crate::repository::codec::{Codec, CodecError};
use crate::repository::pack::{CompressedFrame, FRAME_BYTES_MAX, FrameCompressor};

struct Job {
    plain: Vec<u8>,
    reply: oneshot::Sender<Result<CompressedFrame, CodecError>>,
}

/// Plain buffers that were used and may be used again.
type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

/// A frame that is being compressed.
pub struct Pending(oneshot::Receiver<Result<CompressedFrame, CodecError>>);

/// The threads end when this is dropped and their present frames are done.
pub struct Compressors {
    jobs: mpsc::Sender<Job>,
    spare: Spare,
    _workers: JoinSet<()>,
}

impl Compressors {
    pub fn start(codec: &Codec, threads: usize) -> Self {
        let (jobs, queue) = mpsc::channel(threads.max(1));
        let (queue, spare) = (Arc::new(Mutex::new(queue)), Spare::default());
        let mut workers = JoinSet::new();
        for _ in 0..threads.max(1) {
            let (codec, queue, spare) = (codec.clone(), queue.clone(), spare.clone());
            workers.spawn_blocking(move || work(&codec, &queue, &spare));
        }
        Compressors { jobs, spare, _workers: workers }
    }

    /// An empty buffer for a frame.
    pub fn buffer(&self) -> Vec<u8> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| Vec::with_capacity(FRAME_BYTES_MAX))
    }

    /// Waits for a place in the queue.
    pub async fn compress(&self, plain: Vec<u8>) -> Result<Pending, BackupError> {
        let (reply, pending) = oneshot::channel();
        self.jobs.send(Job { plain, reply }).await.map_err(|_| BackupError::Cancelled)?;
        Ok(Pending(pending))
    }
}

impl Pending {
    pub async fn done(self) -> Result<CompressedFrame, BackupError> {
        self.0.await.map_err(|_| BackupError::Cancelled)?.map_err(BackupError::Compress)
    }
}

fn work(codec: &Codec, queue: &Mutex<mpsc::Receiver<Job>>, spare: &Spare) {
    let mut compressor = FrameCompressor::new(codec);
    loop {
        // Whoever holds the lock waits for the next frame, the others wait for the lock.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Job { mut plain, reply }) = job else { return };
        if reply.is_closed() {
            continue;
        }
        let frame = match &mut compressor {
            Ok(compressor) => compressor.make(&plain),
            Err(error) => Err(error.clone()),
        };
        let _ = reply.send(frame);
        plain.clear();
        spare.lock().unwrap_or_else(PoisonError::into_inner).push(plain);
    }
}
