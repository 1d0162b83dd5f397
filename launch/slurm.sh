#!/bin/bash
# The command on a SLURM allocation: sbatch --nodes=4 launch/slurm.sh target=… vector.plus=… output=…
#
# Starts Ray on every node of the allocation, runs `python -m rvdist.launch cluster=slurm` with the arguments given,
# ends Ray and exits with the command's status. Submit it from a directory that every node sees, with the environment of
# rvdist active (PYTHON=/path/to/python names another). SLURM 20.11 or newer. docs/clusters.md says more.
#SBATCH --job-name=rvdist
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=rvdist-%j.log
#SBATCH --signal=B:TERM@120

set -euo pipefail
export PYTHON="${PYTHON:-python}" RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness="${RAY_worker_niceness:-0}" # Ray's own choice, 15, lets everything else on a node go first

: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}" # where sbatch runs this script

# Everything of this job on a node's own disk. Short, because names of sockets may not be long.
export RAY_DIRECTORY="/tmp/rvdist-$SLURM_JOB_ID"
port=$((20000 + SLURM_JOB_ID % 12000)) # between the ports of Ray's workers and the kernel's

# By what address the other nodes reach this one; HEAD_ADDRESS=… chooses among several networks.
address="${HEAD_ADDRESS:-$({ getent ahostsv4 "$head" | cut -d' ' -f1; hostname --all-ip-addresses | tr ' ' '\n'; } |
  grep --invert-match --max-count=1 -e '^127\.' -e : -e '^$' || true)}"
: "${address:?of $head is not known: set HEAD_ADDRESS to that by which other nodes reach it}"
export RAY_ADDRESS="$address:$port"

# Whoever can talk to Ray can run programs as you: a token that only this job knows, in a file that only you can read.
secrets="$(mktemp --directory --tmpdir="$PWD" ".rvdist-$SLURM_JOB_ID-XXXXXX")"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/token"
unset RAY_AUTH_TOKEN
(umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

ray_processes=()
finish() {
  kill "${ray_processes[@]}" 2>/dev/null || true
  wait "${ray_processes[@]}" 2>/dev/null || true
  rm -r -f "$secrets"
}
trap finish EXIT

# A task of each step starts Ray on its node, with the cores that SLURM gave to this job there, and stays until the end.
# Ray gives a node that is busy 30 seconds to start; so it is tried again.
start_ray() { # srun's arguments, --, those of `ray start`
  local step=()
  while [[ "$1" != -- ]]; do step+=("$1") && shift; done
  # shellcheck disable=SC2016  # is expanded on the node
  srun --overlap --cpu-bind=none --ntasks-per-node=1 "${step[@]}" bash -c '
    trap "ended=1; kill \$! 2>/dev/null" TERM
    for attempt in 1 2 3; do
      "$PYTHON" -m ray.scripts.scripts start "$@" --block --temp-dir="$RAY_DIRECTORY" \
        --num-cpus="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" >/dev/null &
      wait # for Ray or a signal
      wait # for Ray after a signal
      [[ -z "$ended" ]] || break
    done
    rm -r -f "$RAY_DIRECTORY"' ray "${@:2}" &
  ray_processes+=($!)
}

start_ray --nodes=1 --ntasks=1 --nodelist="$head" -- \
  --head --node-ip-address="$address" --port="$port" --include-dashboard=false
until [[ -e "$RAY_DIRECTORY/ray_current_cluster" ]]; do # which Ray writes last
  kill -0 "${ray_processes[0]}" 2>/dev/null || { echo "rvdist: Ray did not start on $head ($RAY_ADDRESS)" >&2 && exit 1; }
  sleep 0.5
done
others=$((${#nodes[@]} - 1))
if ((others)); then
  start_ray --nodes="$others" --ntasks="$others" --exclude="$head" -- --address="$RAY_ADDRESS"
fi

# Job control, so that the command hears an interrupt: it then keeps what is done, and the same job goes on from there.
set -m
"$PYTHON" -m rvdist.launch "$@" cluster=slurm &
command=$!
set +m
trap 'kill -INT $command' TERM INT
status=0
wait "$command" || status=$?
while kill -0 "$command" 2>/dev/null; do # a signal ended the wait, and not the command
  status=0
  wait "$command" || status=$?
done
exit "$status"
