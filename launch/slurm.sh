#!/bin/bash
# The command on a SLURM allocation: sbatch --nodes=4 launch/slurm.sh target=… vector.plus=… output=…
#
# Starts Ray on every node of the allocation with all that the job has there, runs `python -m rvdist.launch cluster=slurm`
# with the arguments given, ends Ray and exits with the command's status. A node that fails costs what it was at; where
# it is the first, SLURM runs the job again, which goes on from there. Submit it from a directory that every node sees, with the environment of
# rvdist active (PYTHON=/path/to/python names another). SLURM 20.11 or newer. docs/clusters.md says more.
#SBATCH --job-name=rvdist
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=rvdist-%j.log
#SBATCH --signal=B:TERM@120

set -euo pipefail
export PYTHON="${PYTHON:-python}" RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness="${RAY_worker_niceness:-0}" # Ray's own choice, 15, lets everything else on a node go first

: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}" # where sbatch runs this script

# Everything of this job on a node's own disk, what is compiled there included: many nodes that compile into one home lock
# each other out. Short, because names of sockets may not be long.
export RAY_DIRECTORY="/tmp/rvdist-$SLURM_JOB_ID"
for cache in VLLM_CACHE_ROOT TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR FLASHINFER_WORKSPACE_BASE CUDA_CACHE_PATH; do
  export "$cache=${!cache:-$RAY_DIRECTORY/cache/$cache}"
done
rm -r -f "$RAY_DIRECTORY" ".rvdist-$SLURM_JOB_ID-"* # of this job, when its first node failed

# What the job has on each node, as NAME=CORES:GPUS. A step gets the GPUs that were asked for by name, and of those that
# come with --exclusive none, unless it asks for them.
mapfile -t cores < <(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:?}" | while IFS='(x)' read -r each _ times; do
  for ((i = 0; i < ${times:-1}; i++)); do echo "$each"; done
done)
declare -A gpus
while read -r names resources; do
  count="$(sed 's/ .*//; s/^GRES=//; s/([^)]*)//g' <<<"$resources" | tr , '\n' |
    awk -F: '$1 == "gpu" { n += $NF } END { print n + 0 }')"
  while IFS= read -r node; do gpus[$node]=$count; done < <(scontrol show hostnames "$names")
done < <(scontrol --details show job "$SLURM_JOB_ID" | sed --quiet 's/^ *Nodes=\([^ ]*\) .* \(GRES=.*\)/\1 \2/p')
RVDIST_NODES=""
for i in "${!nodes[@]}"; do RVDIST_NODES+=" ${nodes[i]}=${cores[i]}:${gpus[${nodes[i]}]:-0}"; done
export RVDIST_NODES
port=$((20000 + SLURM_JOB_ID % 12000)) # between the ports of Ray's workers and the kernel's

# By what address the other nodes reach this one; HEAD_ADDRESS=… chooses among several networks.
address="${HEAD_ADDRESS:-$({ getent ahostsv4 "$head" | cut -d' ' -f1; hostname --all-ip-addresses | tr ' ' '\n'; } |
  grep --invert-match --max-count=1 -e '^127\.' -e : -e '^$' || true)}"
: "${address:?of $head is not known: set HEAD_ADDRESS to that by which other nodes reach it}"
export RAY_ADDRESS="$address:$port"

# Whoever can talk to Ray can run programs as you: a token that only this job knows, in a file that only you can read.
secrets="$(mktemp --directory --tmpdir="$PWD" ".rvdist-$SLURM_JOB_ID-XXXXXX")"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/token" RVDIST_LOGS="$PWD/rvdist-$SLURM_JOB_ID-logs"
unset RAY_AUTH_TOKEN
(umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

ray_processes=()
finish() {
  [[ " 0 2 130 " == *" ${status:-1} "* ]] || : >"$secrets/keep"
  kill "${ray_processes[@]}" 2>/dev/null || true
  wait "${ray_processes[@]}" 2>/dev/null || true
  rm -r -f "$secrets"
  [[ ! -d "$RVDIST_LOGS" ]] || echo "rvdist: what Ray and its workers wrote is in $RVDIST_LOGS" >&2
}
trap finish EXIT

# A task of each step starts Ray on its node, with all that SLURM gave to this job there, and stays until the end; then it
# keeps the logs, where the command failed. Ray gives a node that is busy 30 seconds to start; so it is tried again.
start_ray() { # names of nodes with the same number of GPUs, --, arguments of `ray start`
  local names=()
  while [[ "$1" != -- ]]; do names+=("$1") && shift; done
  local step=("--nodes=${#names[@]}" "--ntasks=${#names[@]}" "--nodelist=$(IFS=, && echo "${names[*]}")")
  ((${gpus[${names[0]}]:-0} == 0)) || step+=("--gres=gpu:${gpus[${names[0]}]}")
  # shellcheck disable=SC2016  # is expanded on the node
  env --unset=SLURM_MEM_PER_CPU --unset=SLURM_MEM_PER_GPU --unset=SLURM_GPUS --unset=SLURM_GPUS_PER_NODE \
    --unset=SLURM_GPUS_PER_TASK --unset=SLURM_GPUS_PER_SOCKET --unset=SLURM_NTASKS_PER_GPU --unset=SLURM_GPU_BIND \
    srun --overlap --export=ALL --mem=0 --no-kill --kill-on-bad-exit=0 --cpu-bind=none --ntasks-per-node=1 "${step[@]}" \
    bash -c '
    trap "ended=1; kill \$! 2>/dev/null" TERM
    has="${RVDIST_NODES#*" $SLURMD_NODENAME="}" && has="${has%% *}"
    for attempt in 1 2 3; do
      "$PYTHON" -m ray.scripts.scripts start "$@" --block --temp-dir="$RAY_DIRECTORY" \
        --labels="rvdist-cores=${has%:*},rvdist-gpus=${has#*:}" \
        --num-cpus="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" >/dev/null &
      wait # for Ray or a signal
      wait # for Ray after a signal
      [[ -z "$ended" ]] || break
    done
    if [[ -e "${RAY_AUTH_TOKEN_PATH%/*}/keep" ]]; then
      mkdir -p "$RVDIST_LOGS/$SLURMD_NODENAME"
      cp "$RAY_DIRECTORY"/session_2*/logs/{worker-*,raylet.*,gcs_server.*} "$RVDIST_LOGS/$SLURMD_NODENAME" 2>/dev/null
      find "$RVDIST_LOGS/$SLURMD_NODENAME" -type f -empty -delete
    fi
    rm -r -f "$RAY_DIRECTORY"' ray "${@:2}" &
  ray_processes+=($!)
}

start_ray "$head" -- --head --node-ip-address="$address" --port="$port" --include-dashboard=false
until [[ -e "$RAY_DIRECTORY/ray_current_cluster" ]]; do # which Ray writes last
  kill -0 "${ray_processes[0]}" 2>/dev/null || { echo "rvdist: Ray did not start on $head ($RAY_ADDRESS)" >&2 && exit 1; }
  sleep 0.5
done
for count in $(printf '%s\n' "${gpus[@]:-0}" 0 | sort --unique); do
  others=()
  for node in "${nodes[@]:1}"; do [[ "${gpus[$node]:-0}" != "$count" ]] || others+=("$node"); done
  ((${#others[@]} == 0)) || start_ray "${others[@]}" -- --address="$RAY_ADDRESS"
done

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
