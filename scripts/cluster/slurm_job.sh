#!/bin/bash
# A training job under Slurm: sbatch scripts/cluster/slurm_job.sh [arguments of the script]
# Submit it from the directory with .venv, which all nodes have to see. The checkpoints go to result/resumable there.
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=01:00:00
# Two minutes before the end of its time the job gets SIGTERM: the script saves and ends with status 75. The same
# sbatch goes on from there.
#SBATCH --signal=B:TERM@120

# The allocation says which hosts there are, and how many ranks each takes. `exec` lets the signal reach chainer-dist,
# which passes it on. Should a rank or a node fail, it starts the script again, which goes on from the newest checkpoint.
exec .venv/bin/chainer-dist run --max-restarts 3 scripts/examples/train_resumable.py "$@"
