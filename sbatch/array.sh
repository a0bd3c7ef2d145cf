#!/bin/bash
# A list of runs as one Slurm array, one task a run, by plain sbatch:
#
#     sbatch --array=1-$(grep -c '' runs.txt) sbatch/array.sh runs.txt
#
# Each line of runs.txt holds the arguments of one `python -m flowjobs train`:
#
#     --arch mlp --flow icfm --seed 0 --name mlp-icfm-seed0
#     --arch mlp --flow icfm --seed 1 --name mlp-icfm-seed1
#
# Submit the same line again to go on with what is not finished. `--array=1-40%8` runs eight at a
# time. Python is taken from .venv here, else from PATH; PYTHON=/path/to/python decides otherwise.

#SBATCH --job-name=flowjobs
#SBATCH --output=%x-%A_%a.out
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00

# One process per GPU. For two GPUs: --gpus-per-node=2 and 2 here.
#SBATCH --ntasks-per-node=1

# Told to save 90 s before the time limit; started again after it and after a preemption, with one
# log. A scancel ends it for good.
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

read -r -a arguments < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
if [ "${#arguments[@]}" -eq 0 ]; then
    echo "error: $1 has no line $SLURM_ARRAY_TASK_ID: it has $(grep -c '' "$1")" >&2
    exit 2
fi

# A signal that comes before python listens would kill it; blocked ones wait.
guard=
block='env --block-signal=TERM --block-signal=USR2'
$block true 2>/dev/null && guard=$block

# srun, so that the signals reach python; it does not take over --cpus-per-task by itself.
srun --unbuffered ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    $guard "$PYTHON" -u -m flowjobs train "${arguments[@]}"
code=$?

# For a death that could not speak: says what it was, and goes on if it may (train --retries N).
study=()
for argument in "${arguments[@]}"; do
    [ "${previous:-}" = --study ] && study=(--study "$argument")
    previous=$argument
done
[ $code -eq 0 ] || "$PYTHON" -m flowjobs reconcile --exit-code $code "${study[@]}"
exit $code
