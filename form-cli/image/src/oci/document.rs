//! The JSON documents of an image in a registry: index, manifest, configuration (OCI image specification 1.1; Docker's image
//! manifest version 2, schema 2, is the same under other media types).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{OciDigest, OciError};

/// No manifest, index or configuration is longer: registries refuse longer manifests too.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;
/// No image has more: the file systems that layers are made for stop long before.
const MAX_LAYERS: usize = 500;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

const INDEX_TYPES: [&str; 2] = [OCI_INDEX, "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFEST_TYPES: [&str; 2] = [OCI_MANIFEST, "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIG_TYPES: [&str; 2] = ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// What a registry is told that we read.
pub(crate) fn accepted() -> String {
    INDEX_TYPES.iter().chain(&MANIFEST_TYPES).copied().collect::<Vec<_>>().join(", ")
}

/// A blob or a manifest, by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: OciDigest,
    /// Bytes.
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub variant: Option<String>,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }

    fn label(&self) -> String {
        let variant = self.variant.as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
        format!("{}/{}{variant}", self.os, self.architecture)
    }
}

/// What a manifest request is answered with.
#[derive(Debug)]
pub(crate) enum Document {
    /// The manifest for linux/amd64 is another document.
    Index(Descriptor),
    Manifest(ImageManifest),
}

#[derive(Debug, Deserialize)]
pub(crate) struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// Any of the documents, before it is known which.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Any {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// `media_type` is the one of the answer; the document's own counts more.
    ///
    /// # Errors
    /// When it is no image, or no image for this architecture.
    pub fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Self, OciError> {
        let any: Any = serde_json::from_slice(bytes).map_err(|source| OciError::Json { what: "manifest", source })?;
        let media_type = any.media_type.as_deref().or(media_type).unwrap_or_default();
        if any.schema_version == 1 {
            return Err(OciError::Unsupported {
                what: "an image manifest of schema 1, which is from before 2016: push the image anew".to_owned(),
            });
        }
        match any {
            Any { manifests: Some(manifests), .. } => choose(manifests).map(Self::Index),
            Any { config: Some(config), layers: Some(layers), .. } => ImageManifest { config, layers }.checked().map(Self::Manifest),
            _ => Err(OciError::Unsupported { what: format!("a document of type `{}`, not an image", shown(media_type)) }),
        }
    }
}

fn shown(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(100).collect()
}

fn choose(manifests: Vec<Descriptor>) -> Result<Descriptor, OciError> {
    let mut others: Vec<String> = Vec::new();
    for descriptor in manifests {
        match &descriptor.platform {
            Some(platform) if platform.is_ours() => {
                if descriptor.size > MAX_DOCUMENT {
                    return Err(OciError::TooLarge { what: "a manifest".to_owned(), size: descriptor.size, limit: MAX_DOCUMENT });
                }
                return Ok(descriptor);
            }
            // Attestations of a build call themselves unknown/unknown.
            Some(platform) if platform.os == "unknown" => {}
            Some(platform) => others.push(shown(&platform.label())),
            None => others.push("one without a platform".to_owned()),
        }
    }
    others.sort();
    others.dedup();
    others.truncate(20);
    Err(OciError::Platform { others })
}

impl ImageManifest {
    fn checked(self) -> Result<Self, OciError> {
        if self.config.media_type == form_bundle::manifest::MEDIA_TYPE {
            let what = "an image of Formation inside of an index: ask for it by a tag or digest of its own".to_owned();
            return Err(OciError::Unsupported { what });
        }
        if !CONFIG_TYPES.contains(&self.config.media_type.as_str()) {
            return Err(OciError::Unsupported {
                what: format!("an artifact with a configuration of type `{}`, not an image", shown(&self.config.media_type)),
            });
        }
        if self.config.size > MAX_DOCUMENT {
            return Err(OciError::TooLarge { what: "the configuration".to_owned(), size: self.config.size, limit: MAX_DOCUMENT });
        }
        if self.layers.len() > MAX_LAYERS {
            return Err(OciError::Unsupported { what: format!("an image of {} layers: the limit is {MAX_LAYERS}", self.layers.len()) });
        }
        for layer in &self.layers {
            Compression::of(&layer.media_type)?;
        }
        Ok(self)
    }
}

