//! Notifications: how statements wake the engines.

use std::future::poll_fn;

use tokio::sync::mpsc;
use tokio_postgres::AsyncMessage;

use crate::connect::{ConnectError, chain};
use crate::{CHANNEL, Catalog, Error};

impl Catalog {
    /// Listens for the notifications of statements; each payload is delivered. The channel ends when the session breaks.
    ///
    /// # Errors
    /// [`Error::Connect`] if no session could be opened.
    pub async fn listen(&self) -> Result<mpsc::Receiver<String>, Error> {
        let attempts = self.connector().attempts();
        let mut last = None;
        for attempt in attempts {
            match attempt.config.connect(attempt.tls.clone()).await {
                Ok((client, mut connection)) => {
                    let (sender, receiver) = mpsc::channel(64);
                    tokio::spawn(async move {
                        loop {
                            match poll_fn(|context| connection.poll_message(context)).await {
                                // A full channel loses nothing but a wake-up: the engine looks at everything when it wakes.
                                Some(Ok(AsyncMessage::Notification(n))) => {
                                    drop(sender.try_send(n.payload().to_owned()))
                                }
                                Some(Ok(_)) => {}
                                Some(Err(error)) => {
                                    tracing::debug!(error = chain(&error), "listening session ended");
                                    return;
                                }
                                None => return,
                            }
                            if sender.is_closed() {
                                return;
                            }
                        }
                    });
                    client.batch_execute(&format!("listen {CHANNEL}")).await?;
                    // The session lives as long as its client: it is kept by a task that waits for the receiver to go.
                    return Ok(keep(client, receiver));
                }
                Err(error) => last = Some(ConnectError::at(&attempt.address, &error)),
            }
        }
        Err(last.expect("there is at least one attempt").into())
    }
}

fn keep(client: tokio_postgres::Client, mut inner: mpsc::Receiver<String>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let _client = client;
        loop {
            tokio::select! {
                payload = inner.recv() => match payload {
                    Some(payload) => drop(sender.try_send(payload)),
                    None => return,
                },
                () = sender.closed() => return,
            }
        }
    });
    receiver
}
