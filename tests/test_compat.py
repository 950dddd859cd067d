"""The shim under Chainer's import, and the start-up finder that brings it there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import runpy
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from unittest import mock

import chainer
import chainer.functions as F
import numpy as np
import pytest

from chainer_dist import _compat

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]

# As on an environment in which everything that Chainer's import trips over is missing.
BREAK = """
import sys
sys.modules["pkg_resources"] = sys.modules["numpy.distutils"] = None
import numpy
vars(numpy).pop("sctypes", None)
"""


class Interpreter:
    """A Python of its own, with the packages of this one on its path.

    Args:
        folder: Where to put it.
        paths: More folders for ``sys.path``, in front.
        pth: Whether ``chainer_dist.pth`` is installed.
    """

    def __init__(self, folder, paths, *, pth):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "0.pth").write_text("\n".join([*map(str, paths), *SITE_PACKAGES]) + "\n")
        if pth:
            (site / "chainer_dist.pth").write_text(pth_line())

    def run(self, code, *args):
        """Run a script in a new process; return it completed, with its output as text."""
        script = self.python.parent.parent / "script.py"
        script.write_text(textwrap.dedent(code))
        environ = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PMI", "OMPI"))
        }
        return subprocess.run(
            [self.python, script, *args],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def check(self, code, *args):
        """Run a script that must succeed and print nothing to stderr; return its stdout."""
        done = self.run(code, *args)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout


def pth_line():
    """Return the content of chainer_dist.pth as setup.py makes it."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))["pth_text"]()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python in which chainer_dist is installed with its .pth file."""
    return Interpreter(tmp_path_factory.mktemp("installed"), [ROOT], pth=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python that finds chainer_dist on its path only, as with PYTHONPATH."""
    return Interpreter(tmp_path_factory.mktemp("bare"), [ROOT], pth=False)


@pytest.mark.mpi_skip
def test_pth_is_one_plain_line():
    """Python's site executes lines that begin with ``import`` and decodes them in many ways."""
    line = pth_line()
    assert line.startswith("import sys; ")
    assert line.isascii()
    assert line.index("\n") == len(line) - 1


@pytest.mark.mpi_skip
def test_start_of_python_imports_nothing_more(installed, bare):
    """The .pth file adds its finder and not one module to an interpreter that has just started."""
    code = "import sys; print(sorted(sys.modules)); print(len(sys.meta_path))"
    with_pth, without = (it.check(code).splitlines() for it in (installed, bare))
    assert with_pth[0] == without[0]
    assert int(with_pth[1]) == int(without[1]) + 1


@pytest.mark.mpi_skip
def test_chainer_first(installed):
    """With the .pth file, ``import chainer`` works first and alone, and starts no MPI."""
    out = installed.check(
        BREAK
        + """
import chainer, chainer.functions
assert numpy.sctypes
assert "chainer_dist" not in sys.modules and "mpi4py" not in sys.modules
print([finder.name for finder in sys.meta_path if type(finder).__name__ == "ImportHook"])
shim = sys.modules["chainer_dist._compat"]
import chainer_dist
assert chainer_dist._compat is shim
assert "mpi4py.MPI" not in sys.modules
"""
    )
    assert out == "['chainermn.iterators.multi_node_iterator']\n"


@pytest.mark.mpi_skip
def test_scipy_is_imported_when_it_is_used(installed):
    """Chainer's import leaves SciPy out; the functions that need it find it, and it is SciPy's own."""
    pytest.importorskip("scipy")
    installed.check(
        """
        import builtins, sys
        python = builtins.__import__
        by_name = []

        class Finder:
            def find_spec(name, *_):
                if name == "chainer.functions" and not by_name:
                    by_name.append(__import__("json", globals=globals(), fromlist=("dumps",)))

        sys.meta_path.insert(0, Finder)
        import chainer, numpy as np
        import chainer.functions as F
        assert by_name == [sys.modules["json"]]
        assert builtins.__import__ is python
        assert not [name for name in sys.modules if name.partition(".")[0] == "scipy"]
        x = np.linspace(0.1, 0.9, 5)
        found = [function(x).array for function in (F.erfinv, F.erfcx, F.ndtri, F.lgamma)]
        scale = np.array([[[2, 0], [1, 3]]], np.float32)
        mean, at = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
        likelihood = chainer.distributions.MultivariateNormal(mean, scale_tril=scale).log_prob(at).array
        sparse = chainer.utils.to_coo(np.eye(3, dtype=np.float32))
        product = F.sparse_matmul(sparse, np.full((3, 2), 2, np.float32)).array
        assert chainer.datasets.svhn._scipy_available
        from scipy import special, stats
        assert type(sys.modules["scipy"]) is type(sys)
        for function, values in zip((special.erfinv, special.erfcx, special.ndtri, special.gammaln), found):
            np.testing.assert_array_equal(values, function(x))
        covariance = scale[0] @ scale[0].T
        expected = stats.multivariate_normal(np.zeros(2), covariance).logpdf(np.ones(2))
        np.testing.assert_allclose(likelihood, [expected], rtol=1e-5)
        np.testing.assert_array_equal(product, np.full((3, 2), 2))
        """
    )


@pytest.mark.mpi_skip
def test_without_scipy(installed):
    """Chainer's own words say so, and SciPy that is there already is taken as it is."""
    code = """
        import sys
        {first}
        import chainer.functions as F, numpy as np
        from chainer.functions.math import erfinv
        try:
            F.erfinv(np.zeros(1))
        except ImportError as error:
            print("missing:", error)
        else:
            print(erfinv.special is sys.modules["scipy.special"])
    """
    missing = installed.check(code.format(first='sys.modules["scipy"] = None'))
    assert missing.startswith("missing: SciPy is not available")
    pytest.importorskip("scipy")
    assert installed.check(code.format(first="import scipy")) == "True\n"


@pytest.mark.mpi_skip
def test_chainer_dist_first(installed, bare):
    """``import chainer_dist`` repairs Chainer with the .pth file and without it."""
    for interpreter in (installed, bare):
        out = interpreter.check(
            BREAK
            + """
import chainer_dist
import chainer
assert "mpi4py.MPI" not in sys.modules
names = [type(finder).__name__ for finder in sys.meta_path] + [getattr(finder, "__name__", "") for finder in sys.meta_path]
print(names.count("ImportHook"), names.count("ChainerFinder"))
"""
        )
        assert out == "1 0\n"


@pytest.mark.mpi_skip
def test_import_after_a_failed_import(bare):
    """What a failed ``import chainer`` left behind does not harm the next one."""
    bare.check(
        BREAK
        + """
try:
    import chainer
except (AttributeError, ImportError):
    left = [name for name in sys.modules if name.startswith("chainer.")]
else:
    raise SystemExit("the import should have failed")
assert left
import chainer_dist
import chainer
assert all(hasattr(chainer, name[8:]) for name in left if name.count(".") == 1), left
"""
    )


@pytest.mark.mpi_skip
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_multiprocessing(installed, method):
    """Data-loader workers are new interpreters that import Chainer before anything of ours."""
    out = installed.check(
        """
        import multiprocessing
        import sys

        import chainer
        import numpy as np


        class Squares(chainer.dataset.DatasetMixin):
            def __len__(self):
                return 6

            def get_example(self, i):
                import chainer.functions as F

                assert "chainer_dist" not in sys.modules
                return F.square(np.full((), i, "f")).array


        if __name__ == "__main__":
            multiprocessing.set_start_method(sys.argv[1])
            iterator = chainer.iterators.MultiprocessIterator(
                Squares(), 2, repeat=False, shuffle=False, n_processes=2
            )
            print(sorted(int(x) for batch in iterator for x in batch))
            iterator.finalize()
        """,
        method,
    )
    assert out == "[0, 1, 4, 9, 16, 25]\n"


@pytest.mark.mpi_skip
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_errors_of_workers(installed, method):
    """They are raised where the batch is asked for, then and ever after; Chainer itself would hang."""
    out = installed.check(
        """
        import multiprocessing
        import sys

        import chainer


        class Dataset(chainer.dataset.DatasetMixin):
            def __len__(self):
                return 12

            def get_example(self, i):
                if i == 7:
                    raise KeyError("seven")
                return i


        if __name__ == "__main__":
            multiprocessing.set_start_method(sys.argv[1])
            iterator = chainer.iterators.MultiprocessIterator(
                Dataset(), 2, shuffle=False, n_processes=2, n_prefetch=4
            )
            for _ in range(3):
                print([int(i) for i in iterator.next()])
            for _ in range(2):
                try:
                    iterator.next()
                except KeyError as error:
                    print(error, "get_example" in str(error.__cause__))
            iterator.finalize()
        """,
        method,
    )
    assert out.splitlines() == ["[0, 1]", "[2, 3]", "[4, 5]", "'seven' True", "'seven' True"]


@pytest.mark.mpi_skip
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_that_die(installed, method):
    """It is raised where the batch is asked for; workers that are replaced as planned are no matter."""
    out = installed.check(
        """
        import multiprocessing
        import os
        import signal
        import sys

        import chainer


        class Dataset(chainer.dataset.DatasetMixin):
            def __len__(self):
                return 12

            def get_example(self, i):
                if i == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                return i


        if __name__ == "__main__":
            multiprocessing.set_start_method(sys.argv[1])
            iterator = chainer.iterators.MultiprocessIterator(
                Dataset(), 2, shuffle=False, n_processes=1, maxtasksperchild=3
            )
            for _ in range(3):
                print([int(i) for i in iterator.next()])
            for _ in range(2):
                try:
                    iterator.next()
                except RuntimeError as error:
                    print("killed by signal 9" in str(error))
            iterator.finalize()
        """,
        method,
    )
    assert out.splitlines() == ["[0, 1]", "[2, 3]", "[4, 5]", "True", "True"]


@pytest.mark.mpi_skip
def test_asking_for_the_spec_imports_nothing(installed):
    """Code that only looks whether Chainer is there neither imports it nor uses up the finder."""
    installed.check(
        BREAK
        + """
import importlib.util
before = set(sys.modules)
assert importlib.util.find_spec("chainer").origin.endswith("__init__.py")
assert not [name for name in set(sys.modules) - before if name.startswith(("chainer.", "mpi4py"))]
import chainer
import importlib, importlib.resources, inspect
assert "import numpy" in inspect.getsource(chainer)
assert importlib.resources.files("chainer").joinpath("__init__.py").is_file()
assert importlib.reload(chainer) is chainer
"""
    )


@pytest.mark.mpi_skip
def test_pth_without_its_package(tmp_path):
    """When the package went and the .pth file stayed, Python and Chainer are as without both."""
    (tmp_path / "chainer.py").write_text("answer = 42")
    (tmp_path / "_compat.py").write_text("raise RuntimeError('somebody else's module')")
    interpreter = Interpreter(tmp_path / "python", [tmp_path], pth=True)
    out = interpreter.check(
        """
        import sys
        sys.path[:] = [path for path in sys.path if "packages" not in path]
        sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in str(finder)]
        import chainer
        print(chainer.answer, [str(finder) for finder in sys.meta_path if "hainer" in str(finder)])
        """
    )
    assert out == "42 []\n"


@pytest.mark.mpi_skip
def test_broken_shim_is_named(tmp_path):
    """A shim that fails says which file failed, how, and what to do."""
    package = tmp_path / "chainer_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_compat.py").write_text("1 / 0")
    done = Interpreter(tmp_path / "python", [tmp_path], pth=True).run("import chainer")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: chainer_dist.pth could not repair Chainer")
    assert str(package / "_compat.py") in message
    assert "ZeroDivisionError" in message
    assert "reinstall chainer_dist" in message


