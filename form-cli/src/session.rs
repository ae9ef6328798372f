//! What a command works with: the terminal, the wishes that hold everywhere, and the way to the host.

use std::{cell::RefCell, collections::BTreeMap, path::Path};

use form_api::{
    ErrorCode,
    client::{Client, ClientError, Timeouts},
    operation::Operation,
};
use form_types::{OperationId, SecretKey};
use tokio::time::Instant;

use crate::{
    cli::Global,
    context::{ConfigFile, LOCAL_SOCKET, PassphraseSource, Target, load_identity, resolve},
    failure::Failure,
    ui::Terminal,
};

pub struct Session {
    pub terminal: Terminal,
    pub global: Global,
    begun: Instant,
    identity: RefCell<Option<SecretKey>>,
    /// Connections to end properly.
    clients: RefCell<Vec<Client>>,
    /// What goes on at a host as far as is known, by what it is about.
    going_on: RefCell<BTreeMap<OperationId, String>>,
}

impl Session {
    pub fn new(terminal: Terminal, global: Global) -> Self {
        Self {
            terminal,
            global,
            begun: std::time::Instant::now().into(),
            identity: RefCell::default(),
            clients: RefCell::default(),
            going_on: RefCell::default(),
        }
    }

    /// The agent that the user means.
    ///
    /// # Errors
    /// When there is no such host, or no key to talk to it with.
    pub fn client(&self) -> Result<Client, Failure> {
        self.connect(&self.target()?, Timeouts::default())
    }

    /// # Errors
    /// When the user's key cannot be read.
    pub fn connect(&self, target: &Target, mut timeouts: Timeouts) -> Result<Client, Failure> {
        timeouts.deadline = self.deadline();
        let client = target.client(timeouts, || self.identity())?;
        self.keep(&client);
        Ok(client)
    }

    /// The user's key. A passphrase is asked for once.
    ///
    /// # Errors
    /// When there is no key, or it cannot be unlocked.
    pub fn identity(&self) -> Result<SecretKey, Failure> {
        if let Some(key) = &*self.identity.borrow() {
            return Ok(key.clone());
        }
        let key = load_identity()?.unlock(&self.passphrase())?;
        *self.identity.borrow_mut() = Some(key.clone());
        Ok(key)
    }

    /// Where the passphrase of the user's key comes from.
    pub fn passphrase(&self) -> PassphraseSource<'_> {
        PassphraseSource::of_the_key(self.global.passphrase_file.as_deref(), Some(&self.terminal))
    }

    /// The connection is ended when the program ends.
    pub fn keep(&self, client: &Client) {
        self.clients.borrow_mut().push(client.clone());
    }

    /// # Errors
    /// When there is no such host.
    pub fn target(&self) -> Result<Target, Failure> {
        let file = ConfigFile::load()?;
        resolve(&file.config, self.global.context.as_ref(), self.global.host.as_deref(), Path::new(LOCAL_SOCKET))
    }

    /// When `--timeout` is over; the time runs from the program's start.
    pub fn deadline(&self) -> Option<Instant> {
        self.global.timeout.and_then(|limit| self.begun.checked_add(limit.0))
    }

    /// Waits for something that may never come, but not longer than `--timeout`.
    ///
    /// # Errors
    /// When the time is over.
    pub async fn in_time<T>(&self, future: impl Future<Output = T>) -> Result<T, Failure> {
        match self.deadline() {
            Some(deadline) => tokio::time::timeout_at(deadline, future).await.map_err(|_| {
                Failure::new(ErrorCode::TimedOut, "the time is over").hint("give it longer with --timeout, or leave that out")
            }),
            None => Ok(future.await),
        }
    }

    /// Says that a host which is followed does not answer, and that it is asked again.
    pub fn interrupted(&self, error: &ClientError) {
        self.terminal.warn(format!("{error}; waiting for it to come back"));
    }

    /// Remembers whether this operation goes on, for who gives up waiting.
    pub fn note(&self, operation: &Operation) {
        let mut going_on = self.going_on.borrow_mut();
        if operation.status.is_final() {
            going_on.remove(&operation.id);
        } else {
            going_on.insert(operation.id, format!("{} of {}", operation.kind.as_str(), operation.subject));
        }
    }

    /// The answer to Ctrl-C while something is waited for: says what goes on without the program, and ends that.
    pub async fn leave(&self) -> ! {
        self.close().await;
        let going_on = self.going_on.take();
        let mut ids = going_on.iter();
        match (ids.next(), ids.next()) {
            (None, _) => {}
            (Some((id, _)), None) => self.terminal.note(format!("\nThe operation goes on. Watch it with `form op wait {id}`")),
            _ => {
                let lines: String = going_on.iter().map(|(id, what)| format!("\n  {what}: `form op wait {id}`")).collect();
                self.terminal.note(format!("\n{} operations go on. Watch them with:{lines}", going_on.len()));
            }
        }
        std::process::exit(130)
    }

    pub async fn close(&self) {
        let clients = self.clients.take();
        for client in clients {
            client.close().await;
        }
    }
}
