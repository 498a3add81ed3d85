//! How fast messages of `pgoutput` are decoded, as a ratio to copying the same bytes one message at a time.

#![allow(clippy::unwrap_used, reason = "what fails here ends the benchmark")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pg::pgoutput::{Message, Value};

const MESSAGES: usize = 200_000;

/// Times the whole is done; the fastest counts.
const ROUNDS: usize = 10;

fn main() {
    println!("{:<26} {:>9}  {:>9} {:>9} {:>9}  {:>6}", "", "bytes", "copy ns", "decode ns", "walk ns", "ratio");
    let short = |n: usize| vec![n.to_string(), (n % 7).to_string()];
    let row = |n: usize| {
        let text = format!("{n:032x}");
        vec![
            n.to_string(),
            (n % 1000).to_string(),
            text.repeat(2),
            "2026-01-01 00:00:00+00".to_owned(),
            "3.14".to_owned(),
        ]
    };
    let wide = |n: usize| (0..50).map(|column| (n + column).to_string()).collect();
    let big = |n: usize| vec![n.to_string(), "x".repeat(4000)];
    measure("INSERT of 2 short values", short);
    measure("INSERT of 5 values", row);
    measure("INSERT of 50 values", wide);
    measure("INSERT of 4 kB", big);
}

fn measure(what: &str, row: impl Fn(usize) -> Vec<String>) {
    let messages: Vec<Bytes> = (0..MESSAGES).map(|n| insert(&row(n))).collect();
    let bytes: usize = messages.iter().map(Bytes::len).sum();
    let copied = fastest(|| {
        for message in &messages {
            black_box(message.to_vec());
        }
    });
    let decoded = fastest(|| {
        for message in &messages {
            black_box(Message::decode(message.clone()).unwrap());
        }
    });
    let walked = fastest(|| {
        for message in &messages {
            let Message::Insert { new, .. } = Message::decode(message.clone()).unwrap() else {
                unreachable!("all are INSERTs")
            };
            let length: usize = new.values().map(|v| if let Value::Text(text) = v { text.len() } else { 0 }).sum();
            black_box(length);
        }
    });
    let each = |took: Duration| took.as_nanos() as f64 / MESSAGES as f64;
    println!(
        "{what:<26} {:>9}  {:>9.1} {:>9.1} {:>9.1}  {:>6.2}",
        bytes / MESSAGES,
        each(copied),
        each(decoded),
        each(walked),
        copied.as_secs_f64() / decoded.as_secs_f64()
    );
}

fn fastest(mut work: impl FnMut()) -> Duration {
    let mut once = || {
        let begun = Instant::now();
        work();
        begun.elapsed()
    };
    (0..ROUNDS).map(|_| once()).min().unwrap_or_default()
}

/// An INSERT as the plugin writes it, with all values as text.
fn insert(values: &[String]) -> Bytes {
    let mut out = Vec::from(*b"I\0\0\x40\0N");
    out.extend_from_slice(&(values.len() as u16).to_be_bytes());
    for value in values {
        out.push(b't');
        out.extend_from_slice(&(value.len() as u32).to_be_bytes());
        out.extend_from_slice(value.as_bytes());
    }
    out.into()
}
