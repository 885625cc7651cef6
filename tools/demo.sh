#!/usr/bin/env bash
# Gateway, Prometheus, Grafana if it is installed, and the demo's traffic, together. What this starts ends with it.
#   tools/demo.sh [--exit] [options of `glassgate demo`]
# In a terminal everything stays up after the demo until Ctrl-C; with --exit or GLASSGATE_DEMO_EXIT=1 it ends with the demo.
set -euo pipefail
# What is written here holds keys: it is its owner's alone, as the data folder is.
umask 077
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}
glassgate=$target/release/glassgate
config=configs/gateway.toml
logs=data/demo

stay=1
[ -t 1 ] || stay=
[ -z "${GLASSGATE_DEMO_EXIT:-}" ] || stay=
options=()
for option in "$@"; do
  if [ "$option" = --exit ]; then stay=; else options+=("$option"); fi
done

say() { printf 'demo: %s\n' "$*"; }
give_up() { say "$*" >&2; exit 1; }

pids=()
demo=
interrupted=
# Each Ctrl-C is passed on, once: the first ends the demo's sending, the second its waiting.
interrupt() {
  interrupted=1
  [ -z "$demo" ] || kill -INT "$demo" 2>/dev/null || true
}
finish() {
  trap - EXIT INT TERM
  for pid in "${pids[@]}"; do kill -INT "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap finish EXIT
trap interrupt INT TERM

# In a session of its own, so that Ctrl-C reaches nothing before the demo has printed its summary.
start() {
  local log=$1
  shift
  setsid "$@" >"$logs/$log.log" 2>&1 </dev/null &
  pids+=($!)
}
# Waits for a URL to answer, as long as the process that was started last lives.
until_up() {
  until curl -fsS -o /dev/null "$1" 2>/dev/null; do
    kill -0 "${pids[-1]}" 2>/dev/null || give_up "$2 did not start: $(tail -n 3 "$logs/$2.log")"
    [ -z "$interrupted" ] || exit 1
    sleep 0.1
  done
}
is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
# The first free port of some.
free_port() {
  for port in "$@"; do
    if is_free "$port"; then echo "$port"; return; fi
  done
  give_up "none of the ports $* is free"
}

mkdir -p "$logs"
address() { sed -n "s/^$1 *= *\"\([^\"]*\)\".*/\1/p" "$config"; }
admin=$(address admin)

if curl -fsS -o /dev/null "http://$admin/readyz" 2>/dev/null; then
  say "using the gateway that answers at $admin"
else
  start gateway "$glassgate" serve --config "$config"
  until_up "http://$admin/readyz" gateway
fi

# The gateway may be elsewhere than deploy/prometheus.yml says; and dashboards begin with this demo, not with the last.
cp deploy/rules.yml "$logs/rules.yml"
sed "s/127\.0\.0\.1:8081/$admin/" deploy/prometheus.yml >"$logs/prometheus.yml"
grep -qF "\"$admin\"" "$logs/prometheus.yml" || give_up "deploy/prometheus.yml has no target that could be set to $admin"
rm -rf "$logs/prometheus"
prometheus_port=$(free_port 9090 9091 9092 9094)
start prometheus prometheus --config.file="$logs/prometheus.yml" --storage.tsdb.path="$logs/prometheus" \
  --web.listen-address="127.0.0.1:$prometheus_port"
until_up "http://127.0.0.1:$prometheus_port/-/ready" prometheus

grafana=
if command -v grafana-server >/dev/null 2>&1 || command -v grafana >/dev/null 2>&1; then
  grafana_port=$(free_port 3000 3001 3002 3003)
  server=(grafana server)
  command -v grafana >/dev/null 2>&1 || server=(grafana-server)
  export GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=$grafana_port GF_PATHS_DATA=$PWD/$logs/grafana
  export GF_PATHS_PROVISIONING=$PWD/deploy/grafana/provisioning GF_AUTH_ANONYMOUS_ENABLED=true
  export GF_ANALYTICS_REPORTING_ENABLED=false GLASSGATE_PROMETHEUS=http://127.0.0.1:$prometheus_port
  export GLASSGATE_DASHBOARDS=$PWD/dashboards GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH=$PWD/dashboards/overview.json
  start grafana "${server[@]}" --homepath "${GRAFANA_HOME:-/usr/share/grafana}"
  until_up "http://127.0.0.1:$grafana_port/api/health" grafana
  grafana="dashboards   http://127.0.0.1:$grafana_port"
fi

cat <<END

  ${grafana:-dashboards   install Grafana, or with Docker:  docker compose -f deploy/compose.yaml up --build}
  Prometheus   http://127.0.0.1:$prometheus_port
  metrics      http://$admin/metrics
  which is better, who spent what, one request:
               $glassgate feedback
               $glassgate spend --by tenant
               $glassgate trace REQUEST-ID

END

# Behind, because bash would hear of a signal only after what is in front has ended.
setsid "$glassgate" demo --config "$config" "${options[@]}" &
demo=$!
while
  played=0
  wait "$demo" || played=$?
  kill -0 "$demo" 2>/dev/null
do :; done
demo=
if [ -n "$stay" ] && [ -z "$interrupted" ]; then
  say "everything stays up; Ctrl-C ends it"
  wait "${pids[@]}" || true
fi
exit "$played"
