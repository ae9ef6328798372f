//! How the board looks: hosts above, VMs below, keys in the last line. What is less important goes first when the terminal is narrow.

use std::time::Duration;

use form_api::stats::VmStats;
use form_types::size::MIB;
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Row, Table},
};

use super::board::{Board, HostView};
use crate::{
    cmd::vm::stats::{disks, networks, number, percent, rate},
    ui::{bytes, count, printable, span},
};

/// At least so many VMs are shown before hosts are left out.
const LEAST_VMS: u16 = 3;

const SPACING: u16 = 2;

struct Column {
    title: &'static str,
    width: u16,
    /// The narrower the terminal, the fewer: 0 is always shown.
    rank: u8,
    text: fn(&str, &VmStats) -> String,
}

const COLUMNS: [Column; 13] = [
    Column { title: "NAME", width: 16, rank: 0, text: |_, vm| vm.name.to_string() },
    Column { title: "HOST", width: 12, rank: 5, text: |host, _| printable(host) },
    Column { title: "STATE", width: 9, rank: 2, text: |_, vm| vm.state.as_str().to_owned() },
    Column { title: "CPU", width: 7, rank: 0, text: |_, vm| percent(vm.cpu_percent) },
    Column { title: "MEMORY", width: 9, rank: 1, text: |_, vm| vm.memory_used_bytes.map_or_else(|| "-".to_owned(), bytes) },
    Column { title: "MEM%", width: 6, rank: 1, text: |_, vm| percent(vm.memory_percent) },
    Column { title: "READ", width: 11, rank: 3, text: |_, vm| rate(disks(vm, |rates| rates.read_bytes)) },
    Column { title: "WRITTEN", width: 11, rank: 3, text: |_, vm| rate(disks(vm, |rates| rates.written_bytes)) },
    Column { title: "NET IN", width: 11, rank: 4, text: |_, vm| rate(networks(vm, |rates| rates.received_bytes)) },
    Column { title: "NET OUT", width: 11, rank: 4, text: |_, vm| rate(networks(vm, |rates| rates.sent_bytes)) },
    Column { title: "EXITS/S", width: 8, rank: 6, text: |_, vm| number(vm.exits_per_second) },
    Column { title: "ERRORS", width: 6, rank: 6, text: |_, vm| vm.disks.iter().map(|disk| disk.errors).sum::<u64>().to_string() },
    Column {
        title: "UPTIME",
        width: 12,
        rank: 2,
        text: |_, vm| if vm.uptime_ms == 0 { "-".to_owned() } else { span(Duration::from_millis(vm.uptime_ms)) },
    },
];

/// The columns that fit: whole ranks, so that what belongs together comes and goes together.
fn columns(width: u16, several_hosts: bool) -> Vec<&'static Column> {
    let of = |rank: u8| COLUMNS.iter().filter(move |column| column.rank <= rank && (several_hosts || column.title != "HOST"));
    let needed = |rank: u8| of(rank).map(|column| column.width + SPACING).sum::<u16>();
    let rank = (0..=6).rev().find(|rank| needed(*rank) <= width + SPACING).unwrap_or(0);
    of(rank).collect()
}

pub fn draw(frame: &mut Frame<'_>, board: &mut Board) {
    let area = frame.area();
    let wanted = u16::try_from(board.hosts.len()).unwrap_or(u16::MAX);
    // A blank line, the titles and the keys are there besides.
    let hosts = wanted.min(area.height.saturating_sub(3 + LEAST_VMS)).max(1);
    let [above, _, middle, below] =
        Layout::vertical([Constraint::Length(hosts), Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]).areas(area);
    draw_hosts(frame, above, board);
    draw_vms(frame, middle, board);
    frame.render_widget(keys(board), below);
}

fn draw_hosts(frame: &mut Frame<'_>, area: Rect, board: &Board) {
    let room = usize::from(area.height);
    // The last line says how many have none.
    let shown = if board.hosts.len() > room { room.saturating_sub(1) } else { room };
    let mut lines: Vec<Line<'_>> = board.hosts.iter().take(shown).map(|(name, view)| host_line(name, view)).collect();
    if board.hosts.len() > shown {
        let away = board.hosts.iter().filter(|(_, view)| matches!(view, HostView::Away(_))).count();
        lines.push(Line::from(format!("and {} more; {away} of {} do not answer", board.hosts.len() - shown, board.hosts.len())));
    }
    frame.render_widget(ratatui::text::Text::from(lines), area);
}

fn host_line(name: &str, view: &HostView) -> Line<'static> {
    let name = Span::styled(format!("{:<16}", printable(name)), Style::new().add_modifier(Modifier::BOLD));
    let text = match view {
        HostView::Asked => Span::raw("  …"),
        HostView::Away(why) => Span::styled(format!("  away: {}", printable(why)), Style::new().fg(Color::Red)),
        HostView::Here(figures) => {
            let host = &figures.host;
            // The sum of nothing is -0.
            let used = figures.vms.iter().filter_map(|vm| vm.cpu_percent).fold(0.0, |sum, percent| sum + percent);
            Span::raw(format!(
                "  {}  cpu {used:.0}% of {}%  memory {} of {}  disk {} free",
                count(figures.vms.len(), "VM"),
                u64::from(host.vcpus_total) * 100,
                bytes(host.memory_allocated_mib * MIB),
                bytes(host.memory_total_mib * MIB),
                bytes(host.disk_free_bytes),
            ))
        }
    };
    Line::from(vec![name, text])
}

fn draw_vms(frame: &mut Frame<'_>, area: Rect, board: &mut Board) {
    board.fit = usize::from(area.height.saturating_sub(1));
    let columns = columns(area.width, board.hosts.len() > 1);
    let vms = board.vms();
    let offset = board.offset.min(vms.len().saturating_sub(board.fit.max(1)));
    let rows = vms.iter().skip(offset).take(board.fit).map(|(host, vm)| {
        let cells = columns.iter().map(|column| Cell::from((column.text)(host, vm)));
        // What needs a look stands out.
        let style = if vm.state.as_str() == "failed" { Style::new().fg(Color::Red) } else { Style::new() };
        Row::new(cells).style(style)
    });
    let header = Row::new(columns.iter().map(|column| column.title)).style(Style::new().add_modifier(Modifier::REVERSED));
    let widths =
        columns.iter().map(|column| if column.title == "NAME" { Constraint::Min(column.width) } else { Constraint::Length(column.width) });
    frame.render_widget(Table::new(rows, widths).header(header).column_spacing(SPACING), area);
    board.offset = offset;
}

fn keys(board: &Board) -> Line<'static> {
    if board.typing.is_some() {
        return Line::from(format!("/{}▏  Enter keeps it, Esc takes it back", printable(&board.filter)));
    }
    let order = if board.reversed { " (turned around)" } else { "" };
    let filter = if board.filter.is_empty() { "filter".to_owned() } else { format!("filter: {}", printable(&board.filter)) };
    Line::from(format!("q quit  s sort: {}{order}  r reverse  / {filter}", board.sort.as_str()))
}