@pytest.mark.mpi_skip
def test_existing_numpy_names_stay(bare):
    """The shim adds what is missing and replaces nothing."""
    bare.check(
        """
        import numpy
        numpy.sctypes = {"int": [numpy.int8], "float": []}
        numpy.float = numpy.float32
        import chainer_dist
        assert numpy.sctypes == {"int": [numpy.int8], "float": []}
        assert numpy.float is numpy.float32
        """
    )


@pytest.mark.mpi_skip
def test_numpy_names():
    """The restored names are those that NumPy 1 had."""
    if np.lib.NumpyVersion(np.__version__) >= "1.24.0":
        assert vars(np)["float"] is float
    kinds = vars(np)["sctypes"]
    assert np.int64 in kinds["int"]
    assert [t().itemsize for t in kinds["int"]] == [1, 2, 4, 8]
    assert [t().itemsize for t in kinds["uint"]] == [1, 2, 4, 8]
    assert [np.dtype(t).char for t in kinds["float"]] == list("efdg")
    assert [np.dtype(t).char for t in kinds["complex"]] == list("FDG")


@pytest.mark.mpi_skip
def test_resize_images():
    """Chainer's user of ``numpy.float`` interpolates as NumPy does."""
    image = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4) ** 2
    wide = F.resize_images(image, (1, 7)).array[0, 0, 0]
    np.testing.assert_allclose(wide, np.interp(np.linspace(0, 3, 7), range(4), image[0, 0, 0]))


