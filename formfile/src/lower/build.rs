//! `FROM`, `ARG`, `INSTALL`, `RUN`, `COPY`, `ENV`, `WORKDIR`: how the image is made.

use form_types::{
    ImageReference,
    spec::{Command, Copy, CopySource, EnvScope, Step, StepAction},
};

use super::{
    Lowerer, split_options,
    value::{self, Wrong, shown},
    words,
};
use crate::{
    ast::{Body, Heredoc, Instruction, Word},
    diagnostic::{Code, Fault},
    expand::Quoting,
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
            self.variables.declare(&name, value.clone());
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

    pub(super) fn copy(&mut self, instruction: &Instruction) {
        let (options, arguments) = match &instruction.body {
            Body::Json { options, words, span } => {
                let words: Vec<Argument> = words.iter().map(|word| Argument { text: word.clone(), span: *span, word: None }).collect();
                let before = self.faults.len();
                for argument in &words {
                    if argument.text.is_empty() {
                        self.faults.push(Fault::error(Code::InvalidPath, *span, "a path is empty"));
                    }
                }
                if self.faults.len() > before {
                    return;
                }
                (options.as_slice(), words)
            }
            Body::Words(words) => {
                let (options, rest) = split_options(words);
                (options, self.arguments(rest))
            }
            Body::Text(_) | Body::Shell { .. } => return,
        };
        let options = self.options(options, &["chown", "chmod"]);
        let chown = options.get("chown").and_then(|(word, text)| self.owner(word, text));
        let chmod = options.get("chmod").and_then(|(word, text)| {
            let text = self.variables.expand(text, word.span, Quoting::Word, self.faults)?;
            self.take(mode(&text), word.span)
        });
        let Some((target, sources)) = arguments.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            return self.missing(instruction, "what to copy, and where to");
        };
        let sources = sources.iter().filter_map(|source| self.source(source, &instruction.heredocs)).collect::<Vec<_>>();
        let to = target_path(&target.text, self.draft.workdir.as_deref());
        let Some(to) = self.take(to, target.span) else { return };
        if target.word.is_some_and(|word| heredoc_of(word, &instruction.heredocs).is_some()) {
            self.faults.push(Fault::error(Code::MissingArgument, target.span, "`COPY` needs a path to copy the heredoc to"));
            return;
        }
        if arguments.len() > 2 && !to.ends_with('/') {
            let fault = Fault::error(Code::InvalidPath, target.span, "several sources are copied into a directory");
            self.faults.push(fault.hint(format!("write it with a `/` at its end: `{}/`", to.trim_end_matches('/'))));
        }
        self.step(instruction, StepAction::Copy(Copy { sources, to, chown, chmod }));
    }

    fn arguments<'i>(&mut self, words: &'i [Word]) -> Vec<Argument<'i>> {
        let mut arguments = Vec::new();
        for word in words {
            // A word that cannot be expanded is reported; it still counts, so that no other fault follows from it.
            let text = if word.raw.starts_with("<<") { Some(word.raw.clone()) } else { self.expand(word) };
            let text = text.unwrap_or_else(|| word.raw.clone());
            if text.is_empty() {
                self.faults.push(Fault::error(Code::InvalidPath, word.span, "this path is empty"));
                continue;
            }
            arguments.push(Argument { text, span: word.span, word: Some(word) });
        }
        arguments
    }

    fn source(&mut self, argument: &Argument<'_>, heredocs: &[Heredoc]) -> Option<CopySource> {
        if let Some(heredoc) = argument.word.and_then(|word| heredoc_of(word, heredocs)) {
            let text = if heredoc.quoted {
                heredoc.text.clone()
            } else {
                self.variables.expand(&heredoc.text, heredoc.span, Quoting::Literal, self.faults)?
            };
            return Some(CopySource::Inline { name: heredoc.delimiter.clone(), text });
        }
        self.take(context_path(&argument.text), argument.span).map(CopySource::Path)
    }

    /// `USER[:GROUP]`.
    fn owner(&mut self, word: &Word, raw: &str) -> Option<String> {
        let text = self.variables.expand(raw, word.span, Quoting::Word, self.faults)?;
        let fits = |part: &str| {
            let number =
                !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()) && part.parse::<u32>().is_ok_and(|id| id < u32::MAX);
            number || value::account("an owner", part).is_ok()
        };
        let parts: Vec<&str> = text.split(':').collect();
        let result = if parts.len() <= 2 && parts.iter().all(|part| fits(part)) {
            Ok(text.clone())
        } else {
            Err(Wrong::new(Code::InvalidValue, format!("an owner is `USER` or `USER:GROUP`, names or numbers, not {}", shown(&text))))
        };
        self.take(result, word.span)
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
            if total > MOST_ENVIRONMENT && !self.environment_full {
                self.environment_full = true;
                let fault = Fault::error(Code::OutOfRange, span, "all variables together take more than 128 KiB");
                self.faults.push(fault.hint("put large values into files and `COPY` them"));
            }
            self.draft.env.insert((scope.clone(), key), value);
        }
    }

    pub(super) fn workdir(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "an absolute path") else { return };
        let Some(text) = self.expand(word) else { return };
        if let Some(path) = self.take(value::absolute_path("`WORKDIR`", &text), word.span) {
            self.draft.workdir = Some(path);
        }
    }

    fn step(&mut self, instruction: &Instruction, action: StepAction) {
        // A file whose environment is too large is refused; holding a copy for each step would only cost memory.
        if !self.environment_full {
            self.draft.steps.push(Step { action, line: instruction.line });
        }
    }
}

