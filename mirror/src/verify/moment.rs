//! One moment of both sides: a snapshot of the source, and one of the target that holds exactly what the source's shows.
//!
//! A temporary slot gives a snapshot of the source and the position C before which lies all that it shows. The target has the same when
//! the stream has applied all that commits before C and nothing after it, which is when its snapshot is taken: the stream stands still
//! for that moment ([`Brake`](super::brake::Brake)). That it did is not taken on trust. The target's snapshot shows the mirror's progress
//! row, which is written with the rows: it must be where the stream says that it stands still, and of our epoch.

use std::time::{Duration, Instant};

use pg::name::quote_literal;
use pg::{Lsn, SqlState};
use tokio::sync::oneshot;

use super::brake::Ask;
use crate::apply::Order;
use crate::error::{Error, Problem};
use crate::late::Main;
use crate::session::PeerSession;
use crate::sink::progress_row::MAIN_LANE;
use crate::source::replication::{CreatedSlot, ReplicationConnection};
use crate::source::slot;
use crate::worker::Context;

/// How long the stream stands still for a slot at first. A slot waits for transactions that write; one that takes longer is waited for
/// while the stream goes on.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a moment is looked for; each time the stream may stand still twice as long.
const ATTEMPTS: u32 = 6;

/// How long the stream may take to the position, once that is known: it may be amid a large transaction.
const ARRIVAL_MAX: Duration = Duration::from_secs(60);

/// Pause between two looks at a source whose transactions are waited for, and between two pushes of its WAL.
const POLL: Duration = Duration::from_millis(100);

/// Both snapshots. Held by sessions that have no locks on tables; others join them.
pub struct Moment {
    /// Where in the source's WAL.
    pub lsn: Lsn,
    /// How long the stream stood still.
    pub stood_still: Duration,
    /// The target's progress row at that moment.
    pub applied: Lsn,
    /// The source's snapshot, by name.
    pub source: String,
    /// The target's snapshot, by name.
    pub target: String,
    /// The sessions that keep the snapshots, each in a transaction that sees its own.
    pub sessions: [PeerSession; 2],
    /// Dropped, it lets the stream go on.
    _release: Option<oneshot::Sender<()>>,
}

impl Moment {
    /// Takes both snapshots. With `hold`, the stream stands still until the moment is dropped: both sides stay what they are there, as far as
    /// the mirror is concerned.
    ///
    /// # Errors
    /// [`Error::Transient`] 55P03 if the source's transactions overlap for so long that no slot can be made in time; [`Error::Stopped`]
    /// if the stream ends; else as the peers' SQLSTATE says.
    pub async fn take(context: &Context, main: &Main, hold: bool) -> Result<Moment, Error> {
        let mirror = &context.mirror;
        let mut patience = PATIENCE;
        for _ in 0..ATTEMPTS {
            let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
            let target = PeerSession::open(&mirror.target_name, &mirror.target).await?;
            let replication = ReplicationConnection::connect(&mirror.source_name, &source.attempt).await?;
            wait_for_older_transactions(&source).await?;
            if let Some(moment) = attempt(context, main, source, target, replication, (patience, hold)).await? {
                return Ok(moment);
            }
            patience *= 2;
        }
        Err(Error::Transient(
            Problem::new(SqlState::LOCK_NOT_AVAILABLE, "the source's transactions do not let a snapshot be taken in time")
                .detail("A replication slot waits until transactions have ended that write and were there before it, and there are always some.")
                .hint("Verify when fewer long transactions write on the source."),
        ))
    }
}

/// The stream, held.
struct Braked {
    /// Nothing has been taken in that commits here or later.
    stands: Lsn,
    until: oneshot::Sender<Lsn>,
    reached: oneshot::Receiver<Lsn>,
    /// Dropped, it releases the stream.
    release: oneshot::Sender<()>,
    since: Instant,
}

async fn brake(main: &Main) -> Result<Braked, Error> {
    let (stands, stands_at) = oneshot::channel();
    let (until, until_told) = oneshot::channel();
    let (reached, reached_at) = oneshot::channel();
    let (release, released) = oneshot::channel();
    main.tell(Order::Brake(Ask { stands, until: until_told, reached, released })).await?;
    // The stream's end is told by others.
    let stands = stands_at.await.map_err(|_| Error::Stopped)?;
    Ok(Braked { stands, until, reached: reached_at, release, since: Instant::now() })
}

