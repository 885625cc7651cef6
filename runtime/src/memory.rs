//! What models take of the machine's memory: known from their headers before any of it is taken, and held against what
//! the machine has left.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Bytes for one model. The text side (tokenizer, template, grammars) is not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Matrices in the order in which the kernels read them, norms and biases.
    pub weights: u64,
    /// Rotary tables.
    pub tables: u64,
    /// The KV pool. The machine gives it out as it is first written to.
    pub kv: u64,
    /// Beside them in the largest step: activations and logits.
    pub workspace: u64,
    /// Beside the weights while they load: the largest matrix as the files store it, and once more if it is quantised.
    pub staging: u64,
}

impl Memory {
    /// While it serves.
    pub fn held(&self) -> u64 {
        self.weights + self.tables + self.kv + self.workspace
    }

    /// From the load on: what is staged is given back before the first step.
    pub fn peak(&self) -> u64 {
        self.weights + self.tables + self.staging.max(self.kv + self.workspace)
    }
}

/// As in `5.1 MiB weights, 0.3 MiB tables, 32.0 MiB KV pool, 4.5 MiB workspace; 1.3 MiB more to load`.
impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { weights, tables, kv, workspace, .. } = self;
        let [weights, tables, kv, workspace] = [weights, tables, kv, workspace].map(|&bytes| Mebibytes(bytes));
        write!(f, "{weights} weights, {tables} tables, {kv} KV pool, {workspace} workspace")?;
        match self.peak() - self.held() {
            0 => Ok(()),
            more => write!(f, "; {} more to load", Mebibytes(more)),
        }
    }
}

pub(crate) struct Mebibytes(pub u64);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB", self.0 as f64 / f64::from(1 << 20))
    }
}

/// What this process may still take, by the machine and by every control group it is in, less a tenth for whoever else
/// is there. None where that cannot be read.
pub(crate) fn available() -> Option<u64> {
    available_below(Path::new("/"))
}

fn available_below(root: &Path) -> Option<u64> {
    let machine = std::fs::read_to_string(root.join("proc/meminfo")).ok();
    let machine = machine.and_then(|text| field(&text, "MemAvailable:")).map(|kibibytes| kibibytes * 1024);
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let groups = groups.lines().flat_map(|line| group_folders(root, line)).filter_map(|folder| left_in(&folder));
    let least = groups.chain(machine).min()?;
    Some(least - least / 10)
}

/// The folders of a line of `/proc/self/cgroup`, from the process's own group up: limits hold for all below. In a
/// container only the root may be there.
fn group_folders(root: &Path, line: &str) -> Vec<PathBuf> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { return Vec::new() };
    let mount = match controllers {
        "" => root.join("sys/fs/cgroup"),
        _ if controllers.split(',').any(|name| name == "memory") => root.join("sys/fs/cgroup/memory"),
        _ => return Vec::new(),
    };
    Path::new(path.trim_start_matches('/')).ancestors().map(|part| mount.join(part)).collect()
}

/// What one group has left: pages that only cache files count as free, as they are dropped before anybody is refused.
fn left_in(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = read("memory.stat").unwrap_or_default();
    let cached = field(&stat, "total_inactive_file").or_else(|| field(&stat, "inactive_file")).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}

/// The number behind a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok()).flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn machine(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        available_below(root.path())
    }

    #[test]
    fn what_is_left_is_the_least_of_the_machine_and_of_every_group_above_the_process() {
        let meminfo = ("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 10485760 kB\n");
        let nine_tenths = |bytes: u64| Some(bytes - bytes / 10);
        assert_eq!(machine(&[meminfo]), nine_tenths(10 * GIB));
        let v2 = [
            meminfo,
            ("proc/self/cgroup", "0::/pod/main\n"),
            ("sys/fs/cgroup/pod/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/pod/memory.current", "2147483648\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 5\ninactive_file 1073741824\n"),
            ("sys/fs/cgroup/pod/main/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/main/memory.current", "2147483648\n"),
        ];
        assert_eq!(machine(&v2), nine_tenths(3 * GIB));
        let v1 = [
            meminfo,
            ("proc/self/cgroup", "5:cpu:/a\n4:memory:/nowhere\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "536870913\n"),
        ];
        assert_eq!(machine(&v1), Some(0), "more is used than may be");
        assert_eq!(machine(&[]), None);
    }
}
