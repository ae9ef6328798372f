//! `USER`: an account of the guest, or who runs the service.
//!
//! No message here shows a word of the line but names that were found to be names: any other may be the password.

use std::collections::BTreeMap;

use form_types::spec::{Secret, User};

use super::{
    Lowerer,
    value::{self, Wrong},
    words,
};
use crate::{
    ast::{Instruction, Word},
    diagnostic::{Code, Fault},
    keyword::nearest,
    span::Span,
    word::unquote,
};

const FIELDS: [&str; 10] = [
    "username",
    "passwd",
    "ssh_authorized_keys",
    "lock_passwd",
    "sudo",
    "shell",
    "ssh_pwauth",
    "disable_root",
    "chpasswd_expire",
    "groups",
];

type Fields = BTreeMap<&'static str, (String, Span)>;

impl Lowerer<'_, '_> {
    pub(super) fn user(&mut self, instruction: &Instruction) {
        match words(instruction) {
            [] => self.missing(instruction, "`username:…` and other fields, or one name"),
            [word] if !word.raw.contains([':', '=']) => self.run_as(word),
            words => {
                let before = self.faults.len();
                let fields = self.fields(words);
                let complete = self.faults.len() == before;
                self.account(instruction, &fields, complete);
            }
        }
    }

    fn run_as(&mut self, word: &Word) {
        let Some(text) = self.expand(word) else { return };
        let number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let name = if number {
            value::number32("a user number", &text, 0, u32::MAX - 1).map(|number| number.to_string())
        } else {
            value::account("a user name", &text)
        };
        let Some(name) = self.take(name, word.span) else { return };
        if let Some(earlier) = self.spans.run_as.replace(word.span) {
            let fault =
                Fault::warning(Code::Overridden, word.span, "this takes the place of an earlier `USER` that chose who runs the service");
            self.faults.push(fault.related(earlier, "has no effect"));
        }
        // Both ways of saying it mean the same.
        self.draft.run_as = Some(if name == "0" { "root".to_owned() } else { name });
    }

    fn fields(&mut self, words: &[Word]) -> Fields {
        let mut fields = Fields::new();
        for word in words {
            let text = unquote(&word.raw);
            let Some((name, value)) = text.split_once([':', '=']) else {
                let fault = Fault::error(Code::InvalidValue, word.span, "this is no `field:value`");
                self.faults.push(fault.hint("put quotes around a value that holds blanks: `passwd:\"two words\"`"));
                continue;
            };
            let Some(field) = FIELDS.iter().find(|field| **field == name) else {
                self.faults.push(unknown(name, word.span));
                continue;
            };
            if let Some((_, earlier)) = fields.get(field) {
                let fault = Fault::error(Code::Repeated, word.span, format!("`{field}` may be given once"));
                self.faults.push(fault.related(*earlier, "first given here"));
                continue;
            }
            fields.insert(field, (value.to_owned(), word.span));
        }
        fields
    }

