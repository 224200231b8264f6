"""Where built images lie: `ISOLATENCY_CACHE` (default ~/.cache/isolatency), and which ones are current."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Images:
    """One build: the same tree in every form that a target needs. All paths exist.

    `key` is the digest of what the build was made from (pins, server/, guest-init, build.py), `tree_sha256` that of
    the canonical tar, `loaded` says that it came by `images load` and may be of other sources than this checkout.
    """

    root: Path
    key: str
    tree_sha256: str
    loaded: bool
    digests: dict[str, str]

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def tar(self) -> Path:
        return self.root / "tree.tar"

    @property
    def ext4(self) -> Path:
        return self.root / "root.ext4"

    @property
    def vmlinux(self) -> Path:
        return self.root / "vmlinux"

    @property
    def initrd(self) -> Path:
        return self.root / "initrd.cpio"

    @property
    def uml(self) -> Path:
        return self.root / "linux.uml"

    @property
    def lock(self) -> Path:
        return self.root / "packages.lock"
