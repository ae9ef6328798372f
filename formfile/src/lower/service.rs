//! `EXPOSE`, `VOLUME`, `RESTART`, `HEALTHCHECK`, `LABEL`, `NETWORK`.

use form_types::{
    label,
    size::GIB,
    spec::{Command, Healthcheck, HealthcheckKind, Port, Protocol, Restart, RestartPolicy, Volume},
};

use super::{
    Lowerer, split_options,
    value::{self, Sizes, Wrong, shown},
    words,
};
use crate::{
    ast::{Body, Instruction, Word},
    diagnostic::{Code, Fault},
    span::Span,
    word::unquote,
};

/// As large as `DISK` may be.
const VOLUME: Sizes = Sizes { what: "a volume's size", unit: GIB, unit_name: "GiB", least: 1, most: 64 << 10 };

const HEALTHCHECK_OPTIONS: [&str; 4] = ["interval", "timeout", "retries", "start-period"];

impl Lowerer<'_, '_> {
    pub(super) fn expose(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        if words.is_empty() {
            self.missing(instruction, "a port");
        }
        for word in words {
            let Some(text) = self.expand(word) else { continue };
            let Some(port) = self.take(exposed(&text), word.span) else { continue };
            self.expose_port(port, word.span);
        }
    }

    fn expose_port(&mut self, port: Port, span: Span) {
        if let Some(host_port) = port.host_port
            && let Some((guest, earlier)) = self.spans.host_ports.insert((port.protocol, host_port), (port.port, span))
            && guest != port.port
        {
            let message = format!("port {host_port}/{} of the host is published twice", port.protocol.as_str());
            let fault = Fault::error(Code::Conflict, span, message).hint("choose another host port");
            self.faults.push(fault.related(earlier, "first published here"));
            return;
        }
        self.draft.ports.entry((port.port, port.protocol)).or_default().extend(port.host_port);
    }

    pub(super) fn volume(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        if words.is_empty() {
            self.missing(instruction, "`NAME:/path`, or `NAME:/path:SIZE`");
        }
        for word in words {
            let Some(text) = self.expand(word) else { continue };
            let Some(volume) = self.take(volume(&text), word.span) else { continue };
            if let Some(earlier) = self.spans.volumes.insert(volume.name.to_string(), word.span) {
                let fault = Fault::error(Code::Conflict, word.span, format!("the volume `{}` is given twice", volume.name));
                self.faults.push(fault.related(earlier, "first given here"));
            } else if let Some(earlier) = self.spans.paths.insert(volume.path.clone(), word.span) {
                let fault = Fault::error(Code::Conflict, word.span, format!("two volumes are mounted at {}", shown(&volume.path)));
                self.faults.push(fault.related(earlier, "the first one"));
            } else {
                self.draft.volumes.push(volume);
            }
        }
    }

    pub(super) fn restart(&mut self, instruction: &Instruction) {
        let Some(word) = self.only(instruction, "`always`, `on-failure` or `never`") else { return };
        let restart = self.take(restart(&unquote(&word.raw)), word.span);
        self.draft.restart = self.draft.restart.take().or(restart);
    }

    pub(super) fn label(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        if words.is_empty() {
            self.missing(instruction, "`key=value`");
        }
        for word in words {
            let Some(text) = self.expand(word) else { continue };
            let Some((key, value)) = text.split_once('=') else {
                let fault = Fault::error(Code::InvalidValue, word.span, format!("{} is no `key=value`", shown(&text)));
                self.faults.push(fault.hint("write `LABEL key=value`; put quotes around a value that holds blanks"));
                continue;
            };
            let fits = key.starts_with(|first: char| first.is_ascii_alphanumeric())
                && key.len() <= label::LONGEST_NAME
                && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/'));
            if !fits {
                let most = label::LONGEST_NAME;
                let message = format!("{} is no label: letters, digits, `.`, `_`, `-` and `/`, at most {most}", shown(key));
                self.faults.push(Fault::error(Code::InvalidName, word.span, message));
                continue;
            }
            if let Err(error) = label::check(key, value) {
                self.faults.push(Fault::error(Code::InvalidValue, word.span, error.to_string()));
                continue;
            }
            if self.draft.labels.insert(key.to_owned(), value.to_owned()).is_none() && self.draft.labels.len() == label::MOST + 1 {
                let message = format!("this is label {}: {} are possible", label::MOST + 1, label::MOST);
                self.faults.push(Fault::error(Code::InvalidValue, word.span, message));
            }
        }
    }

