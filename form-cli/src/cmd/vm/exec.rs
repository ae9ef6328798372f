use std::{collections::BTreeMap, io::IsTerminal};

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    client::Tunnel,
    exec::{ExecRequest, Frame, HEADER},
};
use form_types::Name;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    args::vm_name,
    complete,
    failure::{Failure, Outcome},
    session::Session,
};

/// Run a command in a VM; its exit code becomes this command's
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// Pass standard input on to the command
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run it as this user of the image instead of root
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Run it in this directory
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// Set a variable of its environment
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// The exec itself failed, as docker says it.
const EXEC_FAILED: u8 = 125;

/// What is wrong outside the guest has a code of its own, so that scripts can tell it from what the command says.
pub async fn run(args: Args, session: &Session) -> Outcome {
    if args.tty && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("standard input is no terminal").hint("leave out -t, or run the command on a terminal"));
    }
    exec(args, session).await.or_else(|failure| {
        session.terminal.failure(&failure);
        Ok(EXEC_FAILED)
    })
}

async fn exec(args: Args, session: &Session) -> Outcome {
    let request = ExecRequest {
        command: args.command,
        env: args.env.into_iter().collect::<BTreeMap<_, _>>(),
        user: args.user,
        workdir: args.workdir,
        terminal: args.tty.then(|| session.terminal.as_exec_terminal()),
    };
    let client = session.client()?;
    let tunnel = client.exec(&args.name, &request).await?;
    let raw = if args.tty { Some(session.terminal.raw_mode()?) } else { None };
    let end = relay(tunnel, session, args.interactive, args.tty).await;
    drop(raw);
    match end? {
        Frame::Exit { code } => Ok(code),
        Frame::Error(message) => Err(Failure::failed(message)),
        other => Err(Failure::failed(format!("the agent sent a frame that only a client sends: {other:?}"))),
    }
}

/// Carries bytes both ways until the last frame.
async fn relay(tunnel: Tunnel, session: &Session, interactive: bool, tty: bool) -> Result<Frame, Failure> {
    let (reader, mut writer) = tokio::io::split(tunnel);
    let (sender, mut frames) = mpsc::channel(16);
    tokio::spawn(read_frames(reader, sender));
    let failed = |error: std::io::Error| Failure::failed(format!("signals cannot be watched: {error}"));
    let mut resized = signal(SignalKind::window_change()).map_err(failed)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 16 * 1024];
    let mut reading = interactive;
    if !interactive {
        send(&mut writer, Frame::StdinClosed).await;
    }
    loop {
        tokio::select! {
            frame = frames.recv() => match frame {
                Some(Ok(Frame::Stdout(bytes))) => session.terminal.print_bytes(&bytes),
                Some(Ok(Frame::Stderr(bytes))) => session.terminal.print_error_bytes(&bytes),
                Some(Ok(last)) => return Ok(last),
                Some(Err(reason)) => return Err(broken(&reason)),
                None => return Err(broken("it ended without an exit code")),
            },
            read = stdin.read(&mut buffer), if reading => match read {
                Ok(0) | Err(_) => {
                    reading = false;
                    send(&mut writer, Frame::StdinClosed).await;
                }
                Ok(length) => send(&mut writer, Frame::Stdin(buffer[..length].to_vec())).await,
            },
            Some(()) = resized.recv(), if tty => {
                if let Some((rows, columns)) = session.terminal.size() {
                    send(&mut writer, Frame::Resize { rows, columns }).await;
                }
            }
            Some(()) = interrupted.recv() => send(&mut writer, Frame::Signal(2)).await,
        }
    }
}

/// A tunnel that no longer takes anything has ended: the reader says why.
async fn send(writer: &mut (impl AsyncWriteExt + Unpin), frame: Frame) {
    let _ = writer.write_all(&frame.encode()).await;
    let _ = writer.flush().await;
}

fn broken(reason: &str) -> Failure {
    Failure::new(form_api::ErrorCode::Unavailable, format!("the connection to the command broke: {reason}"))
        .hint("whether the command still runs is not known; see `form events`")
}

async fn read_frames(mut reader: ReadHalf<Tunnel>, sender: mpsc::Sender<Result<Frame, String>>) {
    loop {
        let frame = match read_frame(&mut reader).await {
            Ok(Some(frame)) => Ok(frame),
            Ok(None) => return,
            Err(reason) => Err(reason),
        };
        let last = frame.is_err();
        if sender.send(frame).await.is_err() || last {
            return;
        }
    }
}

async fn read_frame(reader: &mut ReadHalf<Tunnel>) -> Result<Option<Frame>, String> {
    let mut header = [0; HEADER];
    match reader.read_exact(&mut header).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.to_string()),
    }
    let (kind, length) = Frame::parse_header(&header).map_err(|error| error.to_string())?;
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).await.map_err(|error| error.to_string())?;
    Frame::decode(kind, payload).map(Some).map_err(|error| error.to_string())
}
