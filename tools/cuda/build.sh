#!/usr/bin/env bash
# Builds the second binary, the one with the CUDA device, on a machine that needs neither a GPU nor a driver.
#   tools/cuda/build.sh [cargo arguments]      default: build --locked --release -p glassgate --features cuda
# nvcc and the libraries to link come from NVIDIA's Python wheels, into the target folder (about 1.2 GB). The result
# needs libcuda.so.1 (the driver) and the CUDA 13 libraries cudart, cublas and curand at run time; without them the loader
# refuses before `main`, which is why it is a binary of its own.
# CUDA_COMPUTE_CAP chooses the generation (90: H100 and H200).
set -euo pipefail
cd "$(dirname "$0")/../.."
tools/setup.sh cuda
target=${CARGO_TARGET_DIR:-$PWD/target}
command -v cargo >/dev/null 2>&1 || export PATH="$HOME/.cargo/bin:$PATH"

wheels=$(echo "$target"/cuda/lib/python3*/site-packages/nvidia/cu13)
toolkit=$target/cuda/toolkit
if ! [ "$toolkit/.made" -nt "$target/cuda/.made-from" ]; then
  # A copy: nvcc finds its parts beside itself, and the linker wants names without versions.
  rm -rf "$toolkit" && cp -a "$wheels" "$toolkit" && ln -s lib "$toolkit/lib64"
  for name in cublas cublasLt cudart curand nvrtc; do
    ln -sf "$(basename "$(ls "$toolkit/lib/lib$name".so.* | head -n 1)")" "$toolkit/lib/lib$name.so"
  done
  # The driver's library is not in any wheel. One symbol that the program uses keeps libcuda.so.1 among what it needs.
  mkdir -p "$toolkit/lib/stubs"
  echo 'int cuInit(unsigned flags) { return 100 + (int)flags; }' \
    | cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$toolkit/lib/stubs/libcuda.so" -x c -
  touch "$toolkit/.made"
fi

# A machine without a GPU cannot run the kernels, but their arithmetic can be followed thread by thread.
c++ -O1 -std=c++20 -w -Itools/cuda/emulate -o "$target/cuda/emulate" tools/cuda/emulate/main.cpp
"$target/cuda/emulate"

export CUDA_HOME=$toolkit CUDA_PATH=$toolkit CUDA_ROOT=$toolkit PATH=$toolkit/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
export RUSTFLAGS="${RUSTFLAGS:-} -L $toolkit/lib -L $toolkit/lib/stubs -C link-arg=-Wl,--unresolved-symbols=ignore-all"
# Other flags make everything anew; in a folder of its own that happens once, not at every switch.
export CARGO_TARGET_DIR=$target/cuda/build
[ $# -gt 0 ] || set -- build --locked --release -p glassgate --features cuda
cargo "$@"
