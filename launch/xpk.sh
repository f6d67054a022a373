#!/usr/bin/env bash
# Train on a slice of a GKE cluster with XPK.
#
#   CLUSTER=... ZONE=... IMAGE=REGISTRY/proxmo launch/xpk.sh NAME v5litepod-16 train --out /shared/runs/7b ...
#
# IMAGE: built from launch/Dockerfile. /shared: storage of the cluster that all hosts mount there, attached once with
# `xpk storage attach` (Filestore). DRY_RUN=1: print the command instead of running it.
# A command for a run that is in /shared already gets --resume, so that a restarted workload goes on.
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 type=$2
shift 2
: "${CLUSTER:?set CLUSTER}" "${ZONE:?set ZONE}" "${IMAGE:?set IMAGE to the image built from launch/Dockerfile}"

printf -v arguments '%q ' "$@"
resume=
for i in $(seq 1 $#); do
  if [ "${!i}" = --out ]; then
    j=$((i + 1))
    printf -v file '%q' "${!j}/config.json"
    resume="\$([ -f $file ] && echo --resume)"
  fi
done
command=(xpk workload create --cluster "$CLUSTER" --zone "$ZONE" --workload "$name" --tpu-type "$type" --num-slices 1
  --docker-image "$IMAGE" --max-restarts 10 --command "exec proxmo $arguments$resume")
if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${command[@]}" && echo; else "${command[@]}"; fi
