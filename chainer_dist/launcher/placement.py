"""Where the ranks of a job run, by the command line or the scheduler."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chainer_dist.launcher import allocations, cores, hostfiles, mpi, output
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    import argparse

    from chainer_dist.launcher.elastic import Discovery
    from chainer_dist.launcher.hostfiles import Host

__all__ = ["discovery", "places", "source"]


def places(options: argparse.Namespace) -> tuple[int, list[Host]]:
    """Return the number of ranks, and the hosts if they are not this one alone. Local."""
    hosts = _hosts(options)
    if options.per_host:
        hosts = [host._replace(slots=options.per_host) for host in hosts]
        most = options.per_host * max(1, len(hosts))
        if options.n_ranks and options.n_ranks > most:
            options.parser.error(
                f"{options.n_ranks} ranks do not fit: -N {options.per_host} makes {most}"
            )
    n_ranks = options.n_ranks or hostfiles.n_slots(hosts) or options.per_host or cores.n_cores()
    if n_ranks > hostfiles.MAX_RANKS:
        options.parser.error(f"{n_ranks} ranks are more than {hostfiles.MAX_RANKS:,}")
    if hosts and n_ranks > hostfiles.most_slots(hosts):
        options.parser.error(f"{n_ranks} ranks are more than the max_slots of the hosts")
    is_here = all(mpi.is_here(host.name) for host in hosts)
    if options.action == "run":
        n_places = len(cores.physical_cores()) if is_here else hostfiles.n_slots(hosts)
        if n_ranks > n_places:
            what = "cores of this machine" if is_here else "slots of the hosts"
            output.say(
                f"warning: {n_ranks} ranks share the {n_places} {what}, and wait for one another"
            )
    return n_ranks, [] if is_here else hosts


def source(options: argparse.Namespace) -> str:
    """Return what names the hosts, in words. Local."""
    if options.host_discovery_script:
        return str(options.host_discovery_script)
    if options.hosts:
        return f"--hosts {options.hosts}"
    if options.hostfile:
        return f"--hostfile {options.hostfile}"
    return "the scheduler's allocation"


def _hosts(options: argparse.Namespace) -> list[Host]:
    """Return the hosts that the user names, or the hosts of the scheduler's allocation, or none."""
    try:
        if options.hosts:
            return hostfiles.parse_hosts(options.hosts)
        if options.hostfile:
            return hostfiles.read_hostfile(options.hostfile)
    except LaunchError as error:
        options.parser.error(str(error))
    _, hosts = allocations.allocation(os.environ) or ("", [])
    return hosts


def discovery(options: argparse.Namespace) -> Discovery | None:
    """Return what finds the hosts of an elastic job; None for any other. Local."""
    if not options.host_discovery_script:
        if options.action == "run" and (options.min_ranks or options.max_ranks):
            options.parser.error("--min-ranks and --max-ranks want --host-discovery-script")
        return None
    from chainer_dist.launcher.elastic import Discovery

    if options.n_ranks or options.per_host or options.hosts or options.hostfile:
        options.parser.error(
            "hosts come from --host-discovery-script; use --min-ranks and --max-ranks"
        )
    if options.dry_run:
        options.parser.error(
            "--dry-run: the hosts are known only when --host-discovery-script is run"
        )
    least, most = options.min_ranks or 1, options.max_ranks
    if most and most < least:
        options.parser.error(f"--max-ranks {most} are less than --min-ranks {least}")
    if not os.access(options.host_discovery_script, os.X_OK):
        options.parser.error(f"{options.host_discovery_script} is not executable: chmod +x")
    return Discovery(options.host_discovery_script, least, most)
