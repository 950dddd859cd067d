"""Scaling is measured by real steps, and efficiencies are what they are defined to be."""

from __future__ import annotations

import csv
import html.parser
import importlib.util
import json
import re
import subprocess
import sys

import chainer
import numpy as np
import pytest

import mpi_job
from chainer_dist.scaling import (
    accuracy,
    cli,
    contenders,
    experiment,
    page,
    predicted,
    results,
    workloads,
)
from chainer_dist.scaling.experiment import ACCURACY, Job, Plan

PLAN = Plan(
    workloads=["mlp"],
    contenders=["chainer_dist", "independent"],
    ranks=[1, 2, 4],
    more_ranks=[],
    scalings=["weak", "strong"],
    batch=16,
    kernels="auto",
    rounds=2,
    seconds=1.0,
    steps=5,
    accuracy=0.9,
    places=[],
    timeout=60.0,
)


def steps(*seconds):
    """Return the result of a job."""
    return {"seconds": list(seconds), "parts": {}}


class Small(chainer.ChainList):
    """Two linear layers and their loss."""

    def __init__(self):
        """Create them, the same on every rank."""
        super().__init__()
        rng = np.random.RandomState(5)
        for size in ((3, 4), (2, 3)):
            self.add_link(
                chainer.links.Linear(
                    *reversed(size), initialW=rng.standard_normal(size).astype(np.float32)
                )
            )

    def forward(self, x, t):
        """Return the loss."""
        first, second = self
        return chainer.functions.softmax_cross_entropy(second(chainer.functions.relu(first(x))), t)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_built_in_workloads_have_a_gradient_everywhere(comm, name):
    """Each is a model whose loss depends on all of its parameters."""
    if comm.size > 1:
        pytest.skip("takes seconds, and is the same on any number of ranks")
    np.random.seed(0)
    model, arguments = workloads.load(name).make(2, 0)
    loss = model(*arguments)
    loss.backward()
    assert np.isfinite(loss.array)
    assert all(param.grad is not None for param in model.params())


def test_ranks_have_data_of_their_own(comm):
    """Otherwise a mean over ranks would be no work."""
    if comm.size > 1:
        pytest.skip("takes seconds, and is the same on any number of ranks")
    for name in workloads.WORKLOADS:
        if name != "resnet50":
            (_, first), (_, second) = (workloads.load(name).make(2, rank) for rank in (0, 1))
            assert not np.array_equal(first[0], second[0])


def test_contenders_do_the_same_training(comm):
    """What is compared comes to the same parameters."""
    rng = np.random.RandomState(comm.rank)
    arguments = (
        rng.standard_normal((6, 4)).astype(np.float32),
        rng.randint(0, 2, 6).astype(np.int32),
    )
    found = {}
    for name in ("chainer_dist", "allreduce", "chainermn"):
        model = Small()
        model(*arguments)  # initializes
        step, _ = contenders.make_step(name, "small", model, arguments)
        for _ in range(3 + (name == "chainermn")):  # whose first update updates nothing
            step()
        found[name] = np.concatenate([each.array.ravel() for each in model.params()])
    np.testing.assert_allclose(found["chainer_dist"], found["allreduce"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["chainer_dist"], found["chainermn"], rtol=1e-5, atol=1e-7)


MORE_MODELS = mpi_job.ROOT / "scripts" / "benchmarks" / "kernel_models.py"


@pytest.mark.torch
@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "name",
    [
        *workloads.WORKLOADS,
        *(
            f"{MORE_MODELS}:{function}"
            for function in (
                *("vgg16", "mobilenet", "unet"),
                *("gru", "lstm_steps", "bilstm", "transformer_large"),
            )
        ),
    ],
)
def test_torch_models_compute_the_same(name):
    """With equal parameters, loss and gradients are those of Chainer's model, so it is the same work.

    In float64, since batch normalization of few examples makes much of rounding.
    """
    from chainer_dist.scaling import torch_models

    workload = workloads.load(name)
    np.random.seed(0)
    model, arguments = workload.make(2, 0)
    arguments = [
        each.astype(np.float64) if getattr(each, "dtype", None) == np.float32 else each
        for each in arguments
    ]
    for param in model.params():
        param.array = param.array.astype(np.float64)
    for link in model.links():
        if isinstance(link, chainer.links.BatchNormalization):
            link.avg_mean, link.avg_var = (
                each.astype(np.float64) for each in (link.avg_mean, link.avg_var)
            )
    net = workload.torch().double()
    torch_models.copy_parameters(model, net)
    loss = model(*arguments)
    model.cleargrads()
    loss.backward()
    found = net(*torch_models.tensors(arguments, channels_last=workload.images))
    found.backward()
    assert loss.dtype == np.float64
    assert float(found.detach()) == pytest.approx(float(loss.array), rel=1e-9)
    for param in model.params():
        param.array[...] = param.grad
    expected = dict(torch_models.named_arrays(model))
    assert {*expected} == {each for each, _ in net.named_parameters()}
    for each, param in net.named_parameters():
        # What batch normalization takes away again, as a bias before it, is rounding alone.
        size = max(np.abs(expected[each]).max(), 1e-6)
        np.testing.assert_allclose(
            param.grad.numpy(), expected[each], 1e-6, 1e-6 * size, err_msg=each
        )


