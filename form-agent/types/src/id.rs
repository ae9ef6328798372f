//! Ids: 16 bytes, written as 32 lower-case hexadecimal digits. An object's id is derived from who asked for it and
//! that request's idempotency key, so two hosts that see the same request agree on it without talking.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::PublicKey;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an id is 32 hexadecimal digits")]
pub struct IdError;

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// The first twelve digits: enough for people, never for code.
            pub fn short(&self) -> String {
                self.to_string()[..12].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let mut bytes = [0; 16];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| IdError)?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

id!(
    /// A virtual machine, for its whole life, wherever it runs.
    VmId
);
id!(
    /// A volume, for its whole life, whatever it is attached to.
    VolumeId
);
id!(
    /// One asked-for change.
    OperationId
);
id!(
    /// A host: the first 16 bytes of the BLAKE3 hash of its public key.
    HostId
);
id!(
    /// A cluster: drawn at random when its first host is set up.
    ClusterId
);
id!(
    /// Chosen by the client for each mutating request: the same key with the same request gives back the same operation.
    IdempotencyKey
);

fn derive(context: &str, actor: &PublicKey, key: &IdempotencyKey, part: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(actor.as_bytes()).update(key.as_bytes()).update(part);
    first_half(hasher.finalize().as_bytes())
}

fn first_half(bytes: &[u8; 32]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&bytes[..16]);
    half
}

impl VmId {
    /// The id of the VM called `name` that `actor` asked for under `key`.
    pub fn derive(actor: &PublicKey, key: &IdempotencyKey, name: &str) -> Self {
        Self(derive("formation 2026 vm id", actor, key, name.as_bytes()))
    }
}

impl VolumeId {
    /// The id of the volume called `name` that `actor` asked for under `key`, by itself or in a deploy.
    pub fn derive(actor: &PublicKey, key: &IdempotencyKey, name: &str) -> Self {
        Self(derive("formation 2026 volume id", actor, key, name.as_bytes()))
    }
}

impl OperationId {
    pub fn derive(actor: &PublicKey, key: &IdempotencyKey) -> Self {
        Self(derive("formation 2026 operation id", actor, key, &[]))
    }
}

impl HostId {
    pub fn of(key: &PublicKey) -> Self {
        Self(first_half(blake3::hash(key.as_bytes()).as_bytes()))
    }

    /// Six hexadecimal digits that mark what this host makes outside its directories: interfaces, tables, cgroups.
    pub fn mark(&self) -> String {
        self.to_string()[..6].to_owned()
    }
}

impl ClusterId {
    /// A fresh random id.
    ///
    /// # Errors
    /// When the operating system has no entropy to give.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl IdempotencyKey {
    /// A fresh random key.
    ///
    /// # Errors
    /// When the operating system has no entropy to give.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SecretKey;

    #[test]
    fn ids_follow_actor_key_and_name() {
        let actor = SecretKey::from_bytes([7; 32]).public();
        let key = IdempotencyKey::from_bytes([1; 16]);
        let other = IdempotencyKey::from_bytes([2; 16]);
        assert_eq!(VmId::derive(&actor, &key, "web"), VmId::derive(&actor, &key, "web"));
        assert_ne!(VmId::derive(&actor, &key, "web"), VmId::derive(&actor, &key, "web2"));
        assert_ne!(VmId::derive(&actor, &key, "web"), VmId::derive(&actor, &other, "web"));
        assert_eq!(HostId::of(&actor).mark().len(), 6);
        let id = VmId::derive(&actor, &key, "web");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("zz".parse::<VmId>(), Err(IdError));
    }
}
