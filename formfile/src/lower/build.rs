//! `FROM`, `ARG`, `INSTALL`, `RUN`, `ENV`, `WORKDIR`: how the image is made, but for `COPY`.

use form_types::{
    ImageReference,
    spec::{Command, EnvScope, Step, StepAction},
};

use super::{
    Lowerer, split_options,
    value::{self, Wrong, shown},
    words,
};
use crate::{
    ast::{Body, Instruction},
    diagnostic::{Code, Fault},
    expand::Quoting,
    span::Span,
    word::unquote,
};

/// The most that all variables take together: the kernel gives a program little more.
const MOST_ENVIRONMENT: usize = 128 << 10;

impl Lowerer<'_, '_> {
    pub(super) fn from(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        let (options, words) = split_options(words);
        self.options(options, &[]);
        if let [_, word, ..] = words
            && word.raw.eq_ignore_ascii_case("AS")
        {
            let fault = Fault::error(Code::TooManyArguments, word.span, "a Formfile has one stage, which needs no name");
            self.faults.push(fault.hint("remove `AS …`; build what other stages made before, and copy it from the build context"));
        } else if let Some((word, rest)) = words.split_first() {
            if self.no_more(instruction, rest, "one argument")
                && let Some(text) = self.expand(word)
                && let Some(from) = self.take(base(&text), word.span)
            {
                self.draft.from.get_or_insert(from);
            }
        } else {
            self.missing(instruction, "a base such as `debian:12`");
        }
        self.variables.hide();
    }

    pub(super) fn arg(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        if words.is_empty() {
            self.missing(instruction, "`NAME` or `NAME=default`");
        }
        for word in words {
            let (name, default) = match word.raw.split_once('=') {
                None => (unquote(&word.raw), None),
                Some((name, default)) => (unquote(name), Some(default)),
            };
            if self.take(value::variable(&name), word.span).is_none() {
                continue;
            }
            self.declared.insert(name.clone());
            let value = match (self.options.build_args.get(&name), default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => {
                    let Some(value) = self.variables.expand(default, word.span, Quoting::Word, self.faults) else { continue };
                    Some(value)
                }
                (None, None) => self.variables.global(&name),
            };
            let total = self.variables.declare(&name, value.clone());
            self.limit(total, word.span);
            self.draft.args.insert(name, value);
        }
    }

    pub(super) fn install(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        if words.is_empty() {
            self.missing(instruction, "at least one package");
        }
        let mut packages = Vec::new();
        for word in words {
            let Some(text) = self.expand(word) else { continue };
            packages.extend(self.take(package(&text), word.span));
        }
        self.step(instruction, StepAction::Install { packages });
    }

    pub(super) fn run(&mut self, instruction: &Instruction) {
        let (options, command) = match &instruction.body {
            Body::Json { options, words, span } => {
                if words.is_empty() {
                    return self.missing(instruction, "a command");
                }
                if self.no_nul(words, *span).is_none() {
                    return;
                }
                (options, Command::Exec(words.clone()))
            }
            Body::Shell { options, text } => {
                if text.text.trim().is_empty() {
                    return self.missing(instruction, "a command");
                }
                (options, Command::Shell(text.text.clone()))
            }
            Body::Words(_) | Body::Text(_) => return,
        };
        self.options(options, &[]);
        let (env, workdir) = (self.variables.environment(), self.draft.workdir.clone());
        self.step(instruction, StepAction::Run { command, env, workdir });
    }

    pub(super) fn env(&mut self, instruction: &Instruction) {
        let (options, pairs) = split_options(words(instruction));
        let options = self.options(options, &["scope"]);
        let scope = match options.get("scope") {
            None => Some(EnvScope::System),
            Some((word, text)) => {
                let text = unquote(text);
                let scope = scope(&text);
                self.take(scope, word.span)
            }
        };
        if pairs.is_empty() {
            return self.missing(instruction, "`KEY=VALUE`");
        }
        // As in a Dockerfile, a line sees the variables as they were before it.
        let mut read = Vec::new();
        for word in pairs {
            let Some(text) = self.expand(word) else { continue };
            let Some((key, value)) = text.split_once('=') else {
                let fault = Fault::error(Code::InvalidValue, word.span, format!("{} is no `KEY=VALUE`", shown(&text)));
                self.faults.push(fault.hint("write `ENV KEY=VALUE`; put quotes around a value that holds blanks"));
                continue;
            };
            if self.take(value::variable(key), word.span).is_some() {
                read.push((key.to_owned(), value.to_owned(), word.span));
            }
        }
        let Some(scope) = scope else { return };
        for (key, value, span) in read {
            let total = if scope == EnvScope::System { self.variables.set(&key, &value) } else { 0 };
            self.limit(total, span);
            self.draft.env.insert((scope.clone(), key), value);
        }
    }

