//! Listens, serves connections, and stops in order.
//!
//! # How it stops
//!
//! 1. On SIGTERM or SIGINT no connection is accepted any more, and no capture created.
//! 2. Running captures are stopped, sealed and remembered; uploads go on for a moment, and then at the
//!    next start.
//! 3. Requests that are being answered are; idle connections are closed.
//! 4. What is not done in time is cut off.

use std::{
    convert::Infallible, fs::File, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration,
};

use axum::{Router, body::Body, extract::Request, middleware};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use crate::{
    auth::Auth,
    captures::{CaptureError, Captures},
    colo::Colo,
    config::{Config, Tls},
    destination::Destinations,
    http::{self, Peer},
    metrics::Counters,
    ownership::Ownerships,
    request::Rules,
    routes::{self, App},
    secrets::{KeyError, Secrets},
    store::{Store, StoreError},
    upload::Means,
};

/// For a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// For captures to be sealed when the daemon stops: longer than a slow disk takes.
const SEALING: Duration = Duration::from_mins(1);

/// Why the daemon does not run.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A folder for captures.
    #[error("cannot make the folders of `roots`")]
    Roots(#[source] io::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The key of the secrets.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The database or the interfaces.
    #[error(transparent)]
    Captures(#[from] CaptureError),
    /// The certificate or its key.
    #[error("{}: {problem}", path.display())]
    Tls {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The address.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The asynchronous runtime, or its signals.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// Captures did not end in time.
    #[error("captures were not sealed within {} s", SEALING.as_secs())]
    NotSealed,
}

/// Runs the daemon until it is told to stop.
pub fn run(config: &Config) -> Result<(), ServeError> {
    let tls = config.tls.as_ref().map(acceptor).transpose()?;
    let destinations = Arc::new(Destinations::new(config));
    let counters = Arc::new(Counters::default());
    // First the data folder, which is for the daemon only; the default root lies in it.
    let store = Arc::new(Store::open(&config.data_dir)?);
    destinations.create_roots().map_err(ServeError::Roots)?;
    let secrets = Secrets::open(&config.destinations.secrets_key_file, &config.data_dir)?;
    let transfers = runtime("tl-transfer")?;
    let ownerships = Arc::new(Ownerships::new(
        config,
        Arc::clone(&store),
        secrets,
        Arc::clone(&destinations),
        transfers.handle().clone(),
    ));
    let means = Means {
        store,
        ownerships: Arc::clone(&ownerships),
        destinations: Arc::clone(&destinations),
        counters: Arc::clone(&counters),
        runtime: transfers.handle().clone(),
    };
    let captures = Captures::open(config, means)?;
    let (close, closing) = watch::channel(false);
    let app = Arc::new(App {
        config: config.clone(),
        auth: Auth::new(config),
        rules: Rules { colo: Colo::new(config), destinations },
        ownerships,
        captures,
        counters,
        streams: Arc::new(Semaphore::new(config.limits.event_streams)),
        downloads: Arc::new(Semaphore::new(config.limits.downloads)),
        closing,
    });
    let http = runtime("tl-http")?;
    let result = http.block_on(serve(&app, tls, &close));
    http.shutdown_timeout(Duration::from_secs(1));
    transfers.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Requests and what goes to buckets have threads of their own, so that neither waits for the other.
fn runtime(name: &str) -> Result<Runtime, ServeError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name(name)
        .build()
        .map_err(ServeError::Runtime)
}

/// The router with all that every request passes.
pub fn service(app: &Arc<App>) -> Router {
    let observe = middleware::from_fn_with_state(Arc::clone(app), http::observe);
    routes::router(app).layer(observe)
}

async fn serve(
    app: &Arc<App>,
    tls: Option<TlsAcceptor>,
    close: &watch::Sender<bool>,
) -> Result<(), ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Runtime)?;
    let address = app.config.listen;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Listen { address, source })?;
    let address = listener.local_addr().unwrap_or(address);
    let scheme = if tls.is_some() { "https" } else { "http" };
    tracing::info!(%address, scheme, "listening");

    let connections = Connections {
        router: service(app),
        http: http1(&app.config),
        tls,
        graceful: GracefulShutdown::new(),
    };
    let permits = Arc::new(Semaphore::new(app.config.limits.connections));
    tokio::select! {
        () = connections.accept(&listener, &permits) => {}
        () = signals.next() => {}
    }
    drop(listener);
    tracing::info!("stopping: sealing captures");
    // Event streams wait for the ends of their captures, and end with this at the latest.
    let captures = Arc::clone(&app.captures);
    let sealed = tokio::task::spawn_blocking(move || captures.shutdown(SEALING)).await;
    close.send_replace(true);
    let patience = Duration::from_secs(app.config.limits.shutdown_seconds);
    connections.drain(patience).await;
    tracing::info!("stopped");
    if matches!(sealed, Ok(true)) { Ok(()) } else { Err(ServeError::NotSealed) }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn http1(config: &Config) -> http1::Builder {
    let mut http = http1::Builder::new();
    // Also how long a connection may be idle: who sends a header now and then is cut off.
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(config.limits.header_seconds))
        .max_headers(config.limits.headers)
        .max_buf_size(config.limits.head_bytes);
    http
}

