//! Stands a running stream still at exactly one position of the source. No I/O.
//!
//! First the stream stands still where it is, at the end of a transaction: the position that is wanted is not known yet, and must not be
//! passed. Then it goes on to that position, and no further; when the target has all that commits before it, whoever asked is told, and
//! the stream stands still until it is released.

use bytes::Bytes;
use pg::Lsn;
use tokio::sync::oneshot;

/// The ends of a brake that the stream holds. Dropped by whoever asked, they release it.
#[derive(Debug)]
pub struct Ask {
    /// Is told the position that nothing has been taken in beyond.
    pub stands: oneshot::Sender<Lsn>,
    /// Brings the position to go to.
    pub until: oneshot::Receiver<Lsn>,
    /// Is told where the target is (its progress row's position) when it has all that commits before `until`.
    pub reached: oneshot::Sender<Lsn>,
    /// Releases the stream, when something is sent or the other end is gone.
    pub released: oneshot::Receiver<()>,
}

/// Where a stream is with its brake.
#[derive(Debug, Default)]
pub struct Brake {
    stage: Stage,
    /// What was read and not taken in: the beginning of a transaction that commits behind the position.
    kept: Option<(Lsn, Bytes)>,
}

#[derive(Debug, Default)]
enum Stage {
    /// Nobody asks.
    #[default]
    Off,
    /// At the next end of a transaction it stands still.
    Asked(Ask),
    /// It stands still, and waits for a position.
    Stands(Goal),
    /// It goes to that position.
    Goes(Lsn, Goal),
    /// It has read all that commits before the position, and waits until that is written.
    Arrived(Goal),
    /// All is written. Nothing is handed to the sink, not even a position.
    Held(oneshot::Receiver<()>),
}

#[derive(Debug)]
struct Goal {
    until: oneshot::Receiver<Lsn>,
    reached: oneshot::Sender<Lsn>,
    released: oneshot::Receiver<()>,
}

impl Brake {
    /// Asks the stream to stand still.
    pub fn ask(&mut self, ask: Ask) {
        self.stage = Stage::Asked(ask);
    }

    /// Returns whether nobody has asked.
    pub fn is_off(&self) -> bool {
        matches!(self.stage, Stage::Off)
    }

    /// Returns whether nothing more is to be taken in once a transaction ends.
    pub fn is_asked(&self) -> bool {
        matches!(self.stage, Stage::Asked(_))
    }

    /// Returns whether nothing is to be read.
    pub fn stands(&self) -> bool {
        matches!(self.stage, Stage::Stands(_) | Stage::Arrived(_) | Stage::Held(_))
    }

    /// Returns whether nothing is to be written.
    pub fn holds(&self) -> bool {
        matches!(self.stage, Stage::Held(_))
    }

    /// Looks where the stream is. `boundary` is what was taken in, `None` amid a transaction; `written` is where the target is, `None`
    /// while something is under way to it.
    pub fn look(&mut self, boundary: Option<Lsn>, written: Option<Lsn>) {
        self.stage = match (std::mem::take(&mut self.stage), boundary) {
            (Stage::Asked(Ask { stands, until, reached, released }), Some(at)) => {
                // If nobody listens any more, the release tells.
                let _ = stands.send(at);
                Stage::Stands(Goal { until, reached, released })
            }
            (Stage::Goes(until, goal), Some(at)) if at >= until => Stage::Arrived(goal),
            (stage, _) => stage,
        };
        if let Some(written) = written {
            self.stage = match std::mem::take(&mut self.stage) {
                Stage::Arrived(Goal { reached, released, .. }) => {
                    let _ = reached.send(written);
                    Stage::Held(released)
                }
                stage => stage,
            };
        }
    }

    /// Returns whether the stream may take a message in. The beginning of a transaction behind the position is kept for later.
    pub fn lets_pass(&mut self, start: Lsn, body: &Bytes) -> bool {
        let Stage::Goes(until, _) = &self.stage else { return true };
        if commit_of(body).is_none_or(|commit| commit < *until) {
            return true;
        }
        self.kept = Some((start, body.clone()));
        if let Stage::Goes(_, goal) = std::mem::take(&mut self.stage) {
            self.stage = Stage::Arrived(goal);
        }
        false
    }

