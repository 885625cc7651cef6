//! Arguments → command → exit code.

use std::process::ExitCode;

/// glibc keeps the memory of closed streams; jemalloc gives it back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    glassgate::cli::run()
}
