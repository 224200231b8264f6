"""Models for the tests of the server: slow ones, and ones that go wrong on a row that says so. Served by file."""

import time
from typing import Any

import numpy as np

from server.models.base import BadInput, Batch, Model, Tensor

RAISE, EXIT, SHORT, TYPE, MISSING, NOTHING, SLEEP, LOOP, MORE, STUBBORN = range(-1, -11, -1)


class Own(Model):
    """Answers the first value of each row; outputs are new at each call."""

    inputs = (Tensor("x", "FP32", (-1, 2)),)
    outputs = (Tensor("y", "FP32", (-1,)),)

    def predict(self, batch: Batch) -> Any:
        return {"y": batch.inputs["x"][:, 0].copy()}


class Slow(Own):
    """A call takes 100 ms, whatever its rows."""

    name = "slow"

    def predict(self, batch: Batch) -> Any:
        time.sleep(0.1)
        return super().predict(batch)


class Single(Slow):
    name = "single"
    batches = False


class Calls(Own):
    """Answers how many rows its call had, after 3 ms, so that to share one is better; takes any parameters."""

    name = "calls"

    def check(self, parameters: Any) -> None:
        pass

    def predict(self, batch: Batch) -> Any:
        time.sleep(0.003)
        return {"y": np.full(len(batch.inputs["x"]), len(batch.inputs["x"]), np.float32)}


class Busy(Own):
    """Keeps the interpreter busy for 50 ms."""

    name = "busy"

    def predict(self, batch: Batch) -> Any:
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            pass
        return super().predict(batch)


class Sleepy(Own):
    """Takes 50 ms without the interpreter."""

    name = "sleepy"

    def predict(self, batch: Batch) -> Any:
        time.sleep(0.05)
        return super().predict(batch)


class Fails(Own):
    """Fast, until a row begins with one of the values above."""

    name = "fails"

    def predict(self, batch: Batch) -> Any:
        first = batch.inputs["x"][:, 0]
        wrong = int(min(first.min(initial=0), 0))
        if wrong == RAISE:
            raise ZeroDivisionError("this row\ncannot be divided")
        if wrong == EXIT:
            raise SystemExit(3)
        if wrong == NOTHING:
            return None
        if wrong == MISSING:
            return {}
        if wrong == SLEEP:
            time.sleep(1000)
        if wrong == LOOP:
            while True:
                pass
        if wrong == STUBBORN:
            self._stay()
        y = first[:-1] if wrong == SHORT else first
        return {"y": y.astype(np.float64 if wrong == TYPE else np.float32)} | ({"more": 1} if wrong == MORE else {})

    def _stay(self) -> None:
        while True:
            try:
                time.sleep(1000)
            except Exception:
                continue


class FailsInThread(Fails):
    """The same, of which a call takes long enough to be made in a thread."""

    name = "fails-in-thread"

    def predict(self, batch: Batch) -> Any:
        time.sleep(0.002)
        return super().predict(batch)


class Writes(Own):
    """Changes what it was given, which would be somebody else's or its own in the next attempt."""

    name = "writes"

    def predict(self, batch: Batch) -> Any:
        if batch.inputs["x"].any():
            batch.inputs["x"][:] = 0
        return super().predict(batch)


class WarmUpRaises(Own):
    name = "warm-up-raises"

    def warm_up(self) -> None:
        raise RuntimeError("no fire")


class WarmUpExits(Own):
    name = "warm-up-exits"

    def warm_up(self) -> None:
        raise SystemExit("no fire")


class WarmUpHangs(Own):
    name = "warm-up-hangs"

    def warm_up(self) -> None:
        time.sleep(1000)


class LoadsOnce(Own):
    """To load it again does not work, in a way that its version says."""

    name = "loads-once"
    loaded = False

    def load(self) -> None:
        if self.loaded:
            self.again()
        self.loaded = True

    def again(self) -> None:
        raise SystemExit("the file is gone")


class LoadHangs(LoadsOnce):
    name = "load-hangs"

    def again(self) -> None:
        time.sleep(1000)


class CheckExits(Own):
    name = "check-exits"

    def check(self, parameters: Any) -> None:
        if parameters:
            raise SystemExit("such parameters")


class CheckHangs(Own):
    name = "check-hangs"

    def check(self, parameters: Any) -> None:
        while parameters:
            pass


class CheckSlow(Own):
    """Looks at parameters for longer than anybody should be kept waiting."""

    name = "check-slow"

    def check(self, parameters: Any) -> None:
        if parameters:
            time.sleep(0.4)
            raise BadInput("such parameters take long")


class NotFinite(Own):
    """Divides by the first number, which may be 0."""

    name = "not-finite"

    def predict(self, batch: Batch) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"y": (np.float32(1) / batch.inputs["x"][:, 0]).astype(np.float32)}


class Several(Model):
    """Three inputs of different types."""

    name = "several"
    inputs = (Tensor("x", "FP32", (-1, 2)), Tensor("y", "INT64", (-1,)), Tensor("z", "BOOL", (-1, 3)))
    outputs = (Tensor("sum", "FP64", (-1,)), Tensor("any", "BOOL", (-1,)))

    def predict(self, batch: Batch) -> Any:
        x, y, z = (batch.inputs[name] for name in "xyz")
        return {"sum": x.sum(axis=1, dtype=np.float64) + y, "any": z.any(axis=1)}
