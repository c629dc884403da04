#!/bin/bash
# Train with the environment, and if it fits the data, on every node's own disk: for start-up on many nodes.
# Edit: nodes, ranks and cores here (or on sbatch's command line), the values below, jobs/site.sh.
# Submit: jobs/bundle.sh, then sbatch [-p PARTITION] [-A ACCOUNT] jobs/train-bundle.sh [further options of train]
#SBATCH --job-name=hpcmlp-bundle
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail

BUNDLE=${BUNDLE:-hpcmlp-bundle.tar}     # made by jobs/bundle.sh
LOCAL=${LOCAL:-/tmp/hpcmlp-$SLURM_JOB_ID}       # directory on the nodes' own disk (NVMe, burst buffer, /tmp)
DATA=${DATA:-data/mnist}                # data set directory made by prepare
LOCAL_DATA=${LOCAL_DATA:-no}            # yes: copy it to the nodes' own disk, too
RUN=${RUN:-runs/$SLURM_JOB_ID}          # run directory, on the shared file system
CONFIG=${CONFIG:-}                      # TOML file of options; empty: none
OPTIONS=${OPTIONS:-"--hidden 512,256 --epochs 15 --global-batch-size 512"}
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"
read -ra options <<<"$OPTIONS"

[ -e "$BUNDLE" ] || { echo "$BUNDLE is not there: run jobs/bundle.sh first" >&2; exit 66; }
one_a_node=(srun --mpi=none --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
trap '"${one_a_node[@]}" rm -rf "$LOCAL"' EXIT
"${one_a_node[@]}" mkdir -p "$LOCAL"
sbcast --force "$BUNDLE" "$LOCAL/bundle.tar"
"${one_a_node[@]}" tar -C "$LOCAL" -xf "$LOCAL/bundle.tar"
if [ "$LOCAL_DATA" = yes ]; then
    tar -C "$DATA" -cf "$BUNDLE.data-$SLURM_JOB_ID" .
    sbcast --force "$BUNDLE.data-$SLURM_JOB_ID" "$LOCAL/data.tar"
    rm "$BUNDLE.data-$SLURM_JOB_ID"
    # shellcheck disable=SC2016
    "${one_a_node[@]}" sh -c 'mkdir "$0/data" && tar -C "$0/data" -xf "$0/data.tar"' "$LOCAL"
    DATA=$LOCAL/data
fi
"${LAUNCH[@]}" "$LOCAL/environment/bin/python" -m hpcmlp train ${CONFIG:+--config "$CONFIG"} --data "$DATA" \
    --out "$RUN" --resume "${options[@]}" "$@"