@pytest.mark.torch
@pytest.mark.mpi_skip
def test_parameters_of_torch_that_do_not_fit():
    """A model of another structure is no equal contender."""
    import torch

    from chainer_dist.scaling import torch_models

    layer = chainer.links.Linear(3, 2)
    for net, words in (
        (torch.nn.Linear(4, 2), r"weight is \(2, 3\) in Chainer, and in torch: \(2, 4\)"),
        (torch.nn.Linear(3, 2, bias=False), "bias is .*no such parameter"),
        (torch.nn.Bilinear(3, 3, 2), "weight is"),
        (torch.nn.Sequential(torch.nn.Linear(3, 2)), "no such parameter"),
    ):
        with pytest.raises(ValueError, match=words):
            torch_models.copy_parameters(layer, net)
    net = torch.nn.Linear(3, 2)
    net.more = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"in torch alone: more.weight, more.bias"):
        torch_models.copy_parameters(layer, net)


def test_time_to_accuracy():
    """Training ends as soon as the accuracy is reached, on all ranks at once."""
    pytest.importorskip("sklearn")
    found = accuracy.train(32, 0.8, 0)
    assert found["reached"]
    assert found["accuracy"] >= 0.8
    assert found["seconds"] > 0
    assert 1 <= found["epochs"] < 10


def test_jobs_take_turns():
    """Each round has every job once; one rank is measured once for both kinds of scaling."""
    jobs = list(experiment.jobs(PLAN))
    assert len(jobs) == len(set(jobs)) == 2 * (2 * (1 + 2 + 2) + 3)
    half = len(jobs) // 2
    assert [job._replace(round=1) for job in jobs[:half]] == jobs[half:]
    assert {job.batch for job in jobs if job.kind == "strong"} == {8, 4}


def test_ranks_without_an_example_are_named():
    """Strong scaling leaves them out, and says so; weak scaling leaves out none."""
    (line,) = experiment.left_out(PLAN._replace(batch=2))
    assert line.startswith("strong scaling of mlp leaves out 4 ranks")
    assert not [*experiment.left_out(PLAN)]
    assert not [*experiment.left_out(PLAN._replace(batch=1, scalings=["weak"]))]


def test_more_ranks_are_for_orientation():
    """They are measured once, of ours and of copies, and change nothing else."""
    plan = PLAN._replace(contenders=[*PLAN.contenders, "chainermn"])
    more = set(experiment.jobs(plan._replace(more_ranks=[8]))) - set(experiment.jobs(plan))
    assert more == {Job("weak", "mlp", name, 8, 16, 0) for name in ("chainer_dist", "independent")}


