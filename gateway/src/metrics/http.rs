//! The port for monitoring: three pages over HTTP, for everybody who reaches it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Monitor;

/// Connections at the same time; more wait.
const CONNECTIONS_MAX: usize = 32;

/// How long a client may take to say what it wants, and to say it again.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves the pages until it is dropped.
pub async fn serve(listener: TcpListener, monitor: Arc<Monitor>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, _)) => {
                let monitor = monitor.clone();
                tokio::spawn(async move {
                    converse(socket, monitor).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Most often: out of file descriptors.
                tracing::warn!(error = %error, "cannot accept a connection for metrics");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn converse(socket: TcpStream, monitor: Arc<Monitor>) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let monitor = monitor.clone();
        async move { Ok::<_, Infallible>(page(&monitor, request.method(), request.uri().path()).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .serve_connection(TokioIo::new(socket), service);
    if let Err(error) = connection.await {
        tracing::debug!(error = %error, "a connection for metrics broke off");
    }
}

async fn page(monitor: &Monitor, method: &Method, path: &str) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut answer = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".to_owned());
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match path {
        "/metrics" => answer(StatusCode::OK, OPEN_METRICS, monitor.metrics().await),
        "/healthz" => answer(StatusCode::OK, TEXT, "alive\n".to_owned()),
        "/readyz" => match monitor.ready().await {
            Ok(()) => answer(StatusCode::OK, TEXT, "ready\n".to_owned()),
            Err(reason) => answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, reason + "\n"),
        },
        _ => answer(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /healthz and /readyz\n".to_owned()),
    }
}

fn answer(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
