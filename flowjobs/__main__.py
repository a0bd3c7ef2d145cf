"""python -m flowjobs."""

from flowjobs.cli import main

if __name__ == "__main__":
    main()
