//! Whether a guest still answers. Its healthcheck runs inside of it: of a guest that hangs nothing new is heard, and the last word would
//! stand for ever.

use std::{future::Future, num::NonZeroU64, time::Duration};

use form_guest::protocol::StatusReport;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};

use super::session::{Update, goes_on};

/// So many questions in a row without an answer, and the guest is silent.
const MISSES: u32 = 2;

/// How long there is between two questions, and how long each may go without an answer, when a guest may be silent for `timeout`.
pub fn interval(timeout: NonZeroU64) -> Duration {
    Duration::from_secs(timeout.get()) / (2 * MISSES)
}

/// Asks the guest how it is, for as long as the VM lives. Says once that it has become silent, and what it answers when it does so again.
/// Nothing is asked of a guest that stands still.
pub async fn feel<F>(ask: impl Fn() -> F, every: Duration, updates: &mpsc::Sender<Update>, mut paused: watch::Receiver<bool>)
where
    F: Future<Output = Option<StatusReport>>,
{
    let mut missed = 0_u32;
    loop {
        sleep(every).await;
        if !goes_on(&mut paused).await {
            return;
        }
        let answer = tokio::select! {
            answer = ask() => answer,
            stands = paused.wait_for(|paused| *paused) => match stands {
                Ok(_) => continue,
                Err(_) => return,
            },
        };
        let was_silent = missed >= MISSES;
        missed = if answer.is_some() { 0 } else { missed.saturating_add(1) };
        let news = match answer {
            Some(status) if was_silent => Update::Status(Box::new(status)),
            None if missed == MISSES => Update::Silent,
            _ => continue,
        };
        if updates.send(news).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, future::pending};

    use form_guest::protocol::{HealthState, ServicePhase};

    use super::*;
    use crate::driver::health::tests::status;

    #[derive(Clone, Copy)]
    enum Answer {
        Comes,
        IsMissed,
        /// The VM is made to stand still while it is waited for, and goes on later.
        MeetsPause,
    }
    use Answer::{Comes, IsMissed, MeetsPause};

    /// What is said of a guest that gives these answers, one a question.
    async fn said_of(answers: &[Answer]) -> Vec<&'static str> {
        let (pause, paused) = watch::channel(false);
        let (asked, mut questions) = mpsc::unbounded_channel();
        let left = RefCell::new(answers.iter());
        let (sender, mut updates) = mpsc::channel(8);
        let ask = || {
            let answer = left.borrow_mut().next().copied();
            asked.send(answer).unwrap();
            async move {
                match answer {
                    Some(Comes) => Some(status(ServicePhase::Running, HealthState::Healthy, 0)),
                    Some(IsMissed) => None,
                    Some(MeetsPause) | None => pending().await,
                }
            }
        };
        let until_all_is_asked = async {
            while let Some(Some(answer)) = questions.recv().await {
                if matches!(answer, MeetsPause) {
                    pause.send_replace(true);
                    sleep(Duration::from_millis(20)).await;
                    assert!(questions.try_recv().is_err(), "it is asked while it stands still");
                    pause.send_replace(false);
                }
            }
        };
        tokio::select! {
            () = feel(ask, Duration::from_millis(1), &sender, paused) => panic!("it ends while the VM lives"),
            () = until_all_is_asked => {}
        }
        drop(sender);
        let mut said = Vec::new();
        while let Some(update) = updates.recv().await {
            said.push(match update {
                Update::Silent => "silent",
                Update::Status(_) => "answers",
                Update::Ready(_) => "ready",
            });
        }
        said
    }

    #[tokio::test]
    async fn a_guest_is_silent_after_two_questions_and_heard_again_at_once() {
        assert_eq!(said_of(&[Comes, Comes, Comes]).await, [""; 0]);
        assert_eq!(said_of(&[Comes, IsMissed, Comes, IsMissed, Comes]).await, [""; 0], "slow, but there");
        assert_eq!(said_of(&[Comes, IsMissed, IsMissed, IsMissed, IsMissed]).await, ["silent"]);
        assert_eq!(said_of(&[IsMissed, IsMissed, IsMissed, Comes, Comes, IsMissed, IsMissed]).await, ["silent", "answers", "silent"]);
    }

    #[tokio::test]
    async fn a_guest_that_stands_still_need_not_answer() {
        assert_eq!(said_of(&[IsMissed, MeetsPause, Comes, MeetsPause, MeetsPause, IsMissed, Comes]).await, [""; 0]);
    }

    #[test]
    fn a_guest_is_silent_when_the_time_that_it_has_is_over() {
        assert_eq!(interval(NonZeroU64::new(60).unwrap()) * MISSES * 2, Duration::from_secs(60));
        assert!(!interval(NonZeroU64::MIN).is_zero());
    }

    #[tokio::test]
    async fn it_ends_with_the_vm() {
        let (pause, paused) = watch::channel(true);
        let (sender, _updates) = mpsc::channel(1);
        drop(pause);
        feel(pending, Duration::from_millis(1), &sender, paused).await;
    }
}
