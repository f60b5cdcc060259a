//! `cargo xtask setup`: what a fresh Debian or Ubuntu with rustup lacks, and apt packages for it.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use crate::ebpf;
use crate::process::{Privilege, as_root, cargo, command, exec, privilege, target_dir, which};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only say what is missing, and fail if anything is
    #[arg(long)]
    check: bool,
    /// Also install the pinned toolchain that builds the kernel programs: only `ebpf` and `ci`
    /// need it
    #[arg(long, conflicts_with = "check")]
    ebpf: bool,
}

/// What a package is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Compiling the workspace: libxdp and libbpf are built from source by their crates.
    Build,
    /// `cargo xtask demo`.
    Demo,
    /// `cargo xtask test`.
    Test,
    /// `cargo xtask bench`, which can do without the tools that it compares with: they are the tests'.
    Bench,
}

pub(crate) const EVERYTHING: &[Use] = &[Use::Build, Use::Demo, Use::Test, Use::Bench];

/// How to tell that a package is there.
enum Sign {
    /// This program is found, whichever package it came from.
    Program(&'static str),
    /// dpkg has it installed: for libraries and headers.
    Installed,
}

struct Package {
    name: &'static str,
    sign: Sign,
    needed_for: Use,
}

const fn program(needed_for: Use, name: &'static str, program: &'static str) -> Package {
    Package { name, sign: Sign::Program(program), needed_for }
}

const fn library(needed_for: Use, name: &'static str) -> Package {
    Package { name, sign: Sign::Installed, needed_for }
}

const PACKAGES: &[Package] = &[
    program(Use::Build, "gcc", "cc"),
    program(Use::Build, "make", "make"),
    program(Use::Build, "m4", "m4"),
    program(Use::Build, "pkg-config", "pkg-config"),
    program(Use::Build, "clang", "clang"),
    library(Use::Build, "libclang-dev"),
    library(Use::Build, "libc6-dev"),
    library(Use::Build, "libelf-dev"),
    library(Use::Build, "zlib1g-dev"),
    program(Use::Demo, "curl", "curl"),
    program(Use::Demo, "iproute2", "ip"),
    program(Use::Demo, "tcpreplay", "tcpreplay"),
    program(Use::Demo, "tshark", "tshark"),
    library(Use::Test, "libpcap-dev"),
    program(Use::Test, "curl", "curl"),
    // Not by its program, which an ordinary user's PATH does not find.
    library(Use::Test, "e2fsprogs"),
    program(Use::Test, "ethtool", "ethtool"),
    program(Use::Test, "groff-base", "groff"),
    program(Use::Test, "iperf3", "iperf3"),
    program(Use::Test, "iproute2", "ip"),
    // Shows a program another time.
    library(Use::Test, "libfaketime"),
    // AddressSanitizer names functions with its symbolizer.
    program(Use::Test, "llvm", "llvm-symbolizer"),
    program(Use::Test, "netsniff-ng", "netsniff-ng"),
    program(Use::Test, "nginx-light", "nginx"),
    program(Use::Test, "nodejs", "node"),
    program(Use::Test, "npm", "npm"),
    program(Use::Test, "openssl", "openssl"),
    program(Use::Test, "python3", "python3"),
    library(Use::Test, "python3-venv"),
    program(Use::Test, "tcpdump", "tcpdump"),
    program(Use::Test, "tcpreplay", "tcpreplay"),
    program(Use::Test, "tshark", "tshark"),
    program(Use::Test, "wrk", "wrk"),
    program(Use::Bench, "ethtool", "ethtool"),
    program(Use::Bench, "iproute2", "ip"),
    library(Use::Bench, "libpcap-dev"),
    program(Use::Bench, "util-linux", "taskset"),
];

/// Asked for with the rest, but not missed: Ubuntu has it inside a package per kernel.
const OPTIONAL: Package = program(Use::Test, "bpftool", "bpftool");

/// The S3 server that the tests run against; they build it themselves if they are run without xtask.
const S3_SERVER: &str = "s3s-fs@0.14.1";

pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.check {
        ensure(EVERYTHING)?;
    } else if let missing @ [_, ..] = missing(EVERYTHING).as_slice() {
        bail!("missing: {}", missing.join(" "));
    }
    if args.ebpf {
        ebpf::install()?;
    }
    println!("setup: nothing is missing");
    Ok(())
}

