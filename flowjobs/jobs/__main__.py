"""python -m flowjobs.jobs FOLDER: trains the run in a folder, in a job that it shares."""

import sys

from flowjobs.jobs.entry import RunTask

if __name__ == "__main__":
    RunTask(sys.argv[1])()