/// A word of `COPY`, expanded.
struct Argument<'i> {
    text: String,
    span: crate::span::Span,
    word: Option<&'i Word>,
}

fn heredoc_of<'h>(word: &Word, heredocs: &'h [Heredoc]) -> Option<&'h Heredoc> {
    let at = heredocs.partition_point(|heredoc| heredoc.span.start < word.span.start);
    heredocs.get(at).filter(|heredoc| heredoc.span == word.span)
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
        if !host_fits || !port.is_none_or(|port| port.parse::<u16>().is_ok()) {
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

/// Octal digits, as many as were written.
fn mode(text: &str) -> Result<String, Wrong> {
    if (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte)) {
        return Ok(text.to_owned());
    }
    Err(Wrong::new(Code::InvalidValue, format!("a mode has three or four octal digits, unlike {}", shown(text)))
        .hint("for example `--chmod=755`"))
}

/// A path or glob below the build context: `.` for all of it.
fn context_path(text: &str) -> Result<String, Wrong> {
    if text.starts_with('/') {
        return Err(Wrong::new(Code::InvalidPath, format!("a source lies in the build context, not at {}", shown(text)))
            .hint("write the path from the Formfile's directory on, without a `/` at its start"));
    }
    if text.contains("://") {
        return Err(Wrong::new(Code::InvalidPath, "`COPY` takes files, not addresses").hint("fetch it in a `RUN`"));
    }
    if text.chars().any(char::is_control) {
        return Err(Wrong::new(Code::InvalidPath, "a source holds a control character"));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part != ".." {
            parts.push(part);
        } else if parts.pop().is_none() {
            return Err(Wrong::new(Code::InvalidPath, format!("{} leaves the build context", shown(text)))
                .hint("move what is to be copied below the Formfile's directory"));
        }
    }
    Ok(if parts.is_empty() { ".".to_owned() } else { parts.join("/") })
}

/// The absolute target of a `COPY`. It ends in `/` when it names a directory.
fn target_path(text: &str, workdir: Option<&str>) -> Result<String, Wrong> {
    let directory = text.ends_with('/') || text == "." || text.ends_with("/.");
    let full = if text.starts_with('/') { text.to_owned() } else { format!("{}/{text}", workdir.unwrap_or("")) };
    let parts = value::clean("the target of `COPY`", &full)?;
    Ok(match (parts.is_empty(), directory) {
        (true, _) => "/".to_owned(),
        (false, true) => format!("/{}/", parts.join("/")),
        (false, false) => format!("/{}", parts.join("/")),
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
    fn packages() {
        for good in ["nginx", "g++", "libc6:amd64", "nginx=1.22.1-9+deb12u1", "python3.11", "NetworkManager", "1password"] {
            assert!(package(good).is_ok(), "{good}");
        }
        for bad in ["", "-y", "--allow", "nginx-", "a;b", "a b", "a=", "a:", "$(x)", "a/b", "../x", "a*", "a,b", "é"] {
            assert!(package(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn context_paths() {
        assert_eq!(context_path("./app/").ok().as_deref(), Some("app"));
        assert_eq!(context_path("a/../b/*.txt").ok().as_deref(), Some("b/*.txt"));
        assert_eq!(context_path(".").ok().as_deref(), Some("."));
        for bad in ["/etc/passwd", "..", "../x", "a/../../x", "http://x/y"] {
            assert!(context_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn targets() {
        let target = |text, workdir| target_path(text, workdir).ok();
        assert_eq!(target("/app", None).as_deref(), Some("/app"));
        assert_eq!(target("/app/", None).as_deref(), Some("/app/"));
        assert_eq!(target(".", Some("/srv")).as_deref(), Some("/srv/"));
        assert_eq!(target("./x", Some("/srv")).as_deref(), Some("/srv/x"));
        assert_eq!(target("./", None).as_deref(), Some("/"));
        assert_eq!(target("x", None).as_deref(), Some("/x"));
        assert_eq!(target("../x", Some("/srv")), None);
    }
}
