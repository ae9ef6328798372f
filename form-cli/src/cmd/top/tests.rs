use form_api::{host::Host, stats::VmStats};
use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};
use serde_json::json;

use super::{
    board::{Board, Figures, HostView, Sort},
    view,
};

const ID: &str = "00112233445566778899aabbccddeeff";

fn host(name: &str) -> Host {
    serde_json::from_value(json!({
        "id": ID, "name": name, "public_key": "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "cluster": ID, "version": "0.1.0",
        "kernel": "6.1", "owner": null, "started_at": "2026-01-01T00:00:00Z", "now": "2026-01-01T00:00:00Z", "vcpus_total": 4,
        "vcpus_allocated": 1, "memory_total_mib": 4096, "memory_allocated_mib": 512, "disk_total_bytes": 1 << 30, "disk_free_bytes": 1 << 29,
        "vms": 1, "max_vms": 250
    }))
    .unwrap()
}

/// A VM that runs and takes so much of a processor, so many MiB, and so many bytes a second each way.
fn vm(name: &str, cpu: f64, memory_mib: u64, rate: f64) -> VmStats {
    serde_json::from_value(json!({
        "id": ID, "name": name, "state": "running", "at": "2026-01-01T00:00:00Z", "vcpus": 1, "uptime_ms": 90_000,
        "cpu_ms": 1200, "cpu_percent": cpu, "memory_bytes": 512 << 20, "memory_used_bytes": memory_mib << 20,
        "memory_percent": memory_mib as f64 / 5.12, "resident_bytes": 0, "exits": 7, "exits_per_second": 100.0, "restarts": 0,
        "disks": [{
            "id": "root", "reads": 10, "writes": 5, "flushes": 1, "errors": 3, "read_bytes": 1, "written_bytes": 1,
            "per_second": {"reads": 2.0, "writes": 1.0, "read_bytes": rate, "written_bytes": rate}
        }],
        "networks": []
    }))
    .unwrap()
}

fn here(name: &str, vms: Vec<VmStats>) -> HostView {
    HostView::from(Ok(Figures { host: host(name), vms }))
}

fn board() -> Board {
    let mut board = Board::new(vec!["den".to_owned(), "attic".to_owned()], Sort::Cpu, String::new());
    board.hear(0, here("den", vec![vm("web", 12.5, 64, 9000.0), vm("mail", 50.0, 8, 0.0)]));
    board.hear(1, here("attic", vec![vm("backup", 1.0, 128, 90_000.0)]));
    board
}

fn names(board: &Board) -> Vec<&str> {
    board.vms().iter().map(|(_, vm)| vm.name.as_str()).collect()
}

fn press(board: &mut Board, text: &str) -> bool {
    text.chars().any(|character| board.press(KeyEvent::from(KeyCode::Char(character))))
}