/// How a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// # Errors
    /// When the media type is none of a layer that we can read.
    pub fn of(media_type: &str) -> Result<Self, OciError> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Self::None),
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Self::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Self::Zstd),
            other => Err(OciError::Unsupported { what: format!("a layer of type `{}`", shown(other)) }),
        }
    }
}

/// The configuration of an image, as far as a VM has a use for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageConfig {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub config: Option<RunConfig>,
    #[serde(default)]
    pub rootfs: RootfsConfig,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RootfsConfig {
    /// Digests of the layers as they are unpacked, the lowest first.
    #[serde(default)]
    pub diff_ids: Vec<OciDigest>,
}

/// Execution parameters. Any may be absent or null.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct RunConfig {
    #[serde(default)]
    pub user: Option<String>,
    /// `KEY=VALUE`.
    #[serde(default)]
    pub env: Option<Vec<String>>,
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default)]
    pub cmd: Option<Vec<String>>,
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Keys are `80/tcp`, values are empty.
    #[serde(default)]
    pub exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
}

impl ImageConfig {
    /// # Errors
    /// When it is malformed, for another platform, or does not name as many layers as the manifest.
    pub fn parse(bytes: &[u8], layers: usize) -> Result<Self, OciError> {
        let config: Self = serde_json::from_slice(bytes).map_err(|source| OciError::Json { what: "configuration", source })?;
        let platform = Platform { architecture: config.architecture.clone(), os: config.os.clone(), variant: None };
        if !platform.is_ours() {
            return Err(OciError::Platform { others: vec![shown(&platform.label())] });
        }
        if config.rootfs.diff_ids.len() != layers {
            let what = format!("an image whose configuration names {} layers and whose manifest {layers}", config.rootfs.diff_ids.len());
            return Err(OciError::Unsupported { what });
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(platform: &str) -> String {
        let digest = OciDigest::of(b"x");
        format!(r#"{{"mediaType":"{}","digest":"{digest}","size":3{platform}}}"#, MANIFEST_TYPES[0])
    }

    #[test]
    fn an_index_leads_to_the_manifest_for_this_architecture() {
        let platform = |os: &str, architecture: &str| format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#);
        let index = |platforms: &[(&str, &str)]| {
            let manifests: Vec<String> = platforms.iter().map(|(os, architecture)| descriptor(&platform(os, architecture))).collect();
            format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, manifests.join(","))
        };
        let found = Document::parse(index(&[("linux", "arm64"), ("linux", "amd64")]).as_bytes(), None).unwrap();
        assert!(matches!(found, Document::Index(Descriptor { platform: Some(platform), .. }) if platform.architecture == "amd64"));
        let error = Document::parse(index(&[("linux", "s390x"), ("unknown", "unknown"), ("linux", "arm64")]).as_bytes(), None).unwrap_err();
        assert!(matches!(&error, OciError::Platform { others } if *others == ["linux/arm64", "linux/s390x"]), "{error}");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let digest = OciDigest::of(b"x");
        let manifest = |config: &str, layer: &str| {
            format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{digest}","size":2}},"layers":[{{"mediaType":"{layer}","digest":"{digest}","size":3}}]}}"#
            )
        };
        let tar = "application/vnd.oci.image.layer.v1.tar+zstd";
        assert!(matches!(Document::parse(manifest(CONFIG_TYPES[0], tar).as_bytes(), None), Ok(Document::Manifest(_))));
        for (text, word) in [
            (manifest("application/vnd.cncf.helm.config.v1+json", tar), "artifact"),
            (manifest(CONFIG_TYPES[1], "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "encrypted"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), "schema 1"),
            (r#"{"schemaVersion":2}"#.to_owned(), "not an image"),
        ] {
            let error = Document::parse(text.as_bytes(), None).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(matches!(Document::parse(b"<html>", None), Err(OciError::Json { .. })));
    }

    #[test]
    fn a_configuration_fits_its_manifest_and_this_architecture() {
        let config =
            |architecture: &str| format!(r#"{{"architecture":"{architecture}","os":"linux","config":null,"rootfs":{{"diff_ids":[]}}}}"#);
        assert_eq!(ImageConfig::parse(config("amd64").as_bytes(), 0).unwrap().config, None);
        assert!(matches!(ImageConfig::parse(config("arm64").as_bytes(), 0), Err(OciError::Platform { .. })));
        assert!(ImageConfig::parse(config("amd64").as_bytes(), 1).unwrap_err().to_string().contains("names 0 layers"));
    }
}
