//! EXECUTE on a peer: the sessions that the gateway has on peers for one client, and what is said on them.
//!
//! A session is opened when it is first needed and kept until the client goes: its transactions, settings and temporary tables are
//! the peer's own and none of the catalog's. Rows, tags, notices and COPY data go to the client as they come.

mod answer;
mod link;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::time::Duration;

use pg::SqlState;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::encoding::Encoding;
use crate::fields::{Fields, frame};
use crate::intercept::{AnswerForm, PeerDescribe, Run, canceled};
use crate::registry::Entry;
use crate::rewrite::Execution;
use crate::session::Shared;
use answer::{Answer, Said};
use link::Link;

/// How long a peer may take to obey a cancel.
const OBEY_TIMEOUT: Duration = Duration::from_secs(10);

/// The sessions on peers of one client.
#[derive(Default)]
pub(crate) struct PeerSessions {
    /// By the peer's name. One that is in use is not here.
    links: RefCell<HashMap<String, Link>>,
}

/// An error as the client will see it: an ErrorResponse's fields.
pub(crate) type Refused = Fields;

impl PeerSessions {
    /// Ends all sessions, as DISCARD ALL does with what a session holds.
    pub(crate) fn discard(&self) {
        self.links.borrow_mut().clear();
    }

    /// Runs a text on a peer and passes on what it says; returns the frame that ends the statement, or an ErrorResponse.
    ///
    /// # Errors
    /// [`io::Error`] of the client's socket.
    pub(crate) async fn run<W: AsyncWrite + Unpin>(
        &self,
        shared: &Shared,
        entry: &Entry,
        user: &str,
        run: Run,
        client: &mut W,
    ) -> io::Result<Result<Vec<u8>, Vec<u8>>> {
        let peer = run.execution.execute.peer.clone();
        let mut work = entry.begin_work();
        let opened = tokio::select! {
            opened = self.take(shared, user, &peer, Some(&run.permit.version), &run.settings) => opened,
            () = work.canceled() => Err(fields_of(&canceled())),
        };
        let mut link = match opened {
            Ok(link) => link,
            Err(error) => return Ok(Err(failed(error, &run.execution))),
        };
        let mut answer = Answer::new(run.execution.clone(), matches!(run.form, AnswerForm::Simple));
        let question = match &run.form {
            AnswerForm::Simple => frame(b'Q', &[&run.execution.execute.text[..], b"\0"].concat()),
            AnswerForm::Portal { formats, rows_max } => {
                let execute = frame(b'E', &[&b"\0"[..], &rows_max.to_be_bytes()].concat());
                [parse(&run.execution), bind(formats), execute, frame(b'S', b"")].concat()
            }
        };
        let timeout = match run.permit.timeout_ms {
            0 => Duration::MAX,
            timeout_ms => Duration::from_millis(timeout_ms),
        };
        // Whoever goes away leaves nothing running.
        let mut stop = link.stop_on_drop();
        let mut out = Vec::new();
        let mut limit = Box::pin(sleep(timeout));
        let mut timed_out = false;
        let mut canceling = false;
        let mut said = link.say(&question).await.map(|()| Said::More);
        loop {
            match said {
                Ok(Said::More) => {}
                Ok(Said::All) => break,
                Ok(Said::CopyIn) => {
                    let refusal = b"COPY FROM STDIN is not possible in EXECUTE\0";
                    said = link.say(&frame(b'f', refusal)).await.map(|()| Said::More);
                    continue;
                }
                Err(error) => {
                    stop.disarm();
                    if !link.walker.at_boundary() {
                        // The client has a part of a row, and nothing else can be put behind it.
                        return Err(error);
                    }
                    return Ok(Err(failed(link.lost(&error), &run.execution)));
                }
            }
            let heard = tokio::select! {
                heard = link.hear() => heard,
                () = work.canceled(), if !canceling => {
                    canceling = true;
                    limit = Box::pin(sleep(OBEY_TIMEOUT));
                    stop.cancel();
                    continue;
                }
                () = &mut limit => {
                    if canceling {
                        // It does not answer; its session is given up.
                        if !link.walker.at_boundary() {
                            return Err(io::ErrorKind::TimedOut.into());
                        }
                        return Ok(Err(failed(fields_of(&canceled()), &run.execution)));
                    }
                    (canceling, timed_out) = (true, true);
                    limit = Box::pin(sleep(OBEY_TIMEOUT));
                    stop.cancel();
                    continue;
                }
            };
            said = heard.and_then(|()| answer.take(&mut link, &mut out));
            if !out.is_empty() {
                entry.counters.sent.add(out.len());
                client.write_all(&out).await?;
                client.flush().await?;
                out.clear();
            }
        }
        stop.disarm();
        drop(stop);
        if link.is_usable() {
            self.links.borrow_mut().insert(peer, link);
        }
        Ok(answer.end(timed_out))
    }