fn drawn(board: &mut Board, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(frame, board)).unwrap();
    let buffer = terminal.backend().buffer();
    let line = |row| (0..width).map(|column| buffer[(column, row)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

#[test]
fn vms_of_all_hosts_are_sorted() {
    let mut board = board();
    let mut orders = vec![names(&board).join(" ")];
    for _ in 0..5 {
        press(&mut board, "s");
        orders.push(names(&board).join(" "));
    }
    let by = ["mail web backup", "backup web mail", "backup web mail", "backup mail web", "backup mail web", "backup mail web"];
    assert_eq!(orders, by, "cpu, memory, disk, network, uptime, name");
    press(&mut board, "sr");
    assert_eq!((board.sort, names(&board).join(" ").as_str()), (Sort::Cpu, "backup web mail"));
}

#[test]
fn a_filter_is_typed_kept_and_taken_back() {
    let mut board = board();
    assert!(!press(&mut board, "/q"), "q is a letter of the filter here");
    board.press(KeyEvent::from(KeyCode::Backspace));
    press(&mut board, "WE");
    assert_eq!(names(&board), ["web"]);
    board.press(KeyEvent::from(KeyCode::Enter));
    press(&mut board, "/x");
    assert!(names(&board).is_empty());
    board.press(KeyEvent::from(KeyCode::Esc));
    assert_eq!((names(&board), board.typing.is_none()), (vec!["web"], true));
    // A host's VMs are found by its name.
    board.filter = "attic".to_owned();
    assert_eq!(names(&board), ["backup"]);
}

#[test]
fn keys_end_it() {
    let mut board = board();
    assert!(press(&mut board, "q"));
    assert!(board.press(KeyEvent::from(KeyCode::Esc)));
    press(&mut board, "/");
    assert!(board.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), "also while a filter is typed");
}

#[test]
fn a_host_that_goes_away_takes_its_figures_along() {
    let mut board = board();
    board.hear(0, HostView::Away("no answer\u{1b}[2J".to_owned()));
    assert_eq!(names(&board), ["backup"]);
    let lines = drawn(&mut board, 100, 10);
    assert!(lines[0].contains("away: no answer") && !lines[0].contains('\u{1b}'), "{lines:?}");
    board.hear(7, HostView::Asked);
    board.hear(0, here("den", Vec::new()));
    assert!(drawn(&mut board, 100, 10)[0].contains("0 VMs  cpu 0% of"), "nothing is not less than nothing");
}

#[test]
fn wide_terminals_show_everything() {
    let lines = drawn(&mut board(), 160, 9);
    assert_eq!(lines[0], "den               2 VMs  cpu 62% of 400%  memory 512 MiB of 4 GiB  disk 512 MiB free");
    let titles: Vec<&str> = lines[3].split("  ").map(str::trim).filter(|title| !title.is_empty()).collect();
    let all = ["NAME", "HOST", "STATE", "CPU", "MEMORY", "MEM%", "READ", "WRITTEN", "NET IN", "NET OUT", "EXITS/S", "ERRORS", "UPTIME"];
    assert_eq!(titles, all);
    let row: Vec<&str> = lines[5].split_whitespace().collect();
    assert_eq!(row, "web den running 12.5% 64 MiB 12.5% 8.8 KiB/s 8.8 KiB/s - - 100 3 90 s".split(' ').collect::<Vec<_>>());
    assert_eq!(lines[8], "q quit  s sort: cpu  r reverse  / filter");
}

#[test]
fn sixty_columns_show_what_matters_whole() {
    let lines = drawn(&mut board(), 60, 9);
    let titles: Vec<&str> = lines[3].split_whitespace().collect();
    assert_eq!(titles, ["NAME", "CPU", "MEMORY", "MEM%"]);
    assert_eq!(lines[4].split_whitespace().collect::<Vec<_>>(), ["mail", "50.0%", "8", "MiB", "1.6%"]);
    assert!(lines.iter().all(|line| line.chars().count() <= 60), "{lines:?}");
}

#[test]
fn the_smallest_terminals_are_no_trouble() {
    let mut many = Board::new((0..9).map(|number| format!("host-{number}")).collect(), Sort::Name, String::new());
    for host in 0..9 {
        many.hear(host, here("x", vec![vm("a", 1.0, 1, 1.0); 5]));
    }
    many.hear(8, HostView::Away("gone".to_owned()));
    for (width, height) in [(1, 1), (5, 2), (20, 3), (10, 8), (300, 4)] {
        let _ = drawn(&mut many, width, height);
    }
    let lines = drawn(&mut many, 60, 10);
    assert_eq!(lines[3], "and 6 more; 1 of 9 do not answer");
}

#[test]
fn long_lists_scroll_and_end() {
    let mut board = Board::new(vec!["den".to_owned()], Sort::Name, String::new());
    board.hear(0, here("den", (0..30).map(|number| vm(&format!("vm-{number:02}"), 0.0, 1, 0.0)).collect()));
    // A host, a blank line, titles, keys: eight VMs fit.
    let first = |board: &mut Board| drawn(board, 80, 12)[3].split_whitespace().next().unwrap().to_owned();
    assert_eq!(first(&mut board), "vm-00");
    board.press(KeyEvent::from(KeyCode::Down));
    assert_eq!(first(&mut board), "vm-01");
    board.press(KeyEvent::from(KeyCode::PageDown));
    assert_eq!(first(&mut board), "vm-09");
    board.press(KeyEvent::from(KeyCode::End));
    assert_eq!(first(&mut board), "vm-22");
    board.press(KeyEvent::from(KeyCode::PageDown));
    assert_eq!(first(&mut board), "vm-22");
    // What the user looked at is gone: the last page, not an empty one.
    board.hear(0, here("den", vec![vm("vm-00", 0.0, 1, 0.0)]));
    assert_eq!(first(&mut board), "vm-00");
}
