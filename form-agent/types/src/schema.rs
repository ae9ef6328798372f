//! Schemas of the values that travel as text, for the OpenAPI document of the API.

/// Describes a type whose JSON is a string: `text_schema!(Type, pattern, example, description)`.
#[macro_export]
macro_rules! text_schema {
    ($type:ident, $pattern:expr, $example:expr, $description:expr) => {
        impl ::utoipa::PartialSchema for $type {
            fn schema() -> ::utoipa::openapi::RefOr<::utoipa::openapi::schema::Schema> {
                ::utoipa::openapi::schema::ObjectBuilder::new()
                    .schema_type(::utoipa::openapi::schema::Type::String)
                    .pattern(Some($pattern))
                    .examples([$example])
                    .description(Some($description))
                    .into()
            }
        }

        impl ::utoipa::ToSchema for $type {
            fn name() -> ::std::borrow::Cow<'static, str> {
                ::std::borrow::Cow::Borrowed(stringify!($type))
            }
        }
    };
}

use crate::{ClusterId, Digest, HostId, IdempotencyKey, ImageReference, Name, OperationId, PublicKey, VmId, VolumeId, spec::EnvScope};

const ID: &str = "^[0-9a-fA-F]{32}$";

text_schema!(VmId, ID, "5f0c1de2a4b34d1f9e8a7b6c5d4e3f21", "A virtual machine, for its whole life.");
text_schema!(VolumeId, ID, "7c2ad0915e6f4b38a1c4d7e02f9b8a63", "A volume, for its whole life.");
text_schema!(OperationId, ID, "0a6d94c35b7e4f2181d0c9b8a7f6e5d4", "One change that somebody asked for.");
text_schema!(HostId, ID, "8a3dd495638ec17b20f49d55ab30c1e2", "A host: the first half of the BLAKE3 hash of its public key.");
text_schema!(ClusterId, ID, "c3b1f08e5d2947a6b0e4d7f1928a6c53", "A cluster: drawn at random when its first host is set up.");
text_schema!(
    IdempotencyKey,
    ID,
    "7d1e9a40c2b84f63a5d0e8f7162b3c94",
    "Chosen by the client: the same key with the same request is done once."
);
text_schema!(
    Digest,
    "^[0-9a-fA-F]{64}$",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "A BLAKE3 hash, in hexadecimal digits."
);
text_schema!(
    PublicKey,
    "^ed25519:[A-Za-z0-9_-]{43}$",
    "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
    "An Ed25519 public key (RFC 8032): URL-safe base64 without padding of a point of the curve that is not of small order."
);
text_schema!(Name, "^[a-z][a-z0-9-]{0,62}$", "web", "A name that a person chose: a DNS label that begins with a letter.");
text_schema!(
    ImageReference,
    "^[a-z][a-z0-9-]{0,62}(:0*[1-9][0-9]{0,8})?$",
    "web:2",
    "NAME, or NAME:VERSION with a version from 1; without one the newest is meant."
);
text_schema!(EnvScope, "^(system|(user|service):(.|\\n)+)$", "system", "`system`, `user:NAME` or `service:NAME`.");

#[cfg(test)]
mod tests {
    use utoipa::PartialSchema;

    use super::*;

    fn example<T: PartialSchema>() -> String {
        let schema = serde_json::to_value(T::schema()).unwrap();
        schema["examples"][0].as_str().unwrap().to_owned()
    }

    #[test]
    fn the_examples_are_values() {
        assert!(example::<VmId>().parse::<VmId>().is_ok());
        assert!(example::<VolumeId>().parse::<VolumeId>().is_ok());
        assert!(example::<OperationId>().parse::<OperationId>().is_ok());
        assert!(example::<HostId>().parse::<HostId>().is_ok());
        assert!(example::<ClusterId>().parse::<ClusterId>().is_ok());
        assert!(example::<IdempotencyKey>().parse::<IdempotencyKey>().is_ok());
        assert!(example::<Digest>().parse::<Digest>().is_ok());
        assert!(example::<PublicKey>().parse::<PublicKey>().is_ok());
        assert!(example::<Name>().parse::<Name>().is_ok());
        assert!(example::<ImageReference>().parse::<ImageReference>().is_ok());
        assert!(EnvScope::try_from(example::<EnvScope>()).is_ok());
    }
}