@pytest.mark.mpi_skip
def test_as_strided():
    """Chainer's user of ``numpy.sctypes`` sums the gradients of overlapping windows."""
    x = chainer.Variable(np.arange(5, dtype=np.float32))
    windows = F.as_strided(x, (3, 3), (1, 1))
    windows.grad = np.ones((3, 3), np.float32)
    windows.backward()
    np.testing.assert_array_equal(x.grad, [1, 2, 3, 2, 1])


@pytest.mark.mpi_skip
@pytest.mark.parametrize("as_variable", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_categorical_log_prob(batch, as_variable):
    """The log of the probability of each index, for arrays and variables alike."""
    rng = np.random.RandomState(0)
    p = rng.dirichlet(np.ones(4), size=batch).astype(np.float32)
    x = rng.randint(4, size=batch).astype(np.float32)
    wanted = np.log(np.take_along_axis(p, x.astype(int)[..., None], -1)[..., 0])
    result = chainer.distributions.Categorical(p=p).log_prob(
        chainer.Variable(x) if as_variable else x
    )
    assert isinstance(result, chainer.Variable)
    np.testing.assert_allclose(result.array, wanted, rtol=1e-5)


def test_multi_node_iterator_of_chainermn():
    """ChainerMN's iterator gives every rank the batches of rank 0, on NumPy 2.4 as well."""
    chainermn = pytest.importorskip("chainermn")
    data = [(np.float32([i, -i]), np.int32(i)) for i in range(5)]
    mn_comm = chainermn.create_communicator("naive")
    iterator = chainermn.iterators.create_multi_node_iterator(
        chainer.iterators.SerialIterator(data, 2, repeat=False, shuffle=False), mn_comm
    )
    seen = [[(x.tolist(), int(t)) for x, t in batch] for batch in iterator]
    assert seen == [
        [([0, 0], 0), ([1, -1], 1)],
        [([2, -2], 2), ([3, -3], 3)],
        [([4, -4], 4)],
    ]


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A list of events, to which the module ``hooked_module`` adds when it runs, and a hook for it."""
    events = []
    (tmp_path / "hooked_module.py").write_text(
        "import builtins\nbuiltins.hooked_events.append('run')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.hooked_events", events, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "hooked_module", raising=False)
    hook = _compat.ImportHook(
        "hooked_module",
        lambda: events.append("before"),
        lambda module: events.append(module.__name__),
    )
    sys.meta_path.insert(0, hook)
    yield events
    sys.modules.pop("hooked_module", None)


def test_hook_acts_around_the_import_once(record):
    """Before the module's code, after it, and never again."""
    hook = sys.meta_path[0]
    spec = importlib.util.find_spec("hooked_module")
    assert record == []
    module = importlib.import_module("hooked_module")
    assert record == ["before", "run", "hooked_module"]
    assert hook not in sys.meta_path
    assert "append('run')" in inspect.getsource(module)
    importlib.reload(module)
    spec.loader.exec_module(module)
    assert record[3:] == ["run", "run"]


class SharedLoader:
    """A finder and loader of more than one module, as that of a zip file is."""

    def __init__(self, events):
        self.events = events

    def find_spec(self, name, *_):
        """Find two modules."""
        found = name in ("hooked_module", "other_module")
        return importlib.util.spec_from_loader(name, self) if found else None

    def create_module(self, spec):
        """Leave it to importlib."""

    def exec_module(self, module):
        """Note which module was executed."""
        self.events.append(f"run {module.__name__}")


def test_hook_leaves_other_modules_of_a_loader_alone(record):
    """Between search and import of the hooked module, its loader may load another one."""
    sys.meta_path.insert(1, SharedLoader(record))
    assert importlib.util.find_spec("hooked_module") is not None
    importlib.import_module("other_module")
    del sys.modules["other_module"]
    assert record == ["run other_module"]
    importlib.import_module("hooked_module")
    assert record[1:] == ["before", "run hooked_module", "hooked_module"]


def test_hook_waits_through_a_failed_import(record, tmp_path):
    """A module that fails is hooked again at the next attempt."""
    good = (tmp_path / "hooked_module.py").read_text()
    (tmp_path / "hooked_module.py").write_text(
        "raise RuntimeError('not now')  # longer than before" * 2
    )
    with pytest.raises(RuntimeError, match="not now"):
        importlib.import_module("hooked_module")
    (tmp_path / "hooked_module.py").write_text(good)
    importlib.invalidate_caches()
    importlib.import_module("hooked_module")
    assert record == ["before", "before", "run", "hooked_module"]


def test_hook_names_the_module_it_could_not_adapt(record):
    """An error in the shim's own steps is an ImportError that says whose it is."""
    sys.meta_path[0].before = lambda: 1 / 0
    with pytest.raises(
        ImportError, match=r"chainer_dist could not adapt hooked_module .*ZeroDivision"
    ):
        importlib.import_module("hooked_module")
    assert record == []


def test_install_twice_changes_nothing():
    """The shim may be loaded by the start-up finder, by the package and by hand."""
    _compat.install()
    before = list(sys.meta_path)
    _compat.install()
    assert sys.meta_path == before
    names = [hook.name for hook in before if isinstance(hook, _compat.ImportHook)]
    assert len(names) == len(set(names))
    assert "chainer" not in names


@pytest.mark.mpi_skip
def test_a_pool_without_workers_for_a_moment():
    """One that has just lost its worker, and has no other yet, takes work all the same."""
    pool = _compat._make_pool(1)
    try:
        workers = [*pool._pool]
        pool._pool.clear()
        try:
            result = pool.map_async(abs, iter([-1, 2]))
        finally:
            pool._pool.extend(workers)
        assert result.get(60) == [1, 2]
    finally:
        pool.terminate()
