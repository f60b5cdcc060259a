//! Folders: `file://` under one that the operator has named.
//!
//! - The path is decoded once, and `.` and `..` are refused in it, not resolved.
//! - What exists of it is resolved as the kernel would, links included, and must still lie in the
//!   root: a link that leads out of it goes nowhere.
//! - Nothing of a destination is ever made outside a root.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use super::{DestinationError, uri::decode};
use crate::config::Root;

/// The folders that captures may be written to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots(Vec<Root>);

impl Roots {
    /// As configured.
    pub fn new(roots: &[Root]) -> Self {
        Self(roots.to_vec())
    }

    /// Makes the folders that are not there.
    pub fn create(&self) -> std::io::Result<()> {
        self.0.iter().try_for_each(|root| fs::create_dir_all(&root.path))
    }

    pub(super) fn names(&self) -> String {
        let names: Vec<_> = self.0.iter().map(|root| root.path.display().to_string()).collect();
        names.join(", ")
    }

    /// The folder that is meant by what stands behind `file://`, and whether it is trusted.
    pub(super) fn resolve(&self, rest: &str) -> Result<(PathBuf, bool), DestinationError> {
        let path = plain_path(rest).map_err(|problem| DestinationError::Path { problem })?;
        let root = self
            .0
            .iter()
            .filter(|root| path.starts_with(&root.path))
            .max_by_key(|root| root.path.as_os_str().len())
            .filter(|root| stays_in(&path, &root.path))
            .ok_or_else(|| DestinationError::Outside { roots: self.names() })?;
        Ok((path, root.trusted))
    }
}

/// The path of a `file:` URI behind the two slashes.
fn plain_path(rest: &str) -> Result<PathBuf, &'static str> {
    let rest = rest.strip_prefix("localhost").unwrap_or(rest);
    if !rest.starts_with('/') {
        return Err("it has a host, or its path does not begin with /");
    }
    if rest.contains(['?', '#']) {
        return Err("it has a query or a fragment");
    }
    let decoded = decode(rest).ok_or("its percent-encoding is broken or not UTF-8")?;
    if decoded.chars().any(char::is_control) || decoded.len() > 1024 {
        return Err("it has control characters, or more than 1024 bytes");
    }
    if decoded.split('/').any(|part| part == "." || part == "..") {
        return Err("it has `.` or `..` as a part");
    }
    // Also drops doubled slashes.
    Ok(Path::new(&decoded)
        .components()
        .filter(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        .collect())
}

/// Whether the part of `path` that exists lies in `root` when links are followed.
fn stays_in(path: &Path, root: &Path) -> bool {
    let Ok(root) = root.canonicalize() else { return false };
    // `exists` would take a link that leads nowhere for nothing, and making the folder would follow it.
    let existing = path.ancestors().find(|ancestor| ancestor.symlink_metadata().is_ok());
    existing.and_then(|path| path.canonicalize().ok()).is_some_and(|path| path.starts_with(&root))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn roots(path: &Path) -> Roots {
        let trusted = path.join("trusted");
        let roots = Roots::new(&[
            Root { path: trusted, trusted: true },
            Root { path: path.join("other"), trusted: false },
        ]);
        roots.create().unwrap();
        roots
    }

    #[test]
    fn a_folder_in_a_trusted_root_is_fine_whether_it_exists_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let roots = roots(folder.path());
        let base = folder.path().join("trusted");
        for (uri, path) in [("", ""), ("/", ""), ("/a", "a"), ("/a//b/", "a/b"), ("/a%20b", "a b")]
        {
            let uri = format!("{}{uri}", base.display());
            assert_eq!(roots.resolve(&uri), Ok((base.join(path), true)), "{uri}");
        }
        let uri = format!("localhost{}/a", base.display());
        assert_eq!(roots.resolve(&uri), Ok((base.join("a"), true)));
    }

    #[test]
    fn nothing_leads_out_of_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let roots = roots(folder.path());
        let base = folder.path().join("trusted").display().to_string();
        symlink("/etc", format!("{base}/link")).unwrap();
        symlink("/nowhere/at/all", format!("{base}/dangling")).unwrap();
        for path in [
            "/etc".to_owned(),
            "/".to_owned(),
            format!("{base}/../other"),
            format!("{base}/%2e%2e/%2e%2e/etc"),
            format!("{base}/./a"),
            format!("{base}x"),
            format!("{base}/link"),
            format!("{base}/link/new"),
            format!("{base}/dangling"),
            format!("{base}/dangling/x"),
            format!("{base}/a%00b"),
            format!("{base}/%zz"),
            format!("{base}/%"),
            format!("{base}/%ff"),
            format!("{base}?x=1"),
            format!("{base}#x"),
        ] {
            let result = roots.resolve(&path);
            assert!(
                matches!(
                    result,
                    Err(DestinationError::Path { .. } | DestinationError::Outside { .. })
                ),
                "{path}: {result:?}"
            );
        }
        assert!(roots.resolve(&format!("host{base}")).is_err());
        assert!(roots.resolve("").is_err());
    }

    #[test]
    fn a_root_that_is_not_trusted_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other/x");
        let resolved = roots(folder.path()).resolve(&other.display().to_string());
        assert_eq!(resolved, Ok((other, false)));
    }
}
