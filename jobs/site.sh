# shellcheck shell=bash disable=SC2034
# Sourced by every job script: what differs from site to site. Edit here once; the scripts stay as they are.
# Submit from the directory that holds jobs/ (SLURM starts scripts there): sbatch jobs/train-cpu.sh

# 1 Modules: the compiler's and MPI's, as your site names them. With the MPI wheel of `make install` none is needed.
# module purge
# module load gcc openmpi

# 2 Environment: where hpcmlp is installed. In a container: PYTHON=(apptainer exec --nv hpcmlp.sif python3)
# (not called ENVIRONMENT: SLURM sets that to BATCH)
HPCMLP_ENV=${HPCMLP_ENV:-$PWD/.venv}
PYTHON=("$HPCMLP_ENV/bin/python")

# 3 Launcher. srun (the usual), or mpirun: the MPI's own mpiexec, where srun and the MPI library do not go together.
LAUNCHER=${LAUNCHER:-srun}
# What srun speaks to the ranks: pmi2 (MPICH, Intel MPI), pmix (Open MPI) or cray_shasta; `srun --mpi=list` shows what
# there is. auto asks the MPI library. A wrong type starts N runs of one rank: hpcmlp then ends with 78.
MPI_TYPE=${MPI_TYPE:-auto}

# 4 What ranks need to know
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}     # since SLURM 22.05 srun does not take it from the header
export PYTHONFAULTHANDLER=1                             # a crash in a library shows the Python line
export PYTHONNOUSERSITE=1                               # nothing from home directories: fewer calls, no surprises
# export HPCMLP_CACHE=$SCRATCH/hpcmlp                   # where prepare keeps what it fetches; else ~/.cache/hpcmlp
# export UCX_NET_DEVICES=mlx5_0:1                       # pins the network, where the library takes the wrong one

# From here on nothing needs an edit. LAUNCH is the command that starts the ranks; the scripts use it.
mpi_type() {
    case "$("${PYTHON[@]}" -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version())')" in
        *"Open MPI"*) echo pmix ;;
        *CRAY*) echo cray_shasta ;;
        *) echo pmi2 ;;
    esac
}
if [ "$LAUNCHER" = srun ]; then
    [ "$MPI_TYPE" != auto ] || MPI_TYPE=$(mpi_type)
    # kill-on-bad-exit: else one killed rank leaves the others waiting until the time limit
    LAUNCH=(srun --mpi="$MPI_TYPE" --kill-on-bad-exit=1 --unbuffered)
elif [ "$LAUNCHER" = mpirun ]; then
    MPIEXEC=${MPIEXEC:-$HPCMLP_ENV/bin/mpiexec}
    [ -x "$MPIEXEC" ] || MPIEXEC=mpiexec
    LAUNCH=("$MPIEXEC" -n "${SLURM_NTASKS:?LAUNCHER=mpirun needs the number of ranks: give --ntasks-per-node}")
    # Open MPI binds ranks to single cores, of every job the same: leave the cores to SLURM
    export PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none
fi
