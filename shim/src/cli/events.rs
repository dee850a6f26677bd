//! `events`: reports the resource use of a container, and each time the kernel kills a process at
//! the memory limit.

use std::time::Duration;

use clap::Args;

use crate::{
    cli::{Global, print},
    container_id::ContainerId,
    control::{
        client,
        follow::{News, follow},
    },
    engine::Record,
    error::{Error, Explain, Result},
    state::{StateDir, Status},
    stats::Event,
};

#[derive(Debug, Args)]
pub(super) struct Events {
    /// Interval between two reports of the resource use, as in 5s or 1m30s.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = interval)]
    interval: Duration,
    /// Print the resource use once, and nothing more.
    #[arg(long)]
    stats: bool,
    /// Id of the container.
    id: String,
}

impl Events {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = Record::read(&dir)?.map_or(Status::Creating, |record| record.current_status());
        if matches!(status, Status::Creating | Status::Stopped) {
            return Err(Error::new(format!("container {id} is not running: it is {status}")));
        }
        let tell = |news: News| {
            let id = id.to_string();
            line(&match news {
                News::Stats(data) => Event::Stats { id, data },
                News::Oom => Event::Oom { id },
            })
        };
        if self.stats {
            let stats = client::stats(&dir)?.ok_or_else(|| {
                Error::new(format!("container {id} is not running: it is ending or has ended"))
            })?;
            tell(News::Stats(stats))?;
        } else {
            follow(&dir, &id, self.interval, tell)?;
        }
        Ok(0)
    }
}

fn line(event: &Event) -> Result<()> {
    let json = serde_json::to_string(event).explain(|| "cannot write an event".into())?;
    print(&format!("{json}\n"))
}

fn interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(interval) if !interval.is_zero() => Ok(interval),
        Ok(_) => Err("the interval has to be longer than 0".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_runcs_callers() {
        assert_eq!(interval("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(interval("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(interval("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["0s", "-1s", "5", "", "soon"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