def test_efficiencies():
    """They are ratios of throughput, here worked out by hand."""
    measured = {
        Job("weak", "mlp", "chainer_dist", 1, 16, 0): steps(1.0, 1.0, 1.0),
        Job("weak", "mlp", "independent", 1, 16, 0): steps(2.0, 2.0, 2.0),
        Job("weak", "mlp", "chainer_dist", 4, 16, 0): steps(1.25, 1.25),
        Job("weak", "mlp", "chainer_dist", 4, 16, 1): steps(1.25, 9.0, 1.0),
        Job("weak", "mlp", "independent", 4, 16, 0): steps(2.5, 2.5),
        Job("strong", "mlp", "chainer_dist", 4, 4, 0): steps(0.5, 0.5),
    }
    rows = {(row.kind, row.contender, row.ranks): row for row in results.rows(measured, cores=2)}
    weak = rows["weak", "chainer_dist", 4]
    assert weak.ms == 1250
    assert weak.steps == 5
    assert weak.throughput == 4 * 16 / 1.25
    assert weak.efficiency == pytest.approx(0.8)
    assert weak.efficiency_low <= 0.8 <= weak.efficiency_high
    assert weak.against_copies == pytest.approx(2.0)
    assert weak.oversubscribed
    strong = rows["strong", "chainer_dist", 4]
    assert strong.efficiency == pytest.approx(0.5)  # twice as fast on four
    assert strong.against_copies is None
    assert rows["strong", "chainer_dist", 1].efficiency == 1.0
    assert not rows["weak", "chainer_dist", 1].oversubscribed


@pytest.mark.mpi_skip
def test_the_interval_of_confidence_holds_the_median():
    """Of nineteen of twenty samples, and about as often as it says."""
    rng = np.random.RandomState(0)
    hits = sum(
        low <= 1.0 <= high
        for low, high in (results._interval(rng.lognormal(0, 0.3, 25)) for _ in range(100))
    )
    assert 85 <= hits <= 100


def test_a_table_of_everything():
    """Numbers of ranks above the cores are marked, and trainings that fell short counted."""
    measured = {
        Job("weak", "mlp", "chainer_dist", 1, 16, 0): steps(1.0, 1.0),
        Job("weak", "mlp", "chainer_dist", 4, 16, 0): steps(1.0, 1.0),
        Job(ACCURACY, "digits", "chainer_dist", 1, 32, 0): {
            "seconds": 3.0,
            "epochs": 4,
            "updates": 100,
            "accuracy": 0.9,
            "reached": False,
        },
    }
    rows = results.rows(measured, cores=2)
    text = results.table(rows, results.accuracy_rows(measured))
    assert text.count("more ranks than cores") == 1
    assert "1 did not come to it" in text
    assert results.rows(measured, cores=None)[-1].oversubscribed is False


