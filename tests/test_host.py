"""Settings of the host, on a directory that stands for /: changed by the first enclave, put back by the last."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernel.host import SETTINGS, Host, Setting

MAPS, SHMEM = (s.path for s in SETTINGS[:2])
BRACKETS = "always within_size advise [never] deny force"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    h = Host(root=tmp_path / "root", record=tmp_path / "host.json")
    for path in (MAPS, SHMEM):
        file(h, path).parent.mkdir(parents=True)
    file(h, MAPS).write_text("65530\n")
    file(h, SHMEM).write_text(BRACKETS + "\n")
    return h


@pytest.fixture
def holder() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Processes to hold the settings; each is waited for once killed, so that its pid is gone."""
    made: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen(["sleep", "60"]))
        return made[-1]

    yield start
    for p in made:
        p.kill()
        p.wait(10)


def file(h: Host, path: str) -> Path:
    return h.root / path.lstrip("/")


def now(h: Host) -> tuple[str, str]:
    return file(h, MAPS).read_text().strip(), file(h, SHMEM).read_text().strip()


def end(p: subprocess.Popen[bytes]) -> None:
    p.kill()
    p.wait(10)


CHANGED = ("2000000", "advise")
RESTORED = ("65530", "never")


def test_one_holder(host: Host) -> None:
    assert host.pending() == {}
    host.acquire("/run/a")
    assert now(host) == CHANGED
    assert host.pending() == {MAPS: "65530", SHMEM: "never"}
    assert host.release("/run/a")
    assert now(host) == RESTORED
    assert not host.record.exists() and host.pending() == {}
    assert host.restore_if_idle()


def test_record_is_private_and_says_who(host: Host) -> None:
    old = os.umask(0)
    try:
        host.acquire("/run/a")
    finally:
        os.umask(old)
    assert stat.S_IMODE(host.record.stat().st_mode) == 0o600
    state = json.loads(host.record.read_text())
    assert state["holders"]["/run/a"]["pid"] == os.getpid()
    assert not host.record.with_suffix(".new").exists()


@pytest.mark.parametrize("first", ["/run/a", "/run/b"])
def test_two_holders_in_either_order(host: Host, first: str) -> None:
    host.acquire("/run/a")
    host.acquire("/run/b")
    assert host.pending() == {MAPS: "65530", SHMEM: "never"}  # the originals, not what the first holder made
    assert not host.release(first)
    assert now(host) == CHANGED and not host.restore_if_idle()
    assert host.release("/run/b" if first == "/run/a" else "/run/a")
    assert now(host) == RESTORED


def test_count_over_several(host: Host) -> None:
    names = [f"/run/{i}" for i in range(6)]
    for name in names:
        host.acquire(name)
        host.acquire(name)  # the same again counts once
    for name in names[:-1]:
        assert not host.release(name)
        assert now(host) == CHANGED
    assert not host.release("/run/stranger")
    assert host.release(names[-1])
    assert now(host) == RESTORED
    host.acquire("/run/again")
    assert now(host) == CHANGED
    assert host.release("/run/again") and now(host) == RESTORED


def test_crashed_holder_does_not_count(host: Host, holder: Callable[[], subprocess.Popen[bytes]]) -> None:
    dead = holder()
    host.acquire("/run/dead", dead.pid)
    host.acquire("/run/a")
    end(dead)
    assert host.release("/run/a")
    assert now(host) == RESTORED and not host.record.exists()


def test_last_holder_crashed(host: Host, holder: Callable[[], subprocess.Popen[bytes]]) -> None:
    dead = holder()
    host.acquire("/run/dead", dead.pid)
    assert not host.restore_if_idle()
    end(dead)
    assert now(host) == CHANGED
    assert host.restore_if_idle()
    assert now(host) == RESTORED and not host.record.exists()


def test_next_holder_after_a_crash_keeps_the_originals(
    host: Host, holder: Callable[[], subprocess.Popen[bytes]]
) -> None:
    dead = holder()
    host.acquire("/run/a", dead.pid)
    end(dead)
    host.acquire("/run/a")
    assert host.pending() == {MAPS: "65530", SHMEM: "never"}
    assert host.release("/run/a")
    assert now(host) == RESTORED


def test_reused_pid_is_not_the_holder(host: Host) -> None:
    host.acquire("/run/a")
    state = json.loads(host.record.read_text())
    state["holders"]["/run/a"]["started"] = "1"  # somebody who had this pid before
    host.record.write_text(json.dumps(state))
    assert host.restore_if_idle()
    assert now(host) == RESTORED


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("500000400000-500000401000 rw-s 00000000 00:01 77 /memfd:sylvie-ram (deleted)", True),
        ("500000400000-500000401000 rw-s 00000000 00:01 77 /memfd:other (deleted)", False),
        ("7f0000400000-7f0000401000 rw-s 00000000 00:01 77 /memfd:sylvie-ram (deleted)", False),
    ],
)
def test_not_put_back_under_a_program_with_frames(host: Host, line: str, kept: bool) -> None:
    maps = file(host, "/proc/123/maps")
    maps.parent.mkdir(parents=True)
    maps.write_text(f"400000-401000 r-xp 00000000 00:01 5 /bin/true\n{line}\n")
    host.acquire("/run/a")
    assert host.release("/run/a") is not kept
    assert now(host) == (CHANGED if kept else RESTORED)
    if kept:
        assert host.pending() == {MAPS: "65530", SHMEM: "never"}
        assert not host.restore_if_idle()
        maps.unlink()  # it ends
        assert host.restore_if_idle()
    assert now(host) == RESTORED and not host.record.exists()


def test_missing_knob(host: Host) -> None:
    file(host, SHMEM).unlink()
    host.acquire("/run/a")
    assert file(host, MAPS).read_text() == "2000000" and not file(host, SHMEM).exists()
    assert host.pending() == {MAPS: "65530"}
    assert host.release("/run/a")
    assert file(host, MAPS).read_text() == "65530" and not file(host, SHMEM).exists()


@pytest.mark.parametrize(
    ("value", "shmem"),
    [("2000000", "always [advise] never"), ("3000000", "[always] advise never"), ("2000001", "[within_size] never")],
)
def test_what_is_fine_is_left_alone(host: Host, value: str, shmem: str) -> None:
    file(host, MAPS).write_text(f"{value}\n")
    file(host, SHMEM).write_text(f"{shmem}\n")
    host.acquire("/run/a")
    assert host.pending() == {} and now(host) == (value, shmem)
    assert host.release("/run/a")
    assert now(host) == (value, shmem) and not host.record.exists()


def test_damaged_record(host: Host) -> None:
    host.record.write_text("{half")
    assert host.pending() == {}
    host.acquire("/run/a")
    assert host.release("/run/a") and now(host) == RESTORED


def test_many_processes_at_once(host: Host) -> None:
    """Counted under a lock: twelve processes come and go, and the originals survive."""
    code = (
        "import sys; from pathlib import Path; from kernel.host import Host\n"
        "h = Host(root=Path(sys.argv[1]), record=Path(sys.argv[2]))\n"
        "for i in range(20):\n"
        "    h.acquire(sys.argv[3])\n"
        "    assert int((h.root / 'proc/sys/vm/max_map_count').read_text()) == 2_000_000\n"
        "    h.release(sys.argv[3])\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, host.root, host.record, f"/run/{i}"],
            cwd=Path(__file__).resolve().parent.parent,
        )
        for i in range(12)
    ]
    try:
        assert [p.wait(60) for p in running] == [0] * 12
    finally:
        for p in running:
            if p.poll() is None:
                p.kill()
    assert now(host) == RESTORED and not host.record.exists()


def test_unreadable_setting_records_nothing(host: Host) -> None:
    odd = Host(host.root, host.record, (Setting("/proc/sys/vm", str),))
    with pytest.raises(OSError):
        odd.acquire("/run/a")
    assert not host.record.exists()


def test_failure_at_the_second_setting_leaves_the_first_as_it_was(host: Host) -> None:
    file(host, SHMEM).unlink()
    file(host, SHMEM).mkdir()
    with pytest.raises(OSError):
        host.acquire("/run/a")
    assert file(host, MAPS).read_text().strip() == "65530" or host.pending() == {MAPS: "65530"}


def test_holder_that_is_dead_already(host: Host, holder: Callable[[], subprocess.Popen[bytes]]) -> None:
    dead = holder()
    end(dead)
    host.acquire("/run/dead", dead.pid)
    assert host.restore_if_idle()
    assert now(host) == RESTORED


def test_the_last_program_on_frames_ends_after_the_enclave(
    host: Host, holder: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """A process of its own waits for it, once however often it is asked for, and not while an enclave is up."""
    maps = file(host, "/proc/123/maps")
    maps.parent.mkdir(parents=True)
    maps.write_text("500000400000-500000401000 rw-s 00000000 00:01 77 /memfd:sylvie-ram (deleted)\n")
    host.acquire("/run/a")
    host.later()
    assert "waiter" not in json.loads(host.record.read_text())
    assert not host.release("/run/a")
    pid = 0
    for _ in range(3):
        host.later()
        waiter = json.loads(host.record.read_text())["waiter"]
        pid = pid or waiter["pid"]
        assert waiter["pid"] == pid
    assert now(host) == CHANGED
    maps.unlink()
    deadline = time.monotonic() + 20
    while host.record.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert now(host) == RESTORED
    assert os.waitpid(pid, 0)[1] == 0


def test_killed_between_the_record_and_the_change(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has been changed is in the record already."""
    seen = []
    monkeypatch.setattr(Host, "_write", lambda self, path, value: seen.append((path, self.pending().get(path))))
    host.acquire("/run/a")
    assert seen == [(MAPS, "65530"), (SHMEM, "never")]
