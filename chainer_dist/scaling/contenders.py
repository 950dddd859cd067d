"""Who is measured: chainer_dist, and what its users would otherwise take."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    Step = Callable[[], None]

__all__ = ["CONTENDERS", "INDEPENDENT", "OURS", "TORCH", "available", "make_step"]

OURS = "chainer_dist"
INDEPENDENT = "independent"
TORCH = "torch"
CONTENDERS = {
    OURS: "this package, by its two lines",
    "chainermn": "ChainerMN's communicator naive, which ships inside Chainer",
    "allreduce": "Chainer, and one MPI_Allreduce of all gradients, packed",
    TORCH: "torch DistributedDataParallel over gloo (mlp and cnn)",
    INDEPENDENT: "as many copies of plain Chainer that exchange nothing",
}
TORCH_WORKLOADS = ("mlp", "cnn")


def available(contender: str, workload: str) -> bool:
    """Tell whether a contender can train a workload here. Local."""
    if contender == TORCH:
        return workload in TORCH_WORKLOADS and importlib.util.find_spec("torch") is not None
    return True


def make_step(
    contender: str, workload: str, model: chainer.Link, arguments: tuple[Any, ...]
) -> tuple[Step, Any]:
    """Return what does one training step with Adam, and the multi-node optimizer if that is ours. Collective.

    Args:
        contender: One of :data:`CONTENDERS`.
        workload: Its name.
        model: Called for the loss.
        arguments: With these.
    """
    import chainer

    if contender == TORCH:
        return _torch_step(workload, *arguments), None
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
                "CHAINER_DIST_AS_CHAINERMN"
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


def _torch_step(workload: str, x: Any, t: Any) -> Step:
    """Return a step of torch, with its fused Adam."""
    import torch

    from chainer_dist.scaling import torch_gloo
    from chainer_dist.scaling.workloads import MLP

    nn = torch.nn
    torch_gloo.connect()
    layers: list[Any] = []
    if workload == "mlp":
        for low, high in zip(MLP.WIDTHS, MLP.WIDTHS[1:]):
            layers += [nn.Linear(low, high), nn.ReLU()]
        layers.pop()
    else:
        for number, (low, high) in enumerate([(3, 32), (32, 64), (64, 128)]):
            norm = [nn.BatchNorm2d(32)] if number == 0 else []
            layers += [nn.Conv2d(low, high, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(4 * 4 * 128, 512), nn.ReLU(), nn.Linear(512, 10)]
    net = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(t.astype(np.int64))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

    return step
