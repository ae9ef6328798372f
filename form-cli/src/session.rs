//! What a command works with: the terminal, the wishes that hold everywhere, and the way to the host.

use std::{cell::RefCell, path::Path};

use form_api::client::{Client, Timeouts};
use tokio::time::Instant;

use crate::{
    cli::Global,
    context::{ConfigFile, LOCAL_SOCKET, Target, resolve},
    failure::Failure,
    ui::Terminal,
};

pub struct Session {
    pub terminal: Terminal,
    pub global: Global,
    begun: Instant,
    /// Connections to end properly.
    clients: RefCell<Vec<Client>>,
}

impl Session {
    pub fn new(terminal: Terminal, global: Global) -> Self {
        Self { terminal, global, begun: std::time::Instant::now().into(), clients: RefCell::default() }
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
        if let Some(limit) = self.global.timeout {
            timeouts.connect = timeouts.connect.min(limit.0);
        }
        let client = target.client(timeouts)?;
        self.keep(&client);
        Ok(client)
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

    pub async fn close(&self) {
        let clients = self.clients.take();
        for client in clients {
            client.close().await;
        }
    }
}
