//! The conversation with a running guest: when it is ready, how its service fares, and its log, line by line, onto the host's disk.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use form_api::vm::{GuestDevice, GuestReport, LogStream};
use form_guest::protocol::{
    FrameKind, LogLine as GuestLine, LogStream as GuestStream, LogsRequest, Phase, ReadyReport, Reply, Request, StatusReport,
};
use form_types::VmId;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};

use super::{
    guest::{self, Connection, GuestError},
    process::Process,
    pulse,
};
use crate::{
    agent::Agent,
    logs::{KeptLine, Writer},
};

/// Between two tries to reach a guest that is still booting, or whose connection broke.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_millis(500);

/// How long the last lines of a VM that has ended may take to arrive.
const DRAIN: Duration = Duration::from_secs(2);

/// What the guest lets the driver know.
pub enum Update {
    Ready(Box<ReadyReport>),
    Status(Box<StatusReport>),
    /// It does not answer any more. The next status says that it does.
    Silent,
}

/// Of a VM, as far as its log is concerned.
#[derive(Clone, Copy)]
struct Run {
    at: Timestamp,
    /// The first line that is new.
    log_from: u64,
}

pub struct Session {
    watch: JoinHandle<()>,
    logs: JoinHandle<()>,
    /// The VM process is gone: nobody will answer any more.
    ended: Arc<AtomicBool>,
}

impl Session {
    /// Nothing is asked of a guest that stands still.
    pub fn open(agent: &Arc<Agent>, vm: VmId, process: &Process, paused: watch::Receiver<bool>) -> (Self, mpsc::Receiver<Update>) {
        let (sender, updates) = mpsc::channel(64);
        let control = process.control();
        let mut standing = paused.clone();
        let interval = pulse::interval(agent.config().guest_timeout_seconds);
        let directory = process.directory.clone();
        let watch = tokio::spawn(async move {
            let mut retry = FIRST_RETRY;
            while goes_on(&mut standing).await && !sender.is_closed() {
                let ended = until_ready(&control, &sender).await;
                if ended.is_ok() {
                    break;
                }
                tracing::trace!("until the guest is ready: {ended:?}");
                retry = (retry * 2).min(LAST_RETRY);
                sleep(retry).await;
            }
            let beats = standing.clone();
            let listen = async {
                while goes_on(&mut standing).await && !sender.is_closed() {
                    let ended = watch(&control, &sender).await;
                    tracing::trace!("guest conversation: {ended:?}");
                    sleep(FIRST_RETRY).await;
                }
            };
            let ask = || async {
                loop {
                    match status(&control, interval).await {
                        // It stands still, for as long as that takes.
                        None if directory.is_saving() => sleep(interval).await,
                        answer => return answer,
                    }
                }
            };
            tokio::select! {
                () = listen => {}
                () = pulse::feel(ask, interval, &sender, beats) => {}
            }
        });
        let (agent, control) = (Arc::clone(agent), process.control());
        let run = Run { at: process.record.started_at, log_from: process.record.log_from };
        let ended = Arc::new(AtomicBool::new(false));
        let has_ended = Arc::clone(&ended);
        let logs = tokio::spawn(async move {
            let writer = Writer::open(&agent.log_directory(&vm), agent.config().log_file_bytes, agent.log_changes(&vm));
            match writer {
                Ok(writer) => keep_logs(&control, writer, run, paused, &has_ended).await,
                Err(error) => tracing::error!(vm = %vm, "its log cannot be kept: {error}"),
            }
        });
        (Self { watch, logs, ended }, updates)
    }

    /// Of a VM without our guest: nobody says anything.
    pub fn with_nobody() -> (Self, mpsc::Receiver<Update>) {
        let (_, updates) = mpsc::channel(1);
        let (watch, logs) = (tokio::spawn(std::future::ready(())), tokio::spawn(std::future::ready(())));
        (Self { watch, logs, ended: Arc::default() }, updates)
    }

    /// Lets the log end when the VM process has, and stops listening.
    pub async fn drain(&mut self) {
        self.ended.store(true, Ordering::Release);
        let _ = tokio::time::timeout(DRAIN, &mut self.logs).await;
        self.logs.abort();
        self.watch.abort();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.logs.abort();
        self.watch.abort();
    }
}

