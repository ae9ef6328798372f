//! Passwords of a Formfile as crypt(5) hashes.

use std::collections::BTreeMap;

use form_types::Spec;
use sha_crypt::{Sha512Params, sha512_check, sha512_simple};

use crate::failure::Failure;

/// A hash for each user with a password. One that is there already is kept while the password still fits it: a new salt each time
/// would make every deploy a change.
///
/// # Errors
/// When the operating system has no randomness for a salt.
pub fn hashes(spec: &Spec, old: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Failure> {
    let mut hashes = BTreeMap::new();
    for user in &spec.users {
        let Some(passwd) = &user.passwd else { continue };
        let kept = old.get(&user.name).filter(|hash| sha512_check(passwd.expose(), hash).is_ok());
        let hash = match kept {
            Some(hash) => hash.clone(),
            None => sha512_simple(passwd.expose(), &Sha512Params::default())
                .map_err(|error| Failure::failed(format!("the password of {} cannot be hashed: {error:?}", user.name)))?,
        };
        hashes.insert(user.name.clone(), hash);
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(password: &str) -> Spec {
        let text =
            format!("NAME web\nENTRYPOINT /app\nUSER username:ada passwd:{password}\nUSER username:bob ssh_authorized_keys:ssh-ed25519\n");
        formfile::check("Formfile", &text, &formfile::LowerOptions::default()).spec.unwrap()
    }

    #[test]
    fn a_hash_is_kept_while_it_fits() {
        let first = hashes(&spec("hunter2"), &BTreeMap::new()).unwrap();
        assert_eq!(first.keys().collect::<Vec<_>>(), ["ada"]);
        assert!(first["ada"].starts_with("$6$"));
        assert_eq!(hashes(&spec("hunter2"), &first).unwrap(), first);
        assert_ne!(hashes(&spec("hunter3"), &first).unwrap(), first);
        let nonsense = [("ada".to_owned(), "$6$nonsense".to_owned())].into();
        assert!(sha512_check("hunter2", &hashes(&spec("hunter2"), &nonsense).unwrap()["ada"]).is_ok());
    }
}
