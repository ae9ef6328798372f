//! One client: who it is, and what it may have.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use russh::{
    Channel, ChannelId, ChannelOpenFailure, MethodKind, MethodSet, Pty, Sig,
    keys::{Algorithm, PublicKey},
    server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session as Protocol, VerifiedPublicKey},
};
use rustix::termios::Winsize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::AbortHandle,
};

use super::{
    account::{self, Account},
    authorized_keys::KeyOptions,
    flow::{Flow, Input, Stream},
    password,
    server::{Server, Stranger},
    session::{Launch, Session, TerminalWish, Way, Work},
};
use crate::report::say;

/// How long a wrong password is thought about.
const WRONG_PASSWORD: Duration = Duration::from_secs(1);
/// The same for a connection that a client wants us to make.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Channels that a client may have open at once.
const MAX_CHANNELS: usize = 64;
/// Variables that a client may set for one session.
const MAX_VARIABLES: usize = 64;
/// Where images have it (Debian, Fedora, Alpine).
const SFTP_SERVERS: [&str; 3] = ["/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server"];
const PASSWD_PROGRAMS: [&str; 2] = ["/usr/bin/passwd", "/bin/passwd"];
/// As a shell says of a command that it did not run.
const NOT_RUN: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("{0}")]
    Protocol(#[from] russh::Error),
    #[error("the client sends without end and takes nothing")]
    TooMuch,
}

pub struct Connection {
    server: Arc<Server>,
    peer: SocketAddr,
    local: SocketAddr,
    /// Until it has shown who it is.
    stranger: Option<Stranger>,
    login: Option<Login>,
    flow: Arc<Flow>,
    channels: HashMap<ChannelId, Open>,
}

struct Login {
    account: Account,
    options: KeyOptions,
}

/// An open channel.
#[derive(Default)]
struct Open {
    input: Arc<Input>,
    terminal: Option<TerminalWish>,
    env: Vec<(String, String)>,
    what: What,
}

#[derive(Default)]
enum What {
    /// A session in which nothing was asked for yet.
    #[default]
    Nothing,
    Session(Session),
    Forward {
        _until_dropped: Forward,
    },
}

/// A connection to somewhere, made for the client. It is closed when this is dropped.
struct Forward(AbortHandle);

impl Drop for Forward {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    pub fn new(server: Arc<Server>, peer: SocketAddr, local: SocketAddr, stranger: Stranger) -> Self {
        Self { server, peer, local, stranger: Some(stranger), login: None, flow: Arc::default(), channels: HashMap::new() }
    }

    /// What is left for this user to try.
    fn refused(&self, user: &str) -> Auth {
        let mut methods = MethodSet::empty();
        methods.push(MethodKind::PublicKey);
        if self.server.rules.allows_password(user) {
            methods.push(MethodKind::Password);
        }
        Auth::Reject { proceed_with_methods: Some(methods), partial_success: false }
    }

    fn account(&self, user: &str) -> Option<Account> {
        match account::open(&self.server.root, &self.server.rules, user) {
            Ok(account) => Some(account),
            // Of names that are tried out the console need not be full.
            Err(account::Closed::NoSuchUser) => None,
            Err(reason) => {
                let user: String = user.chars().take(32).flat_map(char::escape_debug).collect();
                say(format_args!("sshd: nobody logs in as {user} from {}: {reason}", self.peer.ip()));
                None
            }
        }
    }

    fn by_key(&self, user: &str, key: &PublicKey, algorithm: &Algorithm) -> Option<Login> {
        // A signature over SHA-1 can be forged.
        if matches!(algorithm, Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
            return None;
        }
        let account = self.account(user)?;
        let options = account.key_options(key)?;
        Some(Login { account, options })
    }

    /// Takes the time that a wrong password takes, whatever is wrong.
    async fn by_password(&self, user: &str, password: &str) -> Option<Login> {
        if !self.server.rules.allows_password(user) {
            return None;
        }
        let wait = tokio::time::sleep(WRONG_PASSWORD);
        let account = self.account(user);
        let hash = account.as_ref().and_then(|account| account.hash.clone());
        let password = password.to_owned();
        let fits = {
            // One at a time: each takes a processor, and up to 16 MiB.
            let _turn = self.server.hashing.acquire().await;
            tokio::task::spawn_blocking(move || password::fits(&password, hash.as_deref())).await.unwrap_or(false)
        };
        if let Some(account) = account.filter(|_| fits) {
            return Some(Login { account, options: KeyOptions::default() });
        }
        wait.await;
        None
    }

    fn way(&self, channel: ChannelId, protocol: &Protocol) -> Option<Way> {
        let open = self.channels.get(&channel)?;
        Some(Way { handle: protocol.handle(), channel, flow: Arc::clone(&self.flow), input: Arc::clone(&open.input) })
    }

