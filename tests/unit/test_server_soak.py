"""20,000 mixed requests over connections that come and go leave nothing behind; tests/bench/soak.py does a million."""

from pathlib import Path

from tests.bench.soak import soak
from tests.unit.serving import ALL, serving


def test_nothing_is_left_of_20_000_requests(tmp_path: Path) -> None:
    with serving(tmp_path, *ALL) as running:
        looks, told = soak(running, 20_000, looks=5)
        assert "error" not in running.log()
    assert set(told) == {"right"}, told
    assert told["right"] == 20_000
    assert len({one.fds for one in looks}) == 1, looks
    assert looks[-1].rss_mib - looks[0].rss_mib < 30, looks
