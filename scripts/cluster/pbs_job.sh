#!/bin/bash
# A training job under PBS: qsub scripts/cluster/pbs_job.sh
# Submit it from the directory with .venv, which all nodes have to see.
#PBS -N digits
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=01:00:00

cd "$PBS_O_WORKDIR" || exit
# The hosts, and how many ranks each takes (mpiprocs), are those of PBS_NODEFILE. Should a rank or a node fail,
# the script is started again. qdel sends SIGTERM, which chainer-dist passes on to the scripts.
exec .venv/bin/chainer-dist run --max-restarts 3 scripts/train_digits.py --no-progress-bar
