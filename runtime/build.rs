//! Makes PTX of the CUDA kernels, for binaries with the feature `cuda`. `tools/cuda/build.sh` provides nvcc.

use std::{env, path::PathBuf, process::Command};

const SOURCE: &str = "src/kernels/cuda/kernels.cu";

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("kernels.ptx");
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".to_owned());
    let status = Command::new("nvcc")
        .args(["-ptx", "-O3", "-std=c++17", SOURCE, "-o"])
        .arg(&out)
        .arg(format!("-arch=compute_{capability}"))
        .status()
        .map_err(|error| format!("nvcc does not start ({error}): build with tools/cuda/build.sh"))?;
    if status.success() { Ok(()) } else { Err(format!("nvcc did not compile {SOURCE}")) }
}
