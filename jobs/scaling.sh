#!/bin/bash
# Scaling study: whole training steps on 1, 2, 4, ... nodes, strong and weak, into one table and one picture.
# Edit: nodes, ranks and cores here (or on sbatch's command line), the values below, jobs/site.sh.
# Submit: sbatch [-p PARTITION] [-A ACCOUNT] jobs/scaling.sh [further options of bench step]
#SBATCH --job-name=hpcmlp-scaling
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.out
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail

OUT=${OUT:-runs/scaling-$SLURM_JOB_ID}  # gets steps.jsonl, scaling.md and scaling.png
SIZES=${SIZES:-784,2048,2048,10}        # widths of the network
BATCH=${BATCH:-4096}                    # strong: global batch of every run; weak: of one node
STEPS=${STEPS:-50}                      # timed steps
REPEATS=${REPEATS:-3}                   # of every point, spread over the job
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"

mkdir -p "$OUT"
per_node=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
measure() {     # measure KIND NODES RANKS BATCH
    local launch
    if [ "$LAUNCHER" = srun ]; then
        launch=("${LAUNCH[@]}" --nodes="$2" --ntasks="$3" --ntasks-per-node="$per_node")
        [ "$3" -ge "$per_node" ] || launch=("${LAUNCH[@]}" --nodes=1 --ntasks="$3")
    else
        launch=("$MPIEXEC" -n "$3")     # fills the nodes one after the other
    fi
    printf '{"kind": "%s", "nodes": %s, "batch": %s, "result": %s}\n' "$1" "$2" "$4" "$(
        "${launch[@]}" "${PYTHON[@]}" -m hpcmlp bench step --json --sizes "$SIZES" --global-batch-size "$4" \
            --steps "$STEPS" "${further[@]}" | tr '\n' ' ')" >>"$OUT/steps.jsonl"
}
further=("$@")
for _ in $(seq "$REPEATS"); do
    measure rank 1 1 "$BATCH"
    for ((nodes = 1; nodes <= SLURM_JOB_NUM_NODES; nodes *= 2)); do
        measure strong "$nodes" $((nodes * per_node)) "$BATCH"
        [ "$nodes" = 1 ] || measure weak "$nodes" $((nodes * per_node)) $((nodes * BATCH))
    done
done
"${PYTHON[@]}" jobs/scaling_table.py "$OUT"
