"""Where no kernel of its own keeps the host's files away: what the server sees of them, and what it could change."""

from pathlib import Path

import pytest

from tests.contract.conftest import Maker


@pytest.mark.parametrize("kind", ["process", "docker"])
def test_the_server_can_write_in_memory_only(kind: str, new: Maker) -> None:
    target = new(kind)
    with target:
        server = [pid for pid in target.pids() if b"\0-m\0server\0" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]
        lines = [line.split() for line in Path(f"/proc/{server}/mounts").read_text().splitlines()]
    mounts = {place: (kind_of, options.split(",")) for _, place, kind_of, options, *_ in lines}
    for place in ("/", "/sys"):
        assert "ro" in mounts[place][1], place
    for place in ("/tmp", "/run"):
        assert mounts[place][0] == "tmpfs" and {"rw", "nosuid", "nodev"} <= set(mounts[place][1]), place
    assert mounts["/proc"][0] == "proc" and {"nosuid", "nodev", "noexec"} <= set(mounts["/proc"][1])