    pub(super) fn network(&mut self, instruction: &Instruction) {
        let words = words(instruction);
        if words.is_empty() {
            self.missing(instruction, "a network's name");
        }
        for word in words {
            let Some(name) = self.take(value::name(&unquote(&word.raw)), word.span) else { continue };
            match self.spans.networks.get(&name) {
                Some(earlier) => {
                    let fault = Fault::warning(Code::Repeated, word.span, format!("the network `{name}` is given twice"));
                    self.faults.push(fault.related(*earlier, "first given here"));
                }
                None => {
                    self.spans.networks.insert(name.clone(), word.span);
                    self.draft.networks.push(name);
                }
            }
        }
    }

    pub(super) fn healthcheck(&mut self, instruction: &Instruction) {
        let (options, check) = match &instruction.body {
            Body::Words(words) => {
                let (options, rest) = split_options(words);
                (options, self.probe(instruction, rest))
            }
            Body::Json { options, words, span } => {
                if words.is_empty() {
                    self.missing(instruction, "a command");
                }
                (options.as_slice(), self.no_nul(words, *span).map(|()| Probe::command(Command::Exec(words.clone()))))
            }
            Body::Shell { options, text } => {
                if text.text.is_empty() {
                    self.missing(instruction, "`http PORT /path`, `tcp PORT`, or a command");
                }
                (options.as_slice(), Some(Probe::command(Command::Shell(text.text.clone()))))
            }
            Body::Text(_) => return,
        };
        let options = self.options(options, &HEALTHCHECK_OPTIONS);
        let mut duration = |name: &str, least: u64, default: u64| match options.get(name) {
            Some((word, text)) => {
                self.take(value::duration_ms(&format!("`--{name}`"), &unquote(text), least), word.span).unwrap_or(default)
            }
            None => default,
        };
        let interval_ms = duration("interval", 1, 30_000);
        let timeout_ms = duration("timeout", 1, 30_000);
        let start_period_ms = duration("start-period", 0, 0);
        let retries =
            options.get("retries").and_then(|(word, text)| self.take(value::number32("`--retries`", &unquote(text), 1, 1000), word.span));
        let Some(probe) = check else { return };
        self.draft.healthcheck = probe.kind.map(|kind| Healthcheck {
            kind,
            port: probe.port,
            path: probe.path,
            command: probe.command,
            interval_ms,
            timeout_ms,
            retries: retries.unwrap_or(3),
            start_period_ms,
        });
    }

    /// `http PORT /path`, `tcp PORT`, `NONE`.
    fn probe(&mut self, instruction: &Instruction, words: &[Word]) -> Option<Probe> {
        let (first, rest) = words.split_first()?;
        let (kind, most) = match first.raw.as_str() {
            "http" => (HealthcheckKind::Http, 2),
            "tcp" => (HealthcheckKind::Tcp, 1),
            _ => return self.no_more(instruction, rest, "nothing behind `NONE`").then(Probe::default),
        };
        let Some(port) = rest.first() else {
            self.missing(instruction, "a port");
            return None;
        };
        let number = self.take(value::port(&unquote(&port.raw)), port.span);
        let too_many = rest.get(most..).is_some_and(|more| {
            let takes = if most == 2 { "a port and a path behind `http`" } else { "a port behind `tcp`" };
            !self.no_more(instruction, more, takes)
        });
        let path = match rest.get(1) {
            Some(word) if kind == HealthcheckKind::Http => self.take(http_path(&unquote(&word.raw)), word.span)?,
            _ => "/".to_owned(),
        };
        let path = (kind == HealthcheckKind::Http).then_some(path);
        let port = number.filter(|_| !too_many)?;
        Some(Probe { kind: Some(kind), port: Some(port), path, command: None })
    }
}

