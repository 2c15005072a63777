//! What a server was asked, from the log of nbdkit's filter `log`.

use std::collections::HashMap;
use std::path::Path;

/// The log of a server; what was asked until now.
pub(crate) struct NbdLog(pub(crate) String);

impl NbdLog {
    /// Reads the log.
    pub(crate) fn of(path: &Path) -> Self {
        Self(std::fs::read_to_string(path).expect("nbdkit writes its log"))
    }

    /// The log until so many requests of a kind had begun.
    pub(crate) fn until(&self, kind: &str, count: usize) -> Self {
        let last = self.requests(kind).nth(count - 1).expect("so many requests");
        let end = self.0.find(last).expect("its own line") + last.len();
        Self(self.0[..end].to_owned())
    }

    /// The lines with which requests of a kind begin: `Read`, `Write`, `Flush`, ….
    pub(crate) fn requests<'a>(&'a self, kind: &str) -> impl Iterator<Item = &'a str> {
        let begin = format!(" {kind} id=");
        self.0.lines().filter(move |line| line.contains(&begin))
    }

    /// How many connections there were.
    pub(crate) fn connections(&self) -> usize {
        self.0.lines().filter(|line| line.contains(" Connect ")).count()
    }

    /// The most requests of a kind that were open at once: on one connection, on all.
    pub(crate) fn open(&self, kind: &str) -> (usize, usize) {
        let (begin, end) = (format!(" {kind} id="), format!(" ...{kind} id="));
        let mut open: HashMap<&str, usize> = HashMap::new();
        let mut most = (0, 0);
        for line in self.0.lines() {
            let Some(connection) = line.split(' ').find(|word| word.starts_with("connection="))
            else {
                continue;
            };
            let here = open.entry(connection).or_default();
            if line.contains(&begin) {
                *here += 1;
            } else if line.contains(&end) {
                *here -= 1;
            }
            most.0 = most.0.max(*here);
            most.1 = most.1.max(open.values().sum());
        }
        most
    }

    /// The bytes of all requests of a kind.
    pub(crate) fn bytes(&self, kind: &str) -> usize {
        let count = |line: &str| {
            let (_, hex) = line.split_once(" count=0x").expect("a request has a length");
            let hex = hex.split(' ').next().expect("the first of a split");
            usize::from_str_radix(hex, 16).expect("a number")
        };
        self.requests(kind).map(count).sum()
    }
}
