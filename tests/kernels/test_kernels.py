"""Which kernels are used, and what happens where oneDNN is not as it should be."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer.functions.connection.convolution_2d import Convolution2DFunction

from chainer_dist import kernels
from chainer_dist.kernels import cache, convolution, replacements, shared_library

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]


def python(program, **environment):
    """Run a program in another process, and return what it prints."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("CHAINER")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**given, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


# Functions by which images and rows go, along every axis and in both orders of memory.
_COMMON = """
import chainer, chainer.functions as F, numpy as np
import chainer_dist

rng = np.random.RandomState(0)
images = rng.standard_normal((4, 21, 40, 40)).astype("f")
w, row = rng.standard_normal((9, 21, 3, 3)).astype("f"), np.ones(21, "f")
for x in (images, np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), images.reshape(84, -1)):
    functions = [F.relu, F.leaky_relu, F.elu, F.sigmoid, F.tanh]
    for axis in range(x.ndim):
        functions += [lambda v, axis=axis: F.softmax(v, axis), lambda v, axis=axis: F.log_softmax(v, axis)]
    if x.ndim == 4:
        functions += [lambda v: F.convolution_2d(v, w), lambda v: F.batch_normalization(v, row, row)]
        functions += [lambda v: F.max_pooling_2d(v, 3), lambda v: F.average_pooling_2d(v, 2)]
    else:
        wide, tall = rng.standard_normal((3, 1, 1600, 9)).astype("f"), rng.standard_normal((1, 2, 9, 84)).astype("f")
        functions += [lambda v: F.linear(v, v), lambda v: F.matmul(tall, F.matmul(v, wide))]
    for function in functions:
        variable = chainer.Variable(x)
        y = function(variable)
        y.grad = np.ones_like(y.array)
        y.backward()
"""


def test_no_reference_implementations():
    """What oneDNN has no fast implementation of is left to NumPy, which is up to a hundred times as fast."""
    printed = python(_COMMON, ONEDNN_VERBOSE="1", CHAINER_DIST_KERNELS="onednn")
    ran = [
        line.partition(",exec,")[2].split(",")[1:4]
        for line in printed.splitlines()
        if ",exec," in line
    ]
    assert {"convolution", "softmax", "pooling", "batch_normalization", "matmul"} <= {
        kind for kind, *_ in ran
    }
    assert [each for each in ran if each[1].startswith("ref")] == []


def case():
    """Return an image and weights."""
    rng = np.random.RandomState(0)
    return rng.standard_normal((2, 3, 8, 8)).astype("f"), rng.standard_normal((4, 3, 3, 3)).astype(
        "f"
    )


COMPUTE = """
import chainer, numpy as np
import chainer.functions as F
rng = np.random.RandomState(0)
x, w = rng.standard_normal((2, 3, 8, 8)).astype("f"), rng.standard_normal((4, 3, 3, 3)).astype("f")
def compute():
    variable = chainer.Variable(w)
    F.sum(F.max_pooling_2d(F.relu(F.convolution_2d(x, variable)), 2)).backward()
    return variable.grad
"""
STATUS = "import chainer_dist; print(*chainer_dist.kernels.status())"


def test_onednn_is_used_where_it_is_installed():
    """Its package, installed by this project's own files, is found without any setting."""
    try:
        importlib.metadata.version("onednn-cpu-gomp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("onednn-cpu-gomp is not installed here")
    name, text = python(STATUS).strip().split(" ", 1)
    assert name == "onednn"
    assert text.startswith("oneDNN 3.")
    assert "libdnnl.so.3" in text


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"CHAINER_DIST_KERNELS": "numpy"}, "numpy"),
        ({"CHAINER_DIST_KERNELS": "chainer"}, "chainer"),
        ({"CHAINER_USE_IDEEP": "never"}, "chainer"),
        ({"CHAINER_USE_IDEEP": "never", "CHAINER_DIST_KERNELS": "numpy"}, "numpy"),
    ],
)
def test_the_environment_chooses(environment, name):
    """The variable of this package wins over Chainer's for iDeep, which is oneDNN by its old name."""
    assert python(STATUS, **environment).split()[0] == name


def test_a_wrong_choice_is_refused():
    """The message has all choices, and the variable if it is from there."""
    with pytest.raises(ValueError, match="onednn, numpy, chainer or auto, got 'fast'"):
        kernels.use("fast")
    program = "try:\n import chainer_dist\nexcept ValueError as error:\n print(error)"
    assert "CHAINER_DIST_KERNELS" in python(program, CHAINER_DIST_KERNELS="fast")


