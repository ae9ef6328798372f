//! Comparing a password with what shadow(5) has of it.

use yescrypt::{PasswordVerifier, Yescrypt};

/// What is compared for users who are not there, so that they are not told apart by the time it takes.
const NOBODYS: &str = "$6$Wq8q2cVbTn3mX1Yd$H5dP/g/I85hpt02Ckb6uvkAMbYYfQD/ie8JSWgE9t0s3a2dlbST.DM0UIJ8XJ6vmXf5uivmanQ2g6ThtA5XRR.";

/// The longest password that is looked at, in bytes.
const LONGEST: usize = 1024;

/// Whether `hash` is of this password: crypt(5) of SHA-256, SHA-512 and yescrypt, which Debian's `passwd` writes. `None` compares with
/// nobody's, and says no.
pub fn fits(password: &str, hash: Option<&str>) -> bool {
    if password.len() > LONGEST || password.contains('\0') {
        return false;
    }
    match hash {
        Some(hash) if hash.starts_with("$6$") => sha_crypt::sha512_check(password, hash).is_ok(),
        Some(hash) if hash.starts_with("$5$") => sha_crypt::sha256_check(password, hash).is_ok(),
        Some(hash) if hash.starts_with("$y$") => Yescrypt::default().verify_password(password.as_bytes(), hash).is_ok(),
        // Locked, without a password, or of a kind that is too weak to be used today.
        Some(_) | None => {
            let _ = sha_crypt::sha512_check(password, NOBODYS);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Made with crypt(3) of Debian.
    const SHA512: &str = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/";

    const SHA256: &str = "$5$saltsalt$gOjOtoMpVhru2uyjeJSEc/JaLQWOXMNmlOnj6T4AtC.";
    const YESCRYPT: &str = "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$tnSYvahCwPBHKZUspmcxMfb0.WiB9W.zEaKlOBL35rC";

    #[test]
    fn only_the_password_fits() {
        for hash in [SHA512, SHA256, YESCRYPT] {
            assert!(fits("password", Some(hash)), "{hash}");
            for wrong in ["Password", "", "password\0", "password "] {
                assert!(!fits(wrong, Some(hash)), "{wrong:?} {hash}");
            }
        }
    }

    #[test]
    fn what_is_no_hash_lets_nobody_in() {
        let locked = format!("!{SHA512}");
        for hash in [None, Some(""), Some("!"), Some("*"), Some("x"), Some("$6$"), Some("$y$"), Some("$y$j9T$x"), Some(locked.as_str())] {
            for password in ["", "password", "!", "*", "x"] {
                assert!(!fits(password, hash), "{password:?} {hash:?}");
            }
        }
    }
}
