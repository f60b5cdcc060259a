//! Network namespaces.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::process::checked;

/// A name that no other test, process or interface has, short enough for an interface.
pub fn unique_name(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("tl{kind}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    assert!(name.len() <= 15, "{name}: longer than an interface's name may be");
    name
}

/// A network namespace with its loopback up; gone when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A namespace in which the kernel sends nothing on its own: no IPv6, so no neighbour discovery.
    pub fn new() -> Self {
        let namespace = Self::with_ipv6();
        namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "1");
        namespace.sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        namespace
    }

    /// A namespace with IPv6 on.
    pub fn with_ipv6() -> Self {
        let name = unique_name("n");
        checked(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Self { name };
        checked(&mut namespace.command("ip", ["link", "set", "lo", "up"]));
        namespace
    }

    /// Its name, as in `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Sets a kernel parameter, named by its path under `/proc/sys`.
    pub fn sysctl(&self, parameter: &str, value: &str) {
        self.enter(|| {
            let path = format!("/proc/sys/{parameter}");
            fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
        });
    }

    /// A command that will run inside.
    pub fn command<A: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program).args(args);
        command
    }

    /// Runs a command inside, which must succeed.
    pub fn run(&self, line: &[&str]) -> Output {
        checked(&mut self.command(line[0], &line[1..]))
    }

    /// Starts a command inside, with its output in pipes.
    pub fn spawn(&self, line: &[&str]) -> Child {
        self.command(line[0], &line[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Runs a closure on a thread of its own inside, with `/sys` showing the namespace's devices.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into(&self.path());
                // sysfs shows the network devices of the namespace that mounted it.
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                let none = None::<&str>;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).unwrap();
                match mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none) {
                    // The thread that entered was inside already, and has it there.
                    Err(Errno::EBUSY) => {}
                    result => result.unwrap(),
                }
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside. What it starts is inside, too.
    pub fn spawn_inside(&self, body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        let path = self.path();
        thread::spawn(move || {
            move_into(&path);
            body();
        })
    }
}

/// Moves the calling thread into a namespace.
fn move_into(path: &Path) {
    let namespace = File::open(path).unwrap();
    setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A test that fails still cleans up; what cannot be removed has been said by `ip`.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
