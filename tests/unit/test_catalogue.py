"""What --model takes: our models by name, a user's own by file; every refusal is one line that says what is wrong."""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import catalogue
from server.models.base import Batch
from tests.unit.serving import DATA, ROOT, command, outputs, serving

OWN = """
import numpy as np

class Double:
    name = "double"
    inputs = (("x", "FP32", (-1, 2)),)
    outputs = (("y", "FP32", (-1, 2)),)

    def load(self):
        self.factor = np.float32(2)

    def predict(self, batch):
        return {"y": batch.inputs["x"] * self.factor}
"""


def chosen(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    catalogue.add_arguments(parser.add_argument)
    return parser.parse_args(words)


def load(*words: str) -> list[Any]:
    found = chosen(*words)
    return catalogue.load(found.model, found)


@pytest.mark.parametrize(
    ("word", "columns", "points"), [("cancer", 30, 569), ("digits", 64, 1797), ("mnist", 784, 5000)]
)
def test_knn_by_its_data(word: str, columns: int, points: int) -> None:
    (model,) = load("--model", f"knn:data={word}")
    assert model.name == ("knn" if word == "cancer" else f"knn-{word}")
    assert model.inputs[0].shape == (-1, columns)
    assert len(model._neighbours.points) == points
    with np.load(DATA / f"{model.name}.npz") as stored:
        found = model.predict(Batch({"x": stored["rows"]}))
        assert np.array_equal(found["label"], stored["labels"])
        nearest = model.predict(Batch({"x": stored["rows"]}, {"k": 3}))
        assert nearest["neighbours"].shape == nearest["distances"].shape == (len(stored["rows"]), 3)
        assert not nearest["distances"][:, 0].any()  # every query row is a row of the set
        assert np.array_equal(nearest["neighbours"], found["neighbours"][:, :3])


def test_all_of_ours_at_once_each_once() -> None:
    words = [word for name in (*catalogue.NAMES, "knn:data=digits") for word in ("--model", name)]
    assert [model.name for model in load(*words, "--work-iterations", "3")] == list(catalogue.NAMES)


def test_settings_reach_their_models_and_the_configuration(tmp_path: Path) -> None:
    flags = ["--spin-us", "50", "--spin-tail-us", "70.5", "--spin-tail-p", "0.25", "--work-iterations", "7"]
    with serving(tmp_path, "--model", "spin", "--model", "work", "--model", "knn:data=digits", *flags) as server:
        told = {
            name: server.call("GET", f"/v2/models/{name}/config").json["parameters"]
            for name in ("spin", "work", "knn-digits")
        }
        for key, value in (("us", "50.0"), ("tail_us", "70.5"), ("tail_p", "0.25")):
            assert told["spin"][key] == {"string_value": value}
        assert told["work"]["iterations"] == {"string_value": "7"}
        assert told["knn-digits"]["data"] == {"string_value": "digits"}
        for name in ("spin", "work"):
            assert outputs(server.infer(name, np.zeros((3, 2))))["rows"].tolist() == [1, 1, 1]


def test_work_counts_its_own_iterations_where_none_are_given() -> None:
    (short,), (long,) = load("--model", "work", "--work-us", "20"), load("--model", "work", "--work-us", "2000")
    assert short.iterations >= 1
    assert long.iterations > 10 * short.iterations
    assert long.predict(Batch({"x": np.zeros((2, 5), np.float32)}))["rows"].tolist() == [1, 1]


def test_a_file_of_ones_own_is_served(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    with serving(tmp_path, "--model", f"{tmp_path}/mine.py:Double", "--model", "null") as server:
        assert server.call("GET", "/v2/models/double").json["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [-1, 2]}
        ]
        assert outputs(server.infer("double", np.array([[1.0, 2.5]])))["y"].tolist() == [[2, 5]]
        assert server.infer("double", np.zeros((1, 2)), parameters={"k": 1}).status == 400
        assert server.infer("null", np.zeros((1, 2))).status == 200


def test_a_model_may_be_a_dataclass(tmp_path: Path) -> None:
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Double:"
    (tmp_path / "mine.py").write_text(changed("\nimport numpy as np\n\nclass Double:", f"{head}\n    import numpy as np\n")
                                      .replace("np.float32(2)", "2"))  # fmt: skip
    with serving(tmp_path, "--model", f"{tmp_path}/mine.py:Double") as server:
        assert outputs(server.infer("double", np.ones((1, 2))))["y"].tolist() == [[2, 2]]


def changed(old: str, new: str) -> str:
    assert old in OWN
    return OWN.replace(old, new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["there is no file", "mine.py"]),
        ("class Other: ...", ["has no class 'Double'", "Other"]),
        ("Double = 1", ["has no class 'Double'", "none"]),
        ("import no_such_module", ["could not be imported", "no_such_module"]),
        ("def (", ["could not be imported", "SyntaxError"]),
        ("raise SystemExit(3)", ["could not be imported", "SystemExit"]),
        (changed('name = "double"', ""), ["lacks name"]),
        (changed("def predict", "def answer"), ["lacks predict"]),
        (changed("inputs =", "input ="), ["lacks inputs"]),
        (changed('"double"', '"a/b"'), ["wants a name", "'a/b'"]),
        (changed('"double"', "5"), ["wants a name", "5"]),
        (changed('"double"', '"stats"'), ["'stats'", "another name"]),
        (changed('"double"', '"double"; versions = ()'), ["wants versions", "()"]),
        (changed('"double"', '"double"; versions = (1, 2)'), ["wants versions", "(1, 2)"]),
        (changed('"double"', '"double"; settings = None'), ["settings and stages"]),
        (changed('(("x", "FP32", (-1, 2)),)', '(("x", "FP32", (-1, 2)), ("x", "FP32", (-1, 2)))'), ["two inputs of one name"]),
        (changed('(("x", "FP32", (-1, 2)),)', '("x", "FP32", (-1, 2))'), ["wants inputs like", "found"]),
        (changed('("y", "FP32", (-1, 2))', '("y", "BYTES", (-1, 2))'), ["wants outputs like", "BYTES"]),
        (changed('("y", "FP32", (-1, 2))', '("y", "FP32", (1, 2))'), ["wants outputs like", "rows first"]),
        (changed("(-1, 2)),)\n    outputs", "()),)\n    outputs"), ["wants inputs like"]),
        (changed("def load(self):", "def __init__(self):\n        1 / 0\n\n    def load(self):"), ["could not be made", "ZeroDivisionError"]),
        (changed("self.factor = np.float32(2)", "open('nowhere.bin')"), ["double could not be loaded", "nowhere.bin"]),
        (changed("self.factor = np.float32(2)", "raise SystemExit(0)"), ["double could not be loaded", "SystemExit"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_served(tmp_path: Path, text: str | None, words: list[str]) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        load("--model", f"{tmp_path}/mine.py:Double")
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in words)


def test_two_models_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(changed('"double"', '"null"'))
    with pytest.raises(ValueError, match="two models are called 'null'"):
        load("--model", "null", "--model", f"{tmp_path}/mine.py:Double")


@pytest.mark.parametrize("word", ["ghost", "knn:data=ghost", "mine.txt:Double", "mine.py", ":Double", "knn:k=3"])
def test_a_word_that_names_no_model(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chosen("--model", word)
    assert repr(word) in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--spin-tail-p", "2"], ["--spin-us", "-1"]])
def test_a_setting_that_cannot_be(flags: list[str]) -> None:
    done = subprocess.run([*command("--model", "spin", *flags)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "spin wants" in done.stderr