@pytest.mark.parametrize("content", [None, "this is no library\n", "libm"])
def test_a_library_that_cannot_be_used(tmp_path, content):
    """NumPy then computes, with a warning, the reason is told, and who insists is refused."""
    path = tmp_path / "libdnnl.so.3"
    if content == "libm":
        path = "libm.so.6"
    elif content:
        path.write_text(content)
    program = f"""{COMPUTE}
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import chainer_dist
print(*[each.message for each in caught if "CHAINER_DIST_ONEDNN" in str(each.message)])
print(*chainer_dist.kernels.status())
print(compute().sum())
try:
    chainer_dist.kernels.use("onednn")
except chainer_dist.kernels.OneDNNError as error:
    print("refused", error)
"""
    told = python(program, CHAINER_DIST_ONEDNN=str(path)).splitlines()
    warning, status, _, refused = told
    assert warning == f"CHAINER_DIST_ONEDNN is of no use here: {status.partition(' ')[2]}"
    assert status.startswith("numpy NumPy, as oneDNN cannot be used")
    assert str(path) in status
    assert refused.startswith("refused")
    assert str(path) in refused


def test_another_version_is_refused(monkeypatch):
    """Of 2.x the functions have other arguments."""
    version = shared_library._Version(2, 7, 5)
    functions = types.SimpleNamespace(
        dnnl_version=lambda: ctypes.pointer(version),
        dnnl_primitive_desc_query_md=types.SimpleNamespace(),
        dnnl_memory_desc_get_size=types.SimpleNamespace(),
    )
    functions.dnnl_version = type("F", (), {"__call__": lambda _: ctypes.pointer(version)})()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: functions)
    with pytest.raises(shared_library.OneDNNError, match=r"oneDNN 2\.7\.5, and 3\.x is needed"):
        shared_library._load("libdnnl.so.2")


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "DEFAULT"])
def test_older_processors(instructions):
    """Results are the same to rounding with fewer instructions."""
    program = f"""{COMPUTE}
plain = compute()
import chainer_dist
assert chainer_dist.kernels.status().name == "onednn", chainer_dist.kernels.status()
np.testing.assert_allclose(compute(), plain, 1e-4, 1e-4)
"""
    python(program, ONEDNN_MAX_CPU_ISA=instructions)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_does_without():
    """OpenMP's threads are not there after a fork, and would be waited for."""
    program = f"""{COMPUTE}
import os, chainer_dist
before = compute()
child = os.fork()
if not child:
    np.testing.assert_allclose(compute(), before, 1e-4, 1e-4)
    print(chainer_dist.kernels.status().name, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(chainer_dist.kernels.status().name)
"""
    assert python(program, OMP_NUM_THREADS="2").split() == ["numpy", "onednn"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("choice", ["onednn", "numpy", "chainer"])
def test_a_forked_child_cannot_choose_it(choice):
    """Nor does it get oneDNN back at the end of a block that began before the fork."""
    program = f"""{COMPUTE}
import os, signal
from chainer_dist import kernels
before = compute()
with kernels.use("{choice}"):
    child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert kernels.status().name == "onednn"
else:
    signal.alarm(60)
    assert kernels.status().name == "numpy", kernels.status()
    np.testing.assert_allclose(compute(), before, 1e-4, 1e-4)
    kernels.use("auto")
    assert kernels.status().name == "numpy", kernels.status()
    try:
        kernels.use("onednn")
    except kernels.OneDNNError as error:
        print(error, flush=True)
    os._exit(0)
"""
    assert "was forked" in python(program, OMP_NUM_THREADS="2")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_start_methods(tmp_path, method):
    """A worker computes with oneDNN of its own."""
    script = Path(tmp_path, "script.py")
    script.write_text(f"""{COMPUTE}
import multiprocessing, chainer_dist
def work(_):
    return compute(), chainer_dist.kernels.status().name
if __name__ == "__main__":
    with multiprocessing.get_context("{method}").Pool(1) as pool:
        ((theirs, name),) = pool.map(work, [0])
    np.testing.assert_allclose(compute(), theirs, 1e-6)
    print(name)
""")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["onednn"], done


def test_a_choice_ends_with_its_block():
    """Chainer has its own functions back, and then the kernels again, also after an error."""
    own = {each.original for each in replacements._replacements}
    before = kernels.status()
    with kernels.use("chainer"):
        assert Convolution2DFunction._forward_cpu_core in own
        with kernels.use("numpy"):
            assert kernels.status().name == "numpy"
            assert Convolution2DFunction._forward_cpu_core in own
        assert kernels.status().name == "chainer"
    with pytest.raises(ZeroDivisionError), kernels.use("chainer"):
        raise ZeroDivisionError
    assert kernels.status() == before
    assert Convolution2DFunction._forward_cpu_core not in own


def test_a_graph_made_with_one_is_differentiated_with_another():
    """Both directions."""
    x, w = case()
    found = {}
    for forward, backward in (("chainer", "onednn"), ("onednn", "chainer")):
        variable = chainer.Variable(x)
        with kernels.use(forward):
            y = F.local_response_normalization(F.elu(F.convolution_2d(variable, w)))
            y = F.average_pooling_2d(F.max_pooling_2d(y, 2), 2)
        y.grad = np.ones_like(y.array)
        with kernels.use(backward):
            y.backward()
        found[forward] = variable.grad
    np.testing.assert_allclose(found["chainer"], found["onednn"], 1e-4, 1e-5)


def test_the_setting_for_ideep_is_honoured(monkeypatch):
    """It meant oneDNN, and "never" means Chainer's own code in this thread."""
    called = []
    monkeypatch.setattr(convolution, "convolve", lambda *_: called.append(1))
    x, w = case()
    with kernels.use("onednn"), chainer.using_config("use_ideep", "never"):
        assert F.convolution_2d(x, w).shape == (2, 4, 6, 6)
    assert not called


def test_operations_that_are_kept_are_bounded(monkeypatch):
    """Images of many sizes do not fill the memory."""
    monkeypatch.setattr(cache, "CAPACITY", 10)
    cache.clear()
    _, w = case()
    with kernels.use("onednn"):
        for size in range(4, 40):
            x = np.ones((1, 3, size, size), np.float32)
            y = F.convolution_2d(x, w).array
            np.testing.assert_allclose(
                y, np.broadcast_to(w.sum((1, 2, 3))[:, None, None], y.shape[1:])[None], 1e-4
            )
            assert len(cache._thread.operations) <= 10
    cache.clear()


def test_operations_end_in_their_own_thread(monkeypatch):
    """Where they end, oneDNN counts them out of what uses the scratch memory of that thread."""
    monkeypatch.setattr(cache, "CAPACITY", 2)
    cache.clear()
    ended = []

    class Made:
        def __init__(self, _):
            self.thread = threading.get_native_id()

        def __del__(self):
            ended.append(threading.get_native_id() == self.thread)

    make = cache.kept(Made)

    def work():
        for number in range(5):
            make(number)

    work()
    for ends in (8, 13):  # a thread that ends keeps none of five
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(ended) == ends
    work()
    cache.clear()
    assert ended == [True] * 20


def test_many_operations_in_many_threads():
    """Scratch memory is there for each operation, also where threads with others have come and gone."""
    program = """
import threading
import chainer.functions as F, numpy as np
from chainer_dist import kernels
from chainer_dist.kernels import cache
cache.CAPACITY = 5
x, w = np.ones((2, 9, 9, 9), "f"), np.ones((9, 3, 5, 5), "f")
def work():
    for size in range(5, 10):
        y = F.convolution_2d(x[:, :, :size], w, groups=3).array
        np.testing.assert_array_equal(y, np.full_like(y, 75))
for _ in range(10):
    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    python(program, ONEDNN_MAX_CPU_ISA="AVX2")


def test_threads_do_not_disturb_one_another():
    """Each has operations of its own, into which it puts its addresses."""
    rng = np.random.RandomState(0)
    _, w = case()
    xs = [rng.standard_normal((2, 3, 32, 32)).astype("f") for _ in range(4)]
    expected = [F.convolution_2d(x, w).array for x in xs]
    wrong = []

    def work(x, y):
        found = [F.convolution_2d(x, w).array for _ in range(200)]
        wrong.extend(each for each in found if not np.array_equal(each, y))

    threads = [threading.Thread(target=work, args=each) for each in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def parameter(*shape):
    """Return a parameter, as a static graph takes arrays only from there, and from its arguments."""
    return chainer.Parameter(np.linspace(-1, 1, int(np.prod(shape)), dtype="f").reshape(shape))


P = {each: parameter(*each) for each in [(3,), (4,), (3, 3), (3, 4), (5, 4), (1, 3, 3)]}


# Functions of an array (2, 3, 4).
RECORDED = {
    "layer normalization": lambda x: F.layer_normalization(F.reshape(x, (6, 4)), P[4,], P[4,]),
    "slices": lambda x: F.exp(x)[0] * F.exp(x)[1] + F.exp(x)[0, 1],
    "F.lstm": lambda x: F.lstm(x[0, :, :1], x[1])[1],
    "F.n_step_lstm": lambda x: F.n_step_lstm(
        1, 0.0, *[P[1, 3, 3]] * 2, [[P[3, 4]] * 4 + [P[3, 3]] * 4], [[P[3,]] * 8], [x[0], x[1]]
    )[0],
    "linear": lambda x: F.linear(x[0], P[5, 4]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", RECORDED)
def test_a_static_graph(function):
    """What is recorded in the first iteration computes from the arrays of the later ones."""

    class Recorded(chainer.Chain):
        @chainer.static_graph
        def __call__(self, x):
            return RECORDED[function](x)

    recorded = Recorded()
    for seed in range(3):
        array = np.random.RandomState(seed).standard_normal((2, 3, 4)).astype("f")
        gradients = []
        for compute in (recorded, RECORDED[function]):
            x = chainer.Variable(array)
            y = compute(x)
            F.sum(y * y).backward()
            gradients.append(x.grad)
        np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)
