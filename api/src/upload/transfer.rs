//! One attempt to send one segment.

use std::{collections::VecDeque, path::PathBuf, time::Duration};

use object_store::{MultipartUpload, ObjectStoreExt as _, PutPayload, path::Path};
use tokio::{sync::watch, task::JoinSet};

use super::{
    is_gone,
    parts::{Compression, Parts, Passed, part_bytes},
};
use crate::{
    destination::{Bucket, Cause},
    record::Segment,
};

/// Parts of one segment on their way at once: one is read while another one is sent.
const AT_ONCE: usize = 2;

/// For a multipart upload to be aborted; what is not is left to the bucket's own rules.
const ABORT: Duration = Duration::from_secs(2);

/// Why an attempt came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The segment is not on this host any more.
    Gone,
    /// Anything else.
    Cause(Cause),
}

impl From<Cause> for Failure {
    fn from(cause: Cause) -> Self {
        Self::Cause(cause)
    }
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        Self::Cause(Cause::of(&error))
    }
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) if is_gone(&error) => Err(Failure::Gone),
        Ok(Err(error)) => Err(Cause::own(format!("the file on this host: {error}")).into()),
        Err(error) => Err(Cause::own(format!("reading has ended: {error}")).into()),
    }
}

/// The parts of a segment that is as long as it was when it was sealed.
async fn open(
    path: PathBuf,
    segment: &Segment,
    compression: Option<Compression>,
) -> Result<Parts, Failure> {
    let size = segment.size;
    let parts = blocking(move || Parts::open(&path, part_bytes(size), compression)).await?;
    let found = parts.size();
    if found != size {
        let text = format!("the file on this host has {found} bytes, and had {size}");
        return Err(Cause::lasting(text).into());
    }
    Ok(parts)
}

/// SHA-256 of a segment that stays where it is. It is read only if it was not hashed as it was written.
pub(super) async fn hash(path: PathBuf, segment: &Segment) -> Result<String, Failure> {
    let mut parts = open(path, segment, None).await?;
    if let Some(known) = &segment.sha256 {
        return Ok(known.clone());
    }
    blocking(move || {
        while parts.next()?.is_some() {}
        Ok(parts.passed().sha256)
    })
    .await
}

/// Puts a segment into a bucket, as a whole or, if it is a long one, in parts. Gives up when `quit`
/// turns true. `sent` is told of bytes that were taken.
pub(super) async fn send(
    bucket: &Bucket,
    name: &str,
    path: PathBuf,
    segment: &Segment,
    compression: Option<Compression>,
    quit: &mut watch::Receiver<bool>,
    sent: impl Fn(u64),
) -> Result<Passed, Failure> {
    let to = bucket.path(name);
    let mut source = Source(Some(open(path, segment, compression).await?));
    let first = source.next().await?.unwrap_or_default();
    let Some(second) = source.next().await? else {
        let bytes = first.len() as u64;
        put(bucket, &to, first.into(), quit).await?;
        sent(bytes);
        return source.passed();
    };
    let mut upload = bucket.store.put_multipart(&to).await?;
    let first_two = VecDeque::from([first, second]);
    let result = tokio::select! {
        result = in_parts(&mut *upload, first_two, &mut source, sent) => result,
        () = turned(quit) => Err(stopped().into()),
    };
    if result.is_err() {
        // Whether it works or not, what has failed has failed.
        drop(tokio::time::timeout(ABORT, upload.abort()).await);
    }
    result
}

/// Puts an object into a bucket.
pub(super) async fn put(
    bucket: &Bucket,
    to: &Path,
    payload: PutPayload,
    quit: &mut watch::Receiver<bool>,
) -> Result<(), Failure> {
    tokio::select! {
        result = bucket.store.put(to, payload) => Ok(result.map(drop)?),
        () = turned(quit) => Err(stopped().into()),
    }
}

/// Waits until it turns true.
pub(super) async fn turned(signal: &mut watch::Receiver<bool>) {
    // The sender lives as long as those who wait.
    drop(signal.wait_for(|signal| *signal).await);
}

fn stopped() -> Cause {
    Cause::own("it was stopped")
}

async fn in_parts(
    upload: &mut dyn MultipartUpload,
    mut ready: VecDeque<Vec<u8>>,
    source: &mut Source,
    sent: impl Fn(u64),
) -> Result<Passed, Failure> {
    // What is in here is called off when an error leaves this function.
    let mut sending: JoinSet<object_store::Result<u64>> = JoinSet::new();
    loop {
        while sending.len() < AT_ONCE
            && let Some(part) = ready.pop_front()
        {
            let bytes = part.len() as u64;
            let put = upload.put_part(part.into());
            sending.spawn(async move { put.await.map(|()| bytes) });
            if ready.is_empty() {
                ready.extend(source.next().await?);
            }
        }
        match sending.join_next().await {
            Some(Ok(taken)) => sent(taken?),
            Some(Err(error)) => return Err(Cause::own(format!("a part: {error}")).into()),
            None => break,
        }
    }
    // Every part has been confirmed.
    upload.complete().await?;
    source.passed()
}

/// Parts, read on threads that may block.
struct Source(Option<Parts>);

impl Source {
    async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let Some(mut parts) = self.0.take() else { return Ok(None) };
        let (parts, part) = blocking(move || {
            let part = parts.next()?;
            Ok((parts, part))
        })
        .await?;
        self.0 = Some(parts);
        Ok(part)
    }

    fn passed(&mut self) -> Result<Passed, Failure> {
        let parts = self.0.take().ok_or(Cause::own("reading has ended"))?;
        Ok(parts.passed())
    }
}

#[cfg(test)]
mod tests;