struct Connections {
    router: Router,
    http: http1::Builder,
    tls: Option<TlsAcceptor>,
    graceful: GracefulShutdown,
}

impl Connections {
    async fn accept(&self, listener: &TcpListener, permits: &Arc<Semaphore>) {
        loop {
            // More wait in the kernel's queue.
            let Ok(permit) = Arc::clone(permits).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, peer)) => self.connect(stream, peer, permit),
                Err(error) => {
                    // Out of file descriptors, say: it passes when others hang up.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn connect(&self, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        // Answers are small, and are not to wait for each other.
        drop(stream.set_nodelay(true));
        let (router, http) = (self.router.clone(), self.http.clone());
        let peer = Peer(peer.ip());
        let watcher = self.graceful.watcher();
        let tls = self.tls.clone();
        tokio::spawn(async move {
            match tls {
                None => serve_connection(stream, http, router, peer, watcher).await,
                Some(tls) => match timeout(HANDSHAKE, tls.accept(stream)).await {
                    Ok(Ok(stream)) => serve_connection(stream, http, router, peer, watcher).await,
                    Ok(Err(error)) => tracing::debug!(%error, "TLS handshake"),
                    Err(_elapsed) => tracing::debug!("TLS handshake took too long"),
                },
            }
            drop(permit);
        });
    }

    async fn drain(self, patience: Duration) {
        if timeout(patience, self.graceful.shutdown()).await.is_err() {
            tracing::warn!("cut off requests that were not answered in time");
        }
    }
}

async fn serve_connection<S>(
    stream: S,
    http: http1::Builder,
    router: Router,
    peer: Peer,
    watcher: hyper_util::server::graceful::Watcher,
) where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            let response = router.oneshot(request).await;
            Ok::<_, Infallible>(response.unwrap_or_else(|never| match never {}))
        }
    });
    let connection = http.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        // A client's doing: it hung up, or was too slow.
        tracing::debug!(%error, "connection");
    }
}

fn acceptor(config: &Tls) -> Result<TlsAcceptor, ServeError> {
    let wrong = |path: &PathBuf, problem: String| ServeError::Tls { path: path.clone(), problem };
    let certificates = File::open(&config.certificate)
        .map_err(|error| wrong(&config.certificate, error.to_string()))
        .and_then(|file| {
            CertificateDer::pem_reader_iter(file)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| wrong(&config.certificate, error.to_string()))
        })?;
    if certificates.is_empty() {
        return Err(wrong(&config.certificate, "it has no certificate".into()));
    }
    let key = PrivateKeyDer::from_pem_file(&config.key)
        .map_err(|error| wrong(&config.key, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, key))
        .map_err(|error| wrong(&config.certificate, error.to_string()))?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}