    fn limit(&mut self, total: usize, span: Span) {
        if total > MOST_ENVIRONMENT && !self.environment_full {
            self.environment_full = true;
            let fault = Fault::error(Code::OutOfRange, span, "all variables together take more than 128 KiB");
            self.faults.push(fault.hint("put large values into files and `COPY` them"));
        }
    }

    pub(super) fn workdir(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "an absolute path") else { return };
        let Some(text) = self.expand(word) else { return };
        if let Some(path) = self.take(value::absolute_path("`WORKDIR`", &text), word.span) {
            self.draft.workdir = Some(path);
        }
    }

    pub(super) fn step(&mut self, instruction: &Instruction, action: StepAction) {
        // A file whose environment is too large is refused; holding a copy for each step would only cost memory.
        if !self.environment_full {
            self.draft.steps.push(Step { action, line: instruction.line });
        }
    }
}

fn scope(text: &str) -> Result<EnvScope, Wrong> {
    let wrong = || Wrong::new(Code::InvalidValue, format!("a scope is `system`, `user:NAME` or `service:NAME`, not {}", shown(text)));
    let scope = EnvScope::try_from(text.to_owned()).map_err(|_| wrong())?;
    match &scope {
        EnvScope::System => {}
        EnvScope::User(name) => {
            value::account("a user name", name)?;
        }
        EnvScope::Service(name) => {
            let fits = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'@'));
            if !fits {
                return Err(wrong());
            }
        }
    }
    Ok(scope)
}

/// What an image may be made from.
fn base(text: &str) -> Result<String, Wrong> {
    if text == "scratch" {
        return Ok(text.to_owned());
    }
    if let Some(image) = text.strip_prefix("image:") {
        let wrong = |problem: String| Wrong::new(Code::InvalidValue, problem).hint("write `image:NAME` or `image:NAME:VERSION`");
        return image.parse::<ImageReference>().map(|_| text.to_owned()).map_err(|error| wrong(error.to_string()));
    }
    if text == "." || text.starts_with("./") {
        let parts = value::clean("a base directory or archive", text)?;
        if parts.is_empty() {
            return Err(Wrong::new(Code::InvalidPath, "the build context itself cannot be the base")
                .hint("put the base into a directory of its own: `./rootfs`"));
        }
        return Ok(format!("./{}", parts.join("/")));
    }
    if text.starts_with('/') || text.starts_with("../") || text == ".." {
        return Err(Wrong::new(Code::InvalidPath, format!("a base lies in the build context, not at {}", shown(text)))
            .hint("write a path that begins with `./`"));
    }
    if is_reference(text) {
        return Ok(text.to_owned());
    }
    Err(Wrong::new(Code::InvalidValue, format!("{} is no base", shown(text))).hint(
        "write `debian:12`, `scratch`, `image:NAME`, `./directory`, `./archive.tar`, or a reference such as `ghcr.io/user/image:tag`",
    ))
}

/// Distributions that are bootstrapped: their names mean no image of a registry.
const DISTRIBUTIONS: [&str; 2] = ["debian", "ubuntu"];

/// Whether a base, as [`base`] takes it, comes from a registry with a configuration of its own.
pub(super) fn is_of_a_registry(from: &str) -> bool {
    let name = from.split(':').next().unwrap_or_default();
    !(from == "scratch" || from.starts_with("image:") || from.starts_with('.') || DISTRIBUTIONS.contains(&name))
}

