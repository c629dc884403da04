#!/bin/bash
# Train in as many pieces as it takes: stopped by a time limit or by preemption, saved, queued again, resumed.
# Edit: nodes, ranks and cores here (or on sbatch's command line), the values below, jobs/site.sh.
# Submit: sbatch [-p PARTITION] [-A ACCOUNT] jobs/train-preemptible.sh [further options of train]
#
# 60 s before the time limit SLURM sends USR1 to this script (--signal; give more where saving takes longer), which
# passes it to all ranks; at a preemption it sends TERM to the ranks. They finish their step, save and leave with 75,
# and the script puts the job back into the queue. A cancelled job saves too and stays cancelled.
# For GPUs take the header of train-gpu.sh, with the three lines --requeue, --open-mode and --signal.
#SBATCH --job-name=hpcmlp-preemptible
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%j.out
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail

DATA=${DATA:-data/mnist}                # data set directory made by prepare
RUN=${RUN:-runs/$SLURM_JOB_ID}          # run directory: the same in every piece
CONFIG=${CONFIG:-}                      # TOML file of options; empty: none
MOST_RESTARTS=${MOST_RESTARTS:-100}     # after so many the job ends, and says so
OPTIONS=${OPTIONS:-"--hidden 512,256 --epochs 200 --global-batch-size 512"}
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"
read -ra options <<<"$OPTIONS"

newest() { { find "$RUN/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null || :; } | sort | tail -n 1; }
terminated=0
process=
# shellcheck disable=SC2317  # the trap calls it
pass_on() {
    if [ "$LAUNCHER" = srun ]; then scancel --signal=USR1 "$SLURM_JOB_ID"; else kill -USR1 "$process"; fi
}
trap 'terminated=1' TERM
trap 'pass_on || :' USR1

before=$(newest)
"${LAUNCH[@]}" "${PYTHON[@]}" -m hpcmlp train ${CONFIG:+--config "$CONFIG"} --data "$DATA" --out "$RUN" --resume \
    "${options[@]}" "$@" &
process=$!
while kill -0 "$process" 2>/dev/null; do wait "$process" || :; done     # a trap interrupts `wait`
code=0
wait "$process" || code=$?
sleep 1                                 # lets the TERM of scancel arrive
echo "$(date '+%F %T') ranks ended with $code; restarts so far: ${SLURM_RESTART_COUNT:-0}"

# The run's own record decides, not the launcher: Open MPI's mpirun returns 0 for a job whose node was taken away.
if [ "$code" = 0 ] && [ ! -e "$RUN/summary.json" ]; then code=75; fi
# Not one of hpcmlp's own codes: ranks were killed, by SLURM, with their node or by a fault, and srun or mpirun made the
# code. Go on where that helps, but not for ever from the same place.
case $code in 0 | 2 | 65 | 66 | 69 | 70 | 73 | 75 | 78 | 130 | 141) ;; *)
    if [ "$(newest)" != "$before" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then code=75; fi ;;
esac
if [ "$code" = 75 ] && [ "$terminated" = 0 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MOST_RESTARTS" ]; then
        echo "$MOST_RESTARTS restarts are used up; submit again with RUN=$RUN to go on" >&2
        exit 75
    fi
    scontrol requeue "$SLURM_JOB_ID" || exit 75
fi
# Requeued, or told to end: SLURM ends this script. Were it to end by itself, the job would count as completed.
if [ "$code" = 75 ]; then
    while :; do sleep 60 & wait $! || :; done
fi
exit "$code"
