//! Threads that compress and hash frames; results come back in the order in which the frames were given.
//!
//! They are threads of their own, of a lower priority than everything else: PostgreSQL on the same host, and the WAL that this
//! program stores meanwhile, go first.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};

use super::error::BackupError;
use crate::repository::codec::{Codec, CodecError};
use crate::repository::pack::{CompressedFrame, FRAME_BYTES_MAX, FrameCompressor};

/// What `nice(1)` adds by default.
const NICE: i32 = 10;

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
}

impl Compressors {
    /// # Errors
    /// When the host gives no more threads.
    pub fn start(codec: &Codec, threads: usize) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(threads.max(1));
        let (queue, spare) = (Arc::new(Mutex::new(queue)), Spare::default());
        for _ in 0..threads.max(1) {
            let (codec, queue, spare) = (codec.clone(), queue.clone(), spare.clone());
            let body = move || {
                lower_priority();
                work(&codec, &queue, &spare);
            };
            // Ends with the queue: nobody has to wait for it.
            std::thread::Builder::new().name("backup".to_owned()).spawn(body)?;
        }
        Ok(Compressors { jobs, spare })
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

/// Of this thread alone. It cannot be raised again, and where it must not be lowered the backup only competes more.
fn lower_priority() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "lower the priority of a compressing thread: failed");
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
