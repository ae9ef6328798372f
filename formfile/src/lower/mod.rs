//! From the syntax tree to the [`Spec`]: what the file means.

mod build;
mod command;
mod copy;
mod resource;
mod service;
pub(crate) mod user;
mod value;

use std::collections::{BTreeMap, BTreeSet};

use form_types::{
    Name, Spec,
    spec::{Env, EnvScope, Gpu, Healthcheck, Model, Port, Protocol, Resources, Restart, RestartPolicy, Step, User, Volume},
};

use self::value::Wrong;
use crate::{
    LowerOptions,
    ast::{Body, File, Instruction, Word},
    diagnostic::{Code, Fault},
    expand::{Quoting, Variables},
    keyword::{Keyword, nearest},
    span::Span,
    word::unquote,
};

const DEFAULT_FROM: &str = "debian:12";
const DEFAULT_VCPUS: u32 = 1;
const DEFAULT_MEMORY_MIB: u64 = 512;
const DEFAULT_DISK_GIB: u64 = 5;
const DEFAULT_NETWORK: &str = "default";

/// Says what a file means. `None` when what must be there is not; other faults leave out what they concern.
pub(crate) fn lower(file: &File, options: &LowerOptions, faults: &mut Vec<Fault>) -> Option<Spec> {
    let mut lowerer = Lowerer {
        options,
        faults,
        variables: Variables::default(),
        draft: Draft::default(),
        declared: BTreeSet::new(),
        spans: Spans::default(),
        environment_full: false,
    };
    for instruction in file.instructions() {
        lowerer.instruction(instruction);
    }
    lowerer.finish()
}

/// The spec in the making.
#[derive(Default)]
struct Draft {
    name: Option<(Name, Span)>,
    description: Option<String>,
    from: Option<String>,
    args: BTreeMap<String, Option<String>>,
    steps: Vec<Step>,
    vcpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_gib: Option<u64>,
    gpus: Vec<Gpu>,
    users: Vec<User>,
    run_as: Option<String>,
    env: BTreeMap<(EnvScope, String), String>,
    workdir: Option<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    /// The host ports that publish each exposed port: usually none or one.
    ports: BTreeMap<(u16, Protocol), BTreeSet<u16>>,
    volumes: Vec<Volume>,
    networks: Vec<Name>,
    replicas: Option<u32>,
    restart: Option<Restart>,
    healthcheck: Option<Healthcheck>,
    labels: BTreeMap<String, String>,
    model: Option<Model>,
}

/// Where things were first given, for faults that have to do with two places.
#[derive(Default)]
struct Spans {
    users: BTreeMap<String, Span>,
    run_as: Option<Span>,
    host_ports: BTreeMap<(Protocol, u16), (u16, Span)>,
    volumes: BTreeMap<String, Span>,
    paths: BTreeMap<String, Span>,
    devices: BTreeMap<String, Span>,
    networks: BTreeMap<Name, Span>,
    /// An `ENTRYPOINT` that a shell runs, which takes no arguments.
    shell_entrypoint: Option<Span>,
    cmd: Option<Span>,
}

struct Lowerer<'a, 'f> {
    options: &'a LowerOptions,
    faults: &'f mut Vec<Fault>,
    variables: Variables,
    draft: Draft,
    declared: BTreeSet<String>,
    spans: Spans,
    /// The environment is over its limit and that has been reported.
    environment_full: bool,
}

impl Lowerer<'_, '_> {
    fn instruction(&mut self, instruction: &Instruction) {
        match instruction.keyword {
            Keyword::Name => self.name(instruction),
            Keyword::Description => self.description(instruction),
            Keyword::From => self.from(instruction),
            Keyword::Arg => self.arg(instruction),
            Keyword::Install => self.install(instruction),
            Keyword::Run => self.run(instruction),
            Keyword::Copy => self.copy(instruction),
            Keyword::Env => self.env(instruction),
            Keyword::Workdir => self.workdir(instruction),
            Keyword::User => self.user(instruction),
            Keyword::Vcpu => self.vcpu(instruction),
            Keyword::Mem => self.mem(instruction),
            Keyword::Disk => self.disk(instruction),
            Keyword::Gpu => self.gpu(instruction),
            Keyword::Model => self.model(instruction),
            Keyword::Entrypoint => self.entrypoint(instruction),
            Keyword::Cmd => self.cmd(instruction),
            Keyword::Expose => self.expose(instruction),
            Keyword::Volume => self.volume(instruction),
            Keyword::Replicas => self.replicas(instruction),
            Keyword::Restart => self.restart(instruction),
            Keyword::Healthcheck => self.healthcheck(instruction),
            Keyword::Label => self.label(instruction),
            Keyword::Network => self.network(instruction),
        }
    }