    /// Waits until whoever asked says something; returns what was kept when the stream is released. For ever while nobody asks.
    pub async fn changed(&mut self) -> Option<(Lsn, Bytes)> {
        match &mut self.stage {
            Stage::Off | Stage::Asked(_) => std::future::pending().await,
            Stage::Stands(goal) => tokio::select! {
                until = &mut goal.until => if let Ok(until) = until {
                    if let Stage::Stands(goal) = std::mem::take(&mut self.stage) {
                        self.stage = Stage::Goes(until, goal);
                    }
                    return None;
                },
                _ = &mut goal.released => {}
            },
            Stage::Goes(_, goal) | Stage::Arrived(goal) => drop((&mut goal.released).await),
            Stage::Held(released) => drop(released.await),
        }
        self.stage = Stage::Off;
        self.kept.take()
    }
}

/// Returns where the transaction commits that a message begins; `None` for all other messages.
///
/// Source: PostgreSQL docs, protocol-logicalrep-message-formats, "Begin".
fn commit_of(body: &[u8]) -> Option<Lsn> {
    let (b'B', rest) = body.split_first()? else { return None };
    rest.first_chunk().map(|bytes| Lsn(u64::from_be_bytes(*bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Asking {
        stands: oneshot::Receiver<Lsn>,
        until: oneshot::Sender<Lsn>,
        reached: oneshot::Receiver<Lsn>,
        release: oneshot::Sender<()>,
    }

    fn asked() -> (Brake, Asking) {
        let (stands, stands_at) = oneshot::channel();
        let (until, until_told) = oneshot::channel();
        let (reached, reached_at) = oneshot::channel();
        let (release, released) = oneshot::channel();
        let mut brake = Brake::default();
        brake.ask(Ask { stands, until: until_told, reached, released });
        (brake, Asking { stands: stands_at, until, reached: reached_at, release })
    }

    fn begin(commit: u64) -> Bytes {
        [&b"B"[..], &commit.to_be_bytes(), &[0; 12]].concat().into()
    }

    #[tokio::test]
    async fn the_stream_goes_to_the_position_and_no_further() {
        let (mut brake, mut asking) = asked();
        brake.look(None, None);
        assert!(brake.is_asked() && !brake.stands(), "not amid a transaction");
        brake.look(Some(Lsn(10)), None);
        assert_eq!((brake.stands(), asking.stands.try_recv()), (true, Ok(Lsn(10))));
        asking.until.send(Lsn(20)).unwrap();
        assert_eq!(brake.changed().await, None);
        assert!(!brake.stands() && brake.lets_pass(Lsn(11), &begin(19)) && brake.lets_pass(Lsn(12), &Bytes::from("C")));
        brake.look(Some(Lsn(19)), Some(Lsn(10)));
        assert!(!brake.stands());
        assert!(!brake.lets_pass(Lsn(21), &begin(20)));
        brake.look(Some(Lsn(19)), None);
        assert!(brake.stands() && !brake.holds(), "what was taken in is not written yet");
        brake.look(Some(Lsn(19)), Some(Lsn(19)));
        assert_eq!((brake.holds(), asking.reached.try_recv()), (true, Ok(Lsn(19))));
        asking.release.send(()).unwrap();
        assert_eq!(brake.changed().await, Some((Lsn(21), begin(20))));
        assert!(brake.is_off());
    }

    #[tokio::test]
    async fn a_position_that_the_source_has_passed_without_a_transaction_is_reached() {
        let (mut brake, mut asking) = asked();
        brake.look(Some(Lsn(10)), Some(Lsn(10)));
        asking.until.send(Lsn(20)).unwrap();
        brake.changed().await;
        brake.look(Some(Lsn(20)), Some(Lsn(10)));
        assert_eq!((brake.holds(), asking.reached.try_recv()), (true, Ok(Lsn(10))));
    }

    #[tokio::test]
    async fn whoever_goes_away_releases_the_stream() {
        let (mut brake, asking) = asked();
        brake.look(Some(Lsn(10)), None);
        drop(asking);
        assert_eq!(brake.changed().await, None);
        assert!(brake.is_off());
    }
}
