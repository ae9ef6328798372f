use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use clap_complete::engine::ArgValueCompleter;
use form_api::{ErrorCode, client::Client, vm::ForwardQuery};
use form_types::Name;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::{
    args::{Forward, vm_name},
    complete,
    failure::{Failure, Outcome},
    session::Session,
    signals,
};

/// Reach ports of a VM's own loopback interface from this machine
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// LOCAL:REMOTE, or one port for both
    #[arg(required = true, value_name = "PORTS")]
    ports: Vec<Forward>,
    /// Carry standard input and output to one port instead of listening, as ssh's ProxyCommand wants it
    #[arg(long, conflicts_with = "address")]
    stdio: bool,
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
}

#[derive(Serialize)]
struct Listening {
    local: SocketAddr,
    vm: Name,
    remote: u16,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    if args.stdio {
        return standard(&args, session).await;
    }
    let client = session.client()?;
    // A VM that does not exist is said now and not at the first connection.
    client.vm(&args.name).await?;
    let mut interrupts = signals::interrupts()?;
    let (troubles, mut trouble) = mpsc::channel(16);
    for forward in &args.ports {
        let wanted = SocketAddr::new(args.address, forward.local);
        let listener = TcpListener::bind(wanted).await.map_err(|error| {
            Failure::new(ErrorCode::Conflict, format!("cannot listen on {wanted}: {error}"))
                .hint("choose another local port, or 0 for any free one")
        })?;
        let local = listener.local_addr().unwrap_or(wanted);
        let listening = Listening { local, vm: args.name.clone(), remote: forward.remote };
        session.terminal.stream_item(&listening, || format!("{local} -> {}:{}", args.name, forward.remote))?;
        tokio::spawn(accept(listener, client.clone(), args.name.clone(), forward.remote, troubles.clone()));
    }
    session.terminal.note("Ctrl-C ends it.");
    loop {
        tokio::select! {
            Some(message) = trouble.recv() => session.terminal.warn(message),
            _ = interrupts.recv() => return Ok(0),
        }
    }
}

async fn standard(args: &Args, session: &Session) -> Outcome {
    let [forward] = args.ports[..] else {
        return Err(Failure::usage("--stdio goes to one port").hint("name one port, without a local one"));
    };
    let tunnel = session.client()?.forward(&args.name, &ForwardQuery { port: forward.remote }).await?;
    carry_standard(tunnel).await;
    Ok(0)
}

/// Carries standard input there and what comes from there to standard output, until nothing more comes.
pub async fn carry_standard(stream: impl AsyncRead + AsyncWrite + Send + 'static) {
    let (mut from, mut to) = tokio::io::split(stream);
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut tokio::io::stdin(), &mut to).await;
        let _ = to.shutdown().await;
    });
    let mut stdout = tokio::io::stdout();
    // How a connection ends is between its two ends.
    let _ = tokio::io::copy(&mut from, &mut stdout).await;
    let _ = stdout.flush().await;
}

async fn accept(listener: TcpListener, client: Client, name: Name, port: u16, troubles: mpsc::Sender<String>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (client, name, troubles) = (client.clone(), name.clone(), troubles.clone());
                tokio::spawn(async move {
                    if let Err(message) = carry(stream, &client, &name, port).await {
                        let _ = troubles.send(message).await;
                    }
                });
            }
            Err(error) => {
                let _ = troubles.send(format!("cannot take a connection: {error}")).await;
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        }
    }
}

async fn carry(mut stream: TcpStream, client: &Client, name: &Name, port: u16) -> Result<(), String> {
    let mut tunnel = client.forward(name, &ForwardQuery { port }).await.map_err(|error| format!("{name}:{port}: {error}"))?;
    // How a connection ends is between its two ends.
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut tunnel).await;
    Ok(())
}