    /// The environment of a login. `SSH_TTY` and `TERM` come with the terminal.
    fn env(&self, login: &Login, wished: &[(String, String)], asked: Option<&[u8]>) -> Vec<(String, String)> {
        let identity = &login.account.identity;
        let rules = &self.server.rules;
        let mut env = wished.to_vec();
        env.extend(identity.env());
        env.extend(rules.env.clone());
        let own = identity.name.as_ref().and_then(|name| rules.users.get(name));
        env.extend(own.map(|user| user.env.clone()).unwrap_or_default());
        let (peer, local) = (self.peer, self.local);
        env.push(("SSH_CLIENT".to_owned(), format!("{} {} {}", peer.ip(), peer.port(), local.port())));
        env.push(("SSH_CONNECTION".to_owned(), format!("{} {} {} {}", peer.ip(), peer.port(), local.ip(), local.port())));
        if let Some(asked) = asked {
            env.push(("SSH_ORIGINAL_COMMAND".to_owned(), String::from_utf8_lossy(asked).into_owned()));
        }
        env
    }

    /// Starts what is asked for, or what has to be run in its place.
    fn start(&mut self, channel: ChannelId, work: Work, protocol: &mut Protocol) -> Result<(), ConnectionError> {
        let (Some(login), Some(way)) = (&self.login, self.way(channel, protocol)) else { return Ok(protocol.channel_failure(channel)?) };
        let Some(open) = self.channels.get(&channel).filter(|open| matches!(open.what, What::Nothing)) else {
            return Ok(protocol.channel_failure(channel)?);
        };
        let terminal = open.terminal.clone().filter(|_| login.options.terminal);
        let env = |asked: Option<&[u8]>| self.env(login, &open.env, asked);
        let identity = &login.account.identity;
        let session = if login.account.expired {
            match PASSWD_PROGRAMS.iter().find(|path| std::path::Path::new(path).exists()) {
                Some(passwd) if terminal.is_some() => {
                    let work = Work::Program((*passwd).to_owned());
                    Session::start(&Launch { identity, work, env: env(None), terminal }, way)
                }
                _ => {
                    let reason = "Your password has expired: log in with a terminal (`ssh -t`) to change it.\n";
                    Session::refuse(reason.to_owned(), NOT_RUN, way)
                }
            }
        } else if let Some(forced) = &login.options.command {
            let asked = match &work {
                Work::Line(line) => Some(line.clone()),
                Work::Program(path) => Some(path.clone().into_bytes()),
                Work::Shell => None,
            };
            let work = Work::Line(forced.clone().into_bytes());
            Session::start(&Launch { identity, work, env: env(asked.as_deref()), terminal }, way)
        } else {
            Session::start(&Launch { identity, work, env: env(None), terminal }, way)
        };
        if let Some(open) = self.channels.get_mut(&channel) {
            open.what = What::Session(session);
        }
        Ok(protocol.channel_success(channel)?)
    }

    fn session(&self, channel: ChannelId) -> Option<&Session> {
        match &self.channels.get(&channel)?.what {
            What::Session(session) => Some(session),
            What::Nothing | What::Forward { .. } => None,
        }
    }
}

/// What a client may set: languages, as Debian's sshd_config has it, and what its terminal can do.
fn may_set(name: &str, value: &str) -> bool {
    let known = name == "LANG" || name.starts_with("LC_") || name == "COLORTERM";
    known && name.len() <= 64 && value.len() <= 1024 && !name.contains(['=', '\0']) && !value.contains('\0')
}

fn size(columns: u32, rows: u32, width: u32, height: u32) -> Winsize {
    let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    Winsize { ws_row: short(rows), ws_col: short(columns), ws_xpixel: short(width), ws_ypixel: short(height) }
}

