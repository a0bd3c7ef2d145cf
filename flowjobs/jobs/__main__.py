"""python -m flowjobs.jobs FOLDER: trains a run in a job that it shares, or that starts again."""

import sys

from flowjobs.jobs.entry import RunTask

if __name__ == "__main__":
    RunTask(sys.argv[1])()
