"""Who may do what (docs/security.md): a uid and a key for each component, and nothing for anybody else."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from conftest import Enclave, open_files, wait_for

from bus import keys
from bus.client import EVENTS, REQUESTS, Control, endpoint, subscriber
from bus.codec import BusError, pack
from kernel.abi import OP_DTYPE, ffi, lib, names

RESULTS = names("SY_R_")


def strange(enclave: Enclave, kind: int, name: str, key: str) -> zmq.Socket[bytes]:
    """A socket connected without a key, with a fresh one, or with one made for another enclave's gateway."""
    s: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    s.setsockopt(zmq.LINGER, 0)
    if key != "none":
        keys.connect_as(s, enclave.run_dir, keys.OPERATOR)
        public, secret = zmq.curve_keypair()
        if key == "fresh":
            s.curve_publickey, s.curve_secretkey = public, secret
        else:
            s.curve_serverkey = public
    s.connect(endpoint(enclave.run_dir, name))
    return s


@pytest.mark.parametrize("key", ["none", "fresh", "of another gateway"])
def test_without_a_key_nothing_is_read_or_asked(enclave: Enclave, key: str) -> None:
    before = enclave.status()["counters"]
    with strange(enclave, zmq.DEALER, REQUESTS, key) as ask, strange(enclave, zmq.SUB, EVENTS, key) as events:
        events.subscribe(b"")
        ask.send(pack({"t": "status"}))
        enclave.request(t="post-test", n=1000)
        assert ask.poll(1000) == 0
        assert events.poll(200) == 0
        if (
            key != "of another gateway"
        ):  # that one gives up by itself: the gateway cannot show that it is what was asked for
            wait_for(lambda: enclave.status()["counters"]["bad_keys"] > before["bad_keys"], 10, "it is not counted")
    after = enclave.status()["counters"]
    assert after["bad_requests"] == before["bad_requests"]


@pytest.mark.parametrize("poser", ["kswapd", "sched", "operator"])
def test_nobody_poses_as_another(enclave: Enclave, poser: str) -> None:
    with Control(enclave.run_dir, 5, poser) as c:
        for request in (
            {"t": "hello", "name": "buddy", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": 1},
            {"t": "heartbeat", "name": "buddy"},
            {"t": "goodbye", "name": "buddy"},
        ):
            with pytest.raises(BusError, match=f"in the name of buddy, with the key of {poser}"):
                c.request(request)
        with pytest.raises(BusError, match=f"in the name of buddy, with the key of {poser}"):
            c.exchange({"t": "txn", "name": "buddy"}, np.zeros(1, OP_DTYPE).tobytes())
    assert enclave.component()["state"] == "online"


def test_components_are_not_operators(enclave: Enclave) -> None:
    with Control(enclave.run_dir, 5, "kswapd") as c:
        for request in ({"t": "status"}, {"t": "release", "pid": 1}, {"t": "check"}, {"t": "post-test", "n": 1}):
            with pytest.raises(BusError, match="for the operator, not for kswapd"):
                c.request(request)
        assert "seqs" in c.request({"t": "sync"})
    with subscriber(enclave.run_dir, [b"test"], "kswapd") as events:
        time.sleep(0.3)
        enclave.request(t="post-test", n=10)
        assert events.poll(5000)


def test_each_operation_is_its_owners_only(own_enclave: Enclave) -> None:
    """The table of ARCHITECTURE.md: buddy, online and known, commits what is not buddy's."""
    own_enclave.cli("status")
    own_enclave.supervisorctl("stop", "buddy")
    before = own_enclave.status()["frames"]
    with Control(own_enclave.run_dir, 5, "buddy") as c:
        c.request({"t": "hello", "name": "buddy", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()})
        others = ["RECLAIM", "AGE", "PREFETCH", "FAULT_ORDER", "COLLAPSE", "SPLIT", "MERGE", "RUN"]
        ops = np.zeros(len(others), OP_DTYPE)
        ops["op"] = [getattr(lib, f"SY_OP_{name}") for name in others]
        _, raw = c.exchange({"t": "txn", "name": "buddy"}, ops.tobytes())
        results = [RESULTS[int(r)] for r in np.frombuffer(raw, OP_DTYPE)["result"]]
        assert results == ["NOT_PERMITTED"] * len(others)
    assert own_enclave.status()["frames"] == before


def as_uid(uid: int, code: str, *arguments: Any) -> str:
    """Runs a few lines of the system's Python as another user; what they print."""
    python = "/usr/bin/python3"
    assert os.access(python, os.X_OK)
    cmd = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--no-new-privs", python, "-c", code]
    return subprocess.run([*cmd, *map(str, arguments)], capture_output=True, text=True, timeout=30, check=True).stdout


ATTEMPT = """
import os, sys
for path in sys.argv[1:]:
    for flags in (os.O_RDONLY, os.O_RDWR):
        try:
            os.close(os.open(path, flags))
            print("opened")
        except OSError as e:
            print(e.strerror)
"""


def test_secrets_are_their_owners_only(enclave: Enclave) -> None:
    folder = enclave.run_dir / keys.FOLDER
    for name in (*keys.COMPONENT_IDS, keys.GATEWAY, keys.OPERATOR):
        secret = folder / f"{name}.secret"
        assert (secret.stat().st_mode & 0o777, secret.stat().st_uid) == (0o400, keys.uid_of(name))
        for uid in (65534, keys.uid_of("kswapd")):
            expected = "opened" if uid == keys.uid_of(name) else "Permission denied"
            assert as_uid(uid, ATTEMPT, secret).splitlines() == [expected, "Permission denied"]
    assert len({keys.uid_of(name) for name in keys.COMPONENT_IDS}) == len(keys.COMPONENT_IDS)


def test_processes_have_their_own_user_and_no_privilege(enclave: Enclave) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{enclave.component()['pid']}/status").read_text().splitlines()
    )
    uid = str(keys.uid_of("buddy"))
    assert status["Uid"].split() == [uid] * 4 and status["Gid"].split() == [uid] * 4
    assert status["NoNewPrivs"] == "1" and status["Groups"].strip() == ""
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def memory_files(pid: int) -> list[str]:
    return [*open_files(f"/proc/{pid}/fd", "memfd:sylvie")]


