//! `form top`: what hosts and their VMs use, on the whole terminal.

mod board;
#[cfg(test)]
mod tests;
mod view;

use std::{
    io::{self, IsTerminal},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use form_api::{
    client::{Client, Timeouts},
    stats::StatsQuery,
};
use ratatui::{DefaultTerminal, crossterm::event};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use self::board::{Board, Figures, HostView, Sort};
use crate::{
    context::{ConfigFile, Target},
    failure::{Failure, Outcome},
    session::Session,
};

/// Watch hosts and their VMs: sorted, filtered, until you press q
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the VMs are sorted by; s goes to the next one, r turns the order around
    #[arg(long, value_enum, default_value_t = Sort::Cpu)]
    sort: Sort,
    /// Show the VMs alone whose name, state or host has this text; / changes it
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
}

/// A host that is away is shown as such soon, and is asked again.
const TIMEOUTS: Timeouts = Timeouts { connect: Duration::from_secs(2), request: Duration::from_secs(5), deadline: None };

/// What rates are of, and how long an answer takes.
const INTERVAL_MS: u64 = 1000;

const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How often the keyboard's thread looks whether it is still wanted.
const KEY_PATIENCE: Duration = Duration::from_millis(100);

/// What one host has said, or why it did not.
struct Update {
    host: usize,
    figures: Result<Figures, String>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    if !io::stdout().is_terminal() || session.terminal.is_machine_readable() {
        return Err(Failure::usage("`form top` draws on a terminal, and this is none")
            .hint("`form vm stats` prints the figures once, `form vm stats -w -o json` goes on"));
    }
    let targets = targets(session)?;
    let names = targets.iter().map(name_of).collect();
    let (sender, updates) = mpsc::channel(16);
    for (host, target) in targets.iter().enumerate() {
        let client = session.connect(target, TIMEOUTS)?;
        tokio::spawn(follow(host, client, sender.clone()));
    }
    let board = Board::new(names, args.sort, args.filter);
    let failed = |error: io::Error| Failure::failed(format!("the terminal cannot be drawn on: {error}"));
    // From here on the terminal has to be given back, whatever happens.
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let ended = session.in_time(watch(board, &mut terminal, updates)).await;
    ratatui::try_restore().map_err(failed)?;
    ended?.map_err(failed)?;
    Ok(0)
}

/// All hosts of the context, unless one is named.
fn targets(session: &Session) -> Result<Vec<Target>, Failure> {
    let first = session.target()?;
    let config = ConfigFile::load()?.config;
    let context = if session.global.host.is_some() { None } else { config.chosen(session.global.context.as_ref())? };
    Ok(match context {
        Some(context) => context.hosts.iter().cloned().map(Target::Remote).collect(),
        None => vec![first],
    })
}

fn name_of(target: &Target) -> String {
    match target {
        Target::Local(_) => "this machine".to_owned(),
        Target::Remote(host) => host.label().to_owned(),
    }
}

/// Asks one host again and again, until nobody listens.
async fn follow(host: usize, client: Client, sender: mpsc::Sender<Update>) {
    loop {
        let asked = async {
            let query = StatsQuery { interval_ms: Some(INTERVAL_MS) };
            let (host, vms) = tokio::try_join!(client.host(), client.all_stats(&query))?;
            Ok::<_, form_api::client::ClientError>(Figures { host, vms })
        };
        let figures = asked.await.map_err(|error| error.to_string());
        let failed = figures.is_err();
        if sender.send(Update { host, figures }).await.is_err() {
            return;
        }
        if failed {
            tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
        }
    }
}

/// Draws until the user or a signal ends it.
async fn watch(mut board: Board, terminal: &mut DefaultTerminal, mut updates: mpsc::Receiver<Update>) -> io::Result<()> {
    let mut keyboard = Keyboard::listen();
    let [mut terminate, mut hang_up, mut interrupt] =
        [signal(SignalKind::terminate())?, signal(SignalKind::hangup())?, signal(SignalKind::interrupt())?];
    loop {
        terminal.draw(|frame| view::draw(frame, &mut board))?;
        tokio::select! {
            Some(update) = updates.recv() => board.hear(update.host, HostView::from(update.figures)),
            event = keyboard.events.recv() => match event {
                Some(Ok(event::Event::Key(key))) => if board.press(key) {
                    return Ok(());
                },
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            },
            _ = terminate.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

/// The thread that waits for keys; it ends soon after this is dropped.
struct Keyboard {
    events: mpsc::Receiver<io::Result<event::Event>>,
    unwanted: Arc<AtomicBool>,
}

impl Keyboard {
    fn listen() -> Self {
        let (sender, events) = mpsc::channel(16);
        let unwanted = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&unwanted);
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let event = match event::poll(KEY_PATIENCE) {
                    Ok(false) => continue,
                    Ok(true) => event::read(),
                    Err(error) => Err(error),
                };
                let failed = event.is_err();
                if sender.blocking_send(event).is_err() || failed {
                    return;
                }
            }
        });
        Self { events, unwanted }
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }
}
