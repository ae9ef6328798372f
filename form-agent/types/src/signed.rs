//! `Signed<T>` is what somebody claims, `Verified<T>` what they really said: only `Signed::verify` makes one.

use serde::{Deserialize, Serialize};

use crate::{PublicKey, SecretKey, Signature};

/// A value with the key that signed it. The signature covers a context (so that words said in one place mean nothing in
/// another) and the value's JSON with its keys in the order of the type's fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed<T> {
    pub value: T,
    pub signer: PublicKey,
    pub signature: Signature,
}

/// A value whose signature holds. There is no other way to make one than [`Signed::verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified<T> {
    value: T,
    signer: PublicKey,
}

#[derive(Debug, thiserror::Error)]
pub enum SignedError {
    #[error("the signature does not match the message and the key {0}")]
    BadSignature(PublicKey),
    #[error("the value cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

fn message<T: Serialize>(context: &str, value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut message = Vec::with_capacity(256);
    message.extend_from_slice(context.as_bytes());
    message.push(0);
    serde_json::to_writer(&mut message, value)?;
    Ok(message)
}

impl<T: Serialize> Signed<T> {
    /// # Errors
    /// When `value` cannot be written as JSON.
    pub fn new(context: &str, value: T, key: &SecretKey) -> Result<Self, SignedError> {
        let signature = key.sign(&message(context, &value)?);
        Ok(Self { value, signer: key.public(), signature })
    }

    /// # Errors
    /// When the signature was not made by `signer` over this value in this context.
    pub fn verify(self, context: &str) -> Result<Verified<T>, SignedError> {
        if self.signer.verify(&message(context, &self.value)?, &self.signature) {
            Ok(Verified { value: self.value, signer: self.signer })
        } else {
            Err(SignedError::BadSignature(self.signer))
        }
    }
}

impl<T> Verified<T> {
    pub const fn value(&self) -> &T {
        &self.value
    }

    pub const fn signer(&self) -> &PublicKey {
        &self.signer
    }

    pub fn into_parts(self) -> (T, PublicKey) {
        (self.value, self.signer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_signed_verifies() {
        let key = SecretKey::from_bytes([9; 32]);
        let signed = Signed::new("deploy", "web".to_owned(), &key).unwrap();
        assert_eq!(signed.clone().verify("deploy").unwrap().value(), "web");
        assert!(signed.clone().verify("destroy").is_err());
        assert!(Signed { value: "wob".to_owned(), ..signed.clone() }.verify("deploy").is_err());
        assert!(Signed { signer: SecretKey::from_bytes([8; 32]).public(), ..signed }.verify("deploy").is_err());
    }
}