def test_memory_files_are_closed_to_other_users(enclave: Enclave) -> None:
    """RAM and tables: neither through the gateway, nor through a program of the user's own, nor a component's descriptors."""
    program = enclave.popen(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
         "/usr/bin/python3", "-c", "b = bytearray(8 << 20); print('there', flush=True); input()"],
        stdin=subprocess.PIPE,
    )  # fmt: skip
    assert program.stdout and program.stdout.readline() == "there\n"
    gateway = memory_files(enclave.gateway_pid())
    assert len(gateway) > 4
    assert set(as_uid(65534, ATTEMPT, *gateway).splitlines()) == {"Permission denied"}
    assert all(os.stat(path).st_mode & 0o777 == 0o600 for path in gateway)
    mapped = [f"/proc/{program.pid}/map_files/{line.split()[0]}" for line in Path(f"/proc/{program.pid}/maps").read_text().splitlines() if "memfd:sylvie" in line]  # fmt: skip
    assert mapped
    assert "opened" not in as_uid(65534, ATTEMPT, *mapped[:5])
    buddy = psutil.Process(enclave.component()["pid"]).pid
    assert "opened" not in as_uid(keys.uid_of("buddy"), ATTEMPT, *gateway, *memory_files(buddy))
    program.communicate("\n", timeout=20)


def test_ram_is_read_by_ksm_only(enclave: Enclave) -> None:
    """Of the components; and it cannot write, nor open it again so that it could."""
    maps = {c["name"]: Path(f"/proc/{c['pid']}/maps").read_text() for c in enclave.status()["components"]}
    having = {name: [line for line in text.splitlines() if "memfd:sylvie-ram" in line] for name, text in maps.items()}
    assert {name for name, lines in having.items() if lines} == {"ksm"}
    assert {line.split()[1] for line in having["ksm"]} == {"r--s"}
    pid = enclave.component("ksm")["pid"]
    again = [f"/proc/{pid}/map_files/{line.split()[0]}" for line in having["ksm"]]
    assert "opened" not in as_uid(keys.uid_of("ksm"), ATTEMPT, *again, *memory_files(enclave.gateway_pid()))


def test_keys_live_as_long_as_the_enclave(own_enclave: Enclave) -> None:
    """They outlive a killed gateway and a restarted component; down removes them."""
    public = own_enclave.run_dir / keys.FOLDER / "gateway.public"
    key = public.read_bytes()
    old = own_enclave.gateway_pid()
    os.kill(old, 9)
    own_enclave.successor(old)
    wait_for(lambda: own_enclave.component()["state"] == "online", 30, "buddy does not come back")
    assert public.read_bytes() == key
    own_enclave.cli("swap", "buddy", "next_fit")
    own_enclave.cli("down")
    assert not own_enclave.run_dir.exists()


JOIN = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.settimeout(10)
s.connect(sys.argv[1])
s.send(bytes.fromhex(sys.argv[2]))
data, fds, _, _ = socket.recv_fds(s, 4096, 16)
print(int.from_bytes(data[8:12], "little"), len(fds))
"""
MANAGED = 'b = bytearray(8 << 20); print(any("sylvie-ram" in line for line in open("/proc/self/maps")))'


def test_only_admitted_users_get_memory(enclave: Enclave) -> None:
    """Who was not named gets neither a userfaultfd nor RAM: refused by the gateway, and told by ``sylvie run``."""
    admitted, stranger = 65534, 64999
    hello = bytes(
        ffi.buffer(ffi.new("struct sy_hello *", (lib.SY_MAGIC, lib.SY_ABI_VERSION, lib.SY_HELLO_NEED_UFFD, 0)))
    )
    before = enclave.status()["counters"]["bad_hellos"]
    gateway = enclave.run_dir / "gateway.sock"
    assert as_uid(admitted, JOIN, gateway, hello.hex()) == f"{lib.SY_W_OK} 1\n"
    assert as_uid(stranger, JOIN, gateway, hello.hex()) == f"{lib.SY_W_REFUSED} 0\n"
    assert enclave.status()["counters"]["bad_hellos"] == before + 1
    for uid, managed in ((admitted, True), (stranger, False)):
        become = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
        assert enclave.run([*become, "/usr/bin/python3", "-c", MANAGED]).stdout == f"{managed}\n"
        done = subprocess.run(
            [*become, *enclave.command(["/usr/bin/python3", "-c", MANAGED])], capture_output=True, text=True, timeout=30
        )
        assert done.stdout == f"{managed}\n"
        assert ("not for user" in done.stderr) is not managed


def test_users_are_named(root_dir: Path) -> None:
    e = Enclave(root_dir / "users")
    assert "no such user" in e.cli("up", "--user", "no-such-user", ok=False).stderr
    assert not e.run_dir.exists()
