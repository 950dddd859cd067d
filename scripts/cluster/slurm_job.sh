#!/bin/bash
# A training job under Slurm: sbatch scripts/cluster/slurm_job.sh [arguments of the script]
# Submit it from the directory with .venv, which all nodes have to see.
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=01:00:00
# Two minutes before the end the scripts get SIGTERM, and may write a checkpoint.
#SBATCH --signal=B:TERM@120

# The hosts, and how many ranks each takes, are those of the allocation. `exec`, so that the signal of above
# reaches chainer-dist, which passes it on. Should a rank or a node fail, it starts the script again.
exec .venv/bin/chainer-dist run --max-restarts 3 scripts/train_digits.py --no-progress-bar "$@"
