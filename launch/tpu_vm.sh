#!/usr/bin/env bash
# Train on a Cloud TPU slice: request it, mount the shared folder on every host, run the same command on all of them.
#
#   IMAGE=REGISTRY/proxmo SHARE=10.0.0.2:/share launch/tpu_vm.sh NAME ZONE v5litepod-16 train --out /shared/runs/7b ...
#
# IMAGE: built from launch/Dockerfile.      SHARE: an NFS export (Filestore) that every host mounts at /shared.
# SPOT=1: a spot slice.                     DRY_RUN=1: print the commands instead of running them.
# A command for a run that is in /shared already gets --resume, so that after a preemption the same line goes on.
set -euo pipefail

if [ $# -lt 4 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
: "${IMAGE:?set IMAGE to the image built from launch/Dockerfile}" "${SHARE:?set SHARE to the NFS export, HOST:/PATH}"

case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    echo "$0: no runtime version is known for $type; need v5litepod-N, v5p-N or v6e-N" >&2
    exit 2
    ;;
esac

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

state() {
  gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)' 2>/dev/null || true
}

if [ -n "${DRY_RUN:-}" ] || [ -z "$(state)" ]; then
  run gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$type" --runtime-version "$runtime" ${SPOT:+--spot}
fi
until [ -n "${DRY_RUN:-}" ] || [ "$(state)" = ACTIVE ]; do
  case $(state) in
    FAILED | SUSPENDED)
      echo "$0: the request $name is $(state); delete it and ask again" >&2
      exit 1
      ;;
  esac
  echo "waiting for $type in $zone: $(state)"
  sleep 30
done

printf -v arguments '%q ' "$@"
resume=
for i in $(seq 1 $#); do
  if [ "${!i}" = --out ]; then
    j=$((i + 1))
    printf -v file '%q' "${!j}/config.json"
    resume="\$([ -f $file ] && echo --resume)"
  fi
done
remote="set -e
mountpoint -q /shared || { sudo mkdir -p /shared && sudo mount -t nfs $SHARE /shared; }
exec sudo docker run --rm --init --privileged --net=host -v /shared:/shared -e JAX_COMPILATION_CACHE_DIR=/tmp/programs \
-v /tmp/programs:/tmp/programs $IMAGE $arguments$resume"
run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$remote"