    /// `complete`: each field was read, so that one which is missing was not just misspelt.
    fn account(&mut self, instruction: &Instruction, fields: &Fields, complete: bool) {
        let name = match fields.get("username") {
            Some((name, span)) => self.take(read("username", name, |name| value::account("a user name", name)), *span),
            None => {
                if complete {
                    let fault = Fault::error(Code::MissingArgument, instruction.span, "this user has no `username`");
                    self.faults.push(fault.hint("add `username:…`"));
                }
                None
            }
        };
        if complete && !fields.contains_key("passwd") && !fields.contains_key("ssh_authorized_keys") {
            let fault = Fault::error(
                Code::MissingArgument,
                instruction.span,
                "this user could not log in: there is neither `passwd` nor `ssh_authorized_keys`",
            );
            self.faults.push(fault.hint("add `passwd:…` or `ssh_authorized_keys:\"ssh-ed25519 …\"`"));
        }
        let mut flag = |field: &'static str, default: bool| match fields.get(field) {
            Some((text, span)) => {
                self.take(read(field, text, |text| value::boolean(&format!("`{field}`"), text)), *span).unwrap_or(default)
            }
            None => default,
        };
        let lock_passwd = flag("lock_passwd", false);
        let sudo = flag("sudo", false);
        let ssh_pwauth = flag("ssh_pwauth", true);
        let disable_root = flag("disable_root", true);
        let chpasswd_expire = flag("chpasswd_expire", true);
        let shell = match fields.get("shell") {
            Some((text, span)) => self.take(read("shell", text, |text| value::absolute_path("`shell`", text)), *span).unwrap_or_default(),
            None => "/bin/bash".to_owned(),
        };
        let passwd = fields.get("passwd").and_then(|(text, span)| self.passwd(text, *span));
        let ssh_authorized_keys = fields.get("ssh_authorized_keys").map(|(text, span)| self.keys(text, *span)).unwrap_or_default();
        let groups = fields.get("groups").map(|(text, span)| self.groups(text, *span)).unwrap_or_default();
        let Some(name) = name else { return };
        if let Some(earlier) = self.spans.users.insert(name.clone(), instruction.span) {
            let fault = Fault::error(Code::Repeated, instruction.span, format!("the user `{name}` is given twice"));
            self.faults.push(fault.hint("put all fields of a user into one `USER`").related(earlier, "first given here"));
            return;
        }
        let has_passwd = passwd.is_some();
        self.draft.users.push(User {
            name,
            sudo,
            shell,
            groups,
            ssh_authorized_keys,
            lock_passwd,
            ssh_pwauth,
            disable_root,
            chpasswd_expire,
            has_passwd,
            passwd,
        });
    }

    fn passwd(&mut self, text: &str, span: Span) -> Option<Secret> {
        if text.is_empty() {
            let wrong = Wrong::new(Code::InvalidValue, "`passwd` is empty").hint("leave it out for a user without a password");
            return self.take(Err(wrong), span);
        }
        Some(Secret::new(text))
    }

    fn keys(&mut self, text: &str, span: Span) -> Vec<String> {
        let keys: Vec<String> = text.split(',').map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
        if keys.is_empty() {
            self.faults.push(Fault::error(Code::InvalidValue, span, "`ssh_authorized_keys` holds no key"));
        }
        let is_key = |key: &String| {
            let mut parts = key.split_whitespace();
            let kind = parts.next().is_some_and(|kind| ["ssh-", "ecdsa-", "sk-"].iter().any(|start| kind.starts_with(start)));
            kind && parts.next().is_some()
        };
        if !keys.iter().all(is_key) {
            let fault = Fault::warning(Code::InvalidValue, span, "one of these does not look like an SSH public key");
            self.faults.push(fault.hint("a key reads `ssh-ed25519 AAAA… comment`, in quotes; several are separated by commas"));
        }
        keys
    }

    fn groups(&mut self, text: &str, span: Span) -> Vec<String> {
        let mut groups: Vec<String> = Vec::new();
        for group in text.split(',').map(str::trim).filter(|group| !group.is_empty()) {
            groups.extend(self.take(read("groups", group, |group| value::account("a group name", group)), span));
        }
        // Membership has no order.
        groups.sort();
        groups.dedup();
        groups
    }
}

/// The field that a word means, exactly or misspelt. `None` for what may be a part of a password with a colon in it.
pub(crate) fn meant(name: &str) -> Option<&'static str> {
    let plain = !name.is_empty() && name.len() <= 24 && name.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    plain.then(|| nearest(&name.to_ascii_lowercase(), FIELDS.iter().copied())).flatten()
}

fn unknown(name: &str, span: Span) -> Fault {
    match meant(name) {
        Some(near) => {
            Fault::error(Code::UnknownField, span, format!("`{name}` is no field of `USER`")).hint(format!("did you mean `{near}`?"))
        }
        None => Fault::error(Code::UnknownField, span, "this is no field of `USER`").hint(format!("the fields are {}", FIELDS.join(", "))),
    }
}

/// Reads the value of a field. A value that a misplaced quote may have put another field into is not shown.
fn read<T>(field: &str, text: &str, reader: impl FnOnce(&str) -> Result<T, Wrong>) -> Result<T, Wrong> {
    reader(text).map_err(|wrong| {
        if text.contains([':', '=', ' ', '\t']) {
            Wrong::new(Code::InvalidValue, format!("the value of `{field}` holds a blank, `:` or `=`"))
                .hint("is a quote missing or misplaced?")
        } else {
            wrong
        }
    })
}
