#!/bin/bash
# Train on the cores of several nodes.
# Edit: nodes, ranks and cores here (or on sbatch's command line), the values below, jobs/site.sh.
# Submit: sbatch [-p PARTITION] [-A ACCOUNT] jobs/train-cpu.sh [further options of train]
#SBATCH --job-name=hpcmlp-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail

DATA=${DATA:-data/mnist}                # data set directory made by prepare
RUN=${RUN:-runs/$SLURM_JOB_ID}          # run directory; give one that is there to go on with it
CONFIG=${CONFIG:-}                      # TOML file of options; empty: none
OPTIONS=${OPTIONS:-"--hidden 512,256 --epochs 15 --global-batch-size 512"}
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"
read -ra options <<<"$OPTIONS"

"${LAUNCH[@]}" "${PYTHON[@]}" -m hpcmlp train ${CONFIG:+--config "$CONFIG"} --data "$DATA" --out "$RUN" --resume \
    "${options[@]}" "$@"
