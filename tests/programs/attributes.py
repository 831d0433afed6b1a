"""What a program reads of how it is scheduled, before and after it sets something, and what its children and threads have: one line each."""

import os
import subprocess
import sys
import threading
import time

BUSY = float(sys.argv[1]) if len(sys.argv) > 1 else 0.3


def say(what: str) -> None:
    reset = os.sched_getscheduler(0) & os.SCHED_RESET_ON_FORK
    print(what, sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0), bool(reset), os.sched_getparam(0).sched_priority, os.getpriority(os.PRIO_PROCESS, 0), flush=True)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
        time.sleep(0.0001)


say("at first")
spin(BUSY)
say("later")
cpu = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})
os.nice(2)
spin(BUSY)
say("one CPU, nice")
t = threading.Thread(target=lambda: (spin(BUSY), say("a thread")))
t.start()
t.join()
print(subprocess.run(["sh", "-c", "sleep 0.05; taskset -p $$ | sed 's/.*: //'; nice; chrt -p $$ | sed 's/.*: //'"], capture_output=True, text=True, check=True).stdout.split(), flush=True)
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
spin(BUSY)
say("batch")
try:
    os.sched_setaffinity(0, {5000})
except OSError as error:
    print("affinity", error.errno)
if os.geteuid() == 0:
    os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(30))
    spin(BUSY)
    say("real-time")
    print(subprocess.run(["sh", "-c", "chrt -p $$ | sed 's/.*: //'"], capture_output=True, text=True, check=True).stdout.split(), flush=True)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    say("ordinary")
os.sched_setaffinity(0, {*range(os.cpu_count() or 1)})
say("at last")