impl Handler for Connection {
    type Error = ConnectionError;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, ConnectionError> {
        Ok(self.refused(user))
    }

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, ConnectionError> {
        let known = self.by_key(user, offer.public_key, offer.algorithm).is_some();
        Ok(if known { Auth::Accept } else { self.refused(user) })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, ConnectionError> {
        self.login = self.by_key(user, key.public_key, key.algorithm);
        Ok(if self.login.is_some() { Auth::Accept } else { self.refused(user) })
    }

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, ConnectionError> {
        self.login = self.by_password(user, password).await;
        Ok(if self.login.is_some() { Auth::Accept } else { self.refused(user) })
    }

    async fn auth_succeeded(&mut self, _: &mut Protocol) -> Result<(), ConnectionError> {
        // It is one no more.
        self.stranger = None;
        if let Some(name) = self.login.as_ref().and_then(|login| login.account.identity.name.as_ref()) {
            say(format_args!("sshd: {name} has logged in from {}", self.peer.ip()));
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Protocol,
    ) -> Result<(), ConnectionError> {
        if self.channels.len() >= MAX_CHANNELS {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
        } else {
            self.channels.insert(channel.id(), Open::default());
            reply.accept().await;
        }
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        protocol: &mut Protocol,
    ) -> Result<(), ConnectionError> {
        let allowed = self.login.as_ref().is_some_and(|login| login.options.forwarding && !login.account.expired);
        let (Some(port), true) = (u16::try_from(port).ok(), allowed) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        if self.channels.len() >= MAX_CHANNELS {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let (id, host, input) = (channel.id(), host.to_owned(), Arc::new(Input::default()));
        let way = Way { handle: protocol.handle(), channel: id, flow: Arc::clone(&self.flow), input: Arc::clone(&input) };
        let task = tokio::spawn(forward(host, port, reply, way));
        self.channels.insert(id, Open { input, what: What::Forward { _until_dropped: Forward(task.abort_handle()) }, ..Open::default() });
        Ok(())
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        columns: u32,
        rows: u32,
        width: u32,
        height: u32,
        modes: &[(Pty, u32)],
        protocol: &mut Protocol,
    ) -> Result<(), ConnectionError> {
        let allowed = self.login.as_ref().is_some_and(|login| login.options.terminal);
        match self.channels.get_mut(&channel).filter(|open| allowed && matches!(open.what, What::Nothing)) {
            Some(open) => {
                let kind = if term.is_empty() || term.contains('\0') { "dumb" } else { term };
                let size = size(columns, rows, width, height);
                open.terminal = Some(TerminalWish { kind: kind.to_owned(), size, modes: modes.to_vec() });
                Ok(protocol.channel_success(channel)?)
            }
            None => Ok(protocol.channel_failure(channel)?),
        }
    }

    async fn env_request(&mut self, channel: ChannelId, name: &str, value: &str, protocol: &mut Protocol) -> Result<(), ConnectionError> {
        match self.channels.get_mut(&channel).filter(|open| may_set(name, value) && open.env.len() < MAX_VARIABLES) {
            Some(open) => {
                open.env.push((name.to_owned(), value.to_owned()));
                Ok(protocol.channel_success(channel)?)
            }
            None => Ok(protocol.channel_failure(channel)?),
        }
    }

    async fn shell_request(&mut self, channel: ChannelId, protocol: &mut Protocol) -> Result<(), ConnectionError> {
        self.start(channel, Work::Shell, protocol)
    }

    async fn exec_request(&mut self, channel: ChannelId, line: &[u8], protocol: &mut Protocol) -> Result<(), ConnectionError> {
        self.start(channel, Work::Line(line.to_vec()), protocol)
    }

    async fn subsystem_request(&mut self, channel: ChannelId, name: &str, protocol: &mut Protocol) -> Result<(), ConnectionError> {
        match SFTP_SERVERS.iter().find(|path| name == "sftp" && std::path::Path::new(path).exists()) {
            Some(program) => self.start(channel, Work::Program((*program).to_owned()), protocol),
            None => Ok(protocol.channel_failure(channel)?),
        }
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        columns: u32,
        rows: u32,
        width: u32,
        height: u32,
        _: &mut Protocol,
    ) -> Result<(), ConnectionError> {
        if let Some(session) = self.session(channel) {
            session.resize(size(columns, rows, width, height));
        }
        Ok(())
    }

    async fn signal(&mut self, channel: ChannelId, signal: Sig, _: &mut Protocol) -> Result<(), ConnectionError> {
        if let Some(session) = self.session(channel) {
            session.signal(&signal);
        }
        Ok(())
    }

    async fn data(&mut self, channel: ChannelId, bytes: &[u8], _: &mut Protocol) -> Result<(), ConnectionError> {
        let Some(open) = self.channels.get(&channel) else { return Ok(()) };
        self.flow.take(&open.input, bytes).await.map_err(|_| ConnectionError::TooMuch)
    }

    async fn channel_eof(&mut self, channel: ChannelId, _: &mut Protocol) -> Result<(), ConnectionError> {
        if let Some(open) = self.channels.get(&channel) {
            open.input.end();
        }
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _: &mut Protocol) -> Result<(), ConnectionError> {
        self.channels.remove(&channel);
        Ok(())
    }
}

/// Connects, and carries bytes until both sides have said that nothing follows.
async fn forward(host: String, port: u16, reply: ChannelOpenHandle, way: Way) {
    let Way { handle, channel, flow, input } = way;
    let connected = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect((host.as_str(), port))).await;
    let stream = match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => stream,
        Err(_) => return reply.reject(ChannelOpenFailure::ConnectFailed).await,
    };
    reply.accept().await;
    let (mut from, mut to) = stream.into_split();
    let outward = async {
        while let Some(bytes) = input.next(&flow).await {
            if to.write_all(&bytes).await.is_err() {
                return input.close(&flow);
            }
        }
        let _ = to.shutdown().await;
    };
    let inward = async {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let bytes = buffer.get(..count).unwrap_or_default().to_vec();
            if !flow.send(&handle, channel, Stream::Out, bytes).await {
                return;
            }
        }
        let _ = handle.eof(channel).await;
    };
    tokio::join!(outward, inward);
    let _ = handle.close(channel).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_sets_languages_and_nothing_that_programs_obey() {
        for (name, value) in [("LANG", "de_DE.UTF-8"), ("LC_ALL", ""), ("COLORTERM", "truecolor")] {
            assert!(may_set(name, value), "{name}");
        }
        for (name, value) in [("PATH", "/tmp"), ("LD_PRELOAD", "/tmp/x"), ("LC_A=B", "x"), ("LANG", "a\0b"), ("TERM", "x"), ("", "")] {
            assert!(!may_set(name, value), "{name}");
        }
        assert!(!may_set("LC_LONG", &"x".repeat(2000)));
    }
}
