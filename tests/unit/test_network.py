"""Taps, addresses and NAT, in network namespaces of the test's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostsetup.network import Slot

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces are made as root here; run the tests as root"
)
HEAD = """
import errno
import json
import sys
from hostsetup import network
from hostsetup.ledger import Ledger
from images import shell
from images.errors import IsolatencyError
def names():
    return {link["ifname"] for link in json.loads(shell.run(["ip", "-json", "link"], changes=False).stdout)}
"""


OUTSIDE = (
    "ip link set lo up && ip link add d0 type veth peer name d1 && ip addr add 10.9.9.9/24 dev d0 "
    "&& ip link set d0 up && ip link set d1 up && ip route add default via 10.9.9.1"
)


def in_namespace(script: str, before: str = "ip link set lo up") -> str:
    """Run Python in a new network namespace (with mounts of its own, for ip netns); its output."""
    command = f'{before} && exec {sys.executable} -c "$0"'
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", command, HEAD + script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_slots_names_and_addresses() -> None:
    slot = Slot(10)
    assert (slot.tap, slot.host_ip, slot.guest_ip, slot.mac) == (
        "tap10",
        "172.16.10.1",
        "172.16.10.2",
        "06:00:AC:10:0A:02",
    )


def test_the_lowest_free_index_is_taken_and_given_back() -> None:
    said = in_namespace("""
with Ledger.open("test", "n") as ledger:
    with network.guest_slot(ledger) as first:
        with network.guest_slot(ledger) as second:
            print(first.tap, second.tap, sorted(names() - {"lo"}))
            shown = json.loads(shell.run(["ip", "-json", "address", "show", "dev", "tap0"], changes=False).stdout)[0]
            print([(a["local"], a["prefixlen"]) for a in shown["addr_info"] if a["family"] == "inet"])
    with network.guest_slot(ledger) as again:
        print(again.tap)
print(sorted(names()))
""")
    assert said.splitlines() == ["tap0 tap1 ['tap0', 'tap1']", "[('172.16.0.1', 24)]", "tap0", "['lo']"]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("ip tuntap add dev tap0 mode tap", "tap0"),
        (
            "ip link add d0 type veth peer name d1 && ip addr add 172.16.0.9/16 dev d0 && ip link set d0 up",
            "172.16.0.0/16",
        ),
    ],
)
def test_what_somebody_else_put_there_is_refused_by_name(before: str, words: str) -> None:
    said = in_namespace(
        """
try:
    with Ledger.open("test", "n") as ledger, network.guest_slot(ledger):
        print("made")
except IsolatencyError as error:
    print(error)
""",
        before,
    )
    assert words in said and "made" not in said


def test_a_vpns_halves_of_the_address_space_are_a_default_route() -> None:
    said = in_namespace(
        """
with Ledger.open("test", "n") as ledger, network.guest_slot(ledger) as slot:
    print("made", slot.tap)
""",
        f"{OUTSIDE} && ip route add 0.0.0.0/1 via 10.9.9.1 && ip route add 128.0.0.0/1 via 10.9.9.1",
    )
    assert said == "made tap0\n"


def test_a_namespace_with_a_name_is_found_though_nobody_lives_in_it() -> None:
    said = in_namespace("""
from hostsetup.namespaces import in_netns
shell.run(["mount", "-t", "tmpfs", "tmpfs", "/run"])
shell.run(["ip", "netns", "add", "other"])
ask = "from hostsetup.namespaces import netns; print(netns())"
cookie = int(shell.run(["ip", "netns", "exec", "other", sys.executable, "-c", ask], changes=False).stdout)
print(in_netns(cookie), in_netns(cookie + 10**6))
""")
    assert said == "['nsenter', '--net=/run/netns/other'] None\n"


def test_a_tap_that_another_made_in_the_place_of_ours_is_left_alone() -> None:
    said = in_namespace("""
with Ledger.open("test", "n") as ledger, network.guest_slot(ledger):
    shell.run(["ip", "link", "del", "dev", "tap0"])
    shell.run(["ip", "tuntap", "add", "dev", "tap0", "mode", "tap"])
print(sorted(names()))
""")
    assert said == "['lo', 'tap0']\n"


def test_a_tap_is_removed_before_it_has_its_name_too() -> None:
    said = in_namespace("""
ledger = Ledger.open("test", "n")
run = shell.run
def killed(argv, **more):
    if "alias" in argv:
        raise KeyboardInterrupt
    return run(argv, **more)
shell.run = killed
try:
    with network.guest_slot(ledger):
        pass
except KeyboardInterrupt:
    print(sorted(names()))
