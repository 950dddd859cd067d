"""A small training that goes on from its checkpoints, in which one rank does what it should not.

    chainer-dist run -n 3 tests/helpers/faulty_training.py --out DIR --fault killed --rank 1 --step 17

What is planted comes about once: a job that is started again is not troubled any more. At its end each rank
prints a digest of its parameters, of the optimizer's state and of its random state.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training
from chainer.iterators import MultiprocessIterator, MultithreadIterator, SerialIterator

import chainer_dist
from chainer_dist.iterators import DistributedIterator

N_SAMPLES, N_INPUTS, N_UNITS, N_CLASSES = 480, 16, 32, 4
BATCH = 4
EVERY = 5  # iterations from one checkpoint to the next
SPARE_BYTES = 256 << 20  # of the address space, where memory is short
OVERSLEPT = 4.0  # seconds, of the slow rank
CHUNK = 1 << 16
EARLY = "killed at first"  # when there is a checkpoint that was taken before the first update

# File names in the directory of the job.
PLANTED, CALM, BALLAST, CHECKPOINTS = "planted", "calm", "checkpoints/ballast", "checkpoints"


class Net(chainer.Chain):
    """A classifier with all that a resume may forget: random numbers, and a state of each rank's own."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(N_INPUTS, N_UNITS)
            self.bn = L.BatchNormalization(N_UNITS)
            self.l2 = L.Linear(N_UNITS, N_CLASSES)

    def forward(self, x):
        """Return scores."""
        return self.l2(F.dropout(F.relu(self.bn(self.l1(x)))))


class Samples(chainer.dataset.DatasetMixin):
    """Generated samples, all of which are damaged once a file is there."""

    def __init__(self, damaged_by=None):
        self.damaged_by = damaged_by

    def __len__(self):
        return N_SAMPLES

    def get_example(self, i):
        """Return input and class."""
        if self.damaged_by and self.damaged_by.exists():
            raise ValueError(f"sample {i} is damaged")
        x = np.random.RandomState(i).rand(N_INPUTS).astype(np.float32)
        return x, np.int32(x.argmax() % N_CLASSES)


class Acts:
    """Calls a function when it is pickled."""

    def __init__(self, act):
        self.act = act

    def __reduce__(self):
        """Call it."""
        self.act()
        return str, ()


class Fault:
    """What one rank does in one step."""

    def __init__(self, args, comm, model):
        self.args = args
        self.comm = comm
        self.model = model
        self.is_first = os.environ.get("CHAINER_DIST_RESTART", "0") == "0"

    def begin(self, iteration):
        """Do it, if it is time, before the loss of a step is computed."""
        args, comm = self.args, self.comm
        if args.fault == "killed often" and not (args.out / CALM).exists():
            time.sleep(0.1)
        step = 0 if args.fault == EARLY else args.step
        if args.fault == "none" or iteration != step or not self.is_first:
            return
        if comm.rank == args.rank:
            (args.out / PLANTED).write_text(repr(time.time()))
            act = getattr(self, args.fault.replace(" ", "_"), None)
            if act is not None:
                act()
        elif args.fault == "skipped" or args.fault.endswith(" within"):
            comm.allgather_obj(iteration)
        elif args.fault == "order":
            comm.allgather_obj(iteration)
            comm.bcast_obj(iteration)
        if args.fault == "signal":
            time.sleep(1000)

    def exception(self):
        """Raise."""
        raise RuntimeError("planted")

    def exit_0(self):
        """Leave as if all were done."""
        sys.exit()

    def exit_3(self):
        """Leave with a status."""
        sys.exit(3)

    def killed(self):
        """Be killed."""
        os.kill(os.getpid(), signal.SIGKILL)

    killed_at_first = killed

    def stopped(self):
        """Stand still for ever."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def stopped_within(self):
        """Stand still while the others wait for an object of this rank."""
        self.comm.allgather_obj(Acts(self.stopped))

    def asleep_within(self):
        """Sleep while the others wait for an object of this rank."""
        self.comm.allgather_obj(Acts(lambda: time.sleep(1000)))

    def segfault(self):
        """Crash in compiled code."""
        import ctypes

        ctypes.string_at(0)

    def memory(self):
        """Ask for more memory than there is."""
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
        taken = []
        while True:
            taken.append(np.ones(SPARE_BYTES // 64))

    def slow(self):
        """Be late."""
        time.sleep(OVERSLEPT)

    def shape(self):
        """Go on with parameters of another shape."""
        for param in self.model.predictor.l2.params():
            param.array = np.concatenate([param.array, param.array])

    def order(self):
        """Do the one before the other, and not the other way round."""
        self.comm.bcast_obj(0)
        self.comm.allgather_obj(0)

    def full(self):
        """Fill the file system of the checkpoints."""
        with contextlib.suppress(OSError), (self.args.out / BALLAST).open("wb", 0) as file:
            while True:
                file.write(bytes(CHUNK))

    def quota(self):
        """Be allowed to write no more than small files."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


