"""Numbers on the command line are refused where they make no sense, on all commands in the same words."""

from __future__ import annotations

import argparse
import math

import pytest

from chainer_dist import _arguments
from chainer_dist.launcher import cli as launcher
from chainer_dist.scaling import cli as scale
from chainer_dist.scaling import predict

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("positive", "1", 1),
        ("positive", "4096", 4096),
        ("count", "0", 0),
        ("seconds", "0.5", 0.5),
        ("seconds", "inf", math.inf),
        ("percentage", "0", 0.0),
        ("percentage", "100", 100.0),
        ("at_least_one", "1", 1.0),
        ("at_least_one", "1.2", 1.2),
    ],
)
def test_numbers(kind, text, value):
    """What makes sense is taken for the number that it is."""
    found = getattr(_arguments, kind)(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "texts", "words"),
    [
        ("positive", ["0", "-1", "1.5", "two", "", "٣", "1e3"], "no number from 1 up"),
        ("positive", ["9" * 19], "too large"),
        ("count", ["-1", "0.5", ""], "no number from 0 up"),
        ("seconds", ["0", "-1", "nan", "soon", "٣", " 3", "3\n"], "no number of seconds"),
        ("text", [""], "nothing"),
        ("percentage", ["-1", "100.5", "nan", "all"], "no percentage"),
        ("at_least_one", ["0.9", "inf", "nan", "twice"], "no number from 1 up"),
    ],
)
def test_what_is_no_such_number(kind, texts, words):
    """It is named, and what was expected."""
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=words) as caught:
            getattr(_arguments, kind)(text)
        assert repr(text) in str(caught.value) or not text


@pytest.mark.parametrize("kind", ["positive", "count", "seconds", "percentage", "at_least_one"])
def test_a_number_of_thousands_of_digits(kind):
    """Is too large, or no number, in few words."""
    text = "9" * 5000 + "!"
    for each in (text, text[:-1]):
        if each == text or kind not in ("seconds", "at_least_one"):
            with pytest.raises(argparse.ArgumentTypeError) as caught:
                getattr(_arguments, kind)(each)
            assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (launcher.main, ["run", "-n", "0", "x.py"], "argument -n/-np: '0' is no number from 1 up"),
        (
            launcher.main,
            ["run", "--timeout", "0", "x.py"],
            "argument --timeout: '0' is no number of",
        ),
        (launcher.main, ["run", "--max-restarts", "-1", "x.py"], "--max-restarts"),
        (scale.main, ["--rounds", "0"], "argument --rounds: '0' is no number from 1 up"),
        (scale.main, ["--accuracy", "101"], "argument --accuracy: '101' is no percentage"),
        (predict.main, ["--nodes", "2", "0"], "argument --nodes: '0' is no number from 1 up"),
        (predict.main, ["--ranks-per-node", "0"], "argument --ranks-per-node: '0' is no number"),
        (predict.main, ["--batch", "-4"], "argument --batch"),
        (predict.main, ["--straggler", "0.5"], "argument --straggler: '0.5' is no number from 1"),
        (predict.main, ["--jitter", "200"], "argument --jitter: '200' is no percentage"),
        (predict.main, ["--oversubscription", "0"], "argument --oversubscription: '0' is no"),
        (predict.main, ["--actions", "-1"], "argument --actions"),
        (predict.main, ["--workloads", "nothing"], "there is no workload 'nothing'"),
        (predict.main, ["--report", "--nodes", "2"], "leave out --nodes"),
        (predict.main, ["--report", "--jitter", "0"], "leave out --jitter"),
    ],
)
def test_commands_refuse_them(capsys, main, arguments, words):
    """By argparse's own error, with status 2, before anything is started."""
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert words in capsys.readouterr().err
