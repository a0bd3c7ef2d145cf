"""One of two ranks on one GPU, as a process: `rank_job.py STUDY RANK PORT PORT`."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flowjobs.errors import ConfigError
from flowjobs.runs.run import Run
from flowjobs.training.ranks import joined_ranks
from tests.gpu.runs import CONFIG, train, train_in_parts


def main(study: Path, rank: int, ports: list[str]) -> None:
    """Is refused as a job's ranks are; then trains with gloo, which lets ranks share a GPU."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[0])
    try:
        with joined_ranks(rank, 2, rank, use_gpu=True):
            print("not refused")
    except ConfigError as error:
        print(error)
    os.environ["MASTER_PORT"] = ports[1]
    gpu = torch.device("cuda", 0)
    config = replace(CONFIG, deterministic=True)
    with joined_ranks(rank, 2, rank, use_gpu=False) as joined:
        ranks = replace(joined, device=gpu)
        trainer = train(Run(study, "whole"), config, gpu, ranks=ranks)
        train_in_parts(Run(study, "parts"), config, gpu, leave_at=(17, 40), ranks=ranks)
    print(f"captured {trainer.captured}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