class Step:
    """The loss function, with what is planted in it."""

    def __init__(self, model, fault):
        self.model = model
        self.fault = fault
        self.iteration = 0

    def __call__(self, *batch):
        """Return the loss of a batch."""
        self.fault.begin(self.iteration)
        loss = self.model(*batch)
        args = self.fault.args
        is_now = self.fault.is_first and self.iteration == args.step
        if args.fault == "nan" and is_now and self.fault.comm.rank == args.rank:
            loss += F.sum(self.model.predictor.l2.W) * np.nan  # no other gradient has it
        return loss


def parse_args(arguments=None):
    """Read the command line, or these arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--step", type=int, default=17)
    parser.add_argument("--steps", type=int, default=40)
    return parser.parse_args(arguments)


def make_iterator(args, comm):
    """Return batches, by workers where those are to fail."""
    kind, _, method = args.fault.partition(" in ")
    is_damaged = kind == "damaged" and comm.rank == args.rank
    data = Samples(args.out / PLANTED if is_damaged else None)
    if args.fault.startswith("uneven"):
        n = N_SAMPLES // comm.size - (5 * BATCH if comm.rank == args.rank else 0)
        return SerialIterator([data[comm.rank * n + i] for i in range(n)], BATCH, shuffle=False)
    make = SerialIterator
    if method == "threads":
        make = functools.partial(MultithreadIterator, n_threads=2)
    elif method:
        multiprocessing.set_start_method(method)
        make = functools.partial(MultiprocessIterator, n_processes=2, shared_mem=1000)
    return DistributedIterator(data, BATCH, comm, seed=3, make_iterator=make)


def make_trainer(args, comm):
    """Return a trainer, without its checkpoint, and its loss function."""
    np.random.seed(comm.rank)
    model = L.Classifier(Net())
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(0.01), comm)
    optimizer.setup(model)
    step = Step(model, Fault(args, comm, model))
    updater = training.StandardUpdater(make_iterator(args, comm), optimizer, loss_func=step)
    if args.fault == "uneven joined":
        updater = chainer_dist.create_multi_node_updater(updater, comm)
    until = (2, "epoch") if args.fault.startswith("uneven") else (args.steps, "iteration")
    trainer = training.Trainer(updater, until, out=str(args.out))
    count = training.make_extension(trigger=(1, "iteration"))(
        lambda trainer: setattr(step, "iteration", trainer.updater.iteration)
    )
    trainer.extend(count, name="count")
    return trainer, step


def state_of(trainer):
    """Return the arrays that two trainings must have alike at their end."""
    optimizer = trainer.updater.get_optimizer("main")
    saved = chainer.serializers.DictionarySerializer()
    optimizer.target.serialize(saved["model"])
    optimizer.serialize(saved["optimizer"])
    return {**saved.target, "random": np.random.get_state()[1]}


def digest(trainer):
    """Return a number of all that counts."""
    hashed = hashlib.sha256()
    for name, value in sorted(state_of(trainer).items()):
        hashed.update(f"{name} {np.asarray(value).tobytes().hex()}".encode())
    return hashed.hexdigest()


def main():
    """Train."""
    args = parse_args()
    comm = chainer_dist.create_communicator()
    trainer, step = make_trainer(args, comm)
    is_early = args.fault == EARLY
    checkpoint = chainer_dist.Checkpoint(comm, args.out / CHECKPOINTS, asynchronous=not is_early)
    trainer.extend(checkpoint, trigger=(EVERY, "iteration"), call_before_training=is_early)
    step.iteration = checkpoint.resume(trainer)
    print("begins at", step.iteration, flush=True)
    trainer.run()
    print("result", digest(trainer), flush=True)


if __name__ == "__main__":
    main()