/// `[HOST[:PORT]/]PATH[:TAG][@sha256:DIGEST]` of the OCI distribution specification.
fn is_reference(text: &str) -> bool {
    let (rest, digest) = text.split_once('@').map_or((text, None), |(rest, digest)| (rest, Some(digest)));
    let hex = |digest: &str| digest.len() == 64 && digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !digest.is_none_or(|digest| digest.strip_prefix("sha256:").is_some_and(hex)) {
        return false;
    }
    let last_slash = rest.rfind('/').map_or(0, |at| at + 1);
    let (path, tag) = match rest[last_slash..].split_once(':') {
        None => (rest, None),
        Some((name, tag)) => (&rest[..last_slash + name.len()], Some(tag)),
    };
    let tag_fits = |tag: &str| {
        let first = tag.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_');
        first && tag.len() <= 128 && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
    };
    if !tag.is_none_or(tag_fits) || path.len() > 255 {
        return false;
    }
    let mut parts = path.split('/').peekable();
    let first = path.split('/').next().unwrap_or_default();
    if path.contains('/') && (first.contains(['.', ':']) || first == "localhost") {
        parts.next();
        let (host, port) = first.split_once(':').map_or((first, None), |(host, port)| (host, Some(port)));
        let host_fits = !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
        if !host_fits || port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return false;
        }
    }
    let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    parts.all(|part| {
        let inner = part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-'));
        inner && edge(part.bytes().next()) && edge(part.bytes().last())
    })
}

/// `NAME[:ARCHITECTURE][=VERSION]`. Nothing that a package manager could take for an option, a pattern or a removal.
fn package(text: &str) -> Result<String, Wrong> {
    let (name, version) = text.split_once('=').map_or((text, None), |(name, version)| (name, Some(version)));
    let (name, architecture) = name.split_once(':').map_or((name, None), |(name, architecture)| (name, Some(architecture)));
    let plain = |part: &str, more: &[u8]| {
        part.starts_with(|first: char| first.is_ascii_alphanumeric())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte))
    };
    let fits = plain(name, b"+._-")
        && !name.ends_with('-')
        && architecture.is_none_or(|architecture| plain(architecture, b"-_"))
        && version.is_none_or(|version| plain(version, b"+.~:_-"));
    if fits {
        return Ok(text.to_owned());
    }
    let wrong = Wrong::new(Code::InvalidName, format!("{} is no package name", shown(text)));
    Err(if text.starts_with('-') {
        wrong.hint("`INSTALL` takes package names only; use `RUN` for other options")
    } else if text.contains(',') {
        wrong.hint("separate packages by blanks")
    } else {
        wrong.hint("a package reads `nginx` or `nginx=1.22.1-9`; several are separated by blanks")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases() {
        for good in [
            "debian:12",
            "ubuntu:24.04",
            "alpine",
            "ghcr.io/user/image:tag",
            "localhost:5000/a/b_c",
            "registry.example:443/a@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "scratch",
            "./rootfs",
            "./rootfs.tar",
            "image:web",
            "image:web:3",
        ] {
            assert_eq!(base(good).ok().as_deref(), Some(good));
        }
        assert_eq!(base("./a//b/").ok().as_deref(), Some("./a/b"));
        for bad in [
            "",
            "Debian:12",
            "debian:",
            "/srv/root",
            "../root",
            "./../x",
            ".",
            "image:",
            "image:Web",
            "image:web:x",
            "a b",
            "a@sha256:1",
            "-x",
            "a//b",
            "host:x/y",
        ] {
            assert!(base(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bases_of_registries_are_told_apart() {
        for registry in ["registry.example/debian:12", "localhost:5000/a", "nginx:1.25", "nginx"] {
            assert!(is_of_a_registry(registry), "{registry}");
        }
        for other in ["debian:12", "ubuntu:24.04", "scratch", "./rootfs", "image:web:3"] {
            assert!(!is_of_a_registry(other), "{other}");
        }
    }

    #[test]
    fn packages() {
        for good in ["nginx", "g++", "libc6:amd64", "nginx=1.22.1-9+deb12u1", "python3.11", "NetworkManager", "1password"] {
            assert!(package(good).is_ok(), "{good}");
        }
        for bad in ["", "-y", "--allow", "nginx-", "a;b", "a b", "a=", "a:", "$(x)", "a/b", "../x", "a*", "a,b", "é"] {
            assert!(package(bad).is_err(), "{bad}");
        }
    }
}
