"""kill -9 of a writing process, again and again, at random instants and at every durable operation.

    python -m tests.chaos.kills --kills 1000 --acknowledged 200000 --object-store-kills 100

The witness (this process) never opens a store. It forks lives from its own warm state, reads from a pipe what they
acknowledge, kills them, and starts the next over the same spool. Several stores are filled one after another, so that each
re-opening stays quick; every third has two writers at once. At the end of each store a last life finishes what is missing,
and `kill_check` compares the store with what was witnessed. Prints one JSON object; exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.chaos.forking import in_a_child
from tests.chaos.kill_check import Witnessed, check_store
from tests.chaos.kill_life import MOST_IN_FLIGHT, OPENING, Death, LifePlan, live
from tests.chaos.kill_witness import Experience, Lane
from tests.chaos.s3_server import BUCKET, running_s3_server
from tests.chaos.synthetic import planned_key

KILLS_PER_STORE = 25
WINDOW = 2_000
HANGS_AFTER_S = 240.0


class Campaign:
    """One store, its lanes, and the kills that it has to stand."""

    def __init__(self, store: str, scratch: Path, name: str, num_lanes: int, draw: random.Random, experience: Experience):
        self.store, self.name, self.draw, self.experience = store, name, draw, experience
        self.lanes = [Lane(number, num_lanes, scratch / f"spool-{number}") for number in range(num_lanes)]

    def run(self, num_kills: int, num_acknowledged: int) -> dict[str, Any]:
        goal = self.experience.num_kills + num_kills
        self._live_until(lambda: self.experience.num_kills >= goal, self._next_life)
        share = -(-num_acknowledged // len(self.lanes))
        for lane in self.lanes:
            missing = self._missing(lane, share)
            # Also where nothing is missing: what is in the spool still has to get into the store.
            self._start(lane, self._life(lane, missing, len(missing), Death()), float("inf"))
            self._live_until(lambda: True, None)
            assert not self._missing(lane, 0), "the last life did not finish what is missing"
        return self._check()

    def _missing(self, lane: Lane, share: int) -> tuple[int, ...]:
        """What a last life has to do: gaps below what was ever begun, and what is left of the share to acknowledge."""
        num_open = max(0, share - len(lane.acknowledged))
        gaps = [
            i for i in range(lane.number, lane.highest + 1, lane.num_lanes) if i not in lane.acknowledged and i not in lane.seen
        ]
        return tuple(dict.fromkeys([*gaps, *lane.open_indices(num_open)]))

    def _next_life(self, lane: Lane) -> None:
        death, kill_after_s = self._choose_death(lane)
        quota = self.draw.choice((100, 300, 600, 900))
        self._start(lane, self._life(lane, lane.open_indices(WINDOW), quota, death), kill_after_s)

    def _life(self, lane: Lane, indices: tuple[int, ...], quota: int, death: Death) -> LifePlan:
        lane.life += 1
        known = list(lane.acknowledged)
        return LifePlan(
            store=self.store,
            spool=lane.spool,
            plan=self.name,
            life=lane.life,
            indices=indices,
            quota=quota,
            death=death,
            shard_bytes=self.draw.choice((30_000, 100_000, 400_000)),
            known_places=frozenset(self.experience.places[lane.life == 1]),
            acknowledged=tuple(self.draw.sample(known, min(len(known), 200))),
            threads=self.draw.random() < 0.25,
        )

    def _choose_death(self, lane: Lane) -> tuple[Death, float]:
        """A place in turn, some operation by its number, or a random instant."""
        draw, experience = self.draw, self.experience
        first_life, recovers, kind = lane.life == 0, bool(lane.died_at), draw.random()
        lane.died_at = ""
        if experience.places[first_life] and first_life:
            return experience.next_place(True, draw), float("inf")
        if recovers and kind < 0.4:  # once more, while the last one is put right
            return Death(OPENING, draw.randint(1, 4), draw.choice(("before", "after"))), float("inf")
        if experience.places[first_life] and kind < 0.6:
            return experience.next_place(False, draw), float("inf")
        if kind < 0.65:
            return Death("", draw.randint(1, 300), draw.choice(("before", "after"))), float("inf")
        return Death(), draw.uniform(0, experience.typical_s)

    def _start(self, lane: Lane, plan: LifePlan, kill_after_s: float) -> None:
        reading, writing = os.pipe()
        lane.started = lane.last_heard = time.monotonic()
        lane.kill_at = lane.started + kill_after_s
        lane.pid = os.fork()
        if lane.pid == 0:
            os.close(reading)
            live(plan, writing)
        os.close(writing)
        lane.pipe, lane.buffer = reading, b""

    def _live_until(self, done: Callable[[], bool], next_life: Callable[[Lane], None] | None) -> None:
        """Serve the pipes of all lanes; a lane whose life ended gets a new one until ``done``."""
        while True:
            for lane in self.lanes:
                if not lane.pid and next_life is not None and not done():
                    next_life(lane)
            alive = [lane for lane in self.lanes if lane.pid]
            if not alive:
                return
            now = time.monotonic()
            for lane in alive:
                if now - lane.last_heard > HANGS_AFTER_S:
                    lane.broken.append("a life hangs")
                    lane.kill_at = now
                if now >= lane.kill_at:
                    os.kill(lane.pid, signal.SIGKILL)
            pause = max(0.0, min([lane.kill_at for lane in alive] + [now + 5.0]) - now)
            ready, _, _ = select.select([lane.pipe for lane in alive], [], [], pause if pause else 0.05)
            for lane in alive:
                if lane.pipe in ready:
                    self._read(lane)

    def _read(self, lane: Lane) -> None:
        data = os.read(lane.pipe, 1 << 16)
        lane.last_heard = time.monotonic()
        *lines, lane.buffer = (lane.buffer + data).split(b"\n")
        for line in lines:
            lane.hear(line.decode(), self.experience)
        if data:
            return
        os.close(lane.pipe)
        _, status = os.waitpid(lane.pid, 0)
        lane.pid = 0
        seconds = time.monotonic() - lane.started
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.experience.num_instant_kills += lane.kill_at < float("inf")
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            self.experience.num_clean_ends += 1
            self.experience.typical_s += 0.1 * (min(seconds, 5.0) - self.experience.typical_s)
        else:
            lane.broken.append(f"a life ended with status {status}")
        if lane.broken:
            raise SystemExit(f"{self.store}, life {lane.life}, spool {lane.spool}: {lane.broken}")

    def _check(self) -> dict[str, Any]:
        lanes = self.lanes
        planned = [i for lane in lanes for i in range(lane.number, max([lane.highest, *lane.acknowledged]) + 1, lane.num_lanes)]
        witnessed = Witnessed(
            planned=frozenset(planned_key(self.name, index) for index in planned),
            acknowledged={planned_key(self.name, i): sha for lane in lanes for i, sha in lane.acknowledged.items()},
            partial=frozenset().union(*(lane.partial for lane in lanes)),
            num_begun=sum(lane.num_begun for lane in lanes),
            num_unseen_at_most=sum(lane.life for lane in lanes) * MOST_IN_FLIGHT,
            num_failed=sum(lane.num_failed for lane in lanes),
        )
        return in_a_child(lambda: check_store(self.store, witnessed))


def run_campaigns(kills: int, acknowledged: int, scratch: Path, seed: int, place: str = "") -> dict[str, Any]:
    """``kills`` kills over as many stores as that takes, in ``scratch`` or, with ``place``, under that URL."""
    draw, experience, started = random.Random(seed), Experience(typical_s=1.5 if place else 0.4), time.monotonic()
    num_stores = max(1, -(-kills // KILLS_PER_STORE))
    figures: Counter[str] = Counter()
    violations: list[str] = []
    for number in range(num_stores):
        folder = scratch / f"{'object' if place else 'local'}-{seed}-{number}"
        folder.mkdir()
        store = f"{place}/{folder.name}" if place else str(folder / "store")
        campaign = Campaign(store, folder, folder.name, 2 if number % 3 == 1 else 1, draw, experience)
        left = kills - experience.num_kills
        found = campaign.run(min(KILLS_PER_STORE, max(1, left)), -(-acknowledged // num_stores))
        violations += found.pop("violations")
        figures.update(found)
        if not found["num_lost"] + found["num_changed"] + found["num_duplicated"]:
            shutil.rmtree(folder)
        print(f"{place or 'local'}: {experience.num_kills} kills, {figures['num_acknowledged']} acknowledged", file=sys.stderr)
    return {
        "num_kills": experience.num_kills,
        "num_kills_at_instants": experience.num_instant_kills,
        "num_kills_at_operations": experience.deaths.total(),
        "num_clean_ends": experience.num_clean_ends,
        "num_stores": num_stores,
        **figures,
        "num_manual_repairs": 0,
        "violations": violations,
        "seconds": round(time.monotonic() - started, 1),
        "kills_by_place": {
            place: {when: experience.deaths[place, when] for when in ("before", "after")}
            for place in sorted({*experience.places[True], *experience.places[False]})
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000, help="kills of processes that write into a local folder")
    parser.add_argument("--acknowledged", type=int, default=200_000, help="traces to acknowledge there")
    parser.add_argument(
        "--object-store-kills", type=int, default=0, help="as many again over S3, half of them without conditional PUT"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where spools and stores lie; a temporary folder unless given")
    options = parser.parse_args(arguments)
    gc.freeze()  # the lives share this process's memory as long as nobody touches it
    results = {}
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        folder.mkdir(parents=True, exist_ok=True)
        if options.kills:
            results["local"] = run_campaigns(options.kills, options.acknowledged, folder, options.seed)
        share = options.object_store_kills // 2
        for name, honours in (("s3 with conditional PUT", True), ("s3 without conditional PUT", False)) if share else ():
            with running_s3_server(honours_if_none_match=honours) as environment:
                os.environ.update(environment)
                place = f"s3://{BUCKET}/{'conditional' if honours else 'plain'}"
                results[name] = run_campaigns(share, share * 100, folder, options.seed + 1 + honours, place)
    print(json.dumps(results, indent=2))
    return 1 if any(result["violations"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
