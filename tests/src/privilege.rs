//! A test that needs root is skipped aloud without it.

use std::{env, io::Write as _, path::Path};

use nix::unistd::Uid;

/// Returns from the calling test, aloud, unless it may make namespaces and load programs.
#[macro_export]
macro_rules! privileged {
    () => {
        if !$crate::privilege::require_root($crate::privilege::test_name(|| {})) {
            return;
        }
    };
}

/// Returns from the calling test, aloud, unless it is privileged and this finds what it needs.
#[macro_export]
macro_rules! needs {
    ($check:expr) => {
        $crate::privileged!();
        if !$crate::privilege::require($crate::privilege::test_name(|| {}), &$check) {
            return;
        }
    };
}

/// The path of the function that a closure is written in. The thread's name would not do: libtest
/// runs a lone test on the main thread.
pub fn test_name<F: Fn()>(_: F) -> &'static str {
    let closure = std::any::type_name::<F>();
    let function = closure.trim_end_matches("::{{closure}}");
    function.split_once("::").map_or(function, |(_, path)| path)
}

/// Whether a test that needs root can run; says so when it cannot.
pub fn require_root(test: &str) -> bool {
    require(test, &|| {
        if !Uid::effective().is_root() {
            return Err("needs root".into());
        }
        if !Path::new("/proc/self/ns/net").exists() {
            return Err("this kernel has no network namespaces".into());
        }
        Ok(())
    })
}

/// Whether a test can run that needs more than every machine has. When not, a line on stderr says
/// what is missing, past libtest's capture; with `TAPLINE_REQUIRE_ALL=1` that is a failure.
pub fn require(test: &str, check: &dyn Fn() -> Result<(), String>) -> bool {
    let Err(reason) = check() else { return true };
    assert!(
        env::var("TAPLINE_REQUIRE_ALL").as_deref() != Ok("1"),
        "{test} may not be skipped (TAPLINE_REQUIRE_ALL=1), but: {reason}"
    );
    let line = format!("SKIPPED {test}: {reason}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    false
}
