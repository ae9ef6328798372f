//! Rules between instructions: what may be given once, what must come first, what must be there.

use std::collections::BTreeMap;

use crate::{
    ast::{File, Instruction},
    diagnostic::{Code, Fault},
    keyword::Keyword,
    span::Span,
};

/// The most build steps: each becomes a layer of the image.
const MOST_STEPS: usize = 256;

/// How often an instruction may stand in a file.
enum Times {
    Once,
    /// The last one wins.
    LastWins,
    Any,
}

const fn times(keyword: Keyword) -> Times {
    match keyword {
        Keyword::Name
        | Keyword::Description
        | Keyword::From
        | Keyword::Vcpu
        | Keyword::Mem
        | Keyword::Disk
        | Keyword::Model
        | Keyword::Replicas
        | Keyword::Restart => Times::Once,
        Keyword::Entrypoint | Keyword::Cmd | Keyword::Healthcheck => Times::LastWins,
        Keyword::Arg
        | Keyword::Install
        | Keyword::Run
        | Keyword::Copy
        | Keyword::Env
        | Keyword::Workdir
        | Keyword::User
        | Keyword::Gpu
        | Keyword::Expose
        | Keyword::Volume
        | Keyword::Label
        | Keyword::Network => Times::Any,
    }
}

pub(crate) fn check(file: &File, source: &str, faults: &mut Vec<Fault>) {
    // A file that was not read at all has been refused as a whole.
    if file.items.is_empty() && !faults.is_empty() {
        return;
    }
    repeats(file, source, faults);
    order(file, faults);
    // A misspelt `NAME` has been reported as such.
    let misspelt =
        faults.iter().any(|fault| fault.code == Code::UnknownKeyword && fault.hint.as_ref().is_some_and(|hint| hint.contains("`NAME`")));
    if !misspelt && !file.instructions().any(|instruction| instruction.keyword == Keyword::Name) {
        let fault = Fault::error(Code::MissingName, Span::default(), "there is no `NAME`");
        faults.push(fault.hint("begin the file with `NAME` and a name such as `web`"));
    }
}

fn repeats(file: &File, source: &str, faults: &mut Vec<Fault>) {
    let mut first: BTreeMap<Keyword, &Instruction> = BTreeMap::new();
    for instruction in file.instructions() {
        let keyword = instruction.keyword;
        let Some(earlier) = first.get(&keyword) else {
            first.insert(keyword, instruction);
            continue;
        };
        let spelling = |of: &Instruction| source[of.keyword_span.start..of.keyword_span.end].to_owned();
        let (here, there) = (spelling(instruction), spelling(earlier));
        let alias = if here == there { String::new() } else { format!(" as `{there}`") };
        match times(keyword) {
            Times::Any => {}
            Times::Once => {
                let message = format!("`{here}` may be given once, and line {} already gives it{alias}", earlier.line);
                let fault = Fault::error(Code::Repeated, instruction.span, message).hint("remove one of the two lines");
                faults.push(fault.related(earlier.span, "first given here"));
            }
            Times::LastWins => {
                let message = format!("this `{here}` takes the place of the one in line {}", earlier.line);
                let fault = Fault::warning(Code::Overridden, instruction.span, message).hint(format!("remove line {}", earlier.line));
                faults.push(fault.related(earlier.span, "has no effect"));
                first.insert(keyword, instruction);
            }
        }
    }
}

fn order(file: &File, faults: &mut Vec<Fault>) {
    let mut steps = file.instructions().filter(|instruction| instruction.keyword.is_build_step());
    let first_step = steps.next();
    if let Some(step) = steps.nth(MOST_STEPS - 1) {
        let message = format!("a Formfile has at most {MOST_STEPS} build steps (`INSTALL`, `RUN`, `COPY`)");
        faults.push(Fault::error(Code::OutOfRange, step.span, message).hint("put several commands into one `RUN`"));
    }
    let Some(step) = first_step else { return };
    for from in file.instructions().filter(|instruction| instruction.keyword == Keyword::From) {
        if from.span.start > step.span.start {
            let message = format!("`FROM` must stand before the first build step, which is in line {}", step.line);
            let fault = Fault::error(Code::Order, from.span, message).hint("move `FROM` to the top, below `NAME`");
            faults.push(fault.related(step.span, "the first build step"));
        }
    }
}
