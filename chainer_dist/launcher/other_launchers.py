"""What the options of other launchers are called here: of mpiexec, horovodrun, torchrun, accelerate and deepspeed."""

from __future__ import annotations

__all__ = ["MEANT", "NEEDLESS"]

# The option that does the same.
MEANT = {
    "-env": "--env NAME=VALUE",
    "-f": "--hostfile",
    "-genv": "--env NAME=VALUE",
    "-hosts": "--hosts",
    "-i": "--ssh-identity",
    "-machinefile": "--hostfile",
    "-p": "--ssh-port",
    "-x": "--env",
    "--batch": "--distribute-batch",
    "--machinefile": "--hostfile",
    "--max-np": "--max-ranks",
    "--min-np": "--min-ranks",
    "--nnodes": "--hosts, and -N for the ranks of each",
    "--num-processes": "-n",
    "--num-proc": "-n",
    "--start-timeout": "--timeout",
    "--tee": "--log-dir",
    "--timeline-filename": "--timeline",
    "--verbose-output": "--verbose",
}
# What is done without being asked.
NEEDLESS = {
    "-l": "lines have the number of their rank",
    "--allow-run-as-root": "root may start jobs",
    "--bind-to": "ranks are bound to cores; --no-pin leaves them free",
    "--gloo": "MPI is used",
    "--map-by": "ranks are placed by the slots of the hosts",
    "--master-addr": "ranks find one another by MPI",
    "--master-port": "ranks find one another by MPI",
    "--mpi": "MPI is used",
    "--oversubscribe": "ranks may share cores",
    "--rdzv-backend": "ranks find one another by MPI",
    "--rdzv-endpoint": "ranks find one another by MPI",
    "--rdzv-id": "ranks find one another by MPI",
    "--standalone": "without hosts a job stays on this machine",
    "--tag-output": "lines have the number of their rank",
}
