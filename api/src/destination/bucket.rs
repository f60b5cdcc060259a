//! From a destination to something that objects can be put into.

use std::{env, fs, path::PathBuf, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ObjectStore, RetryConfig, aws::AmazonS3Builder, gcp::GoogleCloudStorageBuilder,
    local::LocalFileSystem, path::Path,
};

use super::{
    Destination, DestinationError, Destinations, Keys, Place,
    client::{Connector, Origin},
};
use crate::config::DestinationSettings;

/// Where Amazon's machines get their credentials.
const AMAZON_METADATA: &str = "http://169.254.169.254";

/// Where Google's do.
const GOOGLE_METADATA: [&str; 2] = ["http://metadata.google.internal", "http://169.254.169.254"];

/// Where Google's credentials become tokens.
const GOOGLE_TOKENS: [&str; 2] = ["https://oauth2.googleapis.com", "https://accounts.google.com"];

/// A store, and where in it a destination is.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// What every object's name begins with.
    pub prefix: Path,
}

impl Bucket {
    /// The name of an object in the store.
    pub fn path(&self, name: &str) -> Path {
        self.prefix.parts().chain(Path::from(name).parts()).collect()
    }
}

impl Destinations {
    /// Makes the way to a destination ready. Nothing is sent yet. `keys` are those of an `r2://`
    /// destination.
    ///
    /// Requests that fail in passing are sent three times in all, within seconds; who wants more
    /// patience has it around this. Blocks: files with credentials are read, and a folder is made.
    pub fn open(
        &self,
        destination: &Destination,
        keys: Option<&Keys>,
    ) -> Result<Bucket, DestinationError> {
        let store = self.store(destination, keys)?;
        let prefix = Path::parse(&destination.directory).map_err(|error| {
            DestinationError::Open { place: destination.identity(), cause: error.to_string() }
        })?;
        Ok(Bucket { store, prefix })
    }

    fn store(
        &self,
        destination: &Destination,
        keys: Option<&Keys>,
    ) -> Result<Arc<dyn ObjectStore>, DestinationError> {
        let settings = &self.settings;
        let failed =
            |cause: String| DestinationError::Open { place: destination.identity(), cause };
        let missing =
            |remedy| DestinationError::Credentials { place: destination.identity(), remedy };
        let origin =
            |url: String| Origin::parse(&url).ok_or_else(|| failed(format!("no host: {url}")));
        let default = DestinationSettings::default();
        match &destination.place {
            Place::Folder { path, .. } => {
                fs::create_dir_all(path).map_err(|error| failed(error.to_string()))?;
                let store = LocalFileSystem::new_with_prefix(path)
                    .map_err(|error| failed(error.to_string()))?;
                Ok(Arc::new(store.with_fsync(true)))
            }
            Place::S3 { bucket, region, endpoint } => {
                let (origin, own) = if let Some(endpoint) = endpoint {
                    (endpoint.clone(), true)
                } else {
                    let url = settings.s3_endpoint.replace("{region}", region);
                    (origin(url)?, settings.s3_endpoint != default.s3_endpoint)
                };
                let keys = self.s3_keys(endpoint.as_ref()).map_err(failed)?;
                let metadata = keys.is_none() && settings.instance_metadata && endpoint.is_none();
                if keys.is_none() && !metadata {
                    return Err(missing(
                        "this host's operator gives them in `destinations.s3_credentials`, or in \
                         AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                    ));
                }
                s3(bucket, region, origin, own, keys.as_ref(), metadata)
                    .map_err(|error| failed(error.to_string()))
            }
            Place::R2 { bucket, account } => {
                let url = settings.r2_endpoint.replace("{account}", account);
                let own = settings.r2_endpoint != default.r2_endpoint;
                let keys = keys.ok_or_else(|| {
                    missing("send access-key-id and secret-access-key once, when it is added")
                })?;
                s3(bucket, "auto", origin(url)?, own, Some(keys), false)
                    .map_err(|error| failed(error.to_string()))
            }
            Place::Gs { bucket } => {
                let origin = origin(settings.gs_endpoint.clone())?;
                let own = settings.gs_endpoint != default.gs_endpoint;
                let file = gs_credentials(settings);
                let metadata = file.is_none() && settings.instance_metadata;
                if file.is_none() && !metadata {
                    return Err(missing(
                        "this host's operator gives them in `destinations.gs_credentials_file`, or \
                         in GOOGLE_APPLICATION_CREDENTIALS",
                    ));
                }
                gs(bucket, origin, own, file, metadata).map_err(|error| failed(error.to_string()))
            }
        }
    }

    /// The operator's keys for Amazon (`None`) or for an endpoint.
    fn s3_keys(&self, endpoint: Option<&Origin>) -> Result<Option<Keys>, String> {
        let found = self
            .settings
            .s3_credentials
            .iter()
            .find(|credentials| Origin::parse(&credentials.endpoint).as_ref() == endpoint);
        match found {
            Some(found) => Keys::from_file(&found.file, &found.profile).map(Some),
            None => Ok(Keys::from_environment()),
        }
    }
}

fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(1),
            base: 2.0,
        },
        max_retries: 2,
        retry_timeout: Duration::from_secs(10),
    }
}

fn s3(
    bucket: &str,
    region: &str,
    origin: Origin,
    own: bool,
    keys: Option<&Keys>,
    metadata: bool,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(region)
        .with_endpoint(origin.to_string())
        .with_allow_http(origin.is_plain())
        .with_virtual_hosted_style_request(false)
        .with_retry(retry());
    if let Some(keys) = keys {
        builder = builder
            .with_access_key_id(keys.access_key_id.reveal())
            .with_secret_access_key(keys.secret_access_key.reveal());
        if let Some(token) = &keys.session_token {
            builder = builder.with_token(token.reveal());
        }
    }
    let mut allowed = vec![origin];
    if metadata {
        builder = builder.with_metadata_endpoint(AMAZON_METADATA);
        allowed.extend(Origin::parse(AMAZON_METADATA));
    }
    let connector = Connector::new(allowed, own, metadata);
    Ok(Arc::new(builder.with_http_connector(connector).build()?))
}

fn gs(
    bucket: &str,
    origin: Origin,
    own: bool,
    credentials: Option<PathBuf>,
    metadata: bool,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_bucket_name(bucket)
        .with_base_url(&origin.to_string())
        .with_retry(retry());
    let mut allowed = vec![origin];
    allowed.extend(GOOGLE_TOKENS.iter().filter_map(|url| Origin::parse(url)));
    if let Some(file) = credentials {
        builder = builder.with_application_credentials(file.to_string_lossy());
    }
    if metadata {
        allowed.extend(GOOGLE_METADATA.iter().filter_map(|url| Origin::parse(url)));
    }
    let connector = Connector::new(allowed, own, metadata);
    Ok(Arc::new(builder.with_http_connector(connector).build()?))
}

/// The file with the operator's credentials for Google.
fn gs_credentials(settings: &DestinationSettings) -> Option<PathBuf> {
    let configured = &settings.gs_credentials_file;
    if !configured.as_os_str().is_empty() {
        return Some(configured.clone());
    }
    let named = env::var_os("GOOGLE_APPLICATION_CREDENTIALS").map(PathBuf::from);
    named.filter(|path| !path.as_os_str().is_empty())
}
