//! `COPY`: what goes from the build context into the image, and where to.

use form_types::spec::{Copy, CopySource, StepAction};

use super::{
    Lowerer, split_options,
    value::{self, Wrong, shown},
};
use crate::{
    ast::{Body, Heredoc, Instruction, Word},
    diagnostic::{Code, Fault},
    expand::Quoting,
    span::Span,
};

impl Lowerer<'_, '_> {
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
}

/// A word of `COPY`, expanded.
struct Argument<'i> {
    text: String,
    span: Span,
    word: Option<&'i Word>,
}

fn heredoc_of<'h>(word: &Word, heredocs: &'h [Heredoc]) -> Option<&'h Heredoc> {
    let at = heredocs.partition_point(|heredoc| heredoc.span.start < word.span.start);
    heredocs.get(at).filter(|heredoc| heredoc.span == word.span)
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