/// `None`: the slot took too long, or the stream did; it goes on.
async fn attempt(
    context: &Context,
    main: &Main,
    source: PeerSession,
    target: PeerSession,
    mut replication: ReplicationConnection,
    (patience, hold): (Duration, bool),
) -> Result<Option<Moment>, Error> {
    let name = format!("peergate_verify_{:016x}", rand::random::<u64>());
    let braked = brake(main).await?;
    let made = tokio::time::timeout(patience, replication.create_temporary_slot(&name, source.version)).await;
    let Ok(made) = made else {
        drop(braked);
        // It would go on waiting; ended, it is gone.
        return slot::free(&source, &name).await.map(|()| None);
    };
    let CreatedSlot { consistent_point: lsn, snapshot } = made?;
    let Some(snapshot) = snapshot else { return Err(Error::protocol(&source.peer, "slot without a snapshot")) };
    let Braked { stands, until, mut reached, release, since } = braked;
    if lsn < stands {
        return Err(Error::protocol(&source.peer, format!("slot at {lsn}, before {stands}, which was sent already")));
    }
    until.send(lsn).map_err(|_| Error::Stopped)?;
    let arrive = async {
        loop {
            // What nobody writes the walsender does not tell of.
            slot::push_wal(&source).await?;
            match tokio::time::timeout(POLL, &mut reached).await {
                Ok(at) => return at.map_err(|_| Error::Stopped),
                Err(_) => continue,
            }
        }
    };
    let Ok(applied) = tokio::time::timeout(ARRIVAL_MAX, arrive).await else { return Ok(None) };
    let applied = applied?;
    let of_target = export_target(context, &target, applied).await?;
    let stood_still = since.elapsed();
    let release = hold.then_some(release);
    // The slot goes with its connection; its snapshot stays with the session that has joined it.
    let of_source = join_and_export(&source, &snapshot).await?;
    drop(replication);
    Ok(Some(Moment {
        lsn,
        stood_still,
        applied,
        source: of_source,
        target: of_target,
        sessions: [source, target],
        _release: release,
    }))
}

/// Takes the target's snapshot, which must show the progress row where the stream stands still.
async fn export_target(context: &Context, target: &PeerSession, applied: Lsn) -> Result<String, Error> {
    target.run("begin transaction isolation level repeatable read, read only").await?;
    let query = "
        select pg_catalog.pg_export_snapshot(), (select p.applied_lsn::text from peergate.progress p where p.mirror = $1 and p.lane = $2 and p.epoch = $3)";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
        [&context.mirror.object_name, &MAIN_LANE, &context.epoch];
    let row = target.done(target.client.query_one(query, &parameters)).await?;
    let found: Option<Lsn> = row.get::<_, Option<&str>>(1).and_then(|text| text.parse().ok());
    if found == Some(applied) { Ok(row.get(0)) } else { Err(Error::Fenced) }
}

/// Joins a snapshot, and exports it for others for as long as the session's transaction is open.
async fn join_and_export(source: &PeerSession, snapshot: &str) -> Result<String, Error> {
    join(source, snapshot).await?;
    let row = source.done(source.client.query_one("select pg_catalog.pg_export_snapshot()", &[])).await?;
    Ok(row.get(0))
}

/// Begins a transaction that sees what a snapshot shows.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn join(session: &PeerSession, snapshot: &str) -> Result<(), Error> {
    session
        .run(&format!(
            "begin transaction isolation level repeatable read, read only; set transaction snapshot {}",
            quote_literal(snapshot)
        ))
        .await
}

/// Waits until all transactions have ended that write now, so that a slot need not wait for them while the stream stands still.
async fn wait_for_older_transactions(source: &PeerSession) -> Result<(), Error> {
    let query = "select pg_catalog.pg_is_in_recovery(), pg_catalog.pg_snapshot_xmax(s)::text::int8, pg_catalog.pg_snapshot_xmin(s)::text::int8
                 from pg_catalog.pg_current_snapshot() s";
    let first = source.done(source.client.query_one(query, &[])).await?;
    if first.get(0) {
        return Ok(());
    }
    let (until, mut oldest): (i64, i64) = (first.get(1), first.get(2));
    while oldest < until {
        tokio::time::sleep(POLL).await;
        oldest = source.done(source.client.query_one(query, &[])).await?.get(2);
    }
    Ok(())
}
