//! `cargo xtask ebpf`: builds the kernel programs, the same to the byte wherever it runs.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::object::{self, OBJECTS, Required};
use crate::process::{command, exec, output, probe, root, target_dir};

/// The compiler that the committed objects come from. Another one makes other instructions of the
/// same source, so the pin is part of the source.
const RUST: &str = "1.95.0";

/// The linker that goes with it: it borrows the LLVM inside rustc, and 0.10 is the last series that
/// can (0.11 wants LLVM's own packages).
const BPF_LINKER: &str = "0.10.4";

/// The kernel target; its `core` is built from source, since no toolchain ships one.
const TARGET: &str = "bpfel-unknown-none";

/// Lints that miss the point in a kernel program.
const KERNEL_STYLE: &[&str] = &[
    // The verifier follows one program without calls more easily than many with.
    "clippy::inline_always",
    // aya's macros hand the context over by value.
    "clippy::needless_pass_by_value",
    // Helpers take and give C's signed numbers.
    "clippy::cast_possible_wrap",
    "clippy::cast_sign_loss",
];

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Change nothing; fail unless the committed objects are exactly what the sources build, and
    /// hold what they must
    #[arg(long, conflicts_with = "log")]
    pub(crate) check: bool,
    /// Build with diagnostics through aya-log, to look into a problem; not to be committed
    #[arg(long)]
    pub(crate) log: bool,
    /// Only run clippy, which on the host never sees these programs: there they are empty
    #[arg(long, conflicts_with_all = ["check", "log"])]
    pub(crate) lint: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.lint {
        let mut clippy = Toolchain::find()?.cargo("clippy")?;
        clippy.args(["--", "--deny", "warnings"]);
        return exec(clippy.args(KERNEL_STYLE.iter().flat_map(|lint| ["--allow", lint])));
    }

    let mut faults = Vec::new();
    if args.check {
        // First what needs no toolchain. An object that lacks a part fails even if it is just what
        // the sources build.
        for required in OBJECTS {
            let path = committed(required.name);
            faults.extend(faults_of(required, &path, &read(&path)?)?);
        }
    }

    let built_dir = build(args)?;
    for required in OBJECTS {
        let built = built_dir.join(format!("{}.bpfel.o", required.name));
        let bytes = object::slimmed(&read(&built_dir.join(required.name))?)
            .with_context(|| format!("cannot slim {}", required.name))?;
        write(&built, &bytes)?;
        let committed = committed(required.name);
        if args.check {
            if read(&committed)? == bytes {
                println!("ebpf: {}: as built from source", committed.display());
            } else {
                faults.push(format!(
                    "{}: not what the sources build; `cargo xtask ebpf` rebuilds it\n{}",
                    committed.display(),
                    object::difference(&committed, &built)?
                ));
            }
        } else {
            let found = faults_of(required, &built, &bytes)?;
            if found.is_empty() {
                write(&committed, &bytes)?;
                println!("ebpf: {} ({} bytes)", committed.display(), bytes.len());
            }
            faults.extend(found);
        }
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// What an object lacks, with its name in front.
fn faults_of(required: &Required, path: &Path, bytes: &[u8]) -> Result<Vec<String>> {
    let faults = required.faults(bytes).with_context(|| path.display().to_string())?;
    Ok(faults.into_iter().map(|fault| format!("{}: {fault}", path.display())).collect())
}

/// Installs what [`run`] asks for, where it is missing.
pub(crate) fn install() -> Result<()> {
    if Toolchain::find().is_err() {
        let rustup = ["toolchain", "install", RUST, "--profile", "minimal"];
        exec(command("rustup").args(rustup).args(["--component", "rust-src"]))?;
    }
    let toolchain = Toolchain::find()?;
    if toolchain.check_linker().is_err() {
        let package = format!("bpf-linker@{BPF_LINKER}");
        exec(tool(&toolchain.prefix, "cargo").args(["install", "--locked", "--force", &package]))?;
    }
    toolchain.check_linker()
}

/// What code the linker may make. The third instruction set (32-bit arithmetic, comparisons either way) came
/// with Linux 5.1, long before the rest of what the programs need. Words of a packet lie at any address: the
/// verifier lets them be read at once unless the architecture cannot (`strict_alignment` in
/// <https://github.com/torvalds/linux/blob/v6.6/kernel/bpf/verifier.c>), and put together byte by byte they
/// take several instructions each.
const CODE: [&str; 2] =
    ["-Ctarget-cpu=v3", "-Clink-arg=--cpu-features=+alu32,+allows-misaligned-mem-access"];

/// Where an object is committed, and embedded from.
fn committed(name: &str) -> PathBuf {
    root().join("capture-ebpf/bpf").join(format!("{name}.bpfel.o"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Builds the kernel programs; gives the folder they are in.
fn build(args: &Args) -> Result<PathBuf> {
    let toolchain = Toolchain::find()?;
    toolchain.check_linker()?;
    let mut build = toolchain.cargo("build")?;
    if args.check {
        build.arg("--locked");
    }
    if args.log {
        build.args(["--features", "log"]);
    }
    exec(&mut build)?;
    Ok(build_dir().join(TARGET).join("ebpf"))
}

/// A target folder of its own: with other flags in one folder, each build would undo the other's.
fn build_dir() -> PathBuf {
    target_dir().join("ebpf")
}

/// rustc [`RUST`] with core's sources.
struct Toolchain {
    /// What goes before a tool's name.
    prefix: Vec<String>,
    sysroot: PathBuf,
}

impl Toolchain {
    /// Under the pin's own name, or as the default toolchain if that is the same version.
    fn find() -> Result<Self> {
        let pinned = vec!["rustup".to_owned(), "run".to_owned(), RUST.to_owned()];
        for prefix in [pinned, Vec::new()] {
            let version = probe(tool(&prefix, "rustc").arg("--version"));
            if !version.is_some_and(|version| version.starts_with(&format!("rustc {RUST} "))) {
                continue;
            }
            let sysroot = output(tool(&prefix, "rustc").args(["--print", "sysroot"]))?;
            let sysroot = PathBuf::from(sysroot.trim_end());
            if !sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file() {
                bail!(
                    "core's sources are missing from Rust {RUST}; get them with\n\n  \
                     rustup component add rust-src --toolchain {RUST}\n"
                );
            }
            return Ok(Self { prefix, sysroot });
        }
        bail!(
            "the kernel programs are built with Rust {RUST}, exactly; get it with\n\n  \
             rustup toolchain install {RUST} --profile minimal --component rust-src\n"
        );
    }

    fn check_linker(&self) -> Result<()> {
        let version = probe(tool(&self.prefix, "bpf-linker").arg("--version"));
        let version = version.as_deref().map_or("none", str::trim_end);
        if version != format!("bpf-linker {BPF_LINKER}") {
            bail!(
                "bpf-linker {BPF_LINKER}, exactly, is needed (found: {version}); get it with\n\n  \
                 cargo install bpf-linker@{BPF_LINKER} --locked\n"
            );
        }
        Ok(())
    }

    /// `cargo VERB` for the kernel programs.
    fn cargo(&self, verb: &str) -> Result<Command> {
        let mut cargo = tool(&self.prefix, "cargo");
        cargo
            .args([verb, "--package", "capture-ebpf", "--bins", "--profile", "ebpf"])
            .args(["--target", TARGET, "-Zbuild-std=core", "--target-dir"])
            .arg(build_dir())
            // `-Z` on a stable compiler, so that the pin can be a release.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags()?);
        Ok(cargo)
    }

    fn flags(&self) -> Result<OsString> {
        let mut flags = vec![OsString::from("-Clink-arg=--btf")];
        flags.extend(CODE.map(OsString::from));
        // File names go into BTF's line numbers. What they are relative to must not, or the bytes
        // would tell where they were built. The last match wins, so the workspace comes last.
        let mut remap = |from: &Path, to: &str| {
            let mut flag = OsString::from("--remap-path-prefix=");
            flag.push(from);
            flag.push("=");
            flag.push(to);
            flags.push(flag);
        };
        remap(&self.sysroot, "/rust");
        for registry in registries()? {
            remap(&registry, "/registry");
        }
        remap(&root(), "/tapline");
        Ok(flags.join(OsStr::new("\x1f")))
    }
}

/// Folders that hold crates' sources; their names depend on how the registry is reached. The one in
/// use is there, since xtask is built from it.
fn registries() -> Result<Vec<PathBuf>> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".cargo")))
        .context("there is neither CARGO_HOME nor a home folder")?;
    let sources = root().join(home).join("registry/src");
    let entries =
        fs::read_dir(&sources).with_context(|| format!("cannot list {}", sources.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// One of the toolchain's programs, out of reach of what the environment says about others.
fn tool(prefix: &[String], name: &str) -> Command {
    let mut words = prefix.iter().map(String::as_str).chain([name]);
    let mut tool = command(words.next().unwrap_or(name));
    tool.args(words);
    for (variable, _) in env::vars_os() {
        let name = variable.to_string_lossy();
        let misleads = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            || name.starts_with("RUSTC")
            || ["CARGO", "CARGO_INCREMENTAL", "LD_LIBRARY_PATH", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"]
                .contains(&name.as_ref());
        if misleads {
            tool.env_remove(variable);
        }
    }
    tool
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_objects_hold_what_they_must() {
        for required in OBJECTS {
            let bytes = read(&committed(required.name)).unwrap();
            assert_eq!(required.faults(&bytes).unwrap(), Vec::<String>::new(), "{}", required.name);
        }
    }

    #[test]
    fn an_object_without_a_part_is_refused() {
        let [capture, generator] = OBJECTS else { panic!("two objects") };
        let bytes = read(&committed(generator.name)).unwrap();
        let faults = capture.faults(&bytes).unwrap();
        assert!(faults.contains(&"program exclusive is missing".to_owned()), "{faults:?}");
        assert!(faults.contains(&"map RINGS is missing".to_owned()), "{faults:?}");
    }

    #[test]
    fn what_is_no_object_is_an_error() {
        assert!(OBJECTS[0].faults(b"").is_err());
    }
}