/// Makes sure that what these uses need is installed.
pub(crate) fn ensure(uses: &[Use]) -> Result<()> {
    let missing = missing(uses);
    if missing.is_empty() {
        return Ok(());
    }
    println!("setup: missing: {}", missing.join(" "));
    let mut line = String::from("apt-get update && apt-get install --no-install-recommends --yes");
    for package in &missing {
        let _ = write!(line, " {package}");
    }
    if which("apt-get").is_none() {
        bail!("there is no apt-get here; install what matches these Debian packages: {missing:?}");
    }
    let privilege = privilege();
    if privilege == Privilege::None {
        bail!("installing needs root; run this line, then try again:\n\n  sudo sh -c '{line}'\n");
    }

    let had_nginx = which("nginx").is_some();
    let quiet = ("DEBIAN_FRONTEND", OsStr::new("noninteractive"));
    let apt = |arguments: &[&str]| {
        let mut apt = as_root(privilege, "apt-get", &[quiet]);
        apt.args(["--quiet=2", "--yes"]).args(arguments);
        exec(&mut apt)
    };
    // Someone else's broken source fails an update, and need not matter here.
    if let Err(error) = apt(&["update"]) {
        eprintln!("setup: {error:#}; going on");
    }
    apt(&[&["install", "--no-install-recommends"], missing.as_slice()].concat())?;
    if !is_there(&OPTIONAL, "")
        && let Err(error) = apt(&["install", "--no-install-recommends", OPTIONAL.name])
    {
        eprintln!("setup: {error:#}; going on without {}", OPTIONAL.name);
    }
    // Debian starts a server when it is installed; the tests want the program, not the service.
    if !had_nginx && which("nginx").is_some() && Path::new("/run/systemd/system").is_dir() {
        exec(as_root(privilege, "systemctl", &[]).args(["disable", "--now", "nginx"]))?;
    }
    Ok(())
}

/// Builds the tests' S3 server, unless it is there. The tests run as root, who may have no toolchain.
pub(crate) fn s3_server() -> Result<PathBuf> {
    let folder = target_dir().join("test-cache/s3s-fs");
    let program = folder.join("bin/s3s-fs");
    if !program.is_file() {
        let mut install = cargo();
        install.args(["install", "--quiet", "--locked", "--features", "binary", S3_SERVER]);
        // Quick to build, but not so slow that hashing decides how long a test takes.
        install.args(["--debug", "--config", "profile.dev.opt-level=1"]);
        install.args(["--config", "profile.dev.debug=false", "--root"]).arg(&folder);
        exec(&mut install)?;
    }
    Ok(program)
}

/// Names of the packages that these uses lack.
pub(crate) fn missing(uses: &[Use]) -> Vec<&'static str> {
    let installed = installed();
    let mut names: Vec<_> = PACKAGES
        .iter()
        .filter(|package| uses.contains(&package.needed_for) && !is_there(package, &installed))
        .map(|package| package.name)
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn is_there(package: &Package, installed: &str) -> bool {
    match package.sign {
        Sign::Program(program) => which(program).is_some(),
        // Without dpkg there is no telling; the build will.
        Sign::Installed => {
            which("dpkg-query").is_none() || installed.lines().any(|name| name == package.name)
        }
    }
}

/// Every installed package of [`PACKAGES`], one a line, in one question to dpkg.
fn installed() -> String {
    let mut query = command("dpkg-query");
    query.args(["--show", "--showformat", "${db:Status-Status} ${Package}\n"]);
    query.args(PACKAGES.iter().map(|package| package.name));
    // It fails when one of the names is unknown, and still lists the others.
    let listed = query.output().map(|output| output.stdout).unwrap_or_default();
    let listed = String::from_utf8_lossy(&listed);
    let names = listed.lines().filter_map(|line| line.strip_prefix("installed "));
    names.collect::<Vec<_>>().join("\n")
}
