"""Which models can be served, by what --model says; what is not served is not imported.

Nothing here imports NumPy before a model is made: its threads are chosen first.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.models.base import Model, Tensor

NAMES = ("knn", "knn-digits", "knn-mnist", "dnn", "null", "spin", "work")
SPELLED = {"knn:data=cancer": "knn", "knn:data=digits": "knn-digits", "knn:data=mnist": "knn-mnist"}
REQUIRED = ("name", "inputs", "outputs", "predict")


def add_arguments(add: Callable[..., Any]) -> None:
    """The flags that name models and set what can be set of them."""
    add("--model", action="append", type=_word, required=True, metavar="NAME", help=(
        f"a model to serve: {', '.join(NAMES)} (knn:data=digits is knn-digits), or MY_FILE.py:CLASS; may be repeated"
    ))  # fmt: skip
    what = "busy by the clock, µs" + " (default: %(default)s)"
    add("--spin-us", type=float, default=200.0, metavar="US", help=f"spin: a call is {what}")
    add("--spin-tail-us", type=float, default=400.0, metavar="US", help=f"spin: a long call is {what}")
    add("--spin-tail-p", type=float, default=0.0, metavar="P", help="spin: share of long calls (default: %(default)s)")
    add("--work-us", type=float, default=200.0, metavar="US", help=(
        "work: iterations that take so long here, counted at the start (default: %(default)s)"
    ))  # fmt: skip
    add("--work-iterations", type=int, default=0, metavar="N", help="work: so many iterations a call, uncounted")


def _word(text: str) -> str:
    word = SPELLED.get(text, text)
    if word not in NAMES and not _is_file(word):
        raise argparse.ArgumentTypeError(f"wanted {', '.join(NAMES)} or MY_FILE.py:CLASS; found {text!r}")
    return word


def _is_file(word: str) -> bool:
    return word.rpartition(":")[0].endswith(".py")


def load(words: Sequence[str], chosen: argparse.Namespace) -> "list[Model]":
    """The models, loaded. Raises ValueError for one that cannot be served, OSError for its files."""
    models: dict[str, Model] = {}
    for word in dict.fromkeys(words):
        model = _own(word) if _is_file(word) else _ours(word, chosen)
        if model.name in models:
            raise ValueError(f"two models are called {model.name!r}; serve them by two servers")
        try:
            model.load()
        except (Exception, SystemExit) as error:
            raise ValueError(f"model {model.name} could not be loaded: {_said(error)}") from error
        models[model.name] = model
    return list(models.values())


def _ours(name: str, chosen: argparse.Namespace) -> "Model":
    kind, _, data = name.partition("-")
    if kind == "knn":
        from server.models.knn import KNN

        return KNN(data or "cancer")
    if kind == "dnn":
        from server.models.dnn import DNN

        return DNN()
    if kind == "spin":
        from server.models.spin import Spin

        return Spin(chosen.spin_us, chosen.spin_tail_us, chosen.spin_tail_p)
    if kind == "work":
        from server.models.work import Work

        return Work(chosen.work_us, chosen.work_iterations)
    from server.models.null import Null

    return Null()


def _own(word: str) -> "Model":
    """The model in a user's file, with the defaults of what it does not say. Raises ValueError, in one line."""
    from server.models.base import Model

    file, _, name = word.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file}; wanted MY_FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(f"model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} could not be imported: {_said(error)}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"{file} has no class {name!r}; its classes are: {', '.join(classes) or 'none'}")
    # Its own class comes first, so Model gives only what is missing.
    kind: Any = found
    if not issubclass(found, Model) or found.__hash__ is None:  # a dataclass has none, and each model is one of its own
        bases = (found,) if issubclass(found, Model) else (found, Model)
        kind = type(name, bases, {"__hash__": object.__hash__, "__eq__": object.__eq__})
    try:
        model: Model = kind()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{word} could not be made: {_said(error)}") from error
    _check(model, word)
    return model


def _check(model: "Model", word: str) -> None:
    """Give tensors their type. Raises ValueError for what a model must have, or has in a way that cannot be served."""
    from server.models.base import Model, Tensor

    lacks = [key for key in REQUIRED if getattr(model, key, None) is None]
    lacks += ["predict"] * (type(model).predict is Model.predict)
    if lacks:
        raise ValueError(f"{word} lacks {', '.join(lacks)}; a model has {', '.join(REQUIRED)}")
    if not isinstance(model.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model.name):
        raise ValueError(f"{word} wants a name of letters, digits, '.', '_' or '-'; found {model.name!r}")
    if model.name == "stats":
        raise ValueError(f"{word} is called 'stats', which is a route of the server; give it another name")
    for key in ("inputs", "outputs"):
        found = getattr(model, key)
        try:
            tensors = tuple(Tensor(*tensor) for tensor in found)
            fits = bool(tensors) and all(_can_be(tensor, model.batches) for tensor in tensors)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f'{word} wants {key} like (Tensor("x", "FP32", (-1, 4)),), rows first; found {found!r}')
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError(f"{word} has two {key} of one name: {', '.join(tensor.name for tensor in tensors)}")
        setattr(model, key, tensors)
    versions = model.versions
    if not isinstance(versions, tuple | list) or not versions or not all(_is_version(one) for one in versions):
        raise ValueError(f'{word} wants versions like ("1",); found {versions!r}')
    if not isinstance(model.settings, Mapping) or not isinstance(model.stages, Mapping):
        raise ValueError(f"{word} wants dictionaries for settings and stages")


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._-]+", value) is not None


def _can_be(tensor: "Tensor", rows_first: bool) -> bool:
    from server.tensors import DTYPES

    sizes = tensor.shape
    known = isinstance(tensor.name, str) and tensor.datatype in DTYPES
    return (
        known
        and len(sizes) > 0
        and all(type(size) is int for size in sizes)
        and (min(sizes) >= -1 and (sizes[0] == -1 or not rows_first))
    )


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
