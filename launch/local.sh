#!/usr/bin/env bash
# Starts N processes of one training job on this machine, connected over loopback: to try a job as it runs on several
# hosts. Process 0 prints; the others write their output to WORKDIR/process-I.log. Ends with the first failure.
#
#   launch/local.sh N mimo-jax train --config configs/text.py:tiny --workdir runs/text [...]
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $# -ge 3 && $1 =~ ^[1-9][0-9]*$ ]] || usage
processes=$1
shift
workdir=""
for ((i = 1; i < $#; i++)); do [[ ${!i} == --workdir ]] && { j=$((i + 1)); workdir=${!j}; }; done
[[ -n $workdir ]] || usage
mkdir -p "$workdir"

port=${PORT:-$((20000 + RANDOM % 20000))}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((i = 1; i < processes; i++)); do
  "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$i" >"$workdir/process-$i.log" 2>&1 &
done
"$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process 0
wait