ledger.__exit__(None, None, None)
""")
    assert said == "['lo']\n"


VICTIM = """
import os, sys
from pathlib import Path
from hostsetup import ledger as books, network
books.folder = lambda: Path(sys.argv[1])
slot = network.guest_slot(books.Ledger.open("run", "victim"))
slot.__enter__()
print("made", flush=True)
os.execvp("sleep", ["sleep", "300"])
"""


def test_a_dead_owners_tap_is_removed_from_its_own_namespace_only(tmp_path: Path) -> None:
    """A namespace's inode number is soon that of the next one, so a tap of that name there may be somebody else's."""
    said = in_namespace(
        f"""
import subprocess
from pathlib import Path
from hostsetup import ledger as books
books.folder = lambda: Path({str(tmp_path)!r})
def taps(*inside):
    links = json.loads(shell.run([*inside, "ip", "-json", "link"], changes=False).stdout)
    return [link["ifname"] for link in links if link["ifname"].startswith("tap")]
def victim():
    argv = ["unshare", "--net", sys.executable, "-c", {VICTIM!r}, {str(tmp_path)!r}]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process
gone = victim()
gone.kill()
gone.wait()
lives = victim()  # its owner is dead since it became `sleep`, but its namespace is there, with its tap
there = ["nsenter", f"--net=/proc/{{lives.pid}}/ns/net"]
with Ledger.open("run", "ours") as ledger, network.guest_slot(ledger) as slot:
    print(slot.tap, taps(), taps(*there))
    removed, left = books.clean()
    print(removed, len(left), taps(), taps(*there))
lives.kill()
"""
    )
    assert said.splitlines() == ["tap0 ['tap0'] ['tap0']", "['tap tap0'] 1 ['tap0'] []"]


def test_forwarding_stays_on_until_the_last_guest_that_needs_it_has_gone() -> None:
    said = in_namespace(
        """
forward = lambda: network.FORWARD.read_text().strip()
with Ledger.open("test", "one") as one, Ledger.open("test", "two") as two:
    with network.guest_slot(one) as first, network.guest_slot(one) as second, network.guest_slot(two) as third:
        nets = [network.internet(one, first), network.internet(one, second), network.internet(two, third)]
        seen = [forward()]
        for net in nets:
            net.__enter__()
            seen.append(forward())
        for net in nets:
            net.__exit__(None, None, None)
            seen.append(forward())
print("".join(seen), shell.run(["iptables-save"], changes=False).stdout.count("isolatency-"))
""",
        f"{OUTSIDE} && echo 0 > /proc/sys/net/ipv4/ip_forward",
    )
    assert said == "0111110 0\n"


def test_internet_reaches_the_outside_and_is_undone(tmp_path: Path) -> None:
    """A second namespace is the outside: a guest's address gets an answer from it only while NAT is on."""
    said = in_namespace(
        """
forward = network.FORWARD
rules = lambda: shell.run(["iptables-save"], changes=False).stdout.count("isolatency-")
print("before", forward.read_text().strip(), rules())
def guest_reaches():
    # A closed port: refused means that the packet came there and its answer back.
    knock = "import socket; s = socket.socket(); s.settimeout(3); print(s.connect_ex(('198.51.100.2', 9)))"
    done = shell.run(["ip", "netns", "exec", "guest", sys.executable, "-c", knock], changes=False)
    return int(done.stdout) == errno.ECONNREFUSED
with Ledger.open("test", "n") as ledger, network.guest_slot(ledger) as slot:
    # a veth pair stands in for the guest behind the tap: same addresses, and the rules name its interface
    shell.run(["ip", "link", "del", "dev", slot.tap])
    shell.run(["ip", "link", "add", slot.tap, "type", "veth", "peer", "name", "eth0", "netns", "guest"])
    shell.run(["ip", "address", "add", slot.host_ip + "/24", "dev", slot.tap])
    shell.run(["ip", "link", "set", slot.tap, "up"])
    for words in (["address", "add", slot.guest_ip + "/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                  ["route", "add", "default", "via", slot.host_ip]):
        shell.run(["ip", "-n", "guest", *words])
    print("without", guest_reaches())
    with network.internet(ledger, slot):
        print("with", forward.read_text().strip(), rules(), guest_reaches())
    print("after", forward.read_text().strip(), rules())
""",
        "mount -t tmpfs tmpfs /run && mkdir -p /run/netns && ip link set lo up && ip netns add out && ip netns add guest "
        "&& ip link add up0 type veth peer name eth0 netns out && ip addr add 198.51.100.1/24 dev up0 && ip link set up0 up "
        "&& ip -n out addr add 198.51.100.2/24 dev eth0 && ip -n out link set eth0 up "
        "&& ip route add default via 198.51.100.2 && sysctl -qw net.ipv4.ip_forward=0",
    )
    assert said.splitlines() == ["before 0 0", "without False", "with 1 3 True", "after 0 0"]
