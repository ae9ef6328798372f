//! Bytes on their way from a client to what it talks to.
//!
//! The protocol's task must not wait for a program that reads nothing while that program waits for its output to be taken, which the same
//! task does. So what comes in is put into a queue, and the task waits for room there only while nothing waits to be sent.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use russh::{ChannelId, server::Handle};
use tokio::sync::Notify;

use crate::process::lock;

/// Bytes that a channel may hold before its client is held back.
const ENOUGH: usize = 1 << 20;
/// Bytes after which a client that takes no output and goes on sending is given up.
const TOO_MUCH: usize = 16 << 20;

/// What comes in on one channel.
#[derive(Default)]
pub struct Input {
    queue: Mutex<Queue>,
    more: Notify,
}

#[derive(Default)]
struct Queue {
    chunks: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The client has said that nothing follows.
    ended: bool,
    /// Nobody reads any more.
    closed: bool,
}

/// What all channels of a connection share.
#[derive(Default)]
pub struct Flow {
    /// How many wait to have something sent.
    sending: AtomicUsize,
    changed: Notify,
}

/// The client sends without end and takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMuch;

impl Input {
    /// For whoever reads: the next bytes, or `None` at the end.
    pub async fn next(&self, flow: &Flow) -> Option<Vec<u8>> {
        loop {
            let more = self.more.notified();
            {
                let mut queue = lock(&self.queue);
                if let Some(chunk) = queue.chunks.pop_front() {
                    queue.bytes -= chunk.len();
                    flow.changed.notify_one();
                    return Some(chunk);
                }
                if queue.ended || queue.closed {
                    return None;
                }
            }
            more.await;
        }
    }

    pub fn end(&self) {
        lock(&self.queue).ended = true;
        self.more.notify_one();
    }

    /// What comes from now on is for nobody.
    pub fn close(&self, flow: &Flow) {
        let mut queue = lock(&self.queue);
        *queue = Queue { closed: true, ..Queue::default() };
        flow.changed.notify_one();
        self.more.notify_one();
    }

    fn bytes(&self) -> usize {
        lock(&self.queue).bytes
    }
}

impl Flow {
    /// Takes bytes from the client, and comes back when it may send more.
    ///
    /// # Errors
    /// [`TooMuch`].
    pub async fn take(&self, input: &Input, bytes: &[u8]) -> Result<(), TooMuch> {
        {
            let mut queue = lock(&input.queue);
            if queue.closed || queue.ended {
                return Ok(());
            }
            queue.bytes += bytes.len();
            queue.chunks.push_back(bytes.to_vec());
        }
        input.more.notify_one();
        while input.bytes() > ENOUGH && !self.is_sending() {
            self.changed.notified().await;
        }
        if input.bytes() > TOO_MUCH { Err(TooMuch) } else { Ok(()) }
    }

    /// Whether something waits to be sent.
    pub fn is_sending(&self) -> bool {
        self.sending.load(Ordering::Acquire) > 0
    }

    /// Sends bytes to the client. `false`: the connection is gone.
    pub async fn send(self: &Arc<Self>, handle: &Handle, channel: ChannelId, stream: Stream, bytes: Vec<u8>) -> bool {
        self.sending.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_one();
        let _sending = Sending(self);
        match stream {
            Stream::Out => handle.data(channel, bytes).await.is_ok(),
            Stream::Error => handle.extended_data(channel, EXTENDED_DATA_STDERR, bytes).await.is_ok(),
        }
    }
}

/// SSH_EXTENDED_DATA_STDERR (RFC 4254, section 5.2).
const EXTENDED_DATA_STDERR: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Out,
    Error,
}

/// Also when the task is ended meanwhile.
struct Sending<'a>(&'a Flow);

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.0.sending.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_client_is_held_back_only_while_nothing_waits_to_be_sent() {
        let (flow, input) = (Arc::new(Flow::default()), Arc::new(Input::default()));
        flow.take(&input, &vec![0; ENOUGH]).await.unwrap();
        let more = vec![1; 10];
        let held = tokio::time::timeout(Duration::from_millis(20), flow.take(&input, &more)).await;
        assert!(held.is_err(), "there is no room");
        flow.sending.fetch_add(1, Ordering::AcqRel);
        flow.take(&input, &more).await.unwrap();
        assert_eq!(flow.take(&input, &vec![2; TOO_MUCH]).await, Err(TooMuch));
        flow.sending.fetch_sub(1, Ordering::AcqRel);
        let taken = tokio::spawn({
            let (flow, input) = (Arc::clone(&flow), Arc::clone(&input));
            async move { flow.take(&input, &[3]).await }
        });
        for length in [ENOUGH, 10, 10, TOO_MUCH, 1] {
            assert_eq!(input.next(&flow).await.map(|chunk| chunk.len()), Some(length));
        }
        taken.await.unwrap().unwrap();
        input.end();
        assert_eq!(input.next(&flow).await, None);
        flow.take(&input, &[4]).await.unwrap();
        assert_eq!(input.next(&flow).await, None, "after the end nothing comes");
    }

    #[tokio::test]
    async fn what_nobody_reads_holds_nobody_up() {
        let (flow, input) = (Flow::default(), Input::default());
        flow.take(&input, &vec![0; ENOUGH]).await.unwrap();
        input.close(&flow);
        flow.take(&input, &vec![0; TOO_MUCH]).await.unwrap();
        assert_eq!((input.bytes(), input.next(&flow).await), (0, None));
    }
}
