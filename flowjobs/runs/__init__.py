"""A run on disk: what is in a study, and the only code that knows its file names.

study/                                     --study DIR, or $FLOWJOBS_STUDY
  datasets/splits/NAME/{train,val}.pt      data
  datasets/pairs/DIGEST/{train,val}.pt     noise and samples of the best.pt of that digest, which
                                           --flow reflow trains on
  checkpoints/RUN/best.pt, last.pt         weights, each with the one before (*.previous.pt)
                  *.damaged-*.pt           set aside: files that could not be read, that hold NaN or
                  *.nonfinite-*.pt         infinity, that are of another model
                  *.mismatched-*.pt
  code/DIGEST/                             snapshots of the user's code, shared by runs
  sweeps/NAME.toml NAME.runs               what was asked for, and the runs that it means
  packs/NAME/                              runs that share a job; see `runs.pack`
  arrays/flowjobs-MARK/                    which task of a Slurm array is which run
  runs/RUN/config.json run.json            what was asked for; the run's id, in W&B too
           status.json jobs.jsonl          state, progress, every attempt; every job submitted
           data.json                       what its data are: rows, width, type, digest
           code.json code.diff             which snapshot of the code it has; its commit, and what
                                           that lacks
           metrics.jsonl                   a row every 10 steps, and one every epoch
           metrics.lost.jsonl              rows that a sudden death lost, until they are repeated
           samples.png evaluation.json     samples of best.pt, and their measures
           tracking.json cancelled.json    its newest session in W&B; there while it is cancelled
           logs/                           batch files and output of its jobs
           wandb/                          W&B's own files, and what W&B has of the run:
                                           on_record.json times.jsonl surroundings.json page.txt
                                           mirror.log
Beside these, hidden: .lock* and .*.lock, of whoever trains, submits or uploads.

the folder     run, submittable (its base, and pack's), files, run_id, code, removal
one attempt    attempt, lock, file_lock, process, recorder, rank_failures, surroundings
what is noted  status, metrics, progress, goodput, newest_job, restarts (kinds of an end), extending
many runs      listing (all at a glance), selection (which are meant), pack, hint (commands)
data           datasets, data_file
"""