/// Waits while the VM stands still; false when there is nothing more to wait for.
pub async fn goes_on(paused: &mut watch::Receiver<bool>) -> bool {
    paused.wait_for(|paused| !*paused).await.is_ok()
}

/// Waits until the guest's start has come to an end, well or badly.
async fn until_ready(control: &Path, sender: &mpsc::Sender<Update>) -> Result<(), GuestError> {
    while !sender.is_closed() {
        let mut connection = Connection::open(control, &Request::Ready { wait_ms: 10_000 }).await?;
        if let Reply::Ready(report) = connection.reply().await?
            && report.phase != Phase::Starting
        {
            let _ = sender.send(Update::Ready(Box::new(report))).await;
            break;
        }
    }
    Ok(())
}

async fn watch(control: &Path, sender: &mpsc::Sender<Update>) -> Result<(), GuestError> {
    let mut connection = Connection::open(control, &Request::Watch).await?;
    while let Reply::Status(status) = connection.reply().await? {
        if sender.send(Update::Status(Box::new(status))).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn status(control: &Path, limit: Duration) -> Option<StatusReport> {
    match guest::ask(control, &Request::Status, limit).await {
        Ok(Reply::Status(status)) => Some(status),
        answer => {
            tracing::trace!("a guest that is asked how it is: {answer:?}");
            None
        }
    }
}

/// Follows the log until the VM process is gone, from where the file ends.
async fn keep_logs(control: &Path, mut writer: Writer, run: Run, mut paused: watch::Receiver<bool>, ended: &AtomicBool) {
    let mut next = writer.last_sequence(run.at).map_or(run.log_from, |last| last + 1);
    let mut retry = FIRST_RETRY;
    while goes_on(&mut paused).await {
        match follow(control, &mut writer, run.at, &mut next).await {
            // The guest says that there will be no more: it is powering off.
            Ok(()) => return,
            Err(GuestError::Control(_)) if ended.load(Ordering::Acquire) || !control.exists() => return,
            Err(error) => tracing::trace!("following a log: {error}"),
        }
        sleep(retry).await;
        retry = (retry * 2).min(LAST_RETRY);
    }
}

async fn follow(control: &Path, writer: &mut Writer, run: Timestamp, next: &mut u64) -> Result<(), GuestError> {
    let request = Request::Logs(LogsRequest { from_sequence: Some(*next), tail: None, follow: true });
    let mut connection = Connection::open(control, &request).await?;
    let mut joined = Vec::new();
    loop {
        let frame = connection.next().await?.ok_or(GuestError::HungUp)?;
        match frame.kind {
            FrameKind::Log => {}
            FrameKind::End => return Ok(()),
            FrameKind::Error => return Err(GuestError::Refused(frame.parse()?)),
            _ => return Err(GuestError::Unexpected),
        }
        let line = GuestLine::from_frame(&frame)?;
        *next = line.sequence + 1;
        joined.extend_from_slice(&line.bytes);
        if line.continues && joined.len() < 64 * 1024 {
            continue;
        }
        let at = i64::try_from(line.timestamp_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let kept = KeptLine {
            at: at.unwrap_or_else(Timestamp::now),
            stream: match line.stream {
                GuestStream::Stdout => LogStream::Stdout,
                GuestStream::Stderr | GuestStream::Guest => LogStream::Stderr,
            },
            line: String::from_utf8_lossy(&joined).into_owned(),
            run,
            sequence: line.sequence,
        };
        joined.clear();
        if let Err(error) = writer.append(&kept) {
            tracing::warn!("a line of a log is lost: {error}");
        }
    }
}

/// The guest's report in the words of the API.
pub fn guest_report(report: ReadyReport) -> GuestReport {
    let reported_at = Some(Timestamp::now());
    GuestReport {
        kernel: report.kernel,
        hostname: report.hostname,
        addresses: report
            .addresses
            .into_iter()
            .flat_map(|(interface, addresses)| addresses.into_iter().map(move |address| format!("{interface} {address}")))
            .collect(),
        devices: report
            .devices
            .into_iter()
            .map(|device| GuestDevice { serial: device.serial, path: device.path, size_bytes: device.size_bytes, reported_at })
            .collect(),
        faults: report.faults.into_iter().map(|fault| format!("{}: {}", fault.step, fault.message)).collect(),
    }
}
