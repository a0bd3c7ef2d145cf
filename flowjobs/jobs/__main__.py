"""python -m flowjobs.jobs FOLDER: trains the run in a folder, that a job shares or continues."""

import sys

from flowjobs.jobs.entry import RunTask

if __name__ == "__main__":
    RunTask(sys.argv[1])()
