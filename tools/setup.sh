#!/usr/bin/env bash
# Installs what a chore needs, or says in one line what is missing.
#   tools/setup.sh build    what building needs: a C/C++ compiler and cmake
#   tools/setup.sh demo     the above, Prometheus and curl
#   tools/setup.sh bench    what building needs, and what the gateway is measured with and beside: valgrind; nginx; Postgres; llama.cpp; SMG, mistral.rs, transformers
#                           and sentence-transformers (in venvs under the target folder; many GB, because PyTorch comes with CUDA)
#   tools/setup.sh cuda     what building needs; nvcc and CUDA's libraries in a venv under the target folder (1.2 GB)
#   tools/setup.sh test     what building needs, cargo-nextest, cargo-deny, Prometheus and amtool, Redis, Postgres, and the Python
#                           clients (in a venv under the target folder)
#   tools/setup.sh long     as test, what models are compared with: transformers, sentence-transformers and MiniLM (several GB),
#                           and schemathesis
#   tools/setup.sh pictures what drawing the dashboards needs: node, chromium, and Grafana's components beside the script
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}

missing() { printf 'glassgate: %s\n' "$*" >&2; exit 1; }

# A fresh rustup is often installed but not yet on PATH.
command -v cargo >/dev/null 2>&1 || export PATH="$HOME/.cargo/bin:$PATH"
command -v cargo >/dev/null 2>&1 || missing "Rust is missing. Install it with:  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"

packages=()
need() { command -v "$1" >/dev/null 2>&1 || packages+=("$2"); }
need cc gcc
need c++ g++
need cmake cmake
need make make
need_python() {
  need python3 python3
  python3 -c 'import ensurepip' >/dev/null 2>&1 || packages+=(python3-venv)
}
case ${1:-build} in
  demo)
    need curl curl
    need prometheus prometheus ;;
  test | long)
    need curl curl
    need prometheus prometheus
    need promtool prometheus
    need amtool prometheus-alertmanager
    need redis-server redis-server
    need redis-cli redis-tools
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || packages+=(postgresql)
    need_python ;;
  bench)
    [ -x /usr/sbin/nginx ] || need nginx nginx-light
    need valgrind valgrind
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || packages+=(postgresql)
    need_python ;;
  cuda)
    need_python ;;
  pictures)
    need chromium chromium
    need node nodejs
    need npm npm
    fc-list 2>/dev/null | grep -q . || packages+=(fonts-dejavu-core) ;;
esac

if [ ${#packages[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${packages[*]}"
  command -v apt-get >/dev/null 2>&1 || missing "please install: ${packages[*]}"
  if [ "$(id -u)" = 0 ]; then
    echo "glassgate: installing ${packages[*]}"
    log=$(mktemp)
    # Programs are wanted, not services: a Prometheus that starts with the machine would take the port of ours.
    policy=/usr/sbin/policy-rc.d
    if ! [ -e $policy ]; then
      printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
      trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    { apt-get update && DEBIAN_FRONTEND=noninteractive $install; } >"$log" 2>&1 \
      || { tail -n 20 "$log" >&2; missing "that did not work; please run:  apt-get update && $install"; }
    rm -f "$log"
  else
    missing "please run:  sudo apt-get update && sudo $install"
  fi
fi

# A venv is made anew when its list changes.
venv() {
  local venv=$target/$1 list=$2 wanted
  wanted=$(cksum <"$list")
  [ "$(cat "$venv/.made-from" 2>/dev/null || true)" != "$wanted" ] || return 0
  echo "glassgate: installing $list into $venv"
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$list"
  printf '%s' "$wanted" >"$venv/.made-from"
}

[ "${1:-build}" != cuda ] || venv cuda tools/cuda/requirements.txt
# llama.cpp comes whole in the source package of its Python binding. Without it, the bench leaves the engine's section out.
llama() {
  local version=0.3.36 folder=$target/llama
  [ ! -e "$folder/build/.made" ] || return 0
  echo "glassgate: building llama.cpp in $folder (minutes)"
  rm -rf "$folder" && mkdir -p "$folder"
  "$target/peers/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
    -d "$folder" "llama-cpp-python==$version" || return 1
  tar -xf "$folder"/llama_cpp_python-*.tar.gz -C "$folder" --strip-components 1 || return 1
  cmake -S "$folder/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF >"$folder/log" 2>&1 || return 1
  cmake --build "$folder/build" -j --target llama-bench llama-quantize llama-server >>"$folder/log" 2>&1 || return 1
  touch "$folder/build/.made"
}
if [ "${1:-build}" = bench ]; then
  venv peers tests/bench/peers/requirements.txt
  venv long tests/long/requirements.txt
  llama || echo "glassgate: llama.cpp could not be built ($target/llama/log says why): it is left out of the bench"
fi
if [ "${1:-build}" = pictures ] && ! [ tools/pictures/node_modules/.package-lock.json -nt tools/pictures/package.json ]; then
  echo "glassgate: installing Grafana's components into tools/pictures/node_modules"
  npm install --prefix tools/pictures --no-package-lock --no-audit --no-fund --loglevel=error
fi

case ${1:-build} in test | long) ;; *) exit 0 ;; esac

# Versions are stated so that two machines run the same checks; a newer one that is already there will do.
command -v cargo-nextest >/dev/null 2>&1 || cargo install --locked cargo-nextest --version 0.9.143
command -v cargo-deny >/dev/null 2>&1 || cargo install --locked cargo-deny --version 0.20.2

venv clients tests/clients/requirements.txt
if [ "$1" = long ]; then
  venv long tests/long/requirements.txt
  venv fuzz tests/clients/fuzz/requirements.txt
fi
