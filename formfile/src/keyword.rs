//! The instructions there are, and the nearest one to a word that is none.

/// An instruction. Aliases (`CPU`, `CORES`) are the same keyword.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Keyword {
    Name,
    Description,
    From,
    Arg,
    Install,
    Run,
    Copy,
    Env,
    Workdir,
    User,
    Vcpu,
    Mem,
    Disk,
    Gpu,
    Model,
    Entrypoint,
    Cmd,
    Expose,
    Volume,
    Replicas,
    Restart,
    Healthcheck,
    Label,
    Network,
}

/// What may follow an instruction, as far as reading lines depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Words with quotes; a trailing comment is stripped.
    Words,
    /// Free text; a trailing comment is stripped.
    Text,
    /// Passed to a shell as written.
    Shell,
}

/// Every spelling, the canonical one of a keyword before its aliases.
const SPELLINGS: [(&str, Keyword); 29] = [
    ("NAME", Keyword::Name),
    ("DESCRIPTION", Keyword::Description),
    ("FROM", Keyword::From),
    ("ARG", Keyword::Arg),
    ("INSTALL", Keyword::Install),
    ("RUN", Keyword::Run),
    ("COPY", Keyword::Copy),
    ("ENV", Keyword::Env),
    ("WORKDIR", Keyword::Workdir),
    ("USER", Keyword::User),
    ("VCPU", Keyword::Vcpu),
    ("CPU", Keyword::Vcpu),
    ("CORES", Keyword::Vcpu),
    ("MEM", Keyword::Mem),
    ("MEMORY", Keyword::Mem),
    ("MBS", Keyword::Mem),
    ("DISK", Keyword::Disk),
    ("STORAGE", Keyword::Disk),
    ("GPU", Keyword::Gpu),
    ("MODEL", Keyword::Model),
    ("ENTRYPOINT", Keyword::Entrypoint),
    ("CMD", Keyword::Cmd),
    ("EXPOSE", Keyword::Expose),
    ("VOLUME", Keyword::Volume),
    ("REPLICAS", Keyword::Replicas),
    ("RESTART", Keyword::Restart),
    ("HEALTHCHECK", Keyword::Healthcheck),
    ("LABEL", Keyword::Label),
    ("NETWORK", Keyword::Network),
];

/// Instructions of a Dockerfile that a Formfile has not, with what to write instead.
const FOREIGN: [(&str, &str); 5] = [
    ("ADD", "write `COPY`; to fetch or unpack something, write a `RUN`"),
    ("MAINTAINER", "write `LABEL maintainer=…`"),
    ("STOPSIGNAL", "a service is stopped with SIGTERM; leave the line out"),
    ("SHELL", "`RUN` uses /bin/sh; name another shell in the `RUN` itself, or begin a heredoc with `#!`"),
    ("ONBUILD", "leave the line out: a Formfile is not a base for others"),
];

impl Keyword {
    /// The keyword of a spelling, upper case only.
    pub fn parse(text: &str) -> Option<Self> {
        SPELLINGS.iter().find(|(spelling, _)| *spelling == text).map(|(_, keyword)| *keyword)
    }

    /// The canonical spelling.
    pub fn as_str(self) -> &'static str {
        SPELLINGS.iter().find(|(_, keyword)| *keyword == self).map_or("", |(spelling, _)| spelling)
    }

    pub(crate) const fn mode(self) -> Mode {
        match self {
            Self::Run | Self::Entrypoint | Self::Cmd | Self::Healthcheck => Mode::Shell,
            Self::Description => Mode::Text,
            _ => Mode::Words,
        }
    }

    /// Whether it makes a layer of the image.
    pub const fn is_build_step(self) -> bool {
        matches!(self, Self::Install | Self::Run | Self::Copy)
    }
}

/// What a word that is no keyword was probably meant to be.
pub(crate) struct Guess {
    pub(crate) keyword: Option<Keyword>,
    pub(crate) hint: Option<String>,
}

pub(crate) fn guess(word: &str) -> Guess {
    const LONGEST: usize = 24;
    if word.len() > LONGEST {
        return Guess { keyword: None, hint: None };
    }
    let upper = word.to_ascii_uppercase();
    if let Some(keyword) = Keyword::parse(&upper) {
        return Guess { keyword: Some(keyword), hint: Some(format!("keywords are upper case: write `{upper}`")) };
    }
    if let Some((_, instead)) = FOREIGN.iter().find(|(foreign, _)| *foreign == upper) {
        return Guess { keyword: None, hint: Some((*instead).to_owned()) };
    }
    let near = nearest(&upper, SPELLINGS.iter().map(|(spelling, _)| *spelling));
    Guess { keyword: near.and_then(Keyword::parse), hint: near.map(|spelling| format!("did you mean `{spelling}`?")) }
}

/// The candidate nearest to `word`, when it is near enough to be meant: a third of its letters may differ.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let most = |candidate: &str| candidate.len().max(word.len()).div_ceil(3);
    candidates
        // At least so many letters were inserted or left out: there is no need to count on.
        .filter(|candidate| candidate.len().abs_diff(word.len()) <= most(candidate))
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= most(candidate))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Optimal string alignment distance: insertions, deletions, substitutions, and swaps of neighbours.
fn distance(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().collect(), right.chars().collect());
    let mut before = vec![0; right.len() + 1];
    let mut previous: Vec<usize> = (0..=right.len()).collect();
    for (row, a) in left.iter().enumerate() {
        let mut current = vec![row + 1; right.len() + 1];
        for (column, b) in right.iter().enumerate() {
            let substituted = previous[column] + usize::from(a != b);
            let mut best = substituted.min(previous[column + 1] + 1).min(current[column] + 1);
            if row > 0 && column > 0 && *a == right[column - 1] && left[row - 1] == *b {
                best = best.min(before[column - 1] + 1);
            }
            current[column + 1] = best;
        }
        before = std::mem::replace(&mut previous, current);
    }
    previous[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        for (spelling, keyword) in SPELLINGS {
            assert_eq!(Keyword::parse(spelling), Some(keyword));
            assert_eq!(Keyword::parse(keyword.as_str()), Some(keyword));
        }
        assert_eq!(Keyword::parse("CORES"), Some(Keyword::Vcpu));
        assert_eq!(Keyword::Vcpu.as_str(), "VCPU");
        assert_eq!(Keyword::parse("name"), None);
    }

    #[test]
    fn guesses() {
        assert_eq!(guess("name").hint.as_deref(), Some("keywords are upper case: write `NAME`"));
        assert_eq!(guess("ENTRYPIONT").hint.as_deref(), Some("did you mean `ENTRYPOINT`?"));
        assert_eq!(guess("INSTAL").keyword, Some(Keyword::Install));
        assert!(guess("ADD").hint.is_some_and(|hint| hint.contains("COPY")));
        assert!(guess("XYZZYPLUGH").hint.is_none());
        assert!(guess(&"x".repeat(100_000)).hint.is_none());
    }

    #[test]
    fn distances() {
        assert_eq!(distance("RNU", "RUN"), 1);
        assert_eq!(distance("", "RUN"), 3);
        assert_eq!(distance("RUN", "RUN"), 0);
    }
}