@pytest.mark.mpi_skip
class TestCommand:
    """``chainer-dist scale``, which starts jobs."""

    WORKLOAD = """
import numpy as np
import chainer.functions as F
import chainer.links as L

def make(batch, rank):
    model = L.Classifier(L.Linear(4, 3))
    rng = np.random.RandomState(rank)
    return model, (rng.rand(batch, 4).astype(np.float32), np.zeros(batch, np.int32))
"""

    def call(self, *arguments):
        """Run the command."""
        return subprocess.run(
            [sys.executable, "-m", "chainer_dist.scaling.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def test_measure_stop_and_go_on(self, tmp_path):
        """A user's own model is measured; what a stop has left is completed, not repeated."""
        (tmp_path / "own.py").write_text(self.WORKLOAD)
        out = tmp_path / "out"
        arguments = ["--workloads", f"{tmp_path}/own.py:make", "--rounds", 1, "--seconds", 0.1]
        arguments += ["--contenders", "chainer_dist", "independent", "--accuracy", 0]
        arguments += ["--scaling", "weak", "--ranks", 2, "--oversubscribe", "--out", out]
        done = self.call(*arguments)
        assert done.returncode == 0, done.stderr
        assert "chainer_dist             2    32" in done.stdout
        content = json.loads((out / "scaling.json").read_text())
        with (out / "scaling.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(content["rows"]) == 4
        page = (out / "index.html").read_text()
        assert page.count("<svg") == 3
        captions = re.findall("<figcaption>(.*?)</figcaption>", page)
        # A slow contender may have the larger efficiency: that comes second.
        assert captions[0] == "Examples a second"
        # Text and lines are legible on a light page and on a dark one.
        assert page.count("currentColor") > 20
        assert "prefers-color-scheme: dark" in page
        assert not re.findall("#010203|#fdfcfb|#000000|#ffffff", page)
        assert "src=" not in page  # it needs nothing else
        assert 'href="http' not in page

        # As if killed within the last line.
        lines = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
        (out / "runs.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
        again = self.call(*arguments)
        assert again.returncode == 0, again.stderr
        assert (out / "runs.jsonl").read_bytes().splitlines(keepends=True)[:-1] == lines[:-1]
        assert "75%" in again.stderr  # three of four were there

        other = self.call(*arguments, "--batch", 8)
        assert other.returncode == 1
        assert "other batch" in other.stderr

    IMAGES = """
import numpy as np
import chainer.functions as F
import chainer.links as L

class Model(L.Classifier):
    def __init__(self):
        super().__init__(L.Convolution2D(2, 3, 4))

    def forward(self, x, t):
        return F.softmax_cross_entropy(self.predictor(x)[:, :, 0, 0], t)

def make(batch, rank):
    rng = np.random.RandomState(rank)
    return Model(), (rng.rand(batch, 2, 4, 4).astype(np.float32), np.zeros(batch, np.int32))

def twin():
    import torch

    class Torch(torch.nn.Conv2d):
        def forward(self, x, t):
            assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
            return torch.nn.functional.cross_entropy(super().forward(x)[:, :, 0, 0], t)

    return Torch(2, 3, 4)

make.batch, make.torch, make.images = 8, twin, True
"""

    def test_all_contenders(self, tmp_path):
        """Kernels are for those whose users have them; torch takes part by a model of the user's."""
        (tmp_path / "own.py").write_text(self.IMAGES)
        out = tmp_path / "out"
        arguments = ["--workloads", f"{tmp_path}/own.py:make", "--rounds", 1, "--seconds", 0.1]
        arguments += ["--accuracy", 0, "--scaling", "weak", "--kernels", "numpy", "--out", out]
        done = self.call(*arguments, "--oversubscribe")
        assert done.returncode == 0, done.stderr
        content = json.loads((out / "scaling.json").read_text())
        expected = {*contenders.CONTENDERS}
        if not importlib.util.find_spec("torch"):
            expected -= {"torch", "torch-channels-last"}
        assert {(row["contender"], row["ranks"]) for row in content["rows"]} == {
            (name, ranks) for name in expected for ranks in (1, 2)
        }
        assert content["plan"]["kernels"] == "numpy"
        assert content["kernels"] == {
            "chainer_dist": "numpy",
            "chainermn": "chainer",
            "allreduce": "chainer",
            "independent": "numpy",
        }
        compared = {row["contender"] for row in content["rows"] if row["against_copies"]}
        assert compared == {"chainer_dist", "independent"}

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--ranks", 10_000], "more than this machine's"),
            (["--ranks", 0], "no number from 1 up"),
            (["--workloads", "nothing"], "there is no workload 'nothing'"),
            (["--workloads", "nothing.py:make"], "there is no file 'nothing.py'"),
            (["--more-ranks", 1], "not more than --ranks 2"),
            (["--seconds", "-1"], "no number of seconds"),
            (["--accuracy", "101"], "no percentage"),
        ],
    )
    def test_bad_input(self, tmp_path, capsys, arguments, words):
        """It is told before anything is measured."""
        try:
            status = cli.main(["--out", str(tmp_path / "out"), *map(str, arguments)])
        except SystemExit as leaving:
            status = leaving.code
        assert status in {1, 2}
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("make.batch = 0", "its batch is 0, expected a number from 1 up"),
            ("make.batch = 'many'", "its batch is 'many', expected a number from 1 up"),
            ("make = 3", "has no function 'make'"),
            ("", "torch cannot train"),
        ],
    )
    def test_workloads_that_cannot_be_measured(self, tmp_path, capsys, line, words):
        """It is told before anything is measured."""
        own = tmp_path / "own.py"
        own.write_text(f"def make(batch, rank):\n    raise AssertionError\n{line}\n")
        out = str(tmp_path / "out")
        arguments = ["--workloads", f"{own}:make", "--contenders", "torch", "--accuracy", "0"]
        try:
            status = cli.main([*arguments, "--ranks", "1", "--out", out])
        except SystemExit as leaving:
            status = leaving.code
        assert status in {1, 2}
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_job_that_fails(self, tmp_path):
        """Its words are shown, and the others' results stay."""
        (tmp_path / "bad.py").write_text(
            "def make(batch, rank):\n    raise KeyError('broken model')\n"
        )
        done = self.call(
            "--workloads", f"{tmp_path}/bad.py:make", "--ranks", 1, "--out", tmp_path / "out"
        )
        assert done.returncode == 1
        assert "broken model" in done.stderr


