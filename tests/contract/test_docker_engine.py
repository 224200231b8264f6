"""What a docker target asks of its engine, and leaves there: the image, where the engine outlives the run."""

import docker
import pytest

from hostsetup import container
from images import store
from images.errors import MissingError
from tests.contract.conftest import Maker


def test_it_stays_for_the_next_run_and_can_be_removed(new: Maker) -> None:
    tag = f"isolatency:{store.current().tree_sha256[:32]}"
    target = new("docker")
    engine = docker.from_env()
    with target:
        assert tag in tags(engine)
        assert container.forget_images() == []  # its container uses it
    assert tag in tags(engine)
    assert container.forget_images() == [f"image {tag}"]
    assert tag not in tags(engine)
    assert container.forget_images() == []


def test_one_that_cannot_pin_or_limit_is_refused(new: Maker) -> None:
    """It says so beforehand (GET /info), and starts containers without what was asked for."""
    with new("docker"):
        real = docker.from_env().info()
    container._refuse_without_limits("t", real)
    with pytest.raises(MissingError, match="t: this Docker engine cannot limit cores and memory"):
        container._refuse_without_limits("t", real | {"CPUSet": False, "MemoryLimit": False})
    assert {"CPUSet", "MemoryLimit"} <= real.keys()


def tags(engine: docker.DockerClient) -> list[str]:
    return [tag for image in engine.images.list() for tag in image.tags]