/// What a health check asks. No kind: there is none (`NONE`).
#[derive(Default)]
struct Probe {
    kind: Option<HealthcheckKind>,
    port: Option<u16>,
    path: Option<String>,
    command: Option<Command>,
}

impl Probe {
    fn command(command: Command) -> Self {
        Self { kind: Some(HealthcheckKind::Command), command: Some(command), ..Self::default() }
    }
}

fn http_path(text: &str) -> Result<String, Wrong> {
    if !text.starts_with('/') {
        return Err(Wrong::new(Code::InvalidPath, format!("a path of an HTTP check begins with `/`, not like {}", shown(text)))
            .hint("for example `HEALTHCHECK http 8080 /health`"));
    }
    if text.bytes().any(|byte| !byte.is_ascii_graphic()) {
        return Err(
            Wrong::new(Code::InvalidPath, "a path of an HTTP check holds no blanks and only ASCII").hint("write others as `%20` and so on")
        );
    }
    Ok(text.to_owned())
}

/// `PORT`, `HOSTPORT:PORT`, each with `/tcp` or `/udp`.
fn exposed(text: &str) -> Result<Port, Wrong> {
    let (ports, protocol) = match text.split_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, protocol)) => match protocol.to_ascii_lowercase().as_str() {
            "tcp" => (ports, Protocol::Tcp),
            "udp" => (ports, Protocol::Udp),
            _ => return Err(Wrong::new(Code::InvalidValue, format!("a protocol is `tcp` or `udp`, not {}", shown(protocol)))),
        },
    };
    let (host_port, port) = match ports.split_once(':') {
        None => (None, ports),
        Some((host_port, port)) => (Some(value::port(host_port)?), port),
    };
    let port = value::port(port)
        .map_err(|wrong| if ports.contains('-') { wrong.hint("name each port: ranges are not supported") } else { wrong })?;
    Ok(Port { port, protocol, host_port })
}

/// `NAME:/path[:SIZE]`.
fn volume(text: &str) -> Result<Volume, Wrong> {
    let Some((name, rest)) = text.split_once(':') else {
        return Err(Wrong::new(Code::InvalidValue, format!("a volume is `NAME:/path` or `NAME:/path:SIZE`, not {}", shown(text)))
            .hint("give it a name: `VOLUME data:/var/lib/data`"));
    };
    let (path, size) = rest.split_once(':').map_or((rest, None), |(path, size)| (path, Some(size)));
    let name = value::name(name)?;
    let path = value::absolute_path("a mount point", path)?;
    if path == "/" {
        return Err(Wrong::new(Code::InvalidPath, "a volume cannot be mounted at `/`"));
    }
    let size_bytes = size.map(|size| VOLUME.read(size)).transpose()?.map(|gib| gib * GIB);
    Ok(Volume { name, path, size_bytes })
}

fn restart(text: &str) -> Result<Restart, Wrong> {
    let (policy, retries) = text.split_once(':').map_or((text, None), |(policy, retries)| (policy, Some(retries)));
    let wrong = || {
        let wrong =
            Wrong::new(Code::InvalidValue, format!("`RESTART` is `always`, `on-failure`, `on-failure:N` or `never`, not {}", shown(text)));
        match text {
            "no" => wrong.hint("write `never`"),
            "unless-stopped" => wrong.hint("write `always`: a stopped instance stays stopped"),
            _ => wrong,
        }
    };
    let policy = match policy {
        "always" => RestartPolicy::Always,
        "on-failure" => RestartPolicy::OnFailure,
        "never" => RestartPolicy::Never,
        _ => return Err(wrong()),
    };
    let max_retries = match retries {
        None => None,
        Some(retries) if policy == RestartPolicy::OnFailure => Some(value::number32("the number of restarts", retries, 1, 1_000_000)?),
        Some(_) => return Err(wrong()),
    };
    Ok(Restart { policy, max_retries })
}
