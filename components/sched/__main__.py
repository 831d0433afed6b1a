"""``python -m components.sched --run-dir DIR``: the process; config.json names the policy."""

from bus.runtime import main

if __name__ == "__main__":
    raise SystemExit(main("sched"))
