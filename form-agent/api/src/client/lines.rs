//! Long answers: one JSON value a line.

use std::marker::PhantomData;

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use serde::de::DeserializeOwned;

use super::ClientError;
use crate::error::ErrorBody;

/// The longest line that is taken, in bytes.
const MAX_LINE: usize = 4 * 1024 * 1024;

/// The lines of a long answer, as they come. Dropping it ends the exchange.
#[derive(Debug)]
pub struct Lines<T> {
    body: Incoming,
    target: String,
    buffer: Vec<u8>,
    /// Bytes of the buffer known to hold no line feed.
    searched: usize,
    ended: bool,
    kind: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    pub(super) fn new(body: Incoming, target: String) -> Self {
        Self { body, target, buffer: Vec::new(), searched: 0, ended: false, kind: PhantomData }
    }

    /// The next value, `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// What the agent reported in the middle, a connection that broke, or a line that is no such value. Nothing follows an error.
    pub async fn next(&mut self) -> Option<Result<T, ClientError>> {
        loop {
            if let Some(line) = self.take_line() {
                return Some(self.parse(&line));
            }
            if self.ended {
                return None;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.append(&frame.into_data().unwrap_or_default()),
                Some(Err(error)) => {
                    self.end();
                    let (target, reason) = (self.target.clone(), format!("the connection broke ({error})"));
                    return Some(Err(ClientError::Unreachable { target, reason, hint: "repeat the command".to_owned() }));
                }
                None => {
                    self.ended = true;
                    if !self.buffer.is_empty() {
                        self.buffer.push(b'\n');
                    }
                }
            }
            if self.buffer.len() > MAX_LINE && self.searched == self.buffer.len() {
                self.end();
                return Some(Err(self.protocol(format!("a line of more than {} MiB", MAX_LINE >> 20))));
            }
        }
    }

    fn append(&mut self, data: &Bytes) {
        self.buffer.extend_from_slice(data);
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        match self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
            Some(offset) => {
                let rest = self.buffer.split_off(self.searched + offset + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                Some(line)
            }
            None => {
                self.searched = self.buffer.len();
                None
            }
        }
    }

    fn parse(&mut self, line: &[u8]) -> Result<T, ClientError> {
        let error = match serde_json::from_slice(line) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        self.end();
        match serde_json::from_slice::<ErrorBody>(line) {
            Ok(body) => Err(ClientError::Api(body.error)),
            Err(_) => Err(self.protocol(error.to_string())),
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.buffer.clear();
        self.searched = 0;
    }

    fn protocol(&self, what: String) -> ClientError {
        ClientError::Protocol { target: self.target.clone(), what }
    }
}
