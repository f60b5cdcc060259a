//! Object stores that are not ours, on the loopback of a namespace: what a test has put there is read
//! back past the API that it was put through.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{fetch, netns::Namespace};

/// What is in a bucket: names and contents.
pub type Objects = BTreeMap<String, Vec<u8>>;

/// The name of the key that [`S3Fs`] knows.
pub const ACCESS_KEY: &str = "TAPLINETESTS00000001";

/// The key itself, with characters that encodings change.
pub const SECRET_KEY: &str = "aVery+secret/Key=thatNobody%mayEver&see1";

/// Longer than a server of Python's takes to start, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_mins(1);

/// A signature that a server which checks none wants to see.
const UNCHECKED: &str = "authorization: AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, \
                         SignedHeaders=host, Signature=0";

/// A program that listens on the loopback of a namespace; killed when dropped.
#[derive(Debug)]
struct Server<'a> {
    namespace: &'a Namespace,
    port: u16,
    log: PathBuf,
    child: Option<Child>,
}

impl Server<'_> {
    /// Starts it and waits until it listens.
    fn start(&mut self, mut command: Command) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let start = Instant::now();
        while !self.listens() {
            let ended = child.try_wait().unwrap();
            let said = || fs::read_to_string(&self.log).unwrap();
            assert!(ended.is_none(), "{command:?} ended: {ended:?}\n{}", said());
            assert!(start.elapsed() < PATIENCE, "{command:?} does not listen\n{}", said());
            thread::sleep(Duration::from_millis(20));
        }
        self.child = Some(child);
    }

    fn listens(&self) -> bool {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        self.namespace.enter(|| TcpStream::connect(address).is_ok())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `s3s-fs`: an S3 server over a folder, which checks signatures and the time in them.
#[derive(Debug)]
pub struct S3Fs<'a> {
    server: Server<'a>,
    folder: TempDir,
}

impl<'a> S3Fs<'a> {
    /// Whether there is the program.
    pub fn available() -> Result<(), String> {
        fetch::s3s_fs().map(drop)
    }

    /// Starts one on a port, with an empty bucket of each name.
    pub fn start(namespace: &'a Namespace, port: u16, buckets: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for bucket in buckets {
            fs::create_dir_all(folder.path().join("store").join(bucket)).unwrap();
        }
        let server = Server { namespace, port, log: folder.path().join("log"), child: None };
        let mut store = Self { server, folder };
        store.restart();
        store
    }

    /// Starts it again, with what it had.
    pub fn restart(&mut self) {
        self.restart_as(&[]);
    }

    /// Starts it again in a process that sees a wall clock which runs ahead, by as much as libfaketime
    /// is told: `+2h`.
    pub fn restart_ahead(&mut self, ahead: &str) {
        self.restart_as(&faketime(ahead));
    }

    fn restart_as(&mut self, wrapper: &[String]) {
        self.kill();
        let port = self.server.port.to_string();
        let program = fetch::s3s_fs().unwrap().into_os_string().into_string().unwrap();
        let root = self.root().into_os_string().into_string().unwrap();
        let arguments = [&program, "--host", "127.0.0.1", "--port", &port].map(str::to_owned);
        let keys = ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY].map(str::to_owned);
        let line = [wrapper, &arguments, &keys, &[root]].concat();
        let command = self.server.namespace.command(&line[0], &line[1..]);
        self.server.start(command);
    }

    /// Kills it: who connects is refused.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Stops it where it stands: who connects waits.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let child = self.server.child.as_ref().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    }

    /// Its folder.
    fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The folder of a bucket.
    pub fn bucket(&self, bucket: &str) -> PathBuf {
        self.root().join(bucket)
    }

    /// All that is in a bucket.
    pub fn objects(&self, bucket: &str) -> Objects {
        objects_in(&self.bucket(bucket))
    }

    /// Multipart uploads that were begun and have neither been completed nor aborted.
    pub fn unfinished(&self) -> usize {
        let entries = fs::read_dir(self.root()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".upload-")).count()
    }
}

/// `moto`: Amazon's answers, out of memory; it checks no signatures.
#[derive(Debug)]
pub struct Moto<'a> {
    server: Server<'a>,
    _folder: TempDir,
}

impl<'a> Moto<'a> {
    /// Whether there is the program.
    pub fn available() -> Result<(), String> {
        Self::python().map(drop)
    }

    /// A Python that has it, and Amazon's own client.
    pub fn python() -> Result<PathBuf, String> {
        fetch::python("moto", &["moto[server]==5.2.5"])
    }

    /// Starts one on a port, with an empty bucket of each name.
    pub fn start(namespace: &'a Namespace, port: u16, buckets: &[&str]) -> Self {
        let program = Self::python().unwrap().with_file_name("moto_server");
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server { namespace, port, log: folder.path().join("log"), child: None };
        let arguments = ["-H", "127.0.0.1", "-p", &port.to_string()];
        server.start(namespace.command(program, arguments));
        let moto = Self { server, _folder: folder };
        for bucket in buckets {
            moto.make(bucket);
        }
        moto
    }

    /// Makes a bucket.
    pub fn make(&self, bucket: &str) {
        self.call("PUT", bucket);
    }

    /// Deletes a bucket with all that is in it.
    pub fn delete(&self, bucket: &str) {
        for name in self.objects(bucket).keys() {
            self.call("DELETE", &format!("{bucket}/{name}"));
        }
        self.call("DELETE", bucket);
    }

    /// All that is in a bucket.
    pub fn objects(&self, bucket: &str) -> Objects {
        let listed = self.call("GET", &format!("{bucket}?list-type=2"));
        let listed = String::from_utf8(listed).unwrap();
        assert!(listed.contains("<IsTruncated>false"), "{listed}");
        let get = |key: &str| self.call("GET", &format!("{bucket}/{key}"));
        elements(&listed, "Key").into_iter().map(|key| (key.to_owned(), get(key))).collect()
    }

    /// Multipart uploads that were begun and have neither been completed nor aborted.
    pub fn unfinished(&self, bucket: &str) -> usize {
        let listed = String::from_utf8(self.call("GET", &format!("{bucket}?uploads"))).unwrap();
        elements(&listed, "UploadId").len()
    }

    fn call(&self, method: &str, path: &str) -> Vec<u8> {
        let url = format!("http://127.0.0.1:{}/{path}", self.server.port);
        let line = ["curl", "--silent", "--show-error", "--fail", "--request", method];
        let header = ["--header", UNCHECKED, &url];
        self.server.namespace.run(&[&line[..], &header].concat()).stdout
    }
}

/// The texts of the elements of a name, in XML without attributes.
fn elements<'a>(xml: &'a str, name: &str) -> Vec<&'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    xml.split(&open).skip(1).map(|rest| rest.split(&close).next().unwrap()).collect()
}

/// All files below a folder, by their paths from there.
pub fn objects_in(folder: &Path) -> Objects {
    let mut objects = Objects::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let path = entry.path();
            let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
            objects.insert(name, fs::read(path).unwrap());
        }
    }
    objects
}

/// What makes a process see a wall clock that runs ahead, put in front of its command line. Its other
/// clocks run as they do.
pub fn faketime(ahead: &str) -> [String; 4] {
    [
        "env".to_owned(),
        // The loader puts the folder of this machine's libraries in.
        "LD_PRELOAD=/usr/$LIB/faketime/libfaketime.so.1".to_owned(),
        format!("FAKETIME={ahead}"),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
    ]
}
