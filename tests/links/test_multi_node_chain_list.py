"""Models spread over ranks, against the same model in one process."""

from __future__ import annotations

import time

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import RankMismatchError
from chainer_dist.links import MultiNodeChainList

X = np.random.RandomState(0).uniform(-1, 1, (7, 3))


class Mix(chainer.Link):
    """tanh of a weighted sum of any number of inputs, tuples among them; may return a tuple."""

    def __init__(self, seed, n_out=1, fails=False):
        super().__init__()
        self.n_out, self.fails = n_out, fails
        rng = np.random.RandomState(seed)
        with self.init_scope():
            self.w = chainer.Parameter(rng.uniform(-1, 1, (3, 3)))
            self.b = chainer.Parameter(rng.uniform(-1, 1, 3))

    def forward(self, *xs):
        """Return one variable of the shape of the inputs, or a tuple of different ones."""
        if self.fails:
            raise FloatingPointError("this component fails")
        flat = [y for x in xs for y in (x if isinstance(x, tuple) else (x,))]
        h = sum(F.matmul(x, self.w) * (i + 1.0) for i, x in enumerate(flat))
        h = F.tanh(h + F.broadcast_to(self.b, h.shape))
        return h if self.n_out == 1 else tuple(h * (i + 1.0) for i in range(self.n_out))


class Part:
    """A component: its rank, its connections, and how many outputs it has.

    ``sources`` says which parts' outputs it takes, None for the model's input; of this the truth in
    one process is made.
    """

    def __init__(self, rank, rank_in, rank_out, sources, n_out=1):
        self.rank, self.rank_in, self.rank_out = rank, rank_in, rank_out
        self.sources, self.n_out = sources, n_out


MODELS = {
    "one rank": [Part(0, None, None, None)],
    "a chain on one rank": [
        Part(0, None, 0, None, n_out=2),
        Part(0, 0, 0, [0]),
        Part(0, [0], None, [1]),
    ],
    "a chain of two": [Part(0, None, 1, None), Part(1, 0, None, [0])],
    "tuples": [Part(0, None, 1, None, n_out=3), Part(1, 0, None, [0], n_out=2)],
    "there and back": [
        Part(0, None, 1, None),
        Part(1, 0, 0, [0], n_out=2),
        Part(0, 1, None, [1]),
    ],
    "output in between": [
        Part(0, None, 1, None),
        Part(1, 0, None, [0]),
        Part(1, None, 0, None),
        Part(0, 1, 0, [2]),
        Part(0, 0, None, [3]),
    ],
    "twice to the same rank": [
        Part(0, None, [1, 1, 1], None),
        Part(1, [0, 0], 1, [0, 0]),
        Part(1, [0, 1], None, [0, 1]),
    ],
    "crossing": [
        Part(0, None, [1, 0], None),
        Part(1, None, [0, 1], None),
        Part(0, [1, 0], None, [1, 0]),
        Part(1, [1, 0], None, [1, 0]),
    ],
    "a chain of three": [
        Part(2, None, 0, None),
        Part(0, 2, 1, [0]),
        Part(1, 0, None, [1]),
    ],
    "one to many to one": [
        Part(0, None, [1, 2, 0], None, n_out=2),
        Part(1, 0, 0, [0]),
        Part(2, 0, 0, [0], n_out=2),
        Part(0, [2, 1, 0], None, [2, 1, 0]),
    ],
    "many to one": [
        Part(0, None, 2, None),
        Part(1, None, 2, None),
        Part(2, [1, 0], None, [1, 0]),
    ],
    "around the ring and back": [
        Part(0, None, 1, None),
        Part(1, 0, 2, [0]),
        Part(2, 1, 0, [1]),
        Part(0, 2, 2, [2]),
        Part(2, 0, 1, [3]),
        Part(1, 2, None, [4]),
    ],
    "a diamond of four": [
        Part(0, None, [1, 2], None),
        Part(1, 0, [3, 2], [0]),
        Part(2, [0, 1], 3, [0, 1]),
        Part(3, [2, 1], [0, 3], [2, 1]),
        Part(3, 3, None, [3]),
        Part(0, 3, None, [3]),
    ],
}


def needed(parts):
    """Return how many ranks a model needs."""
    return 1 + max(part.rank for part in parts)


def skip_unless(comm, parts):
    """Skip a model that needs more ranks."""
    if comm.size < needed(parts):
        pytest.skip(f"needs {needed(parts)} ranks")


