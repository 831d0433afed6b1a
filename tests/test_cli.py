"""The command line: help, advice in errors, exit statuses, several enclaves, supervisorctl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xmlrpc.client
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT, SYLVIE, Enclave, bring_up, module_enclave_of, take_down, wait_for

from kernel.abi import lib
from sylvie import life
from sylvie.cli import DEFAULT_RUN_DIR, Problem, cli

# Holds some memory until its input ends.
HOLD = "b = bytearray(8 << 20); b[::4096] = b'x' * len(b[::4096]); print('there', flush=True); input()"


def call(*args: Any, **kw: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SYLVIE, *map(str, args)], capture_output=True, text=True, timeout=120, check=False, **kw
    )  # no enclave needed


def mentioning(path: Path) -> list[str]:
    """Command lines of processes that name path."""
    lines = (" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(path) in line]


small = module_enclave_of("c1", "--ram", "64M")[0]


# ---- without an enclave ----


@pytest.mark.parametrize("command", ["", *sorted(cli.commands)])
def test_help_has_an_example(command: str) -> None:
    done = call(*([command] if command else []), "--help")
    assert done.returncode == 0 and "Example" in done.stdout and f"sylvie {command}".strip() in done.stdout
    assert done.stdout.startswith("Usage:")


def test_unknown_command_and_option() -> None:
    assert call("frobnicate").returncode == 2
    assert call("status", "--frobnicate").returncode == 2
    assert "sylvie" in call("--version").stdout


@pytest.mark.parametrize("ram", ["", "lots", "4M", "1T", "-5G", "1.5G", "16Mi", "512", "999999G"])
def test_bad_ram(root_dir: Path, ram: str) -> None:
    where = root_dir / "bad"
    done = call("--run-dir", where, "up", f"--ram={ram}")
    assert done.returncode == 1, done
    assert done.stderr.startswith("sylvie: --ram ") and "Traceback" not in done.stderr
    assert (f"--ram {ram}: " in done.stderr and "512M" in done.stderr) or "available" in done.stderr
    assert not where.exists() and not mentioning(where)


@pytest.mark.parametrize("nodes", ["0", "9", "many"])
def test_bad_nodes(root_dir: Path, nodes: str) -> None:
    done = call("--run-dir", root_dir / "bad", "up", "--nodes", nodes)
    assert done.returncode == 2 and "--nodes" in done.stderr and not (root_dir / "bad").exists()


@pytest.mark.parametrize("chosen", ["buddy", "buddy=nonsense", "nobody=buddy"])
def test_bad_implementation(root_dir: Path, chosen: str) -> None:
    done = call("--run-dir", root_dir / "bad", "up", "-i", chosen)
    assert done.returncode == 1 and "buddy" in done.stderr and "Traceback" not in done.stderr
    assert not (root_dir / "bad").exists()


@pytest.mark.parametrize("command", [["status"], ["buddyinfo"], ["slabinfo"], ["watermarks"], ["check"], ["events"], ["swap", "buddy", "next_fit"]])
def test_nothing_up(root_dir: Path, command: list[str]) -> None:
    done = call("--run-dir", root_dir / "none", *command)
    assert done.returncode == 1 and f"sylvie --run-dir {root_dir / 'none'} up" in done.stderr
    assert call("--run-dir", root_dir / "none", "down").returncode == 1


def test_run_with_nothing_up(root_dir: Path) -> None:
    done = call("--run-dir", root_dir / "none", "run", "--", "true")
    assert done.returncode == 125 and done.stdout == ""
    assert f"sylvie --run-dir {root_dir / 'none'} up" in done.stderr


def test_run_dir_from_the_environment_or_after_the_command(root_dir: Path) -> None:
    where = str(root_dir / "elsewhere")
    assert where in call("status", env=os.environ | {"SYLVIE_RUN_DIR": where}).stderr
    assert where in call("status", "--run-dir", where, env=os.environ | {"SYLVIE_RUN_DIR": "/nowhere"}).stderr


@pytest.mark.parametrize("missing", ["no-such-program", "/no/such/program"])
def test_command_not_found(small: Enclave, missing: str) -> None:
    done = small.run([missing])
    assert done.returncode == 127 and f"{missing}: command not found" in done.stderr


def test_not_executable(small: Enclave, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("hello\n")
    for what in (tmp_path / "data", tmp_path):
        done = small.run([what])
        assert done.returncode == 126 and str(what) in done.stderr


def test_doctor() -> None:
    done = call("doctor", "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)
    assert "userfaultfd" in call("doctor").stdout


def test_up_that_fails_leaves_nothing(root_dir: Path) -> None:
    where = root_dir / ("x" * (100 - len(str(root_dir))))  # too long a name for a socket in it
    done = call("--run-dir", where, "up", "--ram", "64M")
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.startswith("sylvie: "), done
    assert not where.exists()
    wait_for(lambda: not mentioning(where), 10, f"left: {mentioning(where)}")


def test_up_that_fails_leaves_what_others_put_there(root_dir: Path) -> None:
    where = root_dir / ("y" * (100 - len(str(root_dir))))
    where.mkdir()
    (where / "mine").write_text("precious")
    assert call("--run-dir", where, "up", "--ram", "64M").returncode == 1
    assert [f.name for f in where.iterdir()] == ["mine"]


# ---- with one ----


def test_up_twice(small: Enclave) -> None:
    pid = small.gateway_pid()
    done = small.cli("up", "--ram", "64M", ok=False)
    assert done.returncode == 1
    assert f"an enclave is up in {small.run_dir} already" in done.stderr and "down" in done.stderr
    assert small.gateway_pid() == pid and small.run(["echo", "on"]).stdout == "on\n"


def test_status_text(small: Enclave) -> None:
    out = small.cli("status").stdout
    assert str(small.run_dir) in out and "buddy" in out and "online" in out and "frames" in out and "reserve" in out


def test_check_json(small: Enclave) -> None:
    assert json.loads(small.cli("check", "--json").stdout) == {"violations": 0, "text": []}
    assert small.cli("check").stdout == "every invariant holds\n"


def test_events_see_a_program_start(small: Enclave) -> None:
    watcher = subprocess.Popen(
        [SYLVIE, "--run-dir", small.run_dir, "events", "mm", "--count", "3", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # The subscription takes a moment: programs are started until it has seen enough.
        wait_for(lambda: small.run(["ls", "/"]).returncode == 0 and watcher.poll() is not None, 60, "no events")
        out, err = watcher.communicate(timeout=10)
    finally:
        if watcher.poll() is None:
            watcher.kill()
            watcher.wait(10)
    rows = [json.loads(line) for line in out.splitlines()]
    assert watcher.returncode == 0 and len(rows) == 3 and not err, (out, err)
    assert {r["topic"] for r in rows} == {"mm"}
    assert any(r["type"] in ("MM_NEW", "MM_EXEC") for r in rows), rows
    assert [r["seqnum"] for r in rows] == sorted(r["seqnum"] for r in rows)
    assert small.cli("events", "nonsense", ok=False).returncode == 1


def test_supervisorctl_restarts_buddy(small: Enclave) -> None:
    old = wait_for(lambda: (c := small.component())["state"] == "online" and c["pid"], 20, "buddy is not online")
    assert "buddy: started" in small.supervisorctl("restart", "buddy")
    wait_for(lambda: (c := small.component())["state"] == "online" and c["pid"] != old, 20, "no new buddy")
    small.idle()
    small.check()


# ---- with several ----


def frames_of_programs(e: Enclave) -> np.ndarray:
    """What the frame table says of every MAPPED frame."""
    from bus.runtime import fetch_tables

    frames = fetch_tables(e.run_dir, lib.SY_C_BUDDY).frames.copy()
    mapped = np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)
    return np.stack([mapped, frames["asid"][mapped], frames["vpage"][mapped], frames["barrier"][mapped]])


def test_two_enclaves_side_by_side(small: Enclave, root_dir: Path) -> None:
    small.idle()
    other = bring_up(root_dir / "c2", "--ram", "64M")
    held: list[subprocess.Popen[str]] = []
    try:
        for e in (small, other):
            p = e.popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE)
            held.append(p)
            assert p.stdout and p.stdout.readline() == "there\n"
        for e, p in zip((small, other), held, strict=True):
            assert [a["pid"] for a in e.status()["address_spaces"]] == [p.pid]
        other.check()  # drains what is still in channels
        before = frames_of_programs(other)
        assert before.shape[1] >= 2048
        for _ in range(3):
            assert small.run([sys.executable, "-c", "print(len(bytes(range(256)) * 60000))"]).stdout == "15360000\n"
        other.check()
        assert (frames_of_programs(other) == before).all()
        small.check()
        for p in held:
            out, _ = p.communicate("\n", timeout=30)
            assert p.returncode == 0, out
        small.idle()
        other.idle()
        assert frames_of_programs(other).shape[1] == 0
    finally:
        for p in held:
            if p.poll() is None:
                p.kill()
                p.wait(10)
        take_down(other)
    assert not other.run_dir.exists() and not mentioning(other.run_dir)
    assert small.run(["echo", "still up"]).stdout == "still up\n"


def test_two_nodes(root_dir: Path) -> None:
    e = bring_up(root_dir / "c3", "--ram", "64M", "--nodes", "2")
    try:
        lines = e.cli("buddyinfo").stdout.splitlines()
        assert len(lines) == 2 and lines[0].startswith("Node 0") and lines[1].startswith("Node 1")
        s = e.status()
        assert len(s["nodes"]) == 2 and s["frames"]["total"] == 64 << 8
        assert len(json.loads(e.cli("buddyinfo", "--json").stdout)) == 2
        code = (
            "b = bytearray(40 << 20); b[::4096] = b'x' * len(b[::4096]); print(b.count(b'x'))"  # more than one node has
        )
        assert e.run([sys.executable, "-c", code]).stdout == f"{40 << 8}\n"
        e.idle()
        e.check()
    finally:
        take_down(e)
    assert not e.run_dir.exists()


def test_restarting_what_keeps_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    """supervisord may start it between our two requests; what else it says is a Problem, not a trace."""
    said = []

    class Supervisord:
        def stopProcess(self, name: str, _wait: bool) -> None:
            said.append(("stop", name))
            raise xmlrpc.client.Fault(70, f"NOT_RUNNING: {name}")

        def startProcess(self, name: str, _wait: bool) -> None:
            said.append(("start", name))
            raise xmlrpc.client.Fault(60 if name == "kswapd" else 50, f"{'ALREADY_STARTED' if name == 'kswapd' else 'SPAWN_ERROR'}: {name}")

    monkeypatch.setattr(life, "rpc", lambda _run_dir: Supervisord())
    life.restart(Path("/nowhere"), "kswapd")
    assert said == [("stop", "kswapd"), ("start", "kswapd")]
    with pytest.raises(Problem, match="SPAWN_ERROR: buddy"):
        life.restart(Path("/nowhere"), "buddy")


def test_supervisorctl_in_the_repository(root_dir: Path) -> None:
    """`supervisorctl restart buddy`, as typed in the repository's root, is about the default run directory."""
    e = Enclave(Path(DEFAULT_RUN_DIR))
    if e.run_dir.exists():
        pytest.skip(f"{DEFAULT_RUN_DIR} is in use")
    path = f"{SYLVIE.parent}:{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if k != "SYLVIE_RUN_DIR"} | {"PATH": path}
    done = call("up", "--ram", "64M", env=env)
    assert done.returncode == 0, done
    try:
        old = e.component()["pid"]
        done = subprocess.run(
            "supervisorctl restart buddy",
            shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout == "buddy: stopped\nbuddy: started\n", done
        wait_for(lambda: (c := e.component())["state"] == "online" and c["pid"] != old, 20, "no new buddy")
        assert e.run(["echo", "fine"]).stdout == "fine\n"
        assert not call("check", env=env).returncode
    finally:
        take_down(e)
    assert not e.run_dir.exists()


def test_tunables(enclave: Enclave) -> None:
    """Shown, set under what runs, kept over restarts; what is wrong changes nothing."""
    before = json.loads(enclave.cli("tune", "ksm", "--json").stdout)
    assert before["cpu"]["value"] == before["cpu"]["default"] and "cpu" in enclave.cli("tune", "ksm").stdout
    pid = enclave.component("ksm")["pid"]
    for bad, why in (("speed=1", "no tunable speed"), ("cpu=fast", "give a number"), ("cpu=7", "from 0.001 to 1"), ("cpu=700%", "share from 0% to 100%")):
        done = enclave.cli("tune", "ksm", bad, ok=False)
        assert done.returncode == 1 and why in done.stderr, done
    assert json.loads(enclave.cli("tune", "ksm", "--json").stdout) == before and enclave.component("ksm")["pid"] == pid
    assert "no component" in enclave.cli("tune", "slub", ok=False).stderr
    enclave.cli("tune", "ksm", "cpu=5%", "pages_to_scan=1000")
    try:
        assert enclave.component("ksm")["pid"] != pid
        now = json.loads(enclave.cli("tune", "ksm", "--json").stdout)
        assert (now["cpu"]["value"], now["pages_to_scan"]["value"], now["idle_cpu"]) == (0.05, 1000, before["idle_cpu"])
        enclave.cli("swap", "ksm", "hot_aware")
        assert json.loads(enclave.cli("tune", "ksm", "--json").stdout)["cpu"]["value"] == 0.05
        assert json.loads(enclave.cli("tune", "buddy", "--json").stdout) == {}
    finally:
        enclave.cli("swap", "ksm", "scan")
        enclave.cli("tune", "ksm", f"cpu={before['cpu']['default']}", f"pages_to_scan={before['pages_to_scan']['default']}")
