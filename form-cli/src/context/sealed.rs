//! A secret key under a passphrase: Argon2id (RFC 9106) makes a key of the passphrase, ChaCha20-Poly1305 (RFC 8439) seals with it. The public
//! half stays readable, and cannot be changed without the seal breaking.

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::{
    ChaCha20Poly1305, Key, KeyInit, Nonce,
    aead::{Aead, Payload},
};
use form_types::{PublicKey, SecretKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

const VERSION: u32 = 1;

/// What making a key costs: the second recommendation of RFC 9106, section 4.
const MEMORY_KIB: u32 = 64 * 1024;
const PASSES: u32 = 3;
const LANES: u32 = 4;

/// A file may not make us use more than this.
const MOST_MEMORY_KIB: u32 = 1024 * 1024;
const MOST_PASSES: u32 = 64;
const MOST_LANES: u32 = 64;

/// The identity file, where it has a passphrase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedKey {
    version: u32,
    pub public_key: PublicKey,
    kdf: Kdf,
    /// Hexadecimal, as the salt and the sealed key.
    nonce: String,
    sealed: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "name", rename_all = "lowercase")]
enum Kdf {
    Argon2id { memory_kib: u32, passes: u32, lanes: u32, salt: String },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SealError {
    #[error("the passphrase is wrong, or the file was changed")]
    WrongPassphrase,
    #[error("it is of a newer version ({0}) than this program knows")]
    Version(u32),
    #[error("its {0} makes no sense")]
    Field(&'static str),
    #[error("it cannot be sealed: {0}")]
    Seal(String),
}

impl SealedKey {
    /// # Errors
    /// When the operating system has no entropy to give.
    pub fn seal(key: &SecretKey, passphrase: &str) -> Result<Self, SealError> {
        let (mut salt, mut nonce) = ([0; 16], [0; 12]);
        for random in [&mut salt[..], &mut nonce[..]] {
            getrandom::fill(random).map_err(|error| SealError::Seal(error.to_string()))?;
        }
        let kdf = Kdf::Argon2id { memory_kib: MEMORY_KIB, passes: PASSES, lanes: LANES, salt: hex::encode(salt) };
        let mut sealed = Self { version: VERSION, public_key: key.public(), kdf, nonce: hex::encode(nonce), sealed: String::new() };
        let secret = Zeroizing::new(key.to_bytes());
        let text = sealed
            .cipher(passphrase)?
            .encrypt(&Nonce::from(nonce), Payload { msg: secret.as_slice(), aad: &sealed.header()? })
            .map_err(|error| SealError::Seal(error.to_string()))?;
        sealed.sealed = hex::encode(text);
        Ok(sealed)
    }

    /// # Errors
    /// When the passphrase is another, or the file is damaged or was changed.
    pub fn open(&self, passphrase: &str) -> Result<SecretKey, SealError> {
        if self.version != VERSION {
            return Err(SealError::Version(self.version));
        }
        let mut nonce = [0; 12];
        hex::decode_to_slice(&self.nonce, &mut nonce).map_err(|_| SealError::Field("nonce"))?;
        let sealed = hex::decode(&self.sealed).map_err(|_| SealError::Field("sealed key"))?;
        let secret = self
            .cipher(passphrase)?
            .decrypt(&Nonce::from(nonce), Payload { msg: &sealed, aad: &self.header()? })
            .map(Zeroizing::new)
            .map_err(|_| SealError::WrongPassphrase)?;
        let bytes: [u8; 32] = secret.as_slice().try_into().map_err(|_| SealError::Field("sealed key"))?;
        let key = SecretKey::from_bytes(*Zeroizing::new(bytes));
        if key.public() == self.public_key { Ok(key) } else { Err(SealError::Field("public key")) }
    }

    /// What the seal covers beside the key.
    fn header(&self) -> Result<Vec<u8>, SealError> {
        serde_json::to_vec(&(self.version, &self.public_key, &self.kdf)).map_err(|error| SealError::Seal(error.to_string()))
    }

    fn cipher(&self, passphrase: &str) -> Result<ChaCha20Poly1305, SealError> {
        let Kdf::Argon2id { memory_kib, passes, lanes, salt } = &self.kdf;
        if *memory_kib > MOST_MEMORY_KIB || *passes > MOST_PASSES || *lanes > MOST_LANES {
            return Err(SealError::Field("cost"));
        }
        let salt = hex::decode(salt).map_err(|_| SealError::Field("salt"))?;
        let params = Params::new(*memory_kib, *passes, *lanes, Some(32)).map_err(|_| SealError::Field("cost"))?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(passphrase.as_bytes(), &salt, key.as_mut_slice())
            .map_err(|_| SealError::Field("salt"))?;
        Ok(ChaCha20Poly1305::new(&Key::from(*key)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_passphrase_opens_and_nothing_can_be_changed() {
        let key = SecretKey::from_bytes([5; 32]);
        let sealed = SealedKey::seal(&key, "correct horse").unwrap();
        assert_eq!(sealed.open("correct horse").unwrap().to_bytes(), key.to_bytes());
        assert_eq!(sealed.open("correct house").unwrap_err(), SealError::WrongPassphrase);
        let json = serde_json::to_string(&sealed).unwrap();
        assert!(!json.contains(&key.to_hex()), "{json}");
        assert_eq!(serde_json::from_str::<SealedKey>(&json).unwrap(), sealed);

        let other = SealedKey { public_key: SecretKey::from_bytes([6; 32]).public(), ..sealed.clone() };
        assert_eq!(other.open("correct horse").unwrap_err(), SealError::WrongPassphrase);
        assert_eq!(SealedKey { version: 2, ..sealed.clone() }.open("x").unwrap_err(), SealError::Version(2));
        assert_eq!(SealedKey { nonce: "00".to_owned(), ..sealed.clone() }.open("x").unwrap_err(), SealError::Field("nonce"));
        let torn = SealedKey { sealed: sealed.sealed[..10].to_owned(), ..sealed.clone() };
        assert_eq!(torn.open("correct horse").unwrap_err(), SealError::WrongPassphrase);
        for (memory_kib, passes, lanes) in [(u32::MAX, 1, 1), (64, u32::MAX, 1), (64, 1, u32::MAX), (1, 1, 1), (64, 0, 1)] {
            let kdf = Kdf::Argon2id { memory_kib, passes, lanes, salt: "00".repeat(16) };
            assert_eq!(
                SealedKey { kdf, ..sealed.clone() }.open("x").unwrap_err(),
                SealError::Field("cost"),
                "{memory_kib} {passes} {lanes}"
            );
        }
    }
}
