"""What the witness of the kills remembers: of each spool what its lives said, and of all of them where lives have ended."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.kill_life import Death


@dataclass
class Experience:
    """What is known over all stores: the places where something durable happens, and where lives have ended."""

    places: dict[bool, list[str]] = field(default_factory=lambda: {True: [], False: []})
    """By whether they were seen in the first life of a spool: some are passed in no other."""
    deaths: Counter[tuple[str, str]] = field(default_factory=Counter)
    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_instant_kills: int = 0
    num_clean_ends: int = 0
    typical_s: float = 0.4
    """How long a life lasts that nobody ends."""

    @property
    def num_kills(self) -> int:
        return self.num_instant_kills + self.deaths.total()

    def next_place(self, first_life: bool, draw: random.Random) -> Death:
        """An end at the place and side that was tried the fewest times: at its first visit, later on also at others."""
        sides = [(place, when) for place in self.places[first_life] for when in ("before", "after")]
        # Over an object store its own operations come first: there are fewer kills, and the others are met in a folder too.
        side = min(sides, key=lambda side: (self.tried[side], not side[0].startswith("s3:"), draw.random()))
        self.tried[side] += 1
        return Death(side[0], draw.choice((1, 1, 2, 3, 5, 9)) if self.deaths[side] >= 2 else 1, side[1])


@dataclass
class Lane:
    """One spool of one store, and what was witnessed of the lives over it."""

    number: int
    num_lanes: int
    spool: Path
    life: int = 0
    acknowledged: dict[int, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    partial: set[str] = field(default_factory=set)
    highest: int = -1
    num_begun: int = 0
    num_failed: int = 0
    pid: int = 0
    pipe: int = -1
    buffer: bytes = b""
    started: float = 0.0
    kill_at: float = float("inf")
    died_at: str = ""
    last_heard: float = 0.0
    broken: list[str] = field(default_factory=list)

    def open_indices(self, at_least: int) -> tuple[int, ...]:
        """The first planned indices of this lane that are not known to be there."""
        found, index = [], self.number
        while len(found) < at_least:
            if index not in self.acknowledged and index not in self.seen:
                found.append(index)
            index += self.num_lanes
        return tuple(found)

    def hear(self, line: str, experience: Experience) -> None:
        """Note one line of a life, see `tests.chaos.kill_life`."""
        kind, _, rest = line.partition(" ")
        if kind == "B":
            self.num_begun += 1
            self.highest = max(self.highest, int(rest))
            if int(rest) in self.acknowledged:
                self.broken.append(f"index {rest} was acknowledged and is asked for again")
        elif kind == "A":
            index, sha = rest.split()
            self.acknowledged[int(index)] = sha
        elif kind == "S":
            self.seen.add(int(rest))
        elif kind == "P":
            self.partial.add(rest)
        elif kind == "F":
            self.num_failed += 1
        elif kind == "D":
            place, _, when = rest.rpartition(" ")
            experience.deaths[place, when] += 1
            self.kill_at, self.died_at = float("inf"), place
        elif kind == "N" and rest not in experience.places[self.life == 1]:
            experience.places[self.life == 1].append(rest)
        elif kind == "X":
            self.broken.append(rest)
