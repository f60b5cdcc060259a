//! A service account of Google's, and whether it has signed for a request.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use serde_json::{Value, json};
use tapline_tests::process::checked;
use tempfile::TempDir;

/// Its name.
const EMAIL: &str = "captures@project.iam.gserviceaccount.com";

/// An account whose key is in a file as Google writes it.
#[derive(Clone)]
pub(super) struct ServiceAccount(Arc<TempDir>);

impl ServiceAccount {
    pub(super) fn new() -> Self {
        let account = Self(Arc::new(tempfile::tempdir().unwrap()));
        let (private, public) = (account.path("private.pem"), account.path("public.pem"));
        let mut generate = Command::new("openssl");
        generate.args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"]);
        checked(generate.arg(&private));
        let mut publish = Command::new("openssl");
        publish.args(["pkey", "-pubout", "-in"]).arg(&private).arg("-out").arg(&public);
        checked(&mut publish);
        let file = json!({
            "type": "service_account",
            "private_key": fs::read_to_string(private).unwrap(),
            "private_key_id": "key1",
            "client_email": EMAIL,
        });
        fs::write(account.file(), file.to_string()).unwrap();
        account
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The file with its key.
    pub(super) fn file(&self) -> PathBuf {
        self.path("account.json")
    }

    /// Whether a token says that it is this account's, for storage, now, and openssl says that it is.
    /// <https://google.aip.dev/auth/4111>
    pub(super) fn signed(&self, token: &str) -> bool {
        let Some((signed, signature)) = token.rsplit_once('.') else { return false };
        let Some((header, claims)) = signed.split_once('.') else { return false };
        let json = |text| serde_json::from_slice::<Value>(&decoded(text)).unwrap();
        let (header, claims) = (json(header), json(claims));
        let scope = claims["scope"].as_str().unwrap();
        let named = header["alg"] == "RS256" && header["kid"] == "key1" && claims["iss"] == EMAIL;
        let (begin, end) = (claims["iat"].as_u64().unwrap(), claims["exp"].as_u64().unwrap());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let timely = (begin..end).contains(&now.as_secs()) && end - begin <= 3600;
        named && timely && scope.contains("cloud-platform") && {
            let folder = tempfile::tempdir().unwrap();
            let (file, digest) = (folder.path().join("signed"), folder.path().join("signature"));
            fs::write(&file, signed).unwrap();
            fs::write(&digest, decoded(signature)).unwrap();
            self.verifies(&file, &digest)
        }
    }

    fn verifies(&self, file: &Path, signature: &Path) -> bool {
        let mut verify = Command::new("openssl");
        verify.args(["dgst", "-sha256", "-verify"]).arg(self.path("public.pem"));
        verify.arg("-signature").arg(signature).arg(file).stdout(Stdio::null());
        verify.status().unwrap().success()
    }
}

/// What base64 in its form for URLs stands for.
fn decoded(text: &str) -> Vec<u8> {
    let mut child = Command::new("basenc")
        .args(["--base64url", "--decode"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let padded = format!("{text}{}", "=".repeat((4 - text.len() % 4) % 4));
    child.stdin.take().unwrap().write_all(padded.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{text}");
    output.stdout
}
