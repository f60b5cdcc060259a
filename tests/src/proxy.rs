//! A proxy in front of a store, which does to requests what networks and stores do to them.
//!
//! - It listens on the loopback of a namespace, and asks a rule what to do about each request.
//! - Each request has a connection of its own on both sides, so that ending one harms no other.
//! - Headers go through as they are, but for `connection` and `expect`: signatures stay what they were.
//! - It remembers every request and what the store said to it.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    libc,
    sys::socket::{self, setsockopt, sockopt},
};

use crate::netns::Namespace;

/// Bytes that go on at once.
const CHUNK: usize = 16 << 10;

/// Longest head of a request.
const HEAD: usize = 64 << 10;

/// What is asked of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The path as it was sent, without the query.
    pub path: String,
    /// The query, or nothing.
    pub query: String,
    /// Headers, names in small letters.
    pub headers: Vec<(String, String)>,
}

impl Request {
    fn parse(head: &str) -> Self {
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (method, target) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        Self { method: method.into(), path: path.into(), query: query.into(), headers }
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The length of its body, bytes.
    pub fn length(&self) -> u64 {
        self.header("content-length").map_or(0, |length| length.parse().unwrap())
    }

    /// A whole object, or a part of one: what has its bytes.
    pub fn is_upload(&self) -> bool {
        self.method == "PUT"
    }

    /// A part of a multipart upload.
    pub fn is_part(&self) -> bool {
        self.is_upload() && self.query.contains("partNumber=")
    }

    /// The end of a multipart upload.
    pub fn is_completion(&self) -> bool {
        self.method == "POST" && self.query.contains("uploadId=")
    }
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// The store gets it, and answers.
    Pass,
    /// The store gets it no faster than all others that are slow: bytes per second.
    Slow(u64),
    /// The connections are reset when the store has had this much of the body, bytes.
    Reset(u64),
    /// The store gets it, and its answer is lost.
    Lose,
    /// The store does not get it; this is the answer: status, and more lines of the head.
    Answer(u16, String),
}

impl Act {
    /// An answer as S3 has them.
    pub fn refuse(status: u16) -> Self {
        Self::Answer(status, String::new())
    }
}

/// A request, and what the store said to it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What was asked.
    pub request: Request,
    /// What was done about it.
    pub act: Act,
    /// The status of the answer that was given; none, if none was.
    pub status: Option<u16>,
    /// How many bytes of the body the store was given.
    pub passed: u64,
}

type Rule = Box<dyn Fn(&Request) -> Act + Send + Sync>;

struct State {
    port: u16,
    rule: Mutex<Rule>,
    seen: Mutex<Vec<Seen>>,
    /// When the next chunk may go to a slow store.
    next: Mutex<Instant>,
    closing: AtomicBool,
}

/// A proxy; gone when dropped.
pub struct Proxy {
    listener: TcpListener,
    state: Arc<State>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Listens on a port, in front of the store at another one.
    pub fn start(namespace: &Namespace, port: u16, store: u16) -> Self {
        let state = Arc::new(State {
            port: store,
            rule: Mutex::new(Box::new(|_| Act::Pass)),
            seen: Mutex::default(),
            next: Mutex::new(Instant::now()),
            closing: AtomicBool::new(false),
        });
        let listener = namespace.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
        let (accepting, shared) = (listener.try_clone().unwrap(), Arc::clone(&state));
        // What it connects to is in the namespace, too, as are the threads that it starts.
        namespace.spawn_inside(move || {
            while let Ok((stream, _)) = accepting.accept() {
                if shared.closing.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&shared);
                // One whose connection is gone has been told enough.
                thread::spawn(move || drop(shared.serve(stream)));
            }
        });
        Self { listener, state }
    }

    /// What to do about each request from now on.
    pub fn rule(&self, rule: impl Fn(&Request) -> Act + Send + Sync + 'static) {
        *lock(&self.state.rule) = Box::new(rule);
    }

    /// Every request so far that has ended, in the order of their ends.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state.seen).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.closing.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for a connection.
        let _ = socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.listener),
            socket::Shutdown::Both,
        );
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a connection so that the other end is told that it broke.
fn reset(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // One that is closed already needs no reset.
    let _ = setsockopt(&stream.as_fd(), sockopt::Linger, &linger);
}

