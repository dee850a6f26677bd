//! Programs that run in a scope.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use crate::deadline::DEADLINE;
use crate::reader::Reader;
use crate::subreaper::{End, Spawn, Subreaper};

/// A program to run, its arguments, environment and input.
#[derive(Debug)]
pub struct Command<'a> {
    subreaper: &'a Subreaper,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    input: Input,
}

#[derive(Debug)]
enum Input {
    /// /dev/null.
    Empty,
    Bytes(Vec<u8>),
    /// A pipe that the caller writes to: see [`RunningCommand::take_stdin`].
    Piped,
    /// A terminal as standard input, output and error.
    Terminal(OwnedFd),
}

/// A finished program.
#[derive(Debug)]
pub struct Output {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The exit status, 128+n when killed by signal n.
    pub status: i32,
    /// The program's standard output.
    pub stdout: String,
    /// The program's standard error.
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n$ {}\nexit status {}", self.argv.join(" "), self.status)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            writeln!(f, "{name}: {}", text.trim_end().replace('\n', &format!("\n{name}: ")))?;
        }
        Ok(())
    }
}

impl Output {
    /// Fails the test unless the program succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.status, 0, "{self}");
        self
    }

    /// Fails the test unless the program failed with one line of standard error that has all of
    /// `words` in it (regardless of case). Returns that line.
    #[track_caller]
    pub fn one_line_error(&self, words: &[&str]) -> &str {
        assert_ne!(self.status, 0, "should have failed: {self}");
        let line = self.stderr.trim_end();
        assert!(!line.is_empty() && !line.contains('\n'), "not one line of error: {self}");
        let lower = line.to_lowercase();
        for word in words {
            assert!(
                lower.contains(&word.to_lowercase()),
                "the error does not name {word:?}: {self}"
            );
        }
        line
    }
}

impl<'a> Command<'a> {
    pub(crate) fn new(subreaper: &'a Subreaper, argv: Vec<String>) -> Self {
        Self { subreaper, argv, env: BTreeMap::new(), input: Input::Empty }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.argv.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets a variable in the program's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<str>) -> Self {
        self.env.insert(name.to_owned(), value.as_ref().to_owned());
        self
    }

    /// Runs the program through another one, such as `unshare --mount`.
    #[must_use]
    pub fn through(mut self, wrapper: &[&str]) -> Self {
        self.argv.splice(0..0, wrapper.iter().map(|&a| a.to_owned()));
        self
    }

    /// Runs the program in a mount namespace of its own, after a shell script in that namespace.
    #[must_use]
    pub fn after_mounting(self, script: &str) -> Self {
        let script = format!("set -e\n{script}\nexec \"$@\"");
        self.through(&["unshare", "--mount", "--propagation=private", "sh", "-c", &script, "sh"])
    }

    /// Gives the program these bytes as standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// Gives the program a pipe as standard input: see [`RunningCommand::take_stdin`].
    #[must_use]
    pub fn stdin_piped(mut self) -> Self {
        self.input = Input::Piped;
        self
    }

    /// Makes a terminal the program's three streams and its controlling terminal.
    #[must_use]
    pub fn terminal(mut self, slave: OwnedFd) -> Self {
        self.input = Input::Terminal(slave);
        self.through(&["setsid", "--ctty"])
    }

    /// Starts the program.
    #[track_caller]
    pub fn spawn(self) -> RunningCommand<'a> {
        let (stdout, out_end) = Reader::pipe();
        let (stderr, err_end) = Reader::pipe();
        let mut stdin = None;
        let mut feeder = None;
        let streams = match self.input {
            Input::Empty => [File::open("/dev/null").expect("/dev/null").into(), out_end, err_end],
            Input::Piped => {
                let (read, write) = std::io::pipe().expect("a pipe");
                stdin = Some(File::from(OwnedFd::from(write)));
                [read.into(), out_end, err_end]
            }
            Input::Bytes(bytes) => {
                let (read, mut write) = std::io::pipe().expect("a pipe");
                // A program may end without reading all of its input.
                feeder = Some(std::thread::spawn(move || drop(write.write_all(&bytes))));
                [read.into(), out_end, err_end]
            }
            Input::Terminal(slave) => {
                let copy = || slave.try_clone().expect("a descriptor");
                [copy(), copy(), copy()]
            }
        };
        let program = Spawn { argv: self.argv.clone(), env: self.env };
        let pid = self.subreaper.spawn(program, &streams).unwrap_or_else(|e| panic!("{e}"));
        drop(streams);
        RunningCommand {
            subreaper: self.subreaper,
            argv: self.argv,
            pid,
            stdin,
            stdout,
            stderr,
            feeder,
        }
    }

    /// Runs the program until both the process and its output have ended.
    #[track_caller]
    pub fn output(self) -> Output {
        self.spawn().output()
    }
}

/// A running program.
#[derive(Debug)]
pub struct RunningCommand<'a> {
    subreaper: &'a Subreaper,
    argv: Vec<String>,
    /// The program's pid.
    pub pid: i32,
    stdin: Option<File>,
    /// The program's standard output.
    pub stdout: Reader,
    /// The program's standard error.
    pub stderr: Reader,
    feeder: Option<JoinHandle<()>>,
}

impl RunningCommand<'_> {
    /// The pipe asked for by [`Command::stdin_piped`].
    pub fn take_stdin(&mut self) -> File {
        self.stdin.take().expect("a piped standard input, taken once")
    }

    /// Kills the process, unless it has ended.
    pub fn kill(&self) {
        // The process may end before the signal; its exit status then shows that.
        let _ = self.subreaper.signal(self.pid, libc::SIGKILL);
    }

    /// The end of the process; `None` while it runs.
    pub fn ended(&self) -> Option<End> {
        self.subreaper.ended(self.pid)
    }

    /// Closes the reading end of the program's standard output.
    pub fn close_stdout(&mut self) {
        self.stdout = Reader::new(File::open("/dev/null").expect("/dev/null").into());
    }

    /// Waits for the end of the process. Its output may stay open.
    #[track_caller]
    pub fn wait(&mut self) -> End {
        let end = self.subreaper.wait(self.pid, DEADLINE);
        end.unwrap_or_else(|| {
            let (out, err) = (self.stdout.so_far(), self.stderr.so_far());
            panic!("{} still runs after {DEADLINE:?}: {out:?} {err:?}", self.argv.join(" "))
        })
    }

    /// Waits for the end of the process and of its output.
    #[track_caller]
    pub fn output(mut self) -> Output {
        drop(self.stdin.take());
        // Both are read at once: a program that fills one pipe would wait for the reader of the
        // other.
        let mut stderr = self.stderr;
        let (stdout, stderr) = std::thread::scope(|s| {
            let err = s.spawn(|| stderr.rest());
            let out = self.stdout.rest();
            (out, err.join().expect("standard error did not end"))
        });
        let end = self.subreaper.wait(self.pid, DEADLINE);
        let end = end.unwrap_or_else(|| panic!("{} does not end", self.argv.join(" ")));
        if let Some(feeder) = self.feeder.take() {
            feeder.join().expect("the thread that writes standard input");
        }
        Output { argv: self.argv, status: end.status(), stdout, stderr }
    }
}