def build(comm, parts, **options):
    """Return this rank's model."""
    model = MultiNodeChainList(comm, **options)
    for i, part in enumerate(parts):
        if part.rank == comm.rank:
            model.add_link(Mix(i, part.n_out), part.rank_in, part.rank_out)
    return model


def loss_of(y, rank):
    """Return a rank's loss, in which every element counts differently."""
    ys = y if isinstance(y, tuple) else (y,)
    weights = np.arange(1, ys[0].size + 1).reshape(ys[0].shape)
    return sum(F.mean(y**3 * weights) * (rank + 1) for y in ys)


def truth(parts, x):
    """Return each component's link, after backward of all losses, and the outputs by rank."""
    links = [Mix(i, part.n_out) for i, part in enumerate(parts)]
    total, outputs = 0, {}
    order = list(range(len(parts)))
    found = {}
    while order:
        for i in list(order):
            sources = parts[i].sources or []
            if all(s in found for s in sources):
                found[i] = links[i](
                    *([x] if parts[i].sources is None else [found[s] for s in sources])
                )
                order.remove(i)
    for i, part in enumerate(parts):
        if part.rank_out is None:
            outputs[part.rank] = found[i]
            total += loss_of(found[i], part.rank)
    total.backward()
    return links, outputs


def check(comm, parts, model, x=X):
    """Run forward and backward of the model; compare outputs and gradients."""
    model.cleargrads()
    y = model(x)
    links, outputs = truth(parts, x)
    if comm.rank in outputs:
        want = outputs[comm.rank]
        for mine, theirs in zip(
            *(each if isinstance(each, tuple) else (each,) for each in (y, want))
        ):
            np.testing.assert_allclose(mine.array, theirs.array, rtol=1e-12)
        loss_of(y, comm.rank).backward()
    else:
        assert y.shape == (0,)
        y.backward()
    expected = [link for link, part in zip(links, parts) if part.rank == comm.rank]
    assert len(expected) == len(model)
    for mine, theirs in zip(model, expected):
        for p, q in zip(mine.params(), theirs.params()):
            np.testing.assert_allclose(p.grad, q.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("n_micro_batches", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(comm, name, n_micro_batches):
    """They are those of the model in one process, call after call, with or without micro-batches."""
    parts = MODELS[name]
    skip_unless(comm, parts)
    model = build(comm, parts, n_micro_batches=n_micro_batches)
    for n in (7, 4):
        check(comm, parts, model, X[:n])


@settings(max_examples=50)  # about a third make a model
@given(data=st.data())
def test_random_models(comm, data):
    """Any model whose components can be put in an order works, on all ranks and with any cut."""
    n_parts = data.draw(st.integers(1, 6))
    ranks = data.draw(st.lists(st.integers(0, comm.size - 1), min_size=n_parts, max_size=n_parts))
    parts, has_output = [], set()
    for i, rank in enumerate(ranks):
        sources = data.draw(st.lists(st.integers(0, i - 1), max_size=2)) if i else []
        # what a component sends to this one is received in the order in which it is sent
        sources = sorted(sources)
        parts.append(Part(rank, [ranks[s] for s in sources] or None, [], sources or None))
        for s in sources:
            parts[s].rank_out.append(rank)
    for part in reversed(parts):
        if not part.rank_out:
            if part.rank in has_output:
                return  # a second output on a rank is refused
            part.rank_out = None
            has_output.add(part.rank)
    n = data.draw(st.sampled_from([1, 2, 5]))
    sends = [(p.rank, t) for p in parts for t in p.rank_out or ()]
    receives = [(ranks[s], p.rank) for p in parts for s in p.sources or ()]
    assert sorted(sends) == sorted(receives)
    if not in_order(parts, ranks):
        return
    check(comm, parts, build(comm, parts, n_micro_batches=n))


def in_order(parts, ranks):
    """Tell whether each connection of two ranks is used in the same order on both."""
    sent = {}
    for i, part in enumerate(parts):
        for target in part.rank_out or ():
            sent.setdefault((ranks[i], target), []).append(i)
    for part in parts:
        for s in part.sources or ():
            if sent[ranks[s], part.rank].pop(0) != s:
                return False
    return True


def test_without_backward(comm):
    """Evaluation in no_backprop_mode, several calls ahead of one another."""
    parts = MODELS["there and back" if comm.size > 1 else "one rank"]
    model = build(comm, parts)
    wants = [truth(parts, X * i)[1] for i in range(5)]
    with chainer.no_backprop_mode():
        ys = [model(X * i) for i in range(5)]
    if comm.rank == 0:
        for y, want in zip(ys, wants):
            np.testing.assert_allclose(y.array, want[0].array, rtol=1e-12)


def test_variables_as_inputs_get_gradients(comm):
    """Micro-batches are cut out of variables and lists as well."""
    parts = MODELS["a chain of two" if comm.size > 1 else "one rank"]
    for n in (1, 2):
        model = build(comm, parts, n_micro_batches=n)
        x = chainer.Variable(X)
        y = model(x)
        (loss_of(y, comm.rank) if y.size else y).backward()
        want = chainer.Variable(X)
        truth(parts, want)
        if comm.rank == 0:
            np.testing.assert_allclose(x.grad, want.grad, rtol=1e-10)


def test_lists_of_sequences(comm):
    """A list is cut into lists, and lists of outputs are put together."""

    class Twice(chainer.Link):
        def forward(self, xs):
            return [x * 2.0 for x in xs]

    model = MultiNodeChainList(comm, n_micro_batches=3)
    model.add_link(Twice())
    xs = [np.full(i, i, np.float32) for i in range(5)]
    ys = model(xs)
    assert [y.shape for y in ys] == [(i,) for i in range(5)]
    np.testing.assert_array_equal(ys[4].array, xs[4] * 2)


def test_a_component_that_ignores_its_input(comm):
    """The gradient of what it ignores is zero, and nobody waits for it."""
    if comm.size == 1:
        pytest.skip("needs two ranks")

    class Ignore(chainer.Link):
        def forward(self, x):
            return chainer.Variable(np.zeros((len(x), 1)))

    for n in (1, 2):
        model = MultiNodeChainList(comm, n_micro_batches=n)
        if comm.rank == 0:
            model.add_link(Mix(0), rank_out=1)
        elif comm.rank == 1:
            model.add_link(Ignore(), rank_in=0)
        y = model(X)
        (F.sum(y) if comm.rank == 1 else y).backward()
        if comm.rank == 0:
            assert not model[0].w.grad.any()


def test_integers_between_components(comm):
    """Indices are sent without gradients to the rank that looks them up."""
    if comm.size == 1:
        pytest.skip("needs two ranks")

    class Indices(chainer.Link):
        def forward(self, x):
            return F.cast(chainer.as_variable(x) * 0 + 2, np.int32)

    model = MultiNodeChainList(comm)
    if comm.rank == 0:
        model.add_link(Indices(), rank_out=1)
    elif comm.rank == 1:
        model.add_link(L.EmbedID(3, 2), rank_in=0)
    model.cleargrads()
    y = model(np.zeros(4, np.int32))
    (F.sum(y) if comm.rank == 1 else y).backward()
    if comm.rank == 1:
        np.testing.assert_array_equal(model[0].W.grad, [[0, 0], [0, 0], [4, 4]])


def test_training_with_an_optimizer(comm):
    """A pipeline learns like the model in one process, also where the last batch is short."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    parts = MODELS["a chain of two"]
    model = build(comm, parts, n_micro_batches=4)
    links = [Mix(i) for i in range(2)]
    optimizers = [chainer.optimizers.Adam(0.05).setup(link) for link in links]
    mine = chainer.optimizers.Adam(0.05).setup(model)
    for batch in (X, X[:5], X[:2], X):
        mine.update(lambda b: F.mean(model(b) ** 2) if comm.rank == 1 else model(b), batch)
        for link in links:
            link.cleargrads()
        F.mean(links[1](links[0](batch)) ** 2).backward()
        for each in optimizers:
            each.update()
    if comm.rank < 2:
        np.testing.assert_allclose(model[0].w.array, links[comm.rank].w.array, rtol=1e-9)


def test_the_same_file_as_chainermn(comm):
    """Parameters have ChainerMN's names, so that its saved models load."""
    theirs = pytest.importorskip("chainermn")
    ours, other = MultiNodeChainList(comm), None
    with pytest.warns(FutureWarning):
        other = theirs.MultiNodeChainList(comm)
    for model in (ours, other):
        model.add_link(Mix(0), None, comm.rank)
        model.add_link(Mix(1), comm.rank, None)
    names = [name for name, _ in ours.namedparams()]
    assert names == [name for name, _ in other.namedparams()]


WRONG = {
    "nobody receives": (
        {0: [(None, 1)], 1: [(None, None)]},
        "rank 0: component 0 sends to rank 1, where there are no components with rank_in=0",
    ),
    "nobody sends": (
        {0: [(None, None)], 1: [(None, 1), ([1, 0], None)]},
        "rank 1: component 1 receives from rank 0, where there are no components with rank_out=1",
    ),
    "one too many": (
        {0: [(None, [1, 1])], 1: [(0, None)]},
        "rank 0: component 0 sends to rank 1, where there is 1 component",
    ),
    "a circle": (
        {0: [(1, 1)], 1: [(0, 0)]},
        "rank 0: component 0 waits for rank 1, rank 1: component 0 waits for rank 0",
    ),
    "the wrong order": (
        {0: [(None, 1), (1, None)], 1: [(1, 0), (0, 1)]},
        "components wait for one another: rank 1: component 0 waits for rank 1",
    ),
    "own rank, nobody receives": ({0: [(None, 0)]}, "rank 0: component 0 sends to rank 0"),
}


def add_links(model, components):
    """Add a link for each pair of ranks that it receives from and sends to."""
    for rank_in, rank_out in components:
        model.add_link(Mix(0), rank_in, rank_out)


def call_for_a_minute(model):
    """Call a model again and again."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        model(X)


def call_until_it_raises(model):
    """Return what a model soon raises: a rank may only then know of one that names it."""
    with pytest.raises(ValueError, match="rank") as caught:
        call_for_a_minute(model)
    return str(caught.value)


@pytest.mark.parametrize("others_call", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_components_that_do_not_fit_together(comm, name, others_call):
    """Every rank that has some raises the same error, and again in the next call."""
    layout, message = WRONG[name]
    if comm.size < len(layout):
        pytest.skip(f"needs {len(layout)} ranks")
    for n_micro_batches in (1, 2):
        if others_call or comm.rank in layout:
            model = MultiNodeChainList(comm, n_micro_batches=n_micro_batches)
            add_links(model, layout.get(comm.rank, []))
        if comm.rank in layout:
            said = call_until_it_raises(model)
            assert message in said
            with pytest.raises(ValueError, match="rank") as caught:
                model(X)
            assert str(caught.value) == said
        elif others_call:
            for _ in range(3):
                assert model(X).shape == (0,)
        comm.mpi_comm.barrier()


def reached(tables):
    """Return for each rank those that its components name, directly or by the components of others."""
    named = [{r for pair in table for ranks in pair for r in ranks or ()} for table in tables]
    found = [{rank} for rank in range(len(tables))]
    for _ in tables:
        found = [ranks.union(*(named[r] for r in ranks)) for ranks in found]
    return found


def is_wrong(tables, ranks):
    """Tell whether some ranks' components do not fit together, by playing through what they do."""
    mail, done, moved = [], dict.fromkeys(ranks, 0), True
    while moved:
        moved = False
        for rank in ranks:
            while done[rank] < len(tables[rank]):
                sources, targets = tables[rank][done[rank]]
                needed = [(source, rank) for source in sources or ()]
                if any(mail.count(each) < needed.count(each) for each in needed):
                    break
                for each in needed:
                    mail.remove(each)
                mail += [(rank, target) for target in targets or ()]
                done[rank] += 1
                moved = True
    return bool(mail) or any(done[rank] < len(tables[rank]) for rank in ranks)


@settings(max_examples=40)
@given(data=st.data())
def test_random_components(comm, data):
    """Whatever ranks say of their components: those that are connected all work, or all raise."""
    ranks = st.one_of(st.none(), st.lists(st.integers(0, comm.size - 1), min_size=1, max_size=2))
    pairs = st.lists(st.tuples(ranks, ranks), max_size=2).filter(
        lambda pairs: [rank_out for _, rank_out in pairs].count(None) < 2
    )
    tables = data.draw(st.lists(pairs, min_size=comm.size, max_size=comm.size))
    found = reached(tables)
    connected = {comm.rank}
    for _ in tables:
        connected = {
            rank
            for rank, ranks in enumerate(found)
            if ranks & {*connected, *(r for c in connected for r in found[c])}
        }
    model = MultiNodeChainList(
        comm.split(0, comm.rank)
    )  # ranks that wait for nothing have called none before
    add_links(model, tables[comm.rank])
    if is_wrong(tables, connected):
        call_until_it_raises(model)
    elif tables[comm.rank]:
        model(X)
    others = comm.mpi_comm.Ibarrier()
    while not others.Test():  # an error of another rank came here before one that names this rank
        if model._comparison is not None:
            model._comparison.strangers(model._n_calls)
    model._comm.finalize()


@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_ranks_without_components_stay_away(comm, n_micro_batches):
    """They do not call a model, and have components of the next one; a rank that has none makes none."""
    for name in ("a chain of two", "there and back", "a chain of three", "a chain of two"):
        parts = MODELS[name]
        if comm.rank > 2 or needed(parts) > comm.size:
            continue
        model = build(comm, parts, n_micro_batches=n_micro_batches)
        if comm.rank < needed(parts):
            for n in (7, 4):
                check(comm, parts, model, X[:n])


def test_ranks_that_are_not_connected_do_not_wait_for_each_other(comm):
    """They have batches and numbers of pieces of their own, and one group may be done before the other starts."""
    model = MultiNodeChainList(comm, n_micro_batches=2 + comm.rank // 2)
    x = X[: 7 - comm.rank // 2]
    is_first = comm.rank % 2 == 0
    has_peer = comm.rank // 2 * 2 + 1 < comm.size
    if has_peer:
        model.add_link(Mix(0), *((None, comm.rank + 1) if is_first else (comm.rank - 1, None)))
    else:
        model.add_link(Mix(0))
    if comm.rank > 1:
        comm.mpi_comm.recv(source=0)
    y = model(x if is_first else None)
    assert y.shape == ((0,) if is_first and has_peer else x.shape)
    if comm.rank == 0:
        for rank in range(2, comm.size):
            comm.mpi_comm.send(None, dest=rank)


def test_a_rank_may_have_components_of_one_of_two_models_only(comm):
    """What it says of that model is not taken for another one that the others call at the time."""
    if comm.size < 3:
        pytest.skip("needs three ranks")
    x = np.ones((2, 3))
    if comm.rank < 2:
        first = MultiNodeChainList(comm)
        first.add_link(Mix(0), *((None, 1) if comm.rank == 0 else (0, None)))
    if comm.rank in (1, 2):
        second = MultiNodeChainList(comm)
        second.add_link(Mix(1), *((None, 2) if comm.rank == 1 else (1, None)))
    if comm.rank < 2:
        time.sleep(0.3)  # until rank 2 has told of the second model
        assert first(x).shape == ((0,) if comm.rank == 0 else (2, 3))
    if comm.rank in (1, 2):
        assert second(x).shape == ((0,) if comm.rank == 1 else (2, 3))


def test_components_added_later_are_checked(comm):
    """Every connected rank compares again after another link was added."""
    model = MultiNodeChainList(comm)
    model.add_link(Mix(0), None, comm.rank)
    model.add_link(Mix(1), comm.rank, None)
    assert model(X).shape == X.shape
    model.add_link(Mix(2), None, comm.rank)
    with pytest.raises(
        ValueError, match=f"rank {comm.rank}: component 2 sends to rank {comm.rank}"
    ):
        model(X)


def test_ranks_are_connected_later(comm):
    """Links may be added between two calls, right ones and wrong ones, and other models follow."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    if comm.rank > 1:
        return
    for _ in range(2):
        model = MultiNodeChainList(comm)
        add_links(model, {0: [(None, None)], 1: []}[comm.rank])
        for _ in range(3):
            assert model(X).shape == (X.shape if comm.rank == 0 else (0,))
        add_links(model, {0: [(None, 1)], 1: [(0, None)]}[comm.rank])
        for _ in range(3):
            assert model(X).shape == X.shape
        add_links(model, {0: [(None, 1)], 1: [(0, 1)]}[comm.rank])
        for _ in range(2):
            with pytest.raises(ValueError, match="rank 1: component 1 sends to rank 1"):
                model(X)


def test_bad_components(comm):
    """What one rank alone can see is refused where it is added."""
    model = MultiNodeChainList(comm)
    for ranks, error in (
        (comm.size, ValueError),
        ([], ValueError),
        ("0", TypeError),
        (-1, ValueError),
    ):
        with pytest.raises(error):
            model.add_link(Mix(0), rank_in=ranks)
        with pytest.raises(error):
            model.add_link(Mix(0), rank_out=ranks)
    model.add_link(Mix(0), None, None)
    with pytest.raises(ValueError, match="another component of this rank has the output"):
        model.add_link(Mix(0), None, None)
    assert len(model) == 1
    with pytest.raises(ValueError, match="n_micro_batches is 0"):
        MultiNodeChainList(comm, n_micro_batches=0)


def test_bad_batches(comm):
    """Inputs that cannot be cut, or are of different lengths, are an error on every rank."""
    last = comm.rank == comm.size - 1

    def connected(n_micro_batches):
        """Return a model to which every rank gives inputs."""
        model = MultiNodeChainList(comm, n_micro_batches=n_micro_batches)
        model.add_link(Mix(0), None, 0)
        if comm.rank == 0:
            model.add_link(Mix(1), list(range(comm.size)), None)
        return model

    model = connected(2)
    with pytest.raises(TypeError, match="an input is str, expected an array"):
        model("text" if last else X)
    with pytest.raises(ValueError, match=r"inputs have lengths \[7, 6\]"):
        model(*((X, X[:6]) if last else (X, X)))
    if comm.size > 1:
        with pytest.raises(
            RankMismatchError, match=r"batch has 6 samples, expected 7 as on rank 0"
        ):
            model(X[:6] if last else X)
        with pytest.raises(
            RankMismatchError, match="n_micro_batches is 3, expected 2 as on rank 0"
        ):
            connected(3 if last else 2)(X)
    assert model(X).shape == (X.shape if comm.rank == 0 else (0,))


@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_a_component_that_fails(comm, n_micro_batches):
    """Ranks that wait for it raise its error: those after it in forward, those before in backward."""
    if comm.size < 3:
        pytest.skip("needs three ranks")
    parts = MODELS["a chain of three"]  # 2, then 0, then 1
    model = build(comm, parts, n_micro_batches=n_micro_batches)
    if comm.rank == 0:
        model[0].fails = True
    before = comm.rank in (2, 3)
    if before:
        y = model(X)
    else:
        with pytest.raises(FloatingPointError, match="this component fails"):
            model(X)
    if comm.rank == 2:
        with pytest.raises(FloatingPointError, match="rank 0: this component fails"):
            y.backward()
    if comm.rank == 0:
        model[0].fails = False
    check(comm, parts, model)


def test_outputs_that_cannot_be_sent_or_joined(comm):
    """They are an error, on the rank that waits as well."""

    class Returns(chainer.Link):
        def forward(self, *_):
            return self.result

    model = MultiNodeChainList(comm, n_micro_batches=2)
    model.add_link(Returns())
    model[0].result = chainer.Variable(np.zeros(()))
    with pytest.raises(ValueError, match="an output is 0-dimensional"):
        model(X)
    model[0].result = "text"
    with pytest.raises(TypeError, match="Returns returned 'text', expected variables"):
        model(X)
    if comm.size == 1:
        return
    for result in ("text", (np.zeros(3), None), ()):
        model = MultiNodeChainList(comm)
        if comm.rank == 0:
            model.add_link(Returns(), rank_out=1)
            model[0].result = result
        elif comm.rank == 1:
            model.add_link(Mix(1), rank_in=0)
        if comm.rank < 2:
            with pytest.raises(TypeError):
                model(X)
        else:
            model(X)


def test_batch_normalization_sees_micro_batches(comm):
    """Each piece is normalized with its own statistics."""
    model = MultiNodeChainList(comm, n_micro_batches=2)
    model.add_link(L.BatchNormalization(3, dtype=np.float64))
    x = np.vstack([X[:3], 100 * X[:3]])
    y = model(x).array
    alone = L.BatchNormalization(3, dtype=np.float64)
    np.testing.assert_allclose(y[:3], alone(x[:3]).array, rtol=1e-12)
    np.testing.assert_allclose(y[3:], alone(x[3:]).array, rtol=1e-12)
    np.testing.assert_allclose(model[0].avg_mean, alone.avg_mean)


def test_backward_of_a_micro_batch_ends_before_the_next_begins(comm):
    """Gradients are sent as soon as one micro-batch is through, so that ranks overlap."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    parts = MODELS["a chain of two"]
    model = build(comm, parts, n_micro_batches=3)
    visited = []

    class Watch(chainer.FunctionHook):
        name = "Watch"

        def backward_preprocess(self, function, *_):
            visited.append(function.label)

    y = model(X)
    loss = F.sum(y) if comm.rank == 1 else y
    with Watch():
        loss.backward()
    step = {0: ["send to rank 1", "Tanh"], 1: ["Tanh", "recv from rank 0"]}.get(comm.rank, [])
    assert [label for label in visited if label in step] == step * 3
