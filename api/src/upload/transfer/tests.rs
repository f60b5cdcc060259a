use std::{
    fmt, fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutResult, Result, UploadPart, memory::InMemory,
};

use super::*;
use crate::id;

/// Longer than a part, and not a whole number of them.
const LONG: usize = (20 << 20) + 17;

fn segment(folder: &std::path::Path, bytes: usize) -> (PathBuf, Segment, Vec<u8>) {
    let path = folder.join("a.pcapng");
    let text: Vec<u8> = (0..bytes).map(|at| (at * 7 % 251) as u8).collect();
    fs::write(&path, &text).unwrap();
    let segment = Segment { name: "a.pcapng".into(), size: bytes as u64, ..Segment::default() };
    (path, segment, text)
}

/// A store that counts what becomes of multipart uploads, and whose second part fails if it is told so.
#[derive(Debug, Default)]
struct Counting {
    inner: InMemory,
    fails: bool,
    said: Arc<Mutex<Vec<&'static str>>>,
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counting")
    }
}

#[derive(Debug)]
struct CountingUpload {
    inner: Box<dyn MultipartUpload>,
    fails: bool,
    parts: usize,
    said: Arc<Mutex<Vec<&'static str>>>,
}

#[async_trait::async_trait]
impl MultipartUpload for CountingUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.parts += 1;
        if self.fails && self.parts == 2 {
            let source = "connection reset".into();
            return Box::pin(async { Err(object_store::Error::Generic { store: "x", source }) });
        }
        self.said.lock().unwrap().push("part");
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.said.lock().unwrap().push("complete");
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.said.lock().unwrap().push("abort");
        self.inner.abort().await
    }
}

#[async_trait::async_trait]
impl ObjectStore for Counting {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.said.lock().unwrap().push("put");
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.inner.put_multipart_opts(location, opts).await?;
        let said = Arc::clone(&self.said);
        Ok(Box::new(CountingUpload { inner, fails: self.fails, parts: 0, said }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

struct Sent {
    result: Result<Passed, Failure>,
    said: Vec<&'static str>,
    counted: u64,
    object: Option<Vec<u8>>,
}

fn sent(bytes: usize, fails: bool, quit: bool) -> (Sent, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let (path, segment, text) = segment(folder.path(), bytes);
    let store = Arc::new(Counting { fails, ..Counting::default() });
    let said = Arc::clone(&store.said);
    let bucket = Bucket { store, prefix: Path::from("dir") };
    let counted = AtomicU64::new(0);
    let count = |bytes| {
        counted.fetch_add(bytes, Ordering::Relaxed);
    };
    let (_sender, mut receiver) = watch::channel(quit);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (result, object) = runtime.block_on(async {
        let name = "pcap_1/a.pcapng";
        let result = send(&bucket, name, path, &segment, None, &mut receiver, count).await;
        let object = match bucket.store.get(&Path::from("dir/pcap_1/a.pcapng")).await {
            Ok(found) => Some(found.bytes().await.unwrap().to_vec()),
            Err(_) => None,
        };
        (result, object)
    });
    let said = said.lock().unwrap().clone();
    (Sent { result, said, counted: counted.into_inner(), object }, text)
}

#[test]
fn a_short_segment_is_one_object_and_a_long_one_comes_in_parts() {
    for (bytes, said) in [
        (0, vec!["put"]),
        (1000, vec!["put"]),
        (8 << 20, vec!["put"]),
        (LONG, vec!["part", "part", "part", "complete"]),
    ] {
        let (sent, text) = sent(bytes, false, false);
        assert_eq!(sent.said, said, "{bytes}");
        let sha256 = id::hex(&id::sha256(&text));
        let passed = Passed { taken: bytes as u64, given: bytes as u64, sha256 };
        assert_eq!(sent.result.unwrap(), passed);
        assert_eq!(sent.counted, bytes as u64);
        assert!(sent.object.unwrap() == text);
    }
}

#[test]
fn a_failed_part_completes_nothing() {
    let (sent, _) = sent(LONG, true, false);
    assert!(matches!(sent.result, Err(Failure::Cause(_))));
    assert!(!sent.said.contains(&"complete"), "{:?}", sent.said);
    assert_eq!(sent.said.last(), Some(&"abort"));
    assert_eq!(sent.object, None);
}

#[test]
fn what_is_told_to_quit_aborts() {
    let (sent, _) = sent(LONG, false, true);
    // Either may be seen first, but never half of it.
    if sent.result.is_err() {
        assert_eq!((sent.said.last(), sent.object), (Some(&"abort"), None));
    }
}

#[test]
fn a_segment_that_is_gone_or_cut_short_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let (path, unknown, text) = segment(folder.path(), 1000);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let sha256 = id::hex(&id::sha256(&text));
    assert_eq!(runtime.block_on(hash(path.clone(), &unknown)).unwrap(), sha256);
    let known = Segment { sha256: Some("as it was written".into()), ..unknown.clone() };
    assert_eq!(runtime.block_on(hash(path.clone(), &known)).unwrap(), "as it was written");
    fs::write(&path, "short").unwrap();
    for segment in [&unknown, &known] {
        let Err(Failure::Cause(cause)) = runtime.block_on(hash(path.clone(), segment)) else {
            panic!("it is not what it was")
        };
        assert!(cause.refused && cause.to_string().contains("had 1000"), "{cause}");
    }
    fs::remove_file(&path).unwrap();
    for segment in [&unknown, &known] {
        assert!(matches!(runtime.block_on(hash(path.clone(), segment)), Err(Failure::Gone)));
    }
}