impl State {
    fn serve(&self, mut client: TcpStream) -> std::io::Result<()> {
        let Some((head, mut body)) = read_head(&mut client)? else { return Ok(()) };
        let request = Request::parse(&head);
        let act = (lock(&self.rule))(&request);
        if request.header("expect").is_some() {
            client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut seen = Seen { request, act, status: None, passed: 0 };
        let result = self.act(&mut client, &head, &mut body, &mut seen);
        if seen.status.is_none() {
            reset(&client);
        }
        lock(&self.seen).push(seen);
        result
    }

    fn act(
        &self,
        client: &mut TcpStream,
        head: &str,
        begun: &mut Vec<u8>,
        seen: &mut Seen,
    ) -> std::io::Result<()> {
        let length = seen.request.length();
        if let Act::Answer(status, lines) = &seen.act {
            let text = format!(
                "HTTP/1.1 {status} X\r\n{lines}content-length: 0\r\nconnection: close\r\n\r\n"
            );
            drain(client, length.saturating_sub(begun.len() as u64))?;
            client.write_all(text.as_bytes())?;
            seen.status = Some(*status);
            return client.shutdown(Shutdown::Write);
        }

        let mut store = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        store.write_all(closing(head).as_bytes())?;
        let end = match seen.act {
            Act::Reset(after) => after.min(length),
            _ => length,
        };
        let mut chunk = vec![0; CHUNK];
        while seen.passed < end {
            let most = CHUNK.min((end - seen.passed) as usize);
            let count = if begun.is_empty() {
                client.read(&mut chunk[..most])?
            } else {
                let count = most.min(begun.len());
                chunk[..count].copy_from_slice(&begun[..count]);
                begun.drain(..count);
                count
            };
            if count == 0 {
                reset(&store);
                return Ok(());
            }
            if let Act::Slow(rate) = seen.act {
                self.wait(count as u64, rate);
            }
            if store.write_all(&chunk[..count]).is_err() {
                // It has answered before it has read all.
                drain(client, length - seen.passed - (count + begun.len()) as u64)?;
                break;
            }
            seen.passed += count as u64;
        }
        if matches!(seen.act, Act::Reset(_)) {
            reset(&store);
            return Ok(());
        }
        let mut answer = Vec::new();
        // What came before an error is there.
        let read = store.read_to_end(&mut answer);
        if answer.is_empty() {
            return read.map(drop);
        }
        if matches!(seen.act, Act::Lose) {
            return Ok(());
        }
        let status = String::from_utf8_lossy(&answer[..answer.len().min(16)]);
        let status = status.split(' ').nth(1).and_then(|status| status.parse().ok());
        client.write_all(&answer)?;
        seen.status = status;
        client.shutdown(Shutdown::Write)
    }

    /// Waits until bytes may go to a slow store.
    fn wait(&self, bytes: u64, rate: u64) {
        let now = Instant::now();
        let at = {
            let mut next = lock(&self.next);
            let at = (*next).max(now);
            *next = at + Duration::from_nanos(bytes * 1_000_000_000 / rate);
            at
        };
        thread::sleep(at - now);
    }
}

/// Takes what is left of a body: to many clients an answer in its middle is a reset.
fn drain(client: &mut TcpStream, length: u64) -> std::io::Result<()> {
    std::io::copy(&mut client.take(length), &mut std::io::sink()).map(drop)
}

/// Reads the head of a request, and what came with it of the body.
fn read_head(client: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let body = bytes.split_off(end + 4);
            bytes.truncate(end);
            return Ok(Some((String::from_utf8_lossy(&bytes).into_owned(), body)));
        }
        let count = client.read(&mut chunk)?;
        if count == 0 || bytes.len() > HEAD {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk[..count]);
    }
}

/// The same head, after whose answer the connection ends, and whose body follows unasked.
fn closing(head: &str) -> String {
    let hop = |line: &str| {
        let name = line.split(':').next().unwrap_or_default();
        ["connection", "expect"].iter().any(|hop| name.eq_ignore_ascii_case(hop))
    };
    let kept = head.split("\r\n").filter(|line| !hop(line));
    kept.chain(["connection: close", "", ""]).collect::<Vec<_>>().join("\r\n")
}
