#!/usr/bin/env bash
# A training job on a GPU mesh under Slurm: one process per GPU, started again from the last checkpoint until it is done.
#
#   CONFIG=configs/joint.py:1b WORKDIR=/shared/runs/joint \
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh [--config.KEY=VALUE ...]
#
# WORKDIR lies on a file system that all nodes see. Syntax is checked by the tests; it has not been run on a cluster yet.
#SBATCH --job-name=mimo-jax
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@180
set -euo pipefail
: "${CONFIG:?expected CONFIG=FILE:SIZE}" "${WORKDIR:?expected WORKDIR=DIR}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"

code=0
srun --kill-on-bad-exit=1 mimo-jax train --distributed --config "$CONFIG" --workdir "$WORKDIR" "$@" || code=$?
# 0 is done, 2 is wrong usage or settings: neither gets better by another try.
if [[ $code -ne 0 && $code -ne 2 && ${SLURM_RESTART_COUNT:-0} -lt ${MAX_RESTARTS:-20} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