    fn finish(mut self) -> Option<Spec> {
        let given = self.options.build_args.keys();
        for name in given.filter(|name| !self.declared.contains(*name)) {
            let message = format!("no `ARG` takes the build argument {}", value::shown(name));
            self.faults.push(Fault::warning(Code::UnusedBuildArg, Span::default(), message).hint(format!("declare `ARG {name}`")));
        }
        if let (Some(entrypoint), Some(cmd)) = (self.spans.shell_entrypoint, self.spans.cmd) {
            let fault = Fault::warning(Code::Ineffective, cmd, "the `ENTRYPOINT` is run by a shell, which does not use these arguments");
            let fault = fault.hint("write the `ENTRYPOINT` as a JSON array, or its arguments into it");
            self.faults.push(fault.related(entrypoint, "run by a shell"));
            // What has no effect is no part of the meaning.
            self.draft.cmd.clear();
        }
        self.replica_names();
        let mut draft = self.draft;
        draft.volumes.sort_by(|left, right| left.name.cmp(&right.name));
        if draft.networks.is_empty() {
            draft.networks.extend(DEFAULT_NETWORK.parse().ok());
        }
        let from = draft.from.unwrap_or_else(|| DEFAULT_FROM.to_owned());
        // Root is what `None` means, unless the base has a user of its own to be taken back.
        let run_as = draft.run_as.filter(|user| user != "root" || build::is_of_a_registry(&from));
        Some(Spec {
            name: draft.name?.0,
            description: draft.description,
            from,
            args: draft.args,
            steps: draft.steps,
            resources: Resources {
                vcpus: draft.vcpus.unwrap_or(DEFAULT_VCPUS),
                memory_mib: draft.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
                disk_gib: draft.disk_gib.unwrap_or(DEFAULT_DISK_GIB),
                gpus: draft.gpus,
            },
            users: draft.users,
            run_as,
            env: draft.env.into_iter().map(|((scope, key), value)| Env { scope, key, value }).collect(),
            workdir: draft.workdir,
            entrypoint: draft.entrypoint,
            cmd: draft.cmd,
            ports: draft.ports.into_iter().flat_map(published).collect(),
            volumes: draft.volumes,
            networks: draft.networks,
            replicas: draft.replicas.unwrap_or(1),
            restart: draft.restart.unwrap_or(Restart { policy: RestartPolicy::Always, max_retries: None }),
            healthcheck: draft.healthcheck,
            labels: draft.labels,
            model: draft.model,
        })
    }

    /// Replicas are named `web-1`, `web-2` …: these must be names too.
    fn replica_names(&mut self) {
        const LONGEST: usize = 63;
        let (Some((name, span)), Some(replicas)) = (&self.draft.name, self.draft.replicas) else { return };
        if replicas > 1 && name.as_str().len() + 1 + replicas.to_string().len() > LONGEST {
            let message =
                format!("`{name}` is too long for {replicas} replicas: with `-{replicas}` behind it, it has over {LONGEST} characters");
            self.faults.push(Fault::error(Code::InvalidName, *span, message).hint("choose a shorter name"));
        }
    }

