#!/bin/bash
# Train on the GPUs of several nodes, one rank per GPU.
# Edit: nodes and GPUs here (or on sbatch's command line), the values below, jobs/site.sh.
# Submit: sbatch [-p PARTITION] [-A ACCOUNT] jobs/train-gpu.sh [further options of train]
#
# Ranks choose their GPUs together, one each, among those that each of them sees. So both ways of giving GPUs
# work: all of a node's to all of its ranks (--gpus-per-node, as here; some sites: --gres=gpu:4), or each rank its own
# (replace the line by --gpus-per-task=1; where the sites offer it also --gpu-bind=closest).
#SBATCH --job-name=hpcmlp-gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail

DATA=${DATA:-data/mnist}                # data set directory made by prepare
RUN=${RUN:-runs/$SLURM_JOB_ID}          # run directory; give one that is there to go on with it
CONFIG=${CONFIG:-}                      # TOML file of options; empty: none
OPTIONS=${OPTIONS:-"--device gpu --hidden 4096,4096 --epochs 15 --global-batch-size 8192"}
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"
read -ra options <<<"$OPTIONS"

"${LAUNCH[@]}" "${PYTHON[@]}" -m hpcmlp train ${CONFIG:+--config "$CONFIG"} --data "$DATA" --out "$RUN" --resume \
    "${options[@]}" "$@"
