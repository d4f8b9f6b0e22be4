#!/usr/bin/env bash
# A training job on TPU slices through xpk, which makes a JobSet of it. `mimo-jax launch xpk` fills this in and runs it;
# project and zone are those of gcloud. Storage that holds data and working directory is attached to the cluster
# before (`xpk storage attach --auto-mount=true`).
set -euo pipefail
# xpk restarts after codes from 127 on (143: stopped by SIGTERM, 134: aborted by JAX after the loss of another process);
# 1 and 3 are failures that may pass, 2 (wrong usage, settings or data) is not.
# `exec`: signals reach the process itself.
exec xpk workload create \
  --cluster={{ cluster | sh }} \
  --workload={{ name | sh }} \
  --tpu-type={{ tpu_type | sh }} \
  --num-slices={{ slices }} \
  --docker-image={{ image | sh }} \
  --max-restarts={{ restarts }} \
  --restart-on-exit-codes=1,3 \
  --termination-grace-period-seconds={{ stop_seconds }} \
  --env={{ ("JAX_COMPILATION_CACHE_DIR=" + cache) | sh }} \
  --command={{ ("exec " + (command | map("sh") | join(" "))) | sh }}