    /// Takes a value, or reports what is wrong with it.
    fn take<T>(&mut self, value: Result<T, Wrong>, span: Span) -> Option<T> {
        match value {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.faults.push(wrong.at(span));
                None
            }
        }
    }

    /// The word with its variables expanded and its quotes off.
    fn expand(&mut self, word: &Word) -> Option<String> {
        self.variables.expand(&word.raw, word.span, Quoting::Word, self.faults)
    }

    fn missing(&mut self, instruction: &Instruction, what: &str) {
        let message = format!("`{}` needs {what}", instruction.keyword.as_str());
        self.faults.push(Fault::error(Code::MissingArgument, instruction.span, message));
    }

    /// The only argument of an instruction.
    fn only<'i>(&mut self, instruction: &'i Instruction, what: &str) -> Option<&'i Word> {
        let words = words(instruction);
        let Some((first, rest)) = words.split_first() else {
            self.missing(instruction, what);
            return None;
        };
        self.no_more(instruction, rest, "one argument").then_some(first)
    }

    /// Reports arguments that are too many.
    fn no_more(&mut self, instruction: &Instruction, rest: &[Word], takes: &str) -> bool {
        let (Some(first), Some(last)) = (rest.first(), rest.last()) else { return true };
        let message = format!("`{}` takes {takes}", instruction.keyword.as_str());
        self.faults.push(
            Fault::error(Code::TooManyArguments, first.span.to(last.span), message)
                .hint("remove the rest, or put quotes around what belongs together"),
        );
        false
    }

    /// Reads `--name=value` options. Each is given once; an unknown one is a fault. The values keep their quotes.
    fn options<'i>(&mut self, options: &'i [Word], known: &[&'static str]) -> BTreeMap<&'static str, (&'i Word, String)> {
        let mut found: BTreeMap<&'static str, (&Word, String)> = BTreeMap::new();
        for option in options {
            let (name, value) = option.raw[2..].split_once('=').map_or((&option.raw[2..], None), |(name, value)| (name, Some(value)));
            let Some(known_name) = known.iter().find(|known| **known == name) else {
                let fault =
                    Fault::error(Code::UnknownOption, option.span, format!("there is no option {}", value::shown(&format!("--{name}"))));
                let short = name.len() <= 24;
                let near = nearest(name, known.iter().copied()).filter(|_| short);
                self.faults.push(match near {
                    _ if name == "from" => {
                        fault.hint("a Formfile has one stage: build the files first and copy them from the build context")
                    }
                    Some(near) => fault.hint(format!("did you mean `--{near}=`?")),
                    None if known.is_empty() => fault.hint("remove it: this instruction has no options"),
                    None => fault.hint(format!("the options here are {}", list(known))),
                });
                continue;
            };
            let Some(value) = value.filter(|value| !value.is_empty()) else {
                self.faults.push(Fault::error(Code::MissingArgument, option.span, format!("`--{name}` needs a value: write `--{name}=…`")));
                continue;
            };
            if let Some((earlier, _)) = found.get(known_name) {
                let fault = Fault::error(Code::Repeated, option.span, format!("`--{name}` may be given once"));
                self.faults.push(fault.related(earlier.span, "first given here"));
                continue;
            }
            found.insert(known_name, (option, value.to_owned()));
        }
        found
    }

    fn name(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "a name") else { return };
        let name = self.take(value::name(&unquote(&word.raw)), word.span);
        if self.draft.name.is_none() {
            self.draft.name = name.map(|name| (name, word.span));
        }
    }

    fn description(&mut self, instruction: &Instruction) {
        let Body::Text(text) = &instruction.body else { return };
        let plain = crate::word::unquote_text(&text.text);
        if plain.is_empty() {
            return self.missing(instruction, "a text");
        }
        self.draft.description.get_or_insert(plain);
    }
}

/// A published port is exposed as well, so `EXPOSE 80 8080:80` means `EXPOSE 8080:80`.
fn published(((port, protocol), host_ports): ((u16, Protocol), BTreeSet<u16>)) -> Vec<Port> {
    if host_ports.is_empty() {
        return vec![Port { port, protocol, host_port: None }];
    }
    host_ports.into_iter().map(|host_port| Port { port, protocol, host_port: Some(host_port) }).collect()
}

fn list(names: &[&str]) -> String {
    names.iter().map(|name| format!("`--{name}=`")).collect::<Vec<_>>().join(", ")
}

/// The words of an instruction that consists of words.
fn words(instruction: &Instruction) -> &[Word] {
    match &instruction.body {
        Body::Words(words) => words,
        Body::Text(_) | Body::Json { .. } | Body::Shell { .. } => &[],
    }
}

/// Options at the front, and the other words.
fn split_options(words: &[Word]) -> (&[Word], &[Word]) {
    words.split_at(words.iter().take_while(|word| word.raw.starts_with("--")).count())
}
