use super::*;
use crate::config::Root;

const ACCOUNT: &str = "0123456789ABCDEF0123456789abcdef";

fn destinations() -> Destinations {
    let mut config =
        Config { roots: vec![Root { path: "/".into(), trusted: false }], ..Config::default() };
    config.destinations.endpoints =
        vec!["https://store.example".into(), "http://127.0.0.1:9000".into()];
    Destinations::new(&config)
}

fn identity(text: &str) -> String {
    let (destination, _keys) = destinations().parse(text).unwrap();
    let identity = destination.identity();
    // What is stored is read again after a restart.
    assert_eq!(destinations().parse(&identity).unwrap(), (destination, None));
    identity
}

#[test]
fn texts_that_mean_one_place_are_one_destination() {
    for (text, same) in [
        ("s3://bucket/dir?region=us-east-1", "s3://bucket/dir?region=us-east-1"),
        ("S3://bucket/dir/?region=us-east-1", "s3://bucket/dir?region=us-east-1"),
        ("s3://bucket?region=us-east-1", "s3://bucket?region=us-east-1"),
        (
            "s3://bucket/a/b?endpoint=store.example",
            "s3://bucket/a/b?region=us-east-1&endpoint=https://store.example",
        ),
        (
            "s3://bucket?endpoint=http%3A%2F%2F127.0.0.1%3A9000&region=x",
            "s3://bucket?region=x&endpoint=http://127.0.0.1:9000",
        ),
        ("gs://my_bucket/dir/a=b/", "gs://my_bucket/dir/a=b"),
        ("file:///tmp//a%20b/", "file:///tmp/a%20b"),
        ("file:///tmp/50%25", "file:///tmp/50%25"),
    ] {
        assert_eq!(identity(text), same);
    }
    let r2 = "r2://bucket/dir?account-id=0123456789abcdef0123456789abcdef";
    assert_eq!(identity(&format!("r2://bucket/dir?account-id={ACCOUNT}")), r2);
    let keys = "access-key-id=me&secret-access-key=hidden%2F";
    let (destination, found) =
        destinations().parse(&format!("r2://bucket/dir?account-id={ACCOUNT}&{keys}")).unwrap();
    assert_eq!(destination.identity(), r2);
    assert_eq!(found.as_ref().unwrap().secret_access_key.reveal(), "hidden/");
    assert!(!format!("{found:?}{destination:?}").contains("hidden"));
}

#[test]
fn what_is_not_allowed_is_refused_and_says_what_is() {
    let long = format!("s3://bucket/{}?region=x", "d".repeat(513));
    let account = format!("account-id={ACCOUNT}");
    for (text, said) in [
        ("", "s3://"),
        ("bucket", "s3://"),
        ("http://169.254.169.254/", "s3://"),
        ("javascript://x", "s3://"),
        ("s3://bucket", "lacks `region`"),
        ("s3://user:hidden@bucket?region=x", "user or password"),
        ("s3://hidden@?region=x", "user or password"),
        ("s3://ab?region=x", "3 to 63"),
        ("s3://Bucket?region=x", "3 to 63"),
        ("s3://a..b?region=x", "3 to 63"),
        ("s3://127.0.0.1?region=x", "3 to 63"),
        ("s3://bucket:80?region=x", "3 to 63"),
        ("s3://-bucket?region=x", "3 to 63"),
        ("s3://bucket?region=evil.example", "us-east-1"),
        ("s3://bucket?region=x%2fy", "us-east-1"),
        ("s3://bucket?region=", "us-east-1"),
        ("s3://bucket?region=x&region=y", "twice"),
        ("s3://bucket?region=%zz", "percent"),
        ("s3://bucket?region=x&allow_http=true", "`allow_http`"),
        ("s3://bucket?region=x&secret-access-key=hidden", "`secret-access-key`"),
        ("s3://bucket?region=x&skip_signature=true", "`skip_signature`"),
        ("s3://bucket?region=x&endpoint=http://169.254.169.254", "https://store.example"),
        ("s3://bucket?region=x&endpoint=http://store.example", "https://store.example"),
        ("s3://bucket?region=x&endpoint=https://store.example:444", "https://store.example"),
        ("s3://bucket?region=x&endpoint=https://store.example/path", "https://store.example"),
        ("s3://bucket?region=x&endpoint=https://a:hidden@store.example", "https://store.example"),
        ("s3://bucket?region=x&endpoint=https://store.example@evil", "https://store.example"),
        ("s3://bucket?region=x#y", "fragment"),
        ("s3://bucket/../x?region=x", "`..`"),
        ("s3://bucket/%2e%2e/x?region=x", "`..`"),
        ("s3://bucket//x?region=x", "nothing between two slashes"),
        ("s3://bucket/a%00b?region=x", "other characters"),
        ("s3://bucket/é?region=x", "other characters"),
        (&long, "512"),
        ("gs://bucket?region=x", "`region`"),
        ("gs://bucket?service_account=/etc/passwd", "`service_account`"),
        ("r2://bucket", "lacks `account-id`"),
        ("r2://bucket?account-id=evil.example", "32 hexadecimal digits"),
        (&format!("r2://bucket?{account}&access-key-id=a"), "lacks `secret-access-key`"),
        (&format!("r2://bucket?{account}&secret-access-key=hidden"), "lacks `access-key-id`"),
        (
            &format!("r2://bucket?{account}&access-key-id=a&secret-access-key=hidden%0a"),
            "secret-access-key = `…`",
        ),
        (&format!("r2://my_bucket?{account}"), "3 to 63"),
        ("file:///../etc", "`..`"),
        ("file://host/tmp", "host"),
    ] {
        let error = destinations().parse(text).unwrap_err();
        assert!(error.to_string().contains(said), "{text}: {error}");
        assert!(!format!("{error} {error:?}").contains("hidden"), "{text}: {error:?}");
    }
}
