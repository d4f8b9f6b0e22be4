#!/usr/bin/env bash
# A training job on a GPU mesh under Slurm: one process per GPU. `mimo-jax launch slurm` fills this in and hands it to
# sbatch, which takes partition, account and time limit from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
# The working directory lies on a file system that all nodes see.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node={{ devices_per_node }}
#SBATCH --gpus-per-node={{ devices_per_node }}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# All processes get SIGTERM so long before the time limit: they finish the step, save, and end with code 143.
#SBATCH --signal=TERM@{{ stop_seconds }}
set -euo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
export JAX_COMPILATION_CACHE_DIR={{ cache | sh }}

code=0
srun --kill-on-bad-exit=1 {{ command | map("sh") | join(" \\\n  ") }} || code=$?
# 0 is done, 2 is wrong usage, settings or data: neither gets better by another try. Everything else goes on from the last
# checkpoint.
if [[ $code -ne 0 && $code -ne 2 && ${SLURM_RESTART_COUNT:-0} -lt {{ restarts }} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
