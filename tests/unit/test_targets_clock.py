"""Where a target's clock begins: what is made once before its start is in neither its ready_s nor its bound."""

import time
from pathlib import Path

import pytest

from hostsetup.ledger import Ledger
from hostsetup.target import Context, Spec
from hostsetup.url import Url
from images.errors import TargetError

MAKING_S = 0.5


class Slow(Url):
    """Makes an image, or not, before its start."""

    makes = True

    def _start(self) -> str:
        time.sleep(MAKING_S)
        if self.makes:
            self.started = time.monotonic()
        return super()._start()


@pytest.mark.parametrize("makes", [True, False])
def test_the_bound_begins_with_the_start(makes: bool, tmp_path: Path) -> None:
    """Nobody answers; the bound is as long as the making, so a clock that began before it leaves no time at all."""
    with Ledger.open("test", "clock") as ledger:
        context = Context(ledger, None, (0,), (), tmp_path, boot_timeout_s=MAKING_S)
        target = Slow(Spec("slow", "url", options={"url": "http://127.0.0.1:9"}), context)
        target.makes = makes
        with pytest.raises(TargetError) as caught:
            target.__enter__()
    asked = "last: nothing" not in str(caught.value)
    assert asked == makes
