//! A TCP proxy in this process, for what networks do: it stalls, refuses, and cuts connections at once or after so many bytes.
//!
//! The gateway's tests use it too. It knows nothing of what passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What happens to bytes and to new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pass,
    Stall,
    Refuse,
}

/// What all connections obey. Each change of `cuts` ends those that there are.
#[derive(Clone, Copy, Debug)]
struct Orders {
    mode: Mode,
    cuts: u64,
}

/// A proxy before one local port; gone, with its connections, when dropped.
pub(crate) struct Proxy {
    port: u16,
    orders: Arc<watch::Sender<Orders>>,
    /// Bytes that may still pass before all connections are cut; negative: as many as like.
    budget: Arc<AtomicI64>,
    listening: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
        self.cut();
    }
}

#[allow(dead_code, reason = "each test binary uses some of it")]
impl Proxy {
    /// Listens on a free port and passes everything on to `to`, on 127.0.0.1.
    pub(crate) async fn start(to: u16) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let orders = Arc::new(watch::Sender::new(Orders { mode: Mode::Pass, cuts: 0 }));
        let budget = Arc::new(AtomicI64::new(-1));
        let listening = tokio::spawn(listen(listener, to, orders.clone(), budget.clone()));
        Proxy { port, orders, budget, listening }
    }

    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends all connections.
    pub(crate) fn cut(&self) {
        self.orders.send_modify(|o| o.cuts += 1);
    }

    /// Ends all connections after so many bytes more, in both directions together.
    pub(crate) fn cut_after(&self, bytes: u32) {
        self.budget.store(i64::from(bytes), Ordering::Relaxed);
    }

    /// Passes nothing on until [`Proxy::pass`], and keeps the connections; new ones are taken and hear nothing.
    pub(crate) fn stall(&self) {
        self.orders.send_modify(|o| o.mode = Mode::Stall);
    }

    /// Ends all connections, and all new ones at once, until [`Proxy::pass`].
    pub(crate) fn refuse(&self) {
        self.orders.send_modify(|o| *o = Orders { mode: Mode::Refuse, cuts: o.cuts + 1 });
    }

    /// All is well again.
    pub(crate) fn pass(&self) {
        self.budget.store(-1, Ordering::Relaxed);
        self.orders.send_modify(|o| o.mode = Mode::Pass);
    }
}

async fn listen(listener: TcpListener, to: u16, orders: Arc<watch::Sender<Orders>>, budget: Arc<AtomicI64>) {
    while let Ok((client, _)) = listener.accept().await {
        let (orders, budget) = (orders.clone(), budget.clone());
        let mut seen = orders.subscribe();
        let now = *seen.borrow_and_update();
        if now.mode == Mode::Refuse {
            continue;
        }
        tokio::spawn(async move {
            let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
            let (_, _) = (client.set_nodelay(true), server.set_nodelay(true));
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            // Whichever ends first takes the other with it: both sockets are closed.
            tokio::select! {
                () = pump(from_client, to_server, &orders, &budget) => {}
                () = pump(from_server, to_client, &orders, &budget) => {}
                _ = seen.wait_for(|o| o.cuts != now.cuts) => {}
            }
        });
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, orders: &watch::Sender<Orders>, budget: &AtomicI64) {
    let mut buffer = vec![0; 16 << 10];
    let mut seen = orders.subscribe();
    loop {
        if seen.wait_for(|o| o.mode != Mode::Stall).await.is_err() {
            return;
        }
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        if seen.wait_for(|o| o.mode != Mode::Stall).await.is_err() {
            return;
        }
        let left = budget.load(Ordering::Relaxed);
        if left >= 0 {
            let passing = read.min(usize::try_from(left).unwrap_or(usize::MAX));
            if to.write_all(&buffer[..passing]).await.is_err() {
                return;
            }
            if budget.fetch_sub(passing as i64, Ordering::Relaxed) <= passing as i64 {
                budget.store(-1, Ordering::Relaxed);
                orders.send_modify(|o| o.cuts += 1);
                return;
            }
        } else if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