# What names of hosts, scripts and workloads may be, and files of results that somebody else has written.
HOSTILE = (
    "</script><script>alert(1)</script><!--\u2028<img src=x onerror='alert(1)'>\" $sections \udc80"
)
SHOWN = HOSTILE.replace("\udc80", "\\udc80")


def spoiled(value):
    """Return the same with hostile text behind each string, but for what names a design."""
    if isinstance(value, dict):
        return {
            f"{key}{HOSTILE if ' ' in key or key in ('mlp', 'numpy') else ''}": each
            if key == "design"
            else spoiled(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [spoiled(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


class Tags(html.parser.HTMLParser):
    """The tags, attributes, comments and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.comments, self.text = set(), set(), [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Note it."""
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_comment(self, data):
        """Note it."""
        self.comments.append(data)

    def handle_data(self, data):
        """Note it."""
        self.text += data


@pytest.mark.mpi_skip
def test_a_page_of_hostile_names(tmp_path):
    """All of them are text, wherever they are on the page."""
    pytest.importorskip("matplotlib")
    measured = mpi_job.ROOT / "docs" / "measured"
    content = json.loads((measured / "predictions.json").read_text())
    names = [*dict.fromkeys(each["scenario"] for each in content["predictions"])]
    content["schedules"] = {"mlp": content["schedules"]["mlp"]}
    content["schedules"]["mlp"][0]["batch"] = "64"
    content["predictions"] = [
        each
        for each in content["predictions"]
        if each["workload"] == "mlp" and each["scenario"] in (names[0], names[-1])
    ]
    (tmp_path / "predictions.json").write_text(json.dumps(spoiled(content)))
    scaling = json.loads((measured / "scaling.json").read_text())
    rows = [results.Row(**each) for each in scaling["rows"] if each["workload"] == "mlp"]
    rows = [each._replace(workload=f"mlp{HOSTILE}", kind=f"weak{HOSTILE}") for each in rows]
    rows.append(rows[-1]._replace(contender=HOSTILE, ranks=3))
    page.write(
        tmp_path / "index.html",
        rows=rows,
        accuracies=[{**scaling["accuracy"][0], "ranks": HOSTILE}],
        parts={},
        machine=spoiled(scaling["machine"]),
        command=f"chainer-dist scale {HOSTILE}",
        predicted=predicted.section(tmp_path),
    )
    found = Tags((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not found.tags & {"script", "img"}
    assert not [each for each in found.attributes if each.startswith("on") or each == "src"]
    assert not [each for each in found.comments if "alert" in each]
    assert found.text.count(SHOWN) > 20
    for before in ("mlp", "weak", "Linux ", "numpy", "chainer-dist scale ", "AMD EPYC", "64"):
        assert before in found.text
        assert SHOWN in found.text[found.text.index(before) :]
