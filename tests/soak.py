"""One service under a bounded load for a long time, with kills: `make soak`.

    python -m tests.soak [--seconds 600] [--seed N]

The service is `tests.soak_service`: a parent whose workers start, record and exit, while a thread reads. Its
aggregator is killed and stopped, and workers are killed. Those that may be killed (label ``killed="yes"``)
may lose a little, which their own logs bound. All else has to be exact, and nothing may grow or remain.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

from tests.crew import resident
from tests.distributed import crashing
from tests.processes import ROOT, Home, children, mentions, wait_for
from tests.soak_service import KINDS, MARK, STEADY

EVERY = {"kill": (10, 20), "stop": (25, 50), "kill_worker": (3, 8), "reload": (40, 80)}
"""The range of seconds between two faults of a kind."""
STOPPED_SECONDS = (1.0, 3.0)
SETTLED_SECONDS = 5.0
LOST_SECONDS, LOST_TOO_SECONDS = 0.5, 2.0
"""Maximum seconds of events that a killed worker loses; the second one if the aggregator was killed too."""
BACK_SECONDS = 3.0
"""Maximum seconds until the aggregator after a killed one has all counts, unless it is stopped."""
OUTAGE_SECONDS = 10.0
MAX_GROWTH = {"aggregator": 4.0, "parent": 4.0, "descriptors": 1, "files": 1}
_MIB = 2**20


class Sample(NamedTuple):
    """One measurement, once a second; memory in MiB."""

    seconds: float
    aggregator: float
    parent: float
    descriptors: int
    files: int


class Soak:
    """A running service, the faults that it had, and the measurements."""

    def __init__(self, home: Home, parent: int, seconds: float, seed: int) -> None:
        self.home, self.parent, self.seconds = home, parent, seconds
        self.source = random.Random(seed + 1)
        self.kills: list[float] = []
        self.stops: list[tuple[float, float]] = []
        self.killed: dict[int, float] = {}
        self.reloads = 0
        self.samples: list[Sample] = []
        self.cpu: dict[int, float] = {}

    def aggregator(self) -> int:
        """Return the pid of the running aggregator; waits until there is one."""
        return wait_for(self._living, "an aggregator lives", OUTAGE_SECONDS)

    def _living(self) -> int:
        (service,) = self.home.services() or [self.home.directory]
        pid = crashing.aggregator(service / "metrics.ipc.lock")
        return pid if pid and b"tapes" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() else 0

    def kill(self) -> None:
        """Kill the aggregator; sometimes with a worker, sometimes the next aggregator too."""
        self._kill_aggregator()
        if self.source.random() < 0.25:
            self.kill_worker()
        if self.source.random() < 0.2:
            time.sleep(self.source.uniform(0, 1))
            self._kill_aggregator()

    def _kill_aggregator(self) -> None:
        pid = self.aggregator()
        self.kills.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid not in mentions(str(self.home.directory)), "it is dead", 5)

    def stop(self) -> None:
        """Stop the aggregator for some seconds; sometimes kill a worker or the aggregator meanwhile."""
        pid, began = self.aggregator(), time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self.source.uniform(*STOPPED_SECONDS))
            if self.source.random() < 0.3:
                self.kill_worker()
            if self.source.random() < 0.2:
                self._kill_aggregator()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.stops.append((began, time.monotonic()))

    def kill_worker(self) -> None:
        """Kill one of the workers that may be killed, if there is one."""
        living = children(self.parent)
        logs = [path.name.split("-") for path in self.home.directory.glob("log-*-yes")]
        victims = sorted({int(pid) for _, _, pid, _ in logs} & living - {*self.killed})
        if victims:
            pid = self.source.choice(victims)
            self.killed[pid] = time.monotonic()
            with contextlib.suppress(ProcessLookupError):  # it has exited meanwhile
                os.kill(pid, signal.SIGKILL)

    def reload(self) -> None:
        """Let the parent replace all workers at once."""
        self.reloads += 1
        os.kill(self.parent, signal.SIGHUP)

    def run(self) -> None:
        """Cause the faults that are due until the time is over."""
        began = now = time.monotonic()
        due = {name: now + self.source.uniform(*every) for name, every in EVERY.items()}
        sampled = 0.0
        while now < began + self.seconds:
            for name, when in due.items():
                if now >= when:
                    getattr(self, name)()
                    due[name] = time.monotonic() + self.source.uniform(*EVERY[name])
            if now >= sampled + 1:
                sampled = now
                with contextlib.suppress(OSError, ValueError):  # the aggregator is about to be replaced
                    self._sample(now - began)
            time.sleep(0.1)
            now = time.monotonic()

    def _sample(self, seconds: float) -> None:
        pid = self._living()
        if pid:
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            self.cpu[pid] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            memory = resident(pid) / _MIB, resident(self.parent) / _MIB
            files = len(os.listdir(self.home.services()[0]))
            self.samples.append(Sample(seconds, *memory, len(os.listdir(f"/proc/{self.parent}/fd")), files))

    def _certain_until(self, killed: float) -> float:
        """Return the time until which every event counts of a worker that was killed at ``killed``."""
        lost, first = killed - LOST_SECONDS, killed
        out = []
        for kill in self.kills:  # an aggregator that is stopped then writes or learns nothing
            near = [stop for stop in self.stops if stop[0] < kill + BACK_SECONDS and kill < stop[1] + 2]
            since, back = min([kill, *(began for began, _ in near)]), max([kill, *(end for _, end in near)])
            out.append((since, back + BACK_SECONDS))
        for since, back in sorted(out, reverse=True):  # the next one may be killed before it has all counts
            if since - LOST_TOO_SECONDS < first < back:
                first = min(first, since)
                lost = min(lost, since - LOST_TOO_SECONDS)
        return lost

    def bounds(self) -> tuple[Counter[str], Counter[str]]:
        """Return the minimum and the maximum of each count."""
        least: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for path in self.home.directory.glob("log-*"):
            _, number, pid, killed = path.name.split("-")
            marks = list(MARK.iter_unpack(path.read_bytes()))
            _, begun, done = marks[-1]
            if int(pid) in self.killed:
                until = self._certain_until(self.killed[int(pid)])
                done = max([mark[2] for mark in marks if mark[0] <= until], default=0)
            kind = {"killed": killed, "kind": str(int(number) % KINDS)}
            for key in (f"c {kind}", f"t {{'killed': '{killed}'}}", f"m {{'killed': '{killed}'}}"):
                least[key] += done
                most[key] += begun
        return least, most

    def settled(self, since: float) -> dict[str, Any]:
        """Return the first exact read that began after ``since``."""
        least, most = self.bounds()
        wrong: list[str] = []

        def exact() -> Any:
            shown = crashing.read(self.home.directory / "shown")
            if shown["asked"] < since:
                return None
            counts = {key: n for key, n in shown["counts"].items() if key[-1] == "}" and key[:2] != "tu"}
            wrong[:] = [
                f"{key}: {counts.get(key, 0)}, should be {least[key]} to {most[key]}"
                for key in {*counts, *most}
                if not least[key] <= counts.get(key, 0) <= most[key]
            ]
            if shown["gauges"].get("steady") != STEADY or shown["gauges"].get("alive"):
                wrong.append(f"gauges: {shown['gauges']}")
            return None if wrong else shown

        try:
            return wait_for(exact, "all is exact", since + SETTLED_SECONDS - time.monotonic())
        except AssertionError as error:
            raise AssertionError(f"{error}: {'; '.join(wrong[:10])}") from None

    def problems(self, shown: dict[str, Any]) -> list[str]:
        """Return what is wrong, a sentence each."""
        found = list(shown["wrong"])
        for last, now, key, n, then in shown["less"]:
            if not ("yes" in key and self._both_killed(last, now)):
                kill = max([kill for kill in self.kills if kill < now], default=0.0)
                found.append(f"{key} fell from {n} to {then}, {now - kill:.2f} s after a kill ({now:.2f})")
        # An exiting interpreter has no signal handlers any more; by then a worker has published everything.
        may_be = (0, -signal.SIGTERM), (0, -signal.SIGTERM, -signal.SIGKILL)
        for line in (self.home.directory / "ended").read_text().splitlines():
            pid, status = map(int, line.split())
            if status not in may_be[pid in self.killed]:
                found.append(f"worker {pid} ended with {status}")
        if shown["longest"] > OUTAGE_SECONDS:
            found.append(f"no read was answered for {shown['longest']:.1f} s")
        first, _, last = self.windows()
        for name, most in MAX_GROWTH.items():
            if getattr(last, name) > getattr(first, name) + most:
                found.append(f"{name} grew from {getattr(first, name):.1f} to {getattr(last, name):.1f}")
        if left := children(self.parent):
            found.append(f"the parent has children: {left}")
        output = (self.home.directory / "output.log").read_text(errors="replace")
        if output.count(" listens at ") > len(self.kills) + 1:
            found.append("an aggregator ended that was not killed")
        if "Traceback" in output:
            found.append(output[output.index("Traceback") :][:3000])
        return found

    def _both_killed(self, last: float, now: float) -> bool:
        """Return whether an aggregator and a worker were killed at about the time between two reads."""
        return any(
            last - SETTLED_SECONDS < kill < now
            and any(abs(worker - kill) < SETTLED_SECONDS for worker in self.killed.values())
            for kill in self.kills
        )

    def windows(self) -> list[Sample]:
        """Return the medians of the measurements after a minute, in the middle, and at the end."""
        half = max(self.seconds / 20, 5)
        centers = (min(60.0, self.seconds / 3), self.seconds / 2, self.seconds - half)
        near = [[one for one in self.samples if abs(one.seconds - center) <= half] for center in centers]
        return [Sample(*map(statistics.median, zip(*some))) for some in near]

    def slope(self, name: str) -> float:
        """Return by how much a measurement grew per hour, after the first minute."""
        some = [one for one in self.samples if one.seconds >= min(60.0, self.seconds / 3)]
        times, values = [one.seconds for one in some], [getattr(one, name) for one in some]
        return 3600 * statistics.linear_regression(times, values).slope

    def table(self, shown: dict[str, Any], used: float, settled: float, again: float) -> str:
        """Return the results as a Markdown table."""
        least, most = self.bounds()
        names = [key for key in most if key.startswith("c ")]
        yes = [key for key in names if "yes" in key]
        counted = shown["counts"]
        logs = list(self.home.directory.glob("log-*"))
        first, middle, last = self.windows()
        rows = {
            "duration": f"{self.seconds:g} s",
            "workers started": len(logs),
            "aggregator kills": len(self.kills),
            "stops of the aggregator": len(self.stops),
            "worker kills": f"{len(self.killed)}",
            "reloads": self.reloads,
            "reads": shown["reads"],
            "failed reads": f"{shown['failed']}, longest outage {shown['longest']:.2f} s",
            "events recorded": sum(most[key] for key in names),
            "events counted": sum(counted.get(key, 0) for key in names),
            "lost by killed workers": f"{sum(most[k] - counted.get(k, 0) for k in yes)}"
            f" (bound {sum(most[k] - least[k] for k in yes)})",
            "exact after the load, after one more kill": f"{settled:.2f} s, {again:.2f} s",
        }
        for name, unit in {"aggregator": " MiB", "parent": " MiB", "descriptors": "", "files": ""}.items():
            values = ", ".join(f"{getattr(one, name):.1f}" for one in (first, middle, last))
            grows = f"{self.slope(name):+.1f}{unit} an hour"
            rows[f"{name}: after a minute, middle, end"] = f"{values}{unit}; {grows}"
        rows["processor"] = f"{100 * used / self.seconds:.0f} % of a core"
        return "| what | how much |\n|---|---|\n" + "\n".join(f"| {k} | {row} |" for k, row in rows.items())


def soak(directory: pathlib.Path, seconds: float, seed: int) -> list[str]:
    """Run the test, print the results, and return what is wrong."""
    home = Home(directory)
    command = [sys.executable, "-m", "tests.soak_service", str(seconds), str(seed)]
    with home.running(command, PYTHONPATH=str(ROOT)) as process:
        one = Soak(home, process.pid, seconds, seed)
        wait_for((directory / "shown").exists, "the service answers")
        one.run()
        process.terminate()
        loaded = wait_for(lambda: crashing.read(directory / "loaded"), "the workers have left", 20)
        settled = one.settled(loaded)["asked"] - loaded
        one._kill_aggregator()
        shown = one.settled(one.kills[-1])
        found = one.problems(shown)
        (directory / "end").touch()
        wait_for(lambda: process.poll() is not None, "the parent has ended", SETTLED_SECONDS)
    with contextlib.suppress(AssertionError):
        wait_for(home.nothing_left, "nothing is left", SETTLED_SECONDS)
    left = [*mentions(str(directory)), *home.private.rglob("*")]
    user = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = user.ru_utime + user.ru_stime + sum(one.cpu.values())
    print(one.table(shown, used, settled, shown["asked"] - one.kills[-1]) + f"\n| seed | {seed} |")
    if process.returncode:
        found.append(f"the parent ended with {process.returncode}")
    return [*found, f"left: {left}"] if left else found


def main() -> None:
    """Run the soak test, print the results, and exit with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    if arguments.seconds < 30:
        parser.error("--seconds has to be 30 at least")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # runs the finally below
    directory = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        found = soak(directory, arguments.seconds, arguments.seed)
    except AssertionError as error:
        found = [str(error)]
    finally:
        for pid in mentions(str(directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
    if found:
        sys.exit("\n".join([f"seed {arguments.seed}:", *found]))


if __name__ == "__main__":
    main()
