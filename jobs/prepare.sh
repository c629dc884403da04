#!/bin/bash
# Prepare a data set on a login node, which has the network that compute nodes lack; no job, no MPI.
# Edit: the values below, jobs/site.sh.
# Run: jobs/prepare.sh [SOURCE [further options of prepare]]; for files that take long: sbatch -n1 jobs/prepare.sh ...
set -euo pipefail

SOURCE=${1:-mnist}                      # named data set, or files
OUT=${OUT:-data/$(basename "${SOURCE%.*}")}
SHARDS=${SHARDS:-8}                     # files that the training rows are spread over; some per node read well
shift || :
LAUNCHER=none
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"

if [ -e "$OUT/dataset.json" ]; then
    echo "$OUT is there already"
else
    # login nodes are shared: leave the others their cores
    OMP_NUM_THREADS=1 nice "${PYTHON[@]}" -m hpcmlp prepare "$SOURCE" --out "$OUT" --shards "$SHARDS" "$@"
fi
"${PYTHON[@]}" -m hpcmlp inspect "$OUT"
