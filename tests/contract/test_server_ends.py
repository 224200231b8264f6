"""A guest whose server ends: what is said is the server's end, not that of the VMM, which is in order."""

import base64

import pytest

from images.errors import TargetError
from tests.contract.conftest import Maker


@pytest.mark.parametrize("kind", ["uml", "qemu", "firecracker"])
def test_a_guest_that_ends_with_its_server_says_how_that_ended(kind: str, new: Maker) -> None:
    argv = base64.b64encode(b"--model\nno-such-model").decode()  # the last one on the command line counts
    with pytest.raises(TargetError, match="ended with its server, which ended with exit code 2") as caught:
        new(kind, boot_args=f"isolatency.argv={argv}").__enter__()
    assert "found 'no-such-model'" in caught.value.detail
