#!/bin/bash
# lsdl on a Cloud TPU pod that is there, the same command on all of its workers (not yet run):
#   TPU=pod ZONE=us-central2-b launch/tpu_pod.sh --config configs/imagenet_vit.py --workdir DIR
# DIR and the data have to be in folders that all workers share, such as a Filestore mount.
# Type it again whenever the connection or the pod was lost: what is installed stays, a run that
# goes on is left alone (exit 73), one that was stopped goes on from its newest checkpoint.
set -euo pipefail

: "${TPU:?the name of the pod}" "${ZONE:?its zone}"
REPOSITORY=${REPOSITORY:-$(git remote get-url origin)}
COMMIT=${COMMIT:-$(git rev-parse HEAD)} # has to be pushed

# shellcheck disable=SC2016 # each worker expands its "$@" itself
run='python -m lsdl.doctor --distributed=auto "$@" && exec python -m lsdl.train --distributed=auto "$@"'
command="set -e
test -d lsdl/.git || git clone -q $(printf %q "$REPOSITORY") lsdl
cd lsdl
exec 9> .tpu_pod.lock
flock --nonblock 9 || { echo 'lsdl runs here already' >&2; exit 73; }
git fetch -q origin
git checkout -q $(printf %q "$COMMIT")
test -f .venv/bin/activate || python3 -m venv .venv
. .venv/bin/activate
python -m pip install -q -c constraints.txt -e '.[tpu]'
bash -c $(printf %q "$run") lsdl$(printf ' %q' "$@")"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
