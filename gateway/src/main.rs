//! Arguments → command → exit code.

use std::process::ExitCode;

/// glibc keeps the memory of closed streams; jemalloc gives it back. Its threads in the background do so for whoever does
/// not allocate any more: the one that loaded a model, or an engine without work.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    glassgate::cli::run()
}
