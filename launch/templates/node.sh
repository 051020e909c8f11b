#!/bin/bash
# What each task of the job runs, after "check" or "train".
set -u
cd @{working_directory} || exit 1
@{modules}
@{environment}
# The processes themselves listen to these; a launcher of theirs would die of the first.
trap "" USR1
trap : TERM

# Compiled kernels are on the node's own disk: many nodes in one cache on a network file system wait for each other.
# What an earlier job compiled is brought along.
export TRITON_CACHE_DIR=@{kernel_cache}/pretrain-kernels-$(id -u)
kernels=@{launch_directory}/kernels.tar.gz
mkdir -p "$TRITON_CACHE_DIR"
if [ "$1" = @{first_step} ] && [ "$SLURM_LOCALID" = 0 ] && [ -f "$kernels" ]; then
  tar --skip-old-files -xzf "$kernels" -C "$TRITON_CACHE_DIR" || echo "$kernels cannot be read: kernels are compiled anew"
fi
@{setup}
check() {
  @{python} -m pretrain.node_check --processes @{processes_per_task} --seconds @{check_seconds}
}
train() {
  # What it began with is in there.
  local resume=auto
  [ -e @{run}/environment.json ] || resume=@{resume}
  @{start} -m pretrain train @{launch_directory}/config.yaml --resume "$resume"
}
"$1"
code=$?
if [ "$1" = train ] && [ "$SLURM_PROCID" = 0 ] && [ -n "$(ls -A "$TRITON_CACHE_DIR")" ]; then
  tar -czf "$kernels.tmp" -C "$TRITON_CACHE_DIR" . && mv "$kernels.tmp" "$kernels"
fi
exit "$code"
