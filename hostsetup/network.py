"""The host's side of a guest's network: tap i with 172.16.i.1/24, the guest at 172.16.i.2; NAT where asked for."""

import ipaddress
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from hostsetup.removers import alias
from images import shell
from images.errors import IsolatencyError

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
SLOTS = 256


@dataclass(frozen=True)
class Slot:
    """One guest's place in this network namespace."""

    index: int

    @property
    def tap(self) -> str:
        return f"tap{self.index}"

    @property
    def host_ip(self) -> str:
        return f"172.16.{self.index}.1"

    @property
    def guest_ip(self) -> str:
        return f"172.16.{self.index}.2"

    @property
    def network(self) -> str:
        return f"172.16.{self.index}.0/24"

    @property
    def mac(self) -> str:
        return f"06:00:AC:10:{self.index:02X}:02"


@contextmanager
def guest_slot(ledger: Ledger) -> Iterator[Slot]:
    """The lowest index that no guest of ours has in this namespace, with its tap made and up; gone at the end.

    Raises IsolatencyError naming a tap or a route that somebody else put in its place.
    """
    with books.locked("slots.lock"):  # two targets that start together must not choose the same index
        slot = _lowest_free()
        _refuse_foreign(slot)
        made_as = f"il{ledger.id}-{slot.index}"
        entry = ledger.add("tap", name=slot.tap, made_as=made_as, index=slot.index, netns=books.netns())
    try:
        # At every moment it carries our mark, first in its name and then as its alias: others make a tap0, too.
        shell.run(["ip", "tuntap", "add", "dev", made_as, "mode", "tap"])
        shell.run(["ip", "link", "set", "dev", made_as, "name", slot.tap, "alias", alias(ledger.id)])
        shell.run(["ip", "address", "add", f"{slot.host_ip}/24", "dev", slot.tap])
        shell.run(["ip", "link", "set", "dev", slot.tap, "up"])
        yield slot
    finally:
        ledger.remove(entry)


def _lowest_free() -> Slot:
    here = books.netns()
    entries = [entry for owner in books.owners() for entry in owner.entries.values()]
    taken = {entry["index"] for entry in entries if entry["kind"] == "tap" and entry["netns"] == here}
    free = next((index for index in range(SLOTS) if index not in taken), None)
    if free is None:
        raise IsolatencyError(f"all {SLOTS} guest networks are in use; `isolatency down` ends kept targets")
    return Slot(free)


def _refuse_foreign(slot: Slot) -> None:
    links = json.loads(shell.run(["ip", "-json", "link", "show"], changes=False).stdout or "[]")
    if any(link.get("ifname") == slot.tap for link in links):
        raise IsolatencyError(
            f"the guest wants the interface {slot.tap}, which exists already and is not isolatency's; "
            f"remove it: ip link del {slot.tap}"
        )
    wanted = ipaddress.ip_network(slot.network)
    routes = json.loads(shell.run(["ip", "-json", "-4", "route", "show"], changes=False).stdout or "[]")
    for route in routes:
        there = ipaddress.ip_network(route["dst"].replace("default", "0.0.0.0/0"), strict=False)
        if there.prefixlen > 1 and there.overlaps(wanted):  # a VPN's two halves are a default route too
            raise IsolatencyError(
                f"the guest wants {slot.network}, and the route to {route['dst']} overlaps it; "
                "remove that route, or run in `isolatency sandbox`"
            )


@contextmanager
def internet(ledger: Ledger, slot: Slot) -> Iterator[None]:
    """Let the guest reach the outside by NAT on the interface of the default route; all undone at the end.

    Raises IsolatencyError where there is no default route.
    """
    out = _outgoing()
    tag = ["-m", "comment", "--comment", f"isolatency-{ledger.id}"]
    established = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"]
    rules = (
        ("nat", ["POSTROUTING", "-s", slot.network, "-o", out, *tag, "-j", "MASQUERADE"]),
        ("filter", ["FORWARD", "-i", slot.tap, "-o", out, *tag, "-j", "ACCEPT"]),
        ("filter", ["FORWARD", "-i", out, "-o", slot.tap, *established, *tag, "-j", "ACCEPT"]),
    )
    entries = []
    try:
        entries.append(ledger.add("sysctl", name="net.ipv4.ip_forward", value=_forward_before(), netns=books.netns()))
        shell.write(FORWARD, "1")
        for table, rule in rules:
            delete = ["iptables", "-w", "-t", table, "-D", *rule]
            entries.append(ledger.add("rule", delete=delete, netns=books.netns()))
            shell.run(["iptables", "-w", "-t", table, "-I", *rule])
        yield
    finally:
        for entry in reversed(entries):
            ledger.remove(entry)


def _outgoing() -> str:
    routes = json.loads(shell.run(["ip", "-json", "-4", "route", "show", "default"], changes=False).stdout or "[]")
    if not routes:
        raise IsolatencyError("internet=true needs a default route on the host, and there is none; leave it out")
    return str(routes[0]["dev"])


def _forward_before() -> str:
    """Forwarding as it was before the first guest of ours changed it in this namespace."""
    for owner in books.owners():
        for entry in owner.entries.values():
            if entry["kind"] == "sysctl" and entry["netns"] == books.netns():
                return str(entry["value"])
    return FORWARD.read_text().strip()


def nameserver() -> str | None:
    """The first name server of the host that a guest could reach too; none where it listens on loopback only."""
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        return None
    servers = [line.split()[1] for line in lines if line.startswith("nameserver ")]
    return next((server for server in servers if not server.startswith("127.") and ":" not in server), None)
