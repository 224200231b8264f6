"""The image that a docker target imports into an engine which is not a sandbox's, and so outlives the run."""

import docker

from hostsetup import container
from images import store
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


def tags(engine: docker.DockerClient) -> list[str]:
    return [tag for image in engine.images.list() for tag in image.tags]
