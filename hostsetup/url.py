"""A server that is already there: it is driven, and nothing on it is changed."""

from hostsetup.lifecycle import ATTEMPT_S, Lifecycle


class Url(Lifecycle):
    bound_s = 10.0
    connect_s = ATTEMPT_S

    def _start(self) -> str:
        return str(self.spec.options["url"]).rstrip("/")

    def _advice(self) -> str:
        return "start that server, or give its address"

    def _ended(self) -> str | None:
        return None

    def pids(self) -> list[int]:
        return []
