"""The contenders of a measurement: chainer_dist, and the programs that its users would otherwise take."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist import _environment
from chainer_dist.scaling import workloads

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    Step = Callable[[], None]

__all__ = [
    "CONTENDERS",
    "INDEPENDENT",
    "OURS",
    "TORCH",
    "TORCH_CHANNELS_LAST",
    "WITHOUT_KERNELS",
    "available",
    "is_torch",
    "make_step",
]

OURS = "chainer_dist"
INDEPENDENT = "independent"
TORCH, TORCH_CHANNELS_LAST = "torch", "torch-channels-last"
CONTENDERS = {
    OURS: "this package, by its two lines",
    "chainermn": "ChainerMN's communicator naive, which ships inside Chainer, and Chainer's own code",
    "allreduce": "Chainer's own code, and one MPI_Allreduce of all gradients, packed",
    TORCH: "torch DistributedDataParallel over gloo, with a fused update",
    TORCH_CHANNELS_LAST: "the same with images channels last in memory, of models that take images",
    INDEPENDENT: "as many copies that exchange nothing, with the kernels of this package",
}
# Whose steps do not depend on the choice of kernels, as their users have Chainer alone, or none of it.
WITHOUT_KERNELS = ("chainermn", "allreduce", TORCH, TORCH_CHANNELS_LAST)


def is_torch(contender: str) -> bool:
    """Return whether a contender does without Chainer. Local."""
    return contender in (TORCH, TORCH_CHANNELS_LAST)


def available(contender: str, workload: str) -> bool:
    """Return whether a contender can train a workload here. Local."""
    if not is_torch(contender):
        return True
    found = workloads.load(workload)
    has_model = found.torch is not None and (found.images or contender == TORCH)
    return has_model and importlib.util.find_spec("torch") is not None


def make_step(
    contender: str, workload: str, model: chainer.Link, arguments: tuple[Any, ...]
) -> tuple[Step, Any]:
    """Return what does one training step with Adam, and the multi-node optimizer if that is ours. Collective.

    Args:
        contender: One of :data:`CONTENDERS`.
        workload: Name of the workload.
        model: The model, which is called for the loss.
        arguments: Arguments of that call.
    """
    import chainer

    if is_torch(contender):
        channels_last = contender == TORCH_CHANNELS_LAST
        return _torch_step(workload, arguments, channels_last=channels_last), None
    optimizer: Any = chainer.optimizers.Adam(alpha=1e-4)
    if contender == OURS:
        import chainer_dist

        optimizer = chainer_dist.create_multi_node_optimizer(
            optimizer, chainer_dist.create_communicator()
        )
    elif contender == "chainermn":
        import chainermn

        if chainermn.__name__ != "chainermn":
            raise RuntimeError(
                "ChainerMN cannot be measured while `import chainermn` means chainer_dist: unset "
                f"{_environment.AS_CHAINERMN}"
            )
        optimizer = chainermn.create_multi_node_optimizer(
            optimizer, chainermn.create_communicator("naive")
        )
    optimizer.setup(model)
    if contender == "allreduce":
        return _allreduce_step(optimizer, model, arguments), None
    return lambda: optimizer.update(model, *arguments), optimizer if contender == OURS else None


def _allreduce_step(
    optimizer: chainer.Optimizer, model: chainer.Link, arguments: tuple[Any, ...]
) -> Step:
    """Return what a user of MPI alone would write."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD

    def step() -> None:
        loss = model(*arguments)
        model.cleargrads()
        loss.backward()
        grads = [param.grad for _, param in sorted(model.namedparams()) if param.grad is not None]
        packed = np.concatenate([grad.ravel() for grad in grads])
        world.Allreduce(MPI.IN_PLACE, packed)
        packed /= world.size
        start = 0
        for grad in grads:
            grad[...] = packed[start : start + grad.size].reshape(grad.shape)
            start += grad.size
        optimizer.update()

    return step


def _torch_step(workload: str, arguments: tuple[Any, ...], *, channels_last: bool) -> Step:
    """Return a step of torch, with its fused Adam."""
    import torch

    from chainer_dist.scaling import torch_gloo, torch_models

    torch_gloo.connect()
    make = workloads.load(workload).torch
    if make is None:
        raise ValueError(f"workload {workload!r} has no torch model")
    net = make()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    net = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    inputs = torch_models.tensors(arguments, channels_last=channels_last)

    def step() -> None:
        optimizer.zero_grad()
        net(*inputs).backward()
        optimizer.step()

    return step
