"""``python -m components.ksm --run-dir DIR``: the process; config.json names the policy."""

from bus.runtime import main

if __name__ == "__main__":
    raise SystemExit(main("ksm"))
