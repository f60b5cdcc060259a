//! TLS, and what the daemon refuses to do without it.

use std::{fs, process::Command};

use serde_json::Value;
use tapline_tests::{
    daemon::{ACCOUNT, Daemon, taplined_path},
    netns::Namespace,
    privileged,
    process::checked,
    veth::Veth,
};

#[test]
fn a_certificate_makes_it_https() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let (key, certificate) = (format!("{path}/tls.key"), format!("{path}/tls.crt"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    openssl.args(["-nodes", "-days", "2", "-subj", "/CN=localhost"]);
    openssl.args(["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", &key, "-out", &certificate]);
    checked(&mut openssl);
    let tls = format!("[tls]\ncertificate = \"{certificate}\"\nkey = \"{key}\"");
    let daemon = Daemon::start(&veth.right, "listen = \"0.0.0.0:8700\"", &tls);
    let url = format!("https://127.0.0.1:8700/client/v4/accounts/{ACCOUNT}/pcaps");
    let header = format!("Authorization: Bearer {}", daemon.token);
    let args = ["--silent", "--show-error", "--cacert", &certificate, "--header", &header, &url];
    let answer: Value =
        serde_json::from_slice(&checked(&mut daemon.command("curl", &args)).stdout).unwrap();
    assert_eq!(answer["success"], true, "{answer}");
    // Without the certificate nobody is to believe it.
    let output = daemon.command("curl", &["--silent", &url]).output().unwrap();
    assert!(!output.status.success());
}

#[test]
fn the_configuration_is_checked_and_its_errors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("taplined.toml");
    let check = |text: &str| {
        fs::write(&file, text).unwrap();
        let output =
            Command::new(taplined_path()).arg("--check").arg("--config").arg(&file).output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let interface = "[[interfaces]]\nname = \"eth0\"\n";
    assert_eq!(check(interface).0, Some(0));
    for (text, named) in [
        ("lissen = 1\n", "lissen"),
        ("listen = \"0.0.0.0:1\"\n", "plaintext = true"),
        ("max_jobs = 0\n", "max_jobs"),
    ] {
        let (code, said) = check(&format!("{text}{interface}"));
        assert_eq!(code, Some(1), "{text}");
        assert!(said.contains(named), "{said}");
    }
    let sample = checked(Command::new(taplined_path()).arg("--print-config")).stdout;
    let (code, said) = check(&format!("{}\n{interface}", String::from_utf8(sample).unwrap()));
    assert_eq!(code, Some(0), "{said}");
}
