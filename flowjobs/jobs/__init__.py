"""The scheduler's side: what is submitted, what runs on the node, what Slurm says of it.

submitting   submit, executors, array (many runs), tasks (what is pickled), origin (of restarts),
             snapshot (the user's code), plain_sbatch, deferred_signals
on the node  entry, environment, signals, stop_cause (why to leave), restart; several runs in a job:
             packing, mps
afterwards   dead_jobs (finds), exit_cause (why), record_end (writes), reconcile (restarts)
looking      current_job (waits or runs?), lock_judge (does the holder live?), run_stages
beside       cancel, side_by_side (what `bench` measures)
"""
