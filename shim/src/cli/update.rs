//! `update`: changes the limits of a container.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use clap::Args;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use crate::{
    bundle::{beyond_vm, parse_resources, update_resources},
    cli::Global,
    container_id::ContainerId,
    control::ask,
    engine::{Record, Request},
    error::{Error, Explain, Result},
    state::{StateDir, Status},
};

/// Longest JSON that is read, in bytes.
const MAX_JSON_LEN: u64 = 32 << 10;

#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub(super) struct Update {
    /// File with the OCI linux.resources object, or - for standard input, in place of the other
    /// options. Fields that are missing, 0 or null stay as they are.
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of block IO among containers, 10 to 1000.
    #[arg(long, value_name = "WEIGHT", default_value_t = 0)]
    blkio_weight: u16,
    /// Period of the CPU quota in microseconds.
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time in a period in microseconds; -1 for no limit.
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// CPU time beyond the quota that may be saved up, in microseconds.
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,
    /// CPU shares, 2 to 262144.
    #[arg(long, visible_alias = "cpu-shares", value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Refused unless 0: cgroup v2, which the guest uses, has no real-time limits.
    #[arg(long, value_name = "US")]
    cpu_rt_period: Option<u64>,
    /// Refused unless 0, like --cpu-rt-period.
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    cpu_rt_runtime: Option<i64>,
    /// 1: only CPU time that no other cgroup wants.
    #[arg(long, value_name = "0|1", allow_hyphen_values = true)]
    cpu_idle: Option<i64>,
    /// CPUs, as in 0-3,8: the container gets the same number of its microVM's CPUs.
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Only 0: a microVM has one memory node.
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Memory limit in bytes, or with a suffix as in 512m; -1 for no limit.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = size)]
    memory: Option<i64>,
    /// Memory that is kept for the container; values as for --memory.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = size)]
    memory_reservation: Option<i64>,
    /// Memory and swap together; values as for --memory.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = size)]
    memory_swap: Option<i64>,
    /// Most processes and threads; -1 for no limit.
    #[arg(long, value_name = "N", default_value_t = 0, allow_hyphen_values = true)]
    pids_limit: i64,
    /// Refused: cache allocation of the host does not reach into a microVM.
    #[arg(long, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    /// Refused, like --l3-cache-schema.
    #[arg(long, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
    /// Without effect, as with runc.
    #[arg(long, hide = true, allow_hyphen_values = true)]
    kernel_memory: Option<String>,
    /// Without effect, as with runc.
    #[arg(long, hide = true, allow_hyphen_values = true)]
    kernel_memory_tcp: Option<String>,
    /// Id of the container.
    id: String,
}

impl Update {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let what = format!("cannot update container {id}");
        let record = Record::read(&dir)?.filter(|record| {
            !matches!(record.current_status(), Status::Creating | Status::Stopped)
        });
        let record = record.ok_or_else(|| Error::new(format!("{what}: container not running")))?;
        let update = self.resources()?;
        let after = update_resources(&record.resources, &update, record.vm)
            .map_err(|error| Error::because(&what, error))?;
        for beyond in beyond_vm(&after, record.vm) {
            log::warn!("container {id}: {beyond}");
        }
        ask(&dir, Request::Update { resources: Box::new(update) })?.done(what)?;
        Ok(0)
    }

    /// The limits to change, from the options or from the file of `--resources`.
    fn resources(&self) -> Result<LinuxResources> {
        for (name, value) in
            [("--l3-cache-schema", &self.l3_cache_schema), ("--mem-bw-schema", &self.mem_bw_schema)]
        {
            if value.as_ref().is_some_and(|value| !value.is_empty()) {
                return Err(Error::new(format!(
                    "{name} is not supported: cache allocation of the host does not reach into a \
                     microVM"
                )));
            }
        }
        if let Some(path) = &self.resources {
            let (name, json) = read(path)?;
            return parse_resources(&name, &json);
        }
        for (name, value) in [
            ("--kernel-memory", &self.kernel_memory),
            ("--kernel-memory-tcp", &self.kernel_memory_tcp),
        ] {
            if value.is_some() {
                log::warn!("{name} has no effect: it is part of --memory");
            }
        }
        let mut memory = LinuxMemory::default();
        memory
            .set_limit(self.memory)
            .set_reservation(self.memory_reservation)
            .set_swap(self.memory_swap);
        let mut cpu = LinuxCpu::default();
        cpu.set_shares(self.cpu_share)
            .set_quota(self.cpu_quota)
            .set_period(self.cpu_period)
            .set_burst(self.cpu_burst)
            .set_realtime_runtime(self.cpu_rt_runtime)
            .set_realtime_period(self.cpu_rt_period)
            .set_idle(self.cpu_idle)
            .set_cpus(self.cpuset_cpus.clone())
            .set_mems(self.cpuset_mems.clone());
        let mut pids = LinuxPids::default();
        pids.set_limit(self.pids_limit);
        let mut io = LinuxBlockIo::default();
        io.set_weight(Some(self.blkio_weight));
        let mut resources = LinuxResources::default();
        resources
            .set_memory(Some(memory))
            .set_cpu(Some(cpu))
            .set_pids(Some(pids))
            .set_block_io(Some(io));
        // The options pass the same checks as a file.
        let json = serde_json::to_vec(&resources).explain(|| "cannot write the limits".into())?;
        parse_resources("the command line", &json)
    }
}

/// Reads the file of `--resources`. Returns its name, for messages, and its content.
fn read(path: &Path) -> Result<(String, Vec<u8>)> {
    let mut json = Vec::new();
    let (name, result) = if path == Path::new("-") {
        let result = std::io::stdin().take(MAX_JSON_LEN + 1).read_to_end(&mut json);
        ("standard input".to_owned(), result)
    } else {
        let file = std::fs::File::open(path);
        let result = file.and_then(|file| file.take(MAX_JSON_LEN + 1).read_to_end(&mut json));
        (path.display().to_string(), result)
    };
    let length = result.explain(|| format!("cannot read {name}"))?;
    if length as u64 > MAX_JSON_LEN {
        return Err(Error::new(format!("{name} is longer than {MAX_JSON_LEN} bytes")));
    }
    Ok((name, json))
}

/// Parses a size in bytes: -1, or a number, perhaps with a fraction, and a unit. The units are `b`,
/// `k`, `m`, `g`, `t` and `p`, each 1024 times the one before. `kb` and `kib` are the same as `k`,
/// and so on.
fn size(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let invalid = || format!("{text:?} is not a size such as 1073741824, 512m, 1.5GiB or -1");
    let lower = text.to_ascii_lowercase();
    let split = lower.rfind(|c: char| c.is_ascii_digit() || c == '.').ok_or_else(invalid)? + 1;
    let (number, unit) = lower.split_at(split);
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(invalid());
    }
    let power = match unit.strip_prefix(' ').unwrap_or(unit) {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        "p" | "pb" | "pib" => 5,
        _ => return Err(invalid()),
    };
    let unit = 1_i64 << (10 * power);
    if let Ok(whole) = number.parse::<i64>() {
        return whole.checked_mul(unit).ok_or_else(invalid);
    }
    let bytes = number.parse::<f64>().map_err(|_| invalid())? * unit as f64;
    // Below 2^63 every whole part fits into an i64.
    if (0.0..9.2e18).contains(&bytes) { Ok(bytes as i64) } else { Err(invalid()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        update: Update,
    }

    fn resources(arguments: &[&str]) -> Result<LinuxResources> {
        Command::try_parse_from([&["update"], arguments, &["c"]].concat())
            .unwrap()
            .update
            .resources()
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("-1", -1),
            ("1000", 1000),
            ("64b", 64),
            ("32k", 32 << 10),
            ("32 KiB", 32 << 10),
            ("512M", 512 << 20),
            ("1.5g", 3 << 29),
            ("2TB", 2 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "-2", "1x", "1kk", "1..5g", "9999999p", "1 k b", "1e3", "١"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn options_become_resources() {
        let arguments = [
            "--memory",
            "-1",
            "--memory-swap=-1",
            "--cpu-quota",
            "-1",
            "--cpu-period",
            "50000",
            "--cpu-share",
            "512",
            "--pids-limit",
            "-1",
            "--cpuset-cpus",
            "0-1",
            "--cpuset-mems",
            "0",
        ];
        let update = resources(&arguments).unwrap();
        let memory = update.memory().unwrap();
        assert_eq!(
            (memory.limit(), memory.swap(), memory.reservation()),
            (Some(-1), Some(-1), None)
        );
        let cpu = update.cpu().as_ref().unwrap();
        assert_eq!((cpu.quota(), cpu.period(), cpu.shares()), (Some(-1), Some(50000), Some(512)));
        assert_eq!(cpu.cpus().as_deref(), Some("0-1"));
        assert_eq!(update.pids().unwrap().limit(), -1);
        for (option, value, name) in [
            ("--cpu-rt-runtime", "1", "realtimeRuntime"),
            ("--cpu-rt-period", "1", "realtimePeriod"),
            ("--l3-cache-schema", "L3:0=f", "--l3-cache-schema"),
            ("--cpuset-mems", "1", "cpu.mems"),
            ("--resources", "/no/such/file", "/no/such/file"),
        ] {
            let error = resources(&[option, value]).unwrap_err().message;
            assert!(error.contains(name), "{error}");
        }
    }
}
