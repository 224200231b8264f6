"""A server that is already there: it is driven, and nothing on it is changed."""

from hostsetup.lifecycle import Lifecycle


class Url(Lifecycle):
    bound_s = 10.0

    def _start(self) -> str:
        return str(self.spec.options["url"]).rstrip("/")

    def _ended(self) -> str | None:
        return None

    def pids(self) -> list[int]:
        return []
