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
# Submit the same line again to resume what is not finished. A task that Slurm starts again goes
# on with its run, whatever its line says by then. `--array=1-40%8` runs eight at a time. Python is
# taken from .venv here, else from PATH; PYTHON=/path/to/python decides otherwise.

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

export PATH  # bash may have made it up, where jobs start with an empty environment

# Runs `flowjobs train` under srun, as the job's own: it is requeued when it is told to leave. If
# it dies without saying why, the cause is looked up, and the run restarted where that is allowed
# (train --retries N).
exec "$PYTHON" -u -m flowjobs.cli.batch_script --lines-of "$@"