    /// Has a peer describe what a text would return; returns a RowDescription or NoData, or an ErrorResponse.
    pub(crate) async fn describe(
        &self,
        shared: &Shared,
        entry: &Entry,
        user: &str,
        question: &PeerDescribe,
    ) -> Result<Vec<u8>, Vec<u8>> {
        let execution = &question.execution;
        let peer = execution.execute.peer.clone();
        let mut work = entry.begin_work();
        let asked = async {
            let mut link = self.take(shared, user, &peer, None, &question.settings).await?;
            let portal = frame(b'D', b"P\0");
            let text = [parse(execution), bind(&question.formats), portal, frame(b'S', b"")].concat();
            let mut answer = Answer::new(execution.clone(), false);
            let mut said = link.say(&text).await.map(|()| Said::More);
            while matches!(said, Ok(Said::More)) {
                said = link.hear().await.and_then(|()| answer.take(&mut link, &mut Vec::new()));
            }
            said.map_err(|error| link.lost(&error))?;
            if link.is_usable() {
                self.links.borrow_mut().insert(peer.clone(), link);
            }
            Ok(answer)
        };
        let answer = tokio::select! {
            answer = asked => answer.map_err(|error| failed(error, execution))?,
            () = work.canceled() => return Err(failed(fields_of(&canceled()), execution)),
        };
        let description = answer.description.clone();
        answer.end(false)?;
        Ok(description.unwrap_or_else(|| frame(b'n', b"")))
    }

    /// Returns the session on a peer: the one that there is, or a new one. With `version`, the catalog has permitted it for the peer as
    /// it was then; without, the role that logged in needs USAGE.
    async fn take(
        &self,
        shared: &Shared,
        user: &str,
        peer: &str,
        version: Option<&str>,
        settings: &[(&'static str, Vec<u8>)],
    ) -> Result<Link, Refused> {
        let kept = self.links.borrow_mut().remove(peer);
        let (version, access) = match version {
            Some(version) => (version.to_owned(), None),
            None => {
                let access = link::access(shared, user, peer).await?;
                if !access.peer.allowed {
                    return Err(link::denied(&access.peer));
                }
                (access.version.clone(), Some(access))
            }
        };
        if let Some(mut link) = kept
            && link.version == version
        {
            if link.is_alive() {
                link.adopt(settings).await?;
                return Ok(link);
            }
            if link.in_transaction() {
                return Err(link.lost(&io::ErrorKind::UnexpectedEof.into()));
            }
        }
        let access = match access {
            Some(access) => access,
            None => link::access(shared, user, peer).await?,
        };
        Link::open(&access, settings).await
    }
}

async fn sleep(duration: Duration) {
    if duration == Duration::MAX { std::future::pending().await } else { tokio::time::sleep(duration).await }
}

fn parse(execution: &Execution) -> Vec<u8> {
    frame(b'P', &[b"\0", &execution.execute.text[..], b"\0\0\0"].concat())
}

fn bind(formats: &[u16]) -> Vec<u8> {
    let mut body = vec![0; 6];
    body.extend_from_slice(&(formats.len() as u16).to_be_bytes());
    formats.iter().for_each(|format| body.extend_from_slice(&format.to_be_bytes()));
    frame(b'B', &body)
}

/// Writes an error that is not the peer's own: it is about the statement as a whole.
fn failed(mut error: Refused, execution: &Execution) -> Vec<u8> {
    for key in *b"MDH" {
        if let Some(text) = error.get(key) {
            let encoded = execution.encoding().encode(&String::from_utf8_lossy(text));
            error.set(key, encoded);
        }
    }
    error.set(b'P', (execution.peer_position() + 1).to_string());
    error.encode(b'E')
}

fn fields_of(refusal: &crate::parser::Refusal) -> Refused {
    error(refusal.sqlstate, &refusal.message, refusal.detail.as_deref(), refusal.hint.as_deref())
}

/// Makes an ErrorResponse of the gateway's own; its texts are UTF-8.
fn error(sqlstate: SqlState, message: &str, detail: Option<&str>, hint: Option<&str>) -> Refused {
    let mut fields = Fields::default();
    for (key, text) in [(b'S', "ERROR"), (b'V', "ERROR"), (b'C', sqlstate.as_str()), (b'M', message)] {
        fields.set(key, text);
    }
    for (key, text) in [(b'D', detail), (b'H', hint)] {
        if let Some(text) = text {
            fields.set(key, text);
        }
    }
    fields
}

/// Returns the text of an error field as UTF-8, as far as it can be told.
fn readable(fields: &Fields, key: u8, encoding: Encoding) -> String {
    let bytes = fields.get(key).unwrap_or_default();
    encoding.decode(bytes).map_or_else(|| String::from_utf8_lossy(bytes).into_owned(), |text| text.into_owned())
}
