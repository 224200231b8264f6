"""Where User-mode Linux keeps its guest's memory: a file that is mapped to be executed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
from pathlib import Path
from hostsetup.ledger import Ledger
from hostsetup.target import Context, Spec
from hostsetup.uml import Uml
with Ledger.open("test", "uml") as ledger:
    target = Uml(Spec("u", "uml"), Context(ledger, None, (0,), (), Path("/tmp")))
    print(target._scratch_parent(), len(target.caveats))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts; run the tests as root")
@pytest.mark.parametrize(
    ("options", "said"), [("size=1g", "/dev/shm 0"), ("size=1g,noexec", "/tmp 1"), ("size=100m", "/tmp 1")]
)
def test_shared_memory_is_taken_where_it_is_large_enough_and_not_noexec(options: str, said: str) -> None:
    mounted = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", ASK]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.stdout == f"{said}\n", done.stderr
