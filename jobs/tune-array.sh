#!/bin/bash
# Try many settings: a job array in which task k trains with the options of line k of a file.
# Edit: the number of lines (--array; % says how many at once), ranks here, the values below, jobs/site.sh.
# Submit: sbatch [-p PARTITION] [-A ACCOUNT] --array=1-$(wc -l <settings.txt)%4 jobs/tune-array.sh [further options]
#
# settings.txt holds options of train, one trial a line, for example:
#   --lr 0.001 --hidden 256,128
#   --lr 0.003 --hidden 512,256 --dropout 0.2
# Afterwards: hpcmlp report runs/tune-JOBID/*
#SBATCH --job-name=hpcmlp-tune
#SBATCH --array=1-2%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%A_%a.out
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail

DATA=${DATA:-data/mnist}                # data set directory made by prepare
SETTINGS=${SETTINGS:-settings.txt}      # one trial a line
RUNS=${RUNS:-runs/tune-$SLURM_ARRAY_JOB_ID}
OPTIONS=${OPTIONS:-"--epochs 15 --global-batch-size 512"}
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"
read -ra options <<<"$OPTIONS"

line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SETTINGS")
[ -n "$line" ] || { echo "$SETTINGS has no line $SLURM_ARRAY_TASK_ID" >&2; exit 66; }
read -ra trial <<<"$line"
echo "trial $SLURM_ARRAY_TASK_ID: $line"
"${LAUNCH[@]}" "${PYTHON[@]}" -m hpcmlp train --data "$DATA" --out "$RUNS/trial-$SLURM_ARRAY_TASK_ID" --resume \
    "${options[@]}" "${trial[@]}" "$@"
