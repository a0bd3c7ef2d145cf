#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --comment='two words'
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=8
#SBATCH --exclude=n1,n7
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=mlp-icfm-digits-none
#SBATCH --mem=1536M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=STUDY/runs/mlp-icfm-digits-none/logs/%j_0_log.out
#SBATCH --partition=preempt
#SBATCH --qos=low
#SBATCH --requeue
#SBATCH --reservation=course
#SBATCH --signal=USR2@120
#SBATCH --time=90

# setup
# Slurm may have been told to pass on nothing to srun, which then finds no program.
export PATH SLURM_EXPORT_ENV=ALL FLOWJOBS_JOB=$SLURM_JOB_ID
guard=
block="$(command -v env) --block-signal=TERM --block-signal=USR2"
$block true 2>/dev/null && guard=$block
# What it does, where submitit looks for it.
ln -sf STUDY/runs/mlp-icfm-digits-none/logs/task.pkl STUDY/runs/mlp-icfm-digits-none/logs/${SLURM_JOB_ID}_submitted.pkl

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output STUDY/runs/mlp-icfm-digits-none/logs/%j_%t_log.out --kill-on-bad-exit --wait=0 --cpus-per-task=8 $guard PYTHON -u -m submitit.core._submit STUDY/runs/mlp-icfm-digits-none/logs


# teardown
code=$?
# If the attempt did not record how it ended: record it, and restart the run if allowed.
[ $code -eq 0 ] || PYTHON -m flowjobs reconcile mlp-icfm-digits-none --study STUDY --exit-code $code
exit $code