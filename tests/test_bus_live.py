"""The bus with a real gateway and real component processes, in a run directory of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus import keys
from bus.client import Control, GatewayGone, subscribe, subscriber
from bus.codec import BusError, decode_batch
from kernel.abi import OP_DTYPE, lib

ROOT = Path(__file__).resolve().parent.parent
# A whole component: what a policy author writes, and nothing else.
COUNTER = """
import sys
from bus.policy import BasePolicy
from bus.runtime import run


class Counter(BasePolicy):
    def rebuild(self):
        self.pages = self.tests = 0

    def page_mapped(self, events):
        self.pages += int(events["npages"].sum())

    def test(self, events):
        self.tests += len(events)

    def dump(self):
        return {"pages": self.pages, "tests": self.tests}


sys.exit(run("kswapd", "counter", Counter, sys.argv[1]))
"""


def wait_for(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The first true answer of ``what``; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


class Enclave:
    """A gateway process, and component processes as a test wants them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.processes: list[subprocess.Popen[bytes]] = []
        config = {"ram": 64 << 20, "nodes": 2, "components": {"buddy": "buddy", "kswapd": "counter"}}
        (run_dir / "config.json").write_text(json.dumps(config))
        self.gateway = self.start("-m", "kernel.gateway", "--run-dir", str(run_dir))
        wait_for((run_dir / "gateway.ready").exists)
        self.control = Control(run_dir)
        self.as_buddy = Control(run_dir, name="buddy")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        with (self.run_dir / "log").open("ab") as log:
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def buddy(self) -> subprocess.Popen[bytes]:
        process = self.start("-m", "components.buddy", "--run-dir", str(self.run_dir))
        self.wait_online("buddy", process)
        return process

    def counter(self) -> subprocess.Popen[bytes]:
        process = self.start("-c", COUNTER, str(self.run_dir))
        self.wait_online("kswapd", process)
        return process

    def wait_online(self, name: str, process: subprocess.Popen[bytes]) -> None:
        wait_for(lambda: self.component(name)["pid"] == process.pid and self.component(name)["dump"])

    def component(self, name: str) -> dict[str, Any]:
        components = self.control.request({"t": "status"})["components"]
        return next(entry for entry in components if entry["name"] == name)

    def free_blocks(self) -> list[list[int]]:
        """From the frame table, per node and order."""
        blocks: list[list[int]] = self.control.request({"t": "buddyinfo"})["nodes"]
        return blocks

    def log(self) -> str:
        return (self.run_dir / "log").read_text()

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            process.wait(15)
        self.control.close()
        self.as_buddy.close()


@pytest.fixture
def enclave() -> Iterator[Enclave]:
    with tempfile.TemporaryDirectory(prefix="sylvie-") as directory:  # pytest's own is closed to other users
        os.chmod(directory, 0o755)
        up = Enclave(Path(directory))
        try:
            yield up
        finally:
            up.close()
        assert up.gateway.returncode == 0
        left = {path.name for path in Path(directory).iterdir()} - {"config.json", "log"}
        assert left == set(), "an orderly stop leaves nothing"


def test_a_component_is_at_most_thirty_lines() -> None:
    assert len([line for line in COUNTER.splitlines() if line]) <= 30


def test_events_arrive_in_order_and_without_loss(enclave: Enclave) -> None:
    enclave.counter()
    with subscriber(enclave.run_dir, [b"test"]) as late:
        total = 0
        while not late.poll(100):  # it is connected when something comes
            enclave.control.request({"t": "post-test", "n": 10_000})
            total += 10_000
        for _ in range(10):
            enclave.control.request({"t": "post-test", "n": 10_000})
            total += 10_000
        wait_for(lambda: enclave.component("kswapd")["dump"]["tests"] == total)
        dump = enclave.component("kswapd")["dump"]
        assert (dump["gaps"], dump["rebuilds"]) == (0, 1)
        seen = []
        expected = None
        while late.poll(1000):
            _, first, events = decode_batch(late.recv_multipart())
            assert expected in (None, first)
            expected = first + len(events)
            seen.append(events["vpage"])
        numbers = np.concatenate(seen)
        assert (np.diff(numbers[numbers.size % 10_000 :].reshape(-1, 10_000).astype(np.int64)) == 1).all()
    status = enclave.control.request({"t": "status"})
    assert status["counters"]["lost_events"] == 0


def test_subscribe_follows_a_topic(enclave: Enclave) -> None:
    following = subscribe(enclave.run_dir, "component", timeout=10)
    enclave.start("-c", COUNTER, str(enclave.run_dir))
    topic, _, events = next(following)
    assert topic == b"component"
    assert events["type"].tolist() == [lib.SY_MSG_COMPONENT_UP]
    assert events["arg"].tolist() == [lib.SY_C_KSWAPD]


def test_component_runs_without_privileges(enclave: Enclave) -> None:
    process = enclave.counter()
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        uid = str(lib.SY_COMPONENT_UID_BASE + lib.SY_C_KSWAPD)
        assert status["Uid"].split() == status["Gid"].split() == [uid] * 4
        assert status["Groups"].split() == []
        assert int(status["CapEff"], 16) == 0


def test_buddy_fills_the_reserve_and_equals_the_table(enclave: Enclave) -> None:
    enclave.buddy()
    # RAM may still be coming online
    wait_for(lambda: enclave.control.request({"t": "status"})["frames"]["offline"] == 0)
    status = enclave.control.request({"t": "status"})
    assert status["reserve"]["0"] >= 64
    wait_for(lambda: enclave.component("buddy")["dump"]["free_blocks"] == enclave.free_blocks())
    frames = status["frames"]
    assert sum(count for state, count in frames.items() if state != "total") == frames["total"] == 64 << 8
    assert enclave.control.request({"t": "check"})["violations"] == 0


def test_killed_buddy_comes_back_to_the_same_lists(enclave: Enclave) -> None:
    first = enclave.buddy()
    first.kill()
    first.wait()
    wait_for(lambda: enclave.component("buddy")["state"] == "lost")
    enclave.buddy()
    buddy = enclave.component("buddy")
    assert (buddy["state"], buddy["restarts"]) == ("online", 1)
    assert buddy["dump"]["free_blocks"] == enclave.free_blocks()


def test_stopped_component_is_lost_and_comes_back(enclave: Enclave) -> None:
    process = enclave.counter()
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: enclave.component("kswapd")["state"] == "lost")
    enclave.control.request({"t": "post-test", "n": 5000})
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: enclave.component("kswapd")["dump"]["tests"] == 5000)
    assert enclave.component("kswapd")["state"] == "online"
    assert enclave.component("kswapd")["restarts"] == 0


def test_orderly_stop_is_said(enclave: Enclave) -> None:
    process = enclave.counter()
    process.terminate()
    assert process.wait(5) == 0
    assert enclave.component("kswapd")["state"] == "down"
    assert "kswapd stopped after" in enclave.log()


def test_stopping_does_not_wait_for_a_dead_gateway(enclave: Enclave) -> None:
    process = enclave.counter()
    enclave.gateway.send_signal(signal.SIGSTOP)
    time.sleep(0.7)  # it waits for an answer to its heartbeat now
    process.terminate()
    assert process.wait(3) == 0
    enclave.gateway.send_signal(signal.SIGCONT)


def test_a_newer_process_takes_over(enclave: Enclave) -> None:
    old = enclave.counter()
    enclave.counter()
    assert old.wait(5) == 1
    assert "has taken over" in enclave.log()
    assert enclave.component("kswapd")["state"] == "online", "the old one's end is not the new one's"


def test_component_ends_when_the_gateway_has_gone(enclave: Enclave) -> None:
    process = enclave.counter()
    enclave.gateway.terminate()
    assert enclave.gateway.wait(10) == 0
    assert process.wait(10) == 1
    assert "is it up?" in enclave.log()


def hello(control: Control, name: str = "buddy", **changes: Any) -> dict[str, Any]:
    header = {"t": "hello", "name": name, "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()}
    return control.request(header | changes)


def test_other_abi_is_refused_saying_both(enclave: Enclave) -> None:
    with pytest.raises(BusError, match=f"ABI 99 asked, gateway speaks {lib.SY_ABI_VERSION}"):
        hello(enclave.as_buddy, abi=99)


def test_refusals_change_nothing_and_are_counted(enclave: Enclave) -> None:
    control = enclave.as_buddy
    before = enclave.control.request({"t": "status"})
    op = np.zeros(1, OP_DTYPE)
    with pytest.raises(BusError, match="not buddy: it has not said HELLO"):
        control.exchange({"t": "txn", "name": "buddy"}, op.tobytes())
    hello(control)
    refused: list[tuple[dict[str, Any], bytes | None, str]] = [
        ({"t": "txn", "name": "buddy"}, b"x" * 33, "32 bytes, not 33"),
        ({"t": "txn", "name": "buddy"}, None, "not 0 bytes"),
        ({"t": "txn", "name": "thp"}, op.tobytes(), "in the name of thp, with the key of buddy"),
        ({"t": "txn"}, op.tobytes(), "'name' is missing"),
        ({"t": "no-such"}, None, "unknown request 'no-such'"),
        ({"t": "status"}, None, "for the operator, not for buddy"),
        ({}, None, "'t' is missing"),
        ({"t": "hello", "name": "buddy", "abi": "1"}, None, "'abi' must be int"),
        ({"t": "heartbeat", "name": "buddy", "dump": 1}, None, "'dump' must be dict"),
    ]
    for header, raw, why in refused:
        with pytest.raises(BusError, match=why):
            control.exchange(header, raw)
    for words, why in (({"reserve": [1]}, "list of 11"), ({"reserve": [-1] * 11}, "32 bits"), ({"x": []}, "tunable")):
        with pytest.raises(BusError, match=why):
            hello(control, words=words)
    after = enclave.control.request({"t": "status"})
    assert after["counters"]["bad_requests"] - before["counters"]["bad_requests"] == len(refused) + 4
    assert after["frames"]["free"] >= before["frames"]["free"]


def test_garbage_on_the_socket_is_survived(enclave: Enclave) -> None:
    socket = enclave.control._socket
    for frames in ([b""], [b"\xc1"], [b"\x00" * 9, b"", b""], [os.urandom(3000)]):
        socket.send_multipart(frames)
        assert socket.poll(5000)
        assert b"error" in socket.recv_multipart()[0]
    assert enclave.control.request({"t": "status"})["counters"]["bad_requests"] == 4


def test_operations_are_refused_one_by_one(enclave: Enclave) -> None:
    wait_for(lambda: enclave.control.request({"t": "status"})["frames"]["offline"] == 0)
    hello(enclave.as_buddy)
    before = enclave.control.request({"t": "status"})["frames"]
    ops = np.zeros(6, OP_DTYPE)
    ops["op"] = lib.SY_OP_GRANT
    ops["asid"] = 12345  # not there
    ops["op"][1] = lib.SY_OP_RESERVE
    ops["barrier"][1] = 0xDEAD
    ops["op"][2] = lib.SY_OP_RECLAIM  # not buddy's
    ops["pfn"][3], ops["order"][3] = 3, 4  # not aligned
    ops["op"][4] = 999
    ops["pfn"][5] = 1 << 30
    answer, raw = enclave.as_buddy.exchange({"t": "txn", "name": "buddy"}, ops.tobytes())
    assert answer["complete"] == 0
    assert np.frombuffer(raw, OP_DTYPE)["result"].tolist() == [
        lib.SY_R_NOT_FOUND, lib.SY_R_STALE, lib.SY_R_NOT_PERMITTED, lib.SY_R_INVALID, lib.SY_R_INVALID,
        lib.SY_R_INVALID,
    ]  # fmt: skip
    assert enclave.control.request({"t": "status"})["frames"] == before
    assert enclave.control.request({"t": "check"})["violations"] == 0


def test_no_gateway_is_said(tmp_path: Path) -> None:
    with pytest.raises(BusError, match="is an enclave up"):
        Control(tmp_path)
    keys.make(tmp_path)
    with Control(tmp_path, timeout=0.2) as control, pytest.raises(GatewayGone, match="is it up"):
        control.request({"t": "status"})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "Expecting property name"),
        ('{"ram": 1, "nodes": 1, "components": {}}', "a node needs at least 4 MiB"),
        ('{"ram": 8388608, "nodes": 1, "components": {"bud": "x"}}', "unknown components"),
        ('{"nodes": 1, "components": {}}', "'ram' is missing"),
    ],
)
def test_gateway_that_cannot_start_says_why(tmp_path: Path, config: str, why: str) -> None:
    (tmp_path / "config.json").write_text(config)
    command = [sys.executable, "-m", "kernel.gateway", "--run-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert why in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def test_component_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"components": {"buddy": "no_such"}}')
    command = [sys.executable, "-m", "components.buddy", "--run-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "buddy has no implementation no_such" in ended.stderr
