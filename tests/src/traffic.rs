//! Traffic of others' programs between two namespaces: a TCP stream (iperf3), and requests to a web server
//! (nginx and wrk).

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    process::{Child, Output},
    time::Duration,
};

use nix::sys::signal::{Signal, kill};
use tempfile::{TempDir, tempdir};

use crate::{netns::Namespace, process::wait_until, veth::Veth};

/// The right end's address, as [`addresses`] gives it.
pub const SERVER: &str = "10.0.0.2";

/// The port of iperf3's server.
const IPERF3: u16 = 5201;

/// Connections that wrk keeps busy.
const CONNECTIONS: &str = "32";

/// Makes two hosts of a pair, the server at the right.
pub fn addresses(veth: &Veth<'_>) {
    veth.left.add_address("10.0.0.1/24");
    veth.right.add_address(&format!("{SERVER}/24"));
}

/// A server in the background; ends when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    _folder: Option<TempDir>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // nginx ends its workers when it is told to, not when it is killed.
        let _ = kill(nix::unistd::Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// Waits until a port of a namespace is listened on.
fn wait_for_port(namespace: &Namespace, port: u16) {
    wait_until("a server", Duration::from_secs(10), || {
        let output = namespace.run(&["ss", "-Hltn", &format!("sport = :{port}")]);
        !output.stdout.is_empty()
    });
}

/// iperf3's server.
pub fn iperf3(namespace: &Namespace) -> Server {
    let child = namespace.spawn(&["iperf3", "--server"]);
    let server = Server { child, _folder: None };
    wait_for_port(namespace, IPERF3);
    server
}

/// nginx that serves a folder.
pub fn nginx(namespace: &Namespace, root: &Path) -> Server {
    let folder = tempdir().unwrap();
    let at = folder.path().display();
    let mut temporary = String::new();
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(temporary, "{kind}_temp_path {at}/{kind};").unwrap();
    }
    let config = format!(
        "daemon off; worker_processes 1; pid {at}/pid; error_log {at}/error.log; user root;
         events {{ worker_connections 1024; }}
         http {{
             access_log off; sendfile on; keepalive_requests 1000000; {temporary}
             server {{ listen 80; root {}; }}
         }}",
        root.display()
    );
    let path = folder.path().join("nginx.conf");
    fs::write(&path, config).unwrap();
    let child = namespace.spawn(&["nginx", "-c", path.to_str().unwrap()]);
    let server = Server { child, _folder: Some(folder) };
    wait_for_port(namespace, 80);
    server
}

/// What wrk has seen.
#[derive(Clone, Copy, Debug)]
pub struct Requests {
    /// Requests that were answered.
    pub answered: u64,
    /// A second.
    pub rate: f64,
}

/// Asks [`SERVER`] for `path` for so many seconds, on connections that stay, or on a new one each time. Panics
/// if a connection is lost or an answer is an error.
pub fn requests(client: &Namespace, path: &str, seconds: u64, keep: bool) -> Requests {
    let duration = format!("{seconds}s");
    let load = ["wrk", "--threads", "1", "--connections", CONNECTIONS, "--timeout", "10s"];
    let close: &[&str] = if keep { &[] } else { &["--header", "Connection: close"] };
    let url = format!("http://{SERVER}/{path}");
    let Output { stdout, .. } =
        client.run(&[&load[..], &["--duration", &duration], close, &[url.as_str()]].concat());
    let text = String::from_utf8(stdout).unwrap();
    assert!(!text.contains("Socket errors"), "{text}");
    assert!(!text.contains("Non-2xx"), "{text}");
    // "  123456 requests in 2.00s, 500.00MB read" and "Requests/sec:  61728.00"
    let answered = text.lines().find_map(|line| line.trim().split_once(" requests in "));
    let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    let (Some((answered, _)), Some(rate)) = (answered, rate) else { panic!("{text}") };
    Requests { answered: answered.parse().unwrap(), rate: rate.trim().parse().unwrap() }
}
