//! `taplined` at work on an end of a veth pair, and a plain HTTP client for it.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    netns::Namespace,
    process::{built, checked, folders, wait_until},
    store::faketime,
    veth::End,
};

/// The account of the tests.
pub const ACCOUNT: &str = "023e105f4ecef8ad9ca31a8372d0c353";

/// An account that the tests' tokens are not for.
pub const OTHER_ACCOUNT: &str = "00000000000000000000000000000001";

/// The URL that clients are given.
pub const BASE_URL: &str = "http://127.0.0.1:8700/client/v4";

/// Every namespace has a loopback of its own.
const ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 8700);

/// Longer than any step takes, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// The path of `taplined`: what `TAPLINED_BIN` names, or built now, as the tests were.
pub fn taplined_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| built("TAPLINED_BIN", "api", "taplined"))
}

/// Where tests keep what they have fetched.
pub fn cache(name: &str) -> PathBuf {
    folders().0.join("test-cache").join(name)
}

/// A running `taplined`; killed when dropped, with its data folder.
#[derive(Debug)]
pub struct Daemon<'a> {
    namespace: &'a Namespace,
    folder: TempDir,
    child: Option<Child>,
    /// A token that may write.
    pub token: String,
}

impl<'a> Daemon<'a> {
    /// Starts a daemon on an end of a veth pair. `top` is put at the top of its configuration, `more`
    /// at the end.
    pub fn start(end: &End<'a>, top: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let config = format!(
            "data_dir = \"{path}/data\"\ncolo = \"ord02\"\nhost = \"test\"\n{top}\n\
             [[interfaces]]\nname = \"{}\"\n{more}\n",
            end.name
        );
        fs::write(folder.path().join("taplined.toml"), config).unwrap();
        let mut daemon =
            Self { namespace: end.namespace, folder, child: None, token: String::new() };
        daemon.token = daemon.new_token(ACCOUNT, "write");
        daemon.restart();
        daemon
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("taplined.toml")
    }

    /// Where it keeps everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where its captures go.
    pub fn captures(&self) -> PathBuf {
        self.folder.path().join("data/captures")
    }

    /// The `destination_conf` of that folder.
    pub fn destination(&self) -> String {
        format!("file://{}", self.captures().display())
    }

    /// Makes a token as an operator does.
    pub fn new_token(&self, account: &str, permission: &str) -> String {
        let mut command = Command::new(taplined_path());
        command.args(["token", "new", "--account", account, "--permission", permission]);
        let output = checked(command.arg("--config").arg(self.config()));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Starts it again, and waits until it answers.
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_until_ready();
    }

    /// Starts it again with a wall clock that runs ahead, by as much as libfaketime is told: `+2h`.
    pub fn restart_ahead(&mut self, ahead: &str) {
        self.spawn_as(&faketime(ahead));
        self.wait_until_ready();
    }

    /// Starts it again with these variables in its environment.
    pub fn restart_with(&mut self, variables: &[(&str, &str)]) {
        let pairs = variables.iter().map(|(name, value)| format!("{name}={value}"));
        let wrapper: Vec<_> = ["env".to_owned()].into_iter().chain(pairs).collect();
        self.spawn_as(&wrapper);
        self.wait_until_ready();
    }

    /// Starts it again.
    pub fn spawn(&mut self) {
        self.spawn_as(&[]);
    }

    fn spawn_as(&mut self, wrapper: &[String]) {
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let config = self.config();
        let daemon = [taplined_path().as_os_str(), "--config".as_ref(), config.as_os_str()];
        let mut line = wrapper.iter().map(OsStr::new).chain(daemon);
        let mut command = self.namespace.command(line.next().unwrap(), line);
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until it answers.
    pub fn wait_until_ready(&mut self) {
        let start = Instant::now();
        loop {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "taplined ended: {ended:?}\n{}", self.log());
            if self.connect().is_ok_and(|_stream| true) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "taplined does not answer\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.as_ref().unwrap().id().cast_signed())
    }

    /// Kills it as the kernel does when memory is short.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Tells it to stop and waits until it has.
    pub fn stop(&mut self) -> ExitStatus {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        let mut child = self.child.take().unwrap();
        let mut status = None;
        wait_until("taplined to stop", PATIENCE, || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// How many requests it has logged, of all that it has answered.
    pub fn requests(&self) -> usize {
        self.log().matches("\"message\":\"request\"").count()
    }

    /// A connection to it.
    pub fn connect(&self) -> std::io::Result<TcpStream> {
        self.namespace.enter(|| {
            let stream = TcpStream::connect(SocketAddr::from(ADDRESS))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
    }

    /// A client with the token that may write.
    pub fn client(&self) -> Client {
        Client::new(self.connect().unwrap(), &self.token)
    }

    /// A command in its namespace.
    pub fn command(&self, program: impl AsRef<OsStr>, args: &[&str]) -> Command {
        self.namespace.command(program, args)
    }

    /// The body of a full capture, with some fields of its own.
    pub fn full(&self, more: &Value) -> Value {
        let mut body = json!({
            "type": "full",
            "system": "magic-transit",
            "colo_name": "ord02",
            "time_limit": 300,
            "destination_conf": self.destination(),
        });
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        body
    }

    /// The files of a capture, but for its manifest.
    pub fn files(&self, id: &str) -> Vec<PathBuf> {
        let folder = self.captures().join(format!("pcap_{id}"));
        let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| !file.ends_with("manifest.json"));
        files.sort();
        files
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(12).collect();
            eprintln!("taplined said, last line first:\n{}", tail.join("\n"));
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Its body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The result of a request that must have succeeded.
    pub fn result(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        let json = self.json();
        assert_eq!(json["success"], true, "{json}");
        json["result"].clone()
    }

    /// The codes of a refusal.
    pub fn codes(&self) -> Vec<u64> {
        let json = self.json();
        assert_eq!((&json["success"], &json["result"]), (&json!(false), &Value::Null), "{json}");
        json["errors"].as_array().unwrap().iter().map(|e| e["code"].as_u64().unwrap()).collect()
    }
}

/// A connection that is kept open between requests.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
    account: &'static str,
    token: String,
}

impl Client {
    /// A client on this connection.
    pub fn new(stream: TcpStream, token: &str) -> Self {
        Self { stream: BufReader::new(stream), account: ACCOUNT, token: token.to_owned() }
    }

    /// The same for another account than [`ACCOUNT`].
    #[must_use]
    pub fn of(self, account: &'static str) -> Self {
        Self { account, ..self }
    }

    /// Sends a request to a path behind `/client/v4/accounts/…/pcaps`.
    pub fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let path = format!("/client/v4/accounts/{}/pcaps{path}", self.account);
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.token,
            body.len()
        );
        self.raw(head.as_bytes()).expect("an answer")
    }

    /// Creates a capture.
    pub fn create(&mut self, body: &Value) -> Value {
        self.call("POST", "", Some(body)).result()
    }

    /// A capture.
    pub fn get(&mut self, id: &str) -> Value {
        self.call("GET", &format!("/{id}"), None).result()
    }

    /// Stops a capture.
    pub fn stop(&mut self, id: &str) {
        assert_eq!(self.call("PUT", &format!("/{id}/stop"), None).status, 204);
    }

    /// Waits until a capture has ended.
    pub fn wait(&mut self, id: &str) -> Value {
        let start = Instant::now();
        loop {
            let capture = self.get(id);
            if capture["status"] == "success" || capture["status"] == "failed" {
                return capture;
            }
            assert!(start.elapsed() < PATIENCE, "{capture} does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends bytes and reads one answer; `None` if the connection is closed without one.
    pub fn raw(&mut self, bytes: &[u8]) -> Option<Answer> {
        // One that is refused early is answered and closed before all of it was sent.
        let _ = self.stream.get_mut().write_all(bytes);
        self.answer(bytes.starts_with(b"HEAD "))
    }

    /// Reads an answer.
    pub fn answer(&mut self, head_only: bool) -> Option<Answer> {
        let mut line = String::new();
        self.stream.read_line(&mut line).ok().filter(|length| *length > 0)?;
        let status: u16 = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).ok()?;
            let line = line.trim_end();
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut answer = Answer { status, headers, body: Vec::new() };
        let length = answer.header("content-length").and_then(|length| length.parse().ok());
        if !head_only && status != 204 {
            answer.body = vec![0; length.unwrap_or(0)];
            self.stream.read_exact(&mut answer.body).ok()?;
        }
        Some(answer)
    }
}
