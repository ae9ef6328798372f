//! Brings the accounts of the machine to what the settings say.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt, lchown, symlink},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use form_types::settings::{Settings, UserSettings};

use super::{
    access,
    database::{Account, Accounts},
};
use crate::{
    environment,
    error::{Context, Error},
    files,
    report::BootReport,
};

/// Which passwords were set by us, so that one that its user changed later is not put back at each start.
const APPLIED: &str = "/var/lib/form/passwords.json";

/// Does everything that the settings say about users. What fails for one user is a fatal fault and does not keep the others back.
pub fn apply(settings: &Settings, report: &mut BootReport) {
    if settings.users.is_empty() && settings.root_login {
        return;
    }
    let before = Accounts::load();
    let mut accounts = before.clone();
    let mut applied = load_applied();
    let mut ready = Vec::new();
    for user in &settings.users {
        let Some(account) = report.fatal_on("users", accounts.ensure_user(user)) else { continue };
        let fingerprint = format!("{:?} {} {}", user.passwd_hash, user.lock_passwd, user.expire_passwd);
        if applied.get(&user.name) != Some(&fingerprint) {
            accounts.set_password(user, days_since_1970());
            applied.insert(user.name.clone(), fingerprint);
        }
        if !Path::new(&user.shell).exists() {
            report.warn("users", format_args!("the shell {} of {} is not in the image: INSTALL it or name another", user.shell, user.name));
        }
        ready.push((user, account));
    }
    if !settings.root_login && !settings.users.iter().any(|user| user.name == "root") {
        accounts.lock_password("root");
    }
    if report.fatal_on("users", accounts.store(&before)).is_none() {
        return;
    }
    store_applied(&applied, report);
    for (user, account) in ready {
        if let Err(error) = prepare_home(user, &account) {
            report.fatal("users", format_args!("{}: {error}", user.name));
        }
        let sudo = access::sudo(user, report);
        report.fatal_on("users", sudo);
    }
    report.fatal_on("users", access::sshd(settings));
}

fn days_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() / 86_400)
}

fn load_applied() -> BTreeMap<String, String> {
    fs::read(APPLIED).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn store_applied(applied: &BTreeMap<String, String>, report: &mut BootReport) {
    match serde_json::to_string(applied) {
        Ok(text) => drop(report.warn_on("users", files::write_if_changed(Path::new(APPLIED), &text, Some(0o600)))),
        Err(error) => report.warn("users", error),
    }
}

/// The home directory with the files of /etc/skel when it is new, the keys, and the user's environment.
fn prepare_home(user: &UserSettings, account: &Account) -> Result<(), Error> {
    let home = files::absolute(&account.home)?;
    if !home.exists() {
        if let Some(parent) = home.parent() {
            fs::create_dir_all(parent).at("create", parent)?;
        }
        fs::DirBuilder::new().mode(0o700).create(home).at("create", home)?;
        copy_tree(Path::new("/etc/skel"), home, account).at("copy /etc/skel to", home)?;
        lchown(home, Some(account.uid), Some(account.gid)).at("change the owner of", home)?;
    }
    let (uid, gid) = (account.uid, account.gid);
    if !user.ssh_authorized_keys.is_empty() || home.join(".ssh/authorized_keys").exists() {
        let directory = files::open_user_directory(home, Some(".ssh"), uid, gid)?;
        files::update_user_file(&directory, "authorized_keys", &access::key_lines(user), 0o600, uid, gid)?;
    }
    if !user.env.is_empty() || home.join(environment::USER_FILE).exists() {
        let directory = files::open_user_directory(home, None, uid, gid)?;
        files::update_user_file(&directory, environment::USER_FILE, &environment::exports(&user.env), 0o600, uid, gid)?;
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path, account: &Account) -> std::io::Result<()> {
    let entries = match fs::read_dir(from) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::create_dir(&target)?;
            fs::set_permissions(&target, fs::Permissions::from_mode(entry.metadata()?.permissions().mode() & 0o7777))?;
            copy_tree(&entry.path(), &target, account)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), &target)?;
        } else {
            continue;
        }
        lchown(&target, Some(account.uid), Some(account.gid))?;
    }
    Ok(())
}
