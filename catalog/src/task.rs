//! Tasks: work that a statement started, as people see it.

use crate::{Catalog, Error};

/// What a task is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// CREATE MIRROR: done when the mirror streams (or the copy is complete, if it only copies).
    CreateMirror,
    /// PAUSE MIRROR: done when nothing is written any more.
    PauseMirror,
    /// RESUME MIRROR: done when the mirror streams again.
    ResumeMirror,
    /// ALTER MIRROR: done when its tables are what they should be.
    AlterMirror,
    /// RESYNC MIRROR: done when the new copies have taken the place of the old ones and stream.
    ResyncMirror,
    /// DROP MIRROR: done when nothing of the mirror is left on the peers.
    DropMirror,
    /// VERIFY MIRROR: done when both sides have been compared. See [`crate::verification`].
    VerifyMirror,
    /// EXECUTE MIRROR: done when a round that began after it is completed. See [`crate::mirror::query`].
    ExecuteMirror,
}

impl TaskKind {
    fn as_str(self) -> &'static str {
        match self {
            TaskKind::CreateMirror => "create_mirror",
            TaskKind::PauseMirror => "pause_mirror",
            TaskKind::ResumeMirror => "resume_mirror",
            TaskKind::AlterMirror => "alter_mirror",
            TaskKind::ResyncMirror => "resync_mirror",
            TaskKind::DropMirror => "drop_mirror",
            TaskKind::VerifyMirror => "verify_mirror",
            TaskKind::ExecuteMirror => "execute_mirror",
        }
    }
}

impl Catalog {
    /// Notes progress, from 0 to 1, in a mirror's open tasks of one kind. 1 completes them.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn advance_tasks(&self, mirror_id: i64, kind: TaskKind, progress: f64) -> Result<(), Error> {
        let statement = "
            update peergate.tasks
            set state = case when $3::float8 >= 1 then 'completed' else 'running' end, progress = $3::float8,
                started_at = coalesce(started_at, clock_timestamp()),
                finished_at = case when $3::float8 >= 1 then clock_timestamp() end,
                error_sqlstate = null, error_message = null
            where mirror_id = $1 and kind = $2 and state in ('pending', 'running')
              -- What the engine has not yet made part of its work is not what it reports on.
              and (taken_at is not null or kind not in ('alter_mirror', 'resync_mirror'))";
        self.client().await?.execute(statement, &[&mirror_id, &kind.as_str(), &progress.clamp(0.0, 1.0)]).await?;
        Ok(())
    }

    /// Ends a mirror's tasks of one kind that are under way: what they want cannot be had.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn fail_tasks(&self, mirror_id: i64, kind: TaskKind, sqlstate: &str, message: &str) -> Result<(), Error> {
        let statement = "
            update peergate.tasks set state = 'failed', error_sqlstate = $3, error_message = $4, finished_at = clock_timestamp()
            where mirror_id = $1 and kind = $2 and state = 'running' and taken_at is not null";
        self.client().await?.execute(statement, &[&mirror_id, &kind.as_str(), &sqlstate, &message]).await?;
        Ok(())
    }

    /// Notes in a mirror's open tasks what holds them up; `fails` ends them.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn hold_up_tasks(&self, mirror_id: i64, sqlstate: &str, message: &str, fails: bool) -> Result<(), Error> {
        let statement = "
            update peergate.tasks
            set state = case when $4 then 'failed' else 'running' end, error_sqlstate = $2, error_message = $3,
                started_at = coalesce(started_at, clock_timestamp()), finished_at = case when $4 then clock_timestamp() end
            where mirror_id = $1 and state in ('pending', 'running')";
        self.client().await?.execute(statement, &[&mirror_id, &sqlstate, &message, &fails]).await?;
        Ok(())
    }

    /// Adds a line to the log of a mirror's open tasks.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn log_tasks(&self, mirror_id: i64, message: &str) -> Result<(), Error> {
        let statement = "
            insert into peergate.task_log (task_id, message)
            select id, $2 from peergate.tasks where mirror_id = $1 and state in ('pending', 'running')";
        self.client().await?.execute(statement, &[&mirror_id, &message]).await?;
        Ok(())
    }
}
