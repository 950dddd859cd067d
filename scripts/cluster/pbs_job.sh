#!/bin/bash
# A training job under PBS: qsub scripts/cluster/pbs_job.sh
# Submit it from the directory with .venv, which all nodes have to see. The checkpoints go to result/resumable there.
#PBS -N digits
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=01:00:00

cd "$PBS_O_WORKDIR" || exit
# PBS_NODEFILE names the hosts, and how many ranks each takes (mpiprocs). Should a rank or a node fail, the script is
# started again, and goes on from the newest checkpoint. qdel sends SIGTERM, which chainer-dist passes on: the script
# saves and ends with status 75. The same qsub goes on from there.
exec .venv/bin/chainer-dist run --max-restarts 3 scripts/examples/train_resumable.py
