//! What a child process of ours may take of the machine.

use rustix::process::{Resource, Rlimit, setrlimit};

/// From here on this process gets no more than that, and leaves no core file.
///
/// # Errors
/// When the limits cannot be set.
pub fn set(limits: &[(Resource, u64)]) -> Result<(), String> {
    for &(resource, most) in limits.iter().chain(&[(Resource::Core, 0)]) {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(|error| format!("cannot limit this process: {error}"))?;
    }
    Ok(())
}

/// Address space that this process has by now; 0 where the system does not tell. Libraries of a CUDA binary alone take
/// more than a gigabyte.
pub fn mapped_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}
