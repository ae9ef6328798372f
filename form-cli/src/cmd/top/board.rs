//! What is shown: the last words of every host, and how the user wishes to see them.

use std::cmp::Ordering;

use form_api::{host::Host, stats::VmStats};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::cmd::vm::stats::{disks, networks};

/// What VMs are sorted by: most first, names from a.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    Cpu,
    Memory,
    Disk,
    Network,
    Uptime,
    Name,
}

impl Sort {
    const ALL: [Self; 6] = [Self::Cpu, Self::Memory, Self::Disk, Self::Network, Self::Uptime, Self::Name];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Network => "network",
            Self::Uptime => "uptime",
            Self::Name => "name",
        }
    }

    fn next(self) -> Self {
        let index = Self::ALL.iter().position(|sort| *sort == self).unwrap_or(0);
        Self::ALL[(index + 1) % Self::ALL.len()]
    }

    fn compare(self, one: &VmStats, other: &VmStats) -> Ordering {
        let most = |value: fn(&VmStats) -> f64| value(other).total_cmp(&value(one));
        match self {
            Self::Cpu => most(|vm| vm.cpu_percent.unwrap_or(0.0)),
            Self::Memory => other.memory_used_bytes.unwrap_or(0).cmp(&one.memory_used_bytes.unwrap_or(0)),
            Self::Disk => most(|vm| disks(vm, |rates| rates.read_bytes + rates.written_bytes).unwrap_or(0.0)),
            Self::Network => most(|vm| networks(vm, |rates| rates.received_bytes + rates.sent_bytes).unwrap_or(0.0)),
            Self::Uptime => other.uptime_ms.cmp(&one.uptime_ms),
            Self::Name => Ordering::Equal,
        }
    }
}

/// One answer of a host.
#[derive(Clone, Debug)]
pub struct Figures {
    pub host: Host,
    pub vms: Vec<VmStats>,
}

#[derive(Clone, Debug)]
pub enum HostView {
    /// It has not been heard yet.
    Asked,
    Here(Box<Figures>),
    Away(String),
}

impl From<Result<Figures, String>> for HostView {
    fn from(figures: Result<Figures, String>) -> Self {
        figures.map_or_else(Self::Away, |figures| Self::Here(Box::new(figures)))
    }
}

#[derive(Debug)]
pub struct Board {
    pub hosts: Vec<(String, HostView)>,
    pub sort: Sort,
    pub reversed: bool,
    pub filter: String,
    /// Whether keys go into the filter; what it was before is what Esc brings back.
    pub typing: Option<String>,
    /// The first VM that is shown.
    pub offset: usize,
    /// How many VMs fit, as they were drawn last.
    pub fit: usize,
}

impl Board {
    pub fn new(hosts: Vec<String>, sort: Sort, filter: String) -> Self {
        let hosts = hosts.into_iter().map(|name| (name, HostView::Asked)).collect();
        Self { hosts, sort, reversed: false, filter, typing: None, offset: 0, fit: 0 }
    }

    /// A host that is away keeps its line and loses its VMs: old figures are not shown as new ones.
    pub fn hear(&mut self, host: usize, view: HostView) {
        if let Some((_, held)) = self.hosts.get_mut(host) {
            *held = view;
        }
    }

    /// The VMs to show with the names of their hosts, sorted.
    pub fn vms(&self) -> Vec<(&str, &VmStats)> {
        let here = self.hosts.iter().filter_map(|(name, view)| match view {
            HostView::Here(figures) => Some((name.as_str(), &figures.vms)),
            HostView::Asked | HostView::Away(_) => None,
        });
        let all = here.flat_map(|(host, vms)| vms.iter().map(move |vm| (host, vm)));
        let wanted = self.filter.to_lowercase();
        let shown = |text: &str| text.to_lowercase().contains(&wanted);
        let mut vms: Vec<_> = all.filter(|(host, vm)| shown(vm.name.as_str()) || shown(vm.state.as_str()) || shown(host)).collect();
        vms.sort_by(|one, other| {
            let order = self.sort.compare(one.1, other.1).then_with(|| one.1.name.cmp(&other.1.name)).then_with(|| one.0.cmp(other.0));
            if self.reversed { order.reverse() } else { order }
        });
        vms
    }

    /// Takes a key; true when it is the end.
    pub fn press(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return matches!(key.code, KeyCode::Char('c' | 'd'));
        }
        if self.typing.is_some() {
            self.type_filter(key.code);
            return false;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('/') => self.typing = Some(self.filter.clone()),
            KeyCode::Up | KeyCode::Char('k') => self.offset = self.offset.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.offset += 1,
            KeyCode::PageUp => self.offset = self.offset.saturating_sub(self.fit.max(1)),
            KeyCode::PageDown | KeyCode::Char(' ') => self.offset += self.fit.max(1),
            KeyCode::Home => self.offset = 0,
            KeyCode::End => self.offset = usize::MAX,
            _ => {}
        }
        self.offset = self.offset.min(self.vms().len().saturating_sub(self.fit.max(1)));
        false
    }

    fn type_filter(&mut self, code: KeyCode) {
        self.offset = 0;
        match code {
            KeyCode::Enter => self.typing = None,
            KeyCode::Esc => self.filter = self.typing.take().unwrap_or_default(),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(character) => self.filter.push(character),
            _ => {}
        }
    }
}
