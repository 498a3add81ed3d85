//! A client that does nothing but read and write: what it costs is the same whoever it talks to.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How long a server may say nothing.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A session in the frontend/backend protocol.
pub(crate) struct Session {
    socket: TcpStream,
    buffer: Vec<u8>,
    from: usize,
    to: usize,
}

/// What an answer came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// DataRow and CopyData messages.
    pub(crate) rows: u64,
    /// Bytes of all messages.
    pub(crate) bytes: u64,
}

/// Makes a message.
pub(crate) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

impl Session {
    /// Logs in as the superuser, without a password.
    pub(crate) fn open(port: u16, database: &str) -> Session {
        let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TIMEOUT)).unwrap();
        let body = [b"\0\x03\0\0user\0postgres\0database\0", database.as_bytes(), b"\0\0"].concat();
        let mut session = Session { socket, buffer: vec![0; 256 * 1024], from: 0, to: 0 };
        session.send(&[&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat());
        session.finish();
        session
    }

    /// Writes bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Runs a query text and throws its answer away.
    pub(crate) fn query(&mut self, text: &str) -> Answer {
        self.send(&frame(b'Q', &[text.as_bytes(), b"\0"].concat()));
        self.finish()
    }

    /// Runs a query text that gives one value; returns it as text.
    pub(crate) fn value(&mut self, text: &str) -> String {
        self.send(&frame(b'Q', &[text.as_bytes(), b"\0"].concat()));
        self.until(b'T');
        while self.to - self.from < 11 {
            self.fill();
        }
        // Message type, its length, the number of columns, the value's length.
        let length = u32::from_be_bytes(self.buffer[self.from + 7..self.from + 11].try_into().unwrap()) as usize;
        while self.to - self.from < 11 + length {
            self.fill();
        }
        let value = String::from_utf8(self.buffer[self.from + 11..self.from + 11 + length].to_vec()).unwrap();
        self.finish();
        value
    }

    /// Reads up to the next ReadyForQuery.
    ///
    /// # Panics
    /// At an error: nothing here is meant to fail.
    pub(crate) fn finish(&mut self) -> Answer {
        self.until(b'Z')
    }

    /// Reads up to a message of that type.
    pub(crate) fn until(&mut self, last: u8) -> Answer {
        let mut answer = Answer::default();
        loop {
            while self.to - self.from < 5 {
                self.fill();
            }
            let header = &self.buffer[self.from..self.from + 5];
            let tag = header[0];
            let size = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize + 1;
            if tag == b'E' {
                while self.to - self.from < size {
                    self.fill();
                }
                panic!("{}", String::from_utf8_lossy(&self.buffer[self.from + 5..self.from + size]));
            }
            answer.rows += u64::from(matches!(tag, b'D' | b'd'));
            answer.bytes += size as u64;
            self.skip(size);
            if tag == last {
                return answer;
            }
        }
    }

    fn skip(&mut self, mut bytes: usize) {
        while bytes > self.to - self.from {
            bytes -= self.to - self.from;
            (self.from, self.to) = (0, 0);
            self.fill();
        }
        self.from += bytes;
    }

    /// Reads more, behind what is there.
    fn fill(&mut self) {
        if self.from > 0 {
            self.buffer.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        let read = self.socket.read(&mut self.buffer[self.to..]).unwrap();
        assert!(read > 0, "the other side closed");
        self.to += read;
    }
}
