//! `ps`: lists the processes of a container.

use clap::{Args, ValueEnum};

use crate::{
    cli::{Global, list::columns, print, users},
    clock::{self, LocalTime},
    container_id::ContainerId,
    control::client,
    engine::{ProcessInfo, Record},
    error::{Error, Result},
    state::{StateDir, Status},
    text::printable,
};

/// First and last major number of pseudo-terminals (the kernel's devices.txt).
const PTS_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;

#[derive(Debug, Args)]
pub(super) struct Ps {
    /// `table`: the processes inside the microVM, with their pids in the container. `json`: the
    /// pids on the host, of the sandbox process and the VMM.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Id of the container.
    id: String,
    /// Options of ps(1): only -e and -f, which are the default.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PS OPTIONS")]
    options: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

impl Ps {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let record = Record::read(&dir)?.filter(|record| {
            !matches!(record.current_status(), Status::Creating | Status::Stopped)
        });
        let not_running = || {
            let what = format!("cannot list the processes of container {id}");
            Error::new(format!("{what}: container not running"))
        };
        let record = record.ok_or_else(not_running)?;
        let text = match self.format {
            Format::Json => format!("{}\n", serde_json::json!(host_pids(&record))),
            Format::Table => {
                self.check_options()?;
                let processes = client::processes(&dir)?.ok_or_else(not_running)?;
                table(processes, &users::of_container(record.sandbox))
            }
        };
        print(&text)?;
        Ok(0)
    }

    /// Refuses options other than those of `ps -ef`, which has the columns of the table.
    fn check_options(&self) -> Result<()> {
        let options = self.options.iter().flat_map(|option| option.split_whitespace());
        match options.clone().find(|option| !matches!(*option, "-ef" | "-fe" | "-e" | "-f" | "ef"))
        {
            None => Ok(()),
            Some(option) => Err(Error::new(format!(
                "ps option {option:?} is not supported: only -ef is, and `isopod exec {} ps` runs the \
                 ps of the container",
                self.id
            ))),
        }
    }
}

/// Pids on the host of the container's sandbox process and VMM, as far as they live.
fn host_pids(record: &Record) -> Vec<i32> {
    let processes = [Some(record.sandbox), record.vmm].into_iter().flatten();
    processes.filter(|process| process.is_alive()).map(|process| process.pid).collect()
}

/// Formats processes as `ps -ef` does, by their pids in the container.
fn table(mut processes: Vec<ProcessInfo>, names: &users::Names) -> String {
    processes.sort_by_key(|process| process.container_pid);
    let now = clock::local_time(clock::realtime_ns() / 1_000_000_000);
    let mut rows =
        vec![["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"].map(str::to_owned)];
    rows.extend(processes.iter().map(|process| {
        let started = clock::local_time(process.start_time_ms / 1000);
        let cpu_seconds = process.cpu_time_ms / 1000;
        [
            names.get(&process.container_uid).cloned().unwrap_or_else(|| process.uid.to_string()),
            process.container_pid.to_string(),
            process.container_parent_pid.to_string(),
            process
                .cpu_time_ms
                .saturating_mul(100)
                .checked_div(process.age_ms)
                .unwrap_or(0)
                .min(9999)
                .to_string(),
            start_time(started, now),
            terminal(process.terminal),
            format!(
                "{:02}:{:02}:{:02}",
                cpu_seconds / 3600,
                cpu_seconds / 60 % 60,
                cpu_seconds % 60
            ),
            command(process),
        ]
    }));
    columns(&rows)
}

/// The start time as `ps` shows it: the time today, the day in this year, or else the year.
fn start_time(started: LocalTime, now: LocalTime) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    if started.year != now.year {
        return started.year.to_string();
    }
    if (started.month, started.day) != (now.month, now.day) {
        return format!("{}{:02}", MONTHS[usize::from(started.month) % 12], started.day);
    }
    format!("{:02}:{:02}", started.hour, started.minute)
}

/// Name of a terminal by its number in the kernel's encoding of devices (`new_encode_dev`).
fn terminal(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    match (major, minor) {
        (0, 0) => "?".to_owned(),
        (major, minor) if PTS_MAJORS.contains(&major) => {
            format!("pts/{}", (major - PTS_MAJORS.start()) * 256 + minor)
        }
        (5, 1) => "console".to_owned(),
        (4, minor) => format!("tty{minor}"),
        _ => format!("{major}:{minor}"),
    }
}

/// The arguments, or the name in brackets if there are no arguments.
fn command(process: &ProcessInfo) -> String {
    if process.args.is_empty() {
        return printable(&format!("[{}]", process.name));
    }
    printable(&process.args.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_as_of_ps_and_of_a_hostile_guest_too() {
        let process = ProcessInfo {
            pid: 40,
            container_pid: 7,
            container_parent_pid: 1,
            uid: 101_000,
            container_uid: 1000,
            terminal: 34816,
            start_time_ms: 1000,
            age_ms: 200_000,
            cpu_time_ms: 100_000,
            args: vec!["a\x1b[2J".into(), "b\nc".into()],
            ..Default::default()
        };
        let strange = ProcessInfo { cpu_time_ms: u64::MAX, name: "x".into(), ..Default::default() };
        let text = table(vec![process, strange], &[(1000, "alice".to_owned())].into());
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!((lines[1][0], lines[1].last()), ("0", Some(&"[x]")));
        assert_eq!(
            lines[2],
            ["alice", "7", "1", "50", "1970", "pts/0", "00:01:40", "a", "[2J", "b", "c"]
        );
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn terminals_have_names() {
        for (device, name) in [
            (0, "?"),
            (34816, "pts/0"),
            (34817, "pts/1"),
            (1 << 20 | 136 << 8, "pts/256"),
            (1281, "console"),
        ] {
            assert_eq!(terminal(device), name);
        }
    }

    #[test]
    fn starts_are_told_by_their_age() {
        let time = |year, month, day| LocalTime { year, month, day, hour: 3, minute: 4 };
        let now = time(2026, 1, 2);
        assert_eq!(start_time(time(2026, 1, 2), now), "03:04");
        assert_eq!(start_time(time(2026, 0, 2), now), "Jan02");
        assert_eq!(start_time(time(2025, 1, 2), now), "2025");
    }
}
