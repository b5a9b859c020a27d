"""Engine servers on Ray: each replica a thin actor that starts the engine's own server on the node where its GPUs are.

The driver watches them and tells its client which URLs are up. What dies is started again, on the same node or another: the
actor, the node, the server, and a server that no longer answers. Requests under way there fail, and the client asks them
again elsewhere. vLLM over several nodes is `stillhouse.jobs.serve_llm`'s.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.pipeline.errors import ClusterError, RecipeError, first_line
from stillhouse.teachers.engine_commands import EngineSpec, command, ignored_settings
from stillhouse.teachers.engine_process import EngineServer, State, is_healthy

_ACTOR_TIMEOUT_S = 30.0
"""An actor that does not say how its server is for so long counts as dead; its node may hang."""
_MISSED_BEATS = 3
_PLACE_NOTICE_S = 30.0
_BACKOFF_S = (2.0, 60.0)
"""Pause before a second start, doubled each time, and the longest. Ray takes some seconds to know that a node is dead."""


class _EngineActor:
    """Lives in a Ray worker on the engine's node; its death ends the server, see `stillhouse.teachers.engine_watch`."""

    def __init__(self, spec: EngineSpec, log_folder: str | None, start_limit_s: float):
        import ray.util

        folder = Path(log_folder or Path(tempfile.gettempdir()) / f"stillhouse-engines-{os.getuid()}")
        host = ray.util.get_node_ip_address()
        self._server = EngineServer(spec, host=host, log_folder=folder, start_limit_s=start_limit_s)

    def launch(self) -> None:
        self._server.launch()

    def state(self) -> tuple[State, str]:
        """``starting``, ``up`` with the base URL, or ``dead`` with the reason."""
        state = self._server.state()
        if state != "dead":
            return state, self._server.url
        self._server.stop(drain_s=0)
        return state, self._server.why_dead()

    def stop(self, drain_s: float) -> None:
        self._server.stop(drain_s)


class EnginePool:
    """``replicas`` engine servers. Use as a context manager: inside, at least one is up or comes up again.

    Args:
        gpus_per_replica: GPUs of one node for each replica; 0 serves on the CPU.
        on_up: called with a base URL from which chats are answered, from a thread of this pool.
        on_down: called with a URL that no longer does.
        on_failed: called once with the error that ended the last replica's hope, so that nobody waits for a URL in vain.
        note: gets sentences about restarts and waiting, for the user.
        log_folder: folder on the nodes for the servers' logs; None takes one under the nodes' temporary folder.
        start_limit_s: seconds from start to the first answered chat.
        beat_s: seconds between looks at a replica; three in a row without an answer from its server restart it.
        max_failures: starts in a row that did not lead to ``stable_s`` seconds of service, before a replica is given up.

    Raises:
        RecipeError: the replica does not fit one node's GPUs.
        ClusterError: on entering, when no replica comes up; from `check`, when none is left.
    """

    def __init__(
        self,
        ray: Any,
        spec: EngineSpec,
        *,
        replicas: int,
        gpus_per_replica: float,
        cpus_per_replica: float,
        on_up: Callable[[str], object],
        on_down: Callable[[str], object],
        on_failed: Callable[[ClusterError], object] | None = None,
        note: Callable[[str], object] | None = None,
        log_folder: str | None = None,
        start_limit_s: float = 1800.0,
        beat_s: float = 5.0,
        max_failures: int = 5,
        stable_s: float = 60.0,
    ):
        require_one_node(ray, spec, gpus_per_replica)
        self._ray = ray
        self._spec = spec
        self._bundle = {"CPU": cpus_per_replica} | ({"GPU": gpus_per_replica} if gpus_per_replica else {})
        self._on_up, self._on_down, self._on_failed = on_up, on_down, on_failed
        self._note = note or (lambda _: None)
        self._log_folder = log_folder
        self._start_limit_s, self._beat_s = start_limit_s, beat_s
        self._max_failures, self._stable_s = max_failures, stable_s
        self._closing = threading.Event()
        self._came_up = threading.Event()  # or never will
        self._lock = threading.Lock()
        self._urls: set[str] = set()
        self._lost: list[ClusterError] = []
        self._num_restarts = 0
        self._threads = [
            threading.Thread(target=self._keep_replica, args=(number,), name=f"engine-{number}", daemon=True)
            for number in range(replicas)
        ]

    @property
    def urls(self) -> list[str]:
        """Base URLs that are up now."""
        with self._lock:
            return sorted(self._urls)

    @property
    def num_restarts(self) -> int:
        """How often a replica was started again after it had been started once."""
        return self._num_restarts

    def check(self) -> None:
        """Raise the ClusterError that ended the last replica, if it has come to that."""
        if len(self._lost) == len(self._threads):
            raise self._lost[-1]

    def __enter__(self) -> EnginePool:
        for sentence in ignored_settings(self._spec):
            self._note(sentence)
        for thread in self._threads:
            thread.start()
        try:
            self._came_up.wait()
            self.check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _keep_replica(self, number: int) -> None:
        """One thread a replica: hold its place in the cluster, run a server there, and again when it dies."""
        place = None
        try:
            # Holds the GPUs while a server is started again, and moves to another node with them when its node dies.
            place = self._ray.util.placement_group([self._bundle], strategy="STRICT_PACK")
            self._run_servers(number, place)
        except Exception as error:  # ends this thread and not the process: said to whoever waits for a URL
            what = error if isinstance(error, ClusterError) else ClusterError(f"engine replica {number}: {first_line(error)}")
            self._give_up(what)
        finally:
            if place is not None:
                self._ray.util.remove_placement_group(place)

    def _wait_for_place(self, number: int, place: Any) -> None:
        since, told = time.monotonic(), False
        while not self._closing.is_set() and not place.wait(1):
            if not told and time.monotonic() - since > _PLACE_NOTICE_S:
                self._note(f"engine replica {number} waits for a node with {_in_words(self._bundle)} free")
                told = True

    def _run_servers(self, number: int, place: Any) -> None:
        failures = 0
        while True:
            self._wait_for_place(number, place)
            if self._closing.is_set():
                return
            up_for_s, reason = self._run_one_server(place)
            if self._closing.is_set():
                return
            failures = 1 if up_for_s >= self._stable_s else failures + 1
            if failures >= self._max_failures:
                raise ClusterError(
                    f"engine replica {number} ({self._spec.engine}, {self._spec.model!r}) failed {failures} times in a row "
                    f"without {self._stable_s:g} s of service in between; the last time: {reason}"
                )
            self._note(f"engine replica {number} is started again, after: {reason}")
            with self._lock:
                self._num_restarts += 1
            self._closing.wait(min(_BACKOFF_S[0] * 2 ** (failures - 1), _BACKOFF_S[1]))

    def _run_one_server(self, place: Any) -> tuple[float, str]:
        """Start an actor with a server and watch it to its end; gives the seconds that it was up, and why it ended."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(placement_group=place, placement_group_bundle_index=0)
        actor = (
            self._ray.remote(_EngineActor)
            .options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                scheduling_strategy=strategy,
                max_concurrency=2,
            )
            .remote(self._spec, self._log_folder, self._start_limit_s)
        )
        url, since = "", 0.0
        try:
            launched, missed = actor.launch.remote(), 0
            while not self._ray.wait([launched], timeout=1)[0]:  # its worker starts, perhaps after its place has moved
                if self._closing.is_set():
                    return 0.0, "the pool was closed"
            self._ray.get(launched)
            while True:
                state, detail = self._ray.get(actor.state.remote(), timeout=_ACTOR_TIMEOUT_S)
                if state == "dead":
                    return self._seconds_since(since), detail
                if state == "up" and not url:
                    url, since = detail, time.monotonic()
                    self._tell_up(url)
                missed = 0 if not url or is_healthy(self._spec, url) else missed + 1
                if missed >= _MISSED_BEATS:
                    return self._seconds_since(since), f"{url} did not answer its health path {missed} times in a row"
                if self._closing.wait(self._beat_s if url else min(self._beat_s, 0.5)):
                    self._tell_down(url)
                    self._ray.get(actor.stop.remote(10.0), timeout=_ACTOR_TIMEOUT_S)
                    return self._seconds_since(since), "the pool was closed"
        except self._ray.exceptions.RayError as error:  # the actor or its node died, or hangs
            return self._seconds_since(since), f"the actor on its node ended ({type(error).__name__}: {first_line(error)})"
        finally:
            self._tell_down(url)
            self._ray.kill(actor)

    @staticmethod
    def _seconds_since(since: float) -> float:
        return time.monotonic() - since if since else 0.0

    def _tell_up(self, url: str) -> None:
        with self._lock:
            self._urls.add(url)
        self._on_up(url)
        self._came_up.set()

    def _tell_down(self, url: str) -> None:
        with self._lock:
            known = url in self._urls
            self._urls.discard(url)
        if known:
            self._on_down(url)

    def _give_up(self, error: ClusterError) -> None:
        with self._lock:
            self._lost.append(error)
            none_left = len(self._lost) == len(self._threads)
        self._note(f"given up: {error}")
        if none_left:
            self._came_up.set()
            if self._on_failed is not None:
                self._on_failed(error)


def require_one_node(ray: Any, spec: EngineSpec, gpus_per_replica: float) -> None:
    """Refuse a replica that is split over other GPUs than it gets, or over more than one node has.

    Raises:
        RecipeError: with what to change.
    """
    if gpus_per_replica and spec.num_gpus > 1 and gpus_per_replica != spec.num_gpus:
        raise RecipeError(
            f"tensor_parallel={spec.tensor_parallel} times pipeline_parallel={spec.pipeline_parallel} needs {spec.num_gpus} "
            f"GPUs a replica; gpus_per_replica={gpus_per_replica:g}"
        )
    largest = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if largest and gpus_per_replica > largest:
        raise RecipeError(
            f"a replica of {gpus_per_replica:g} GPUs is more than any node has ({largest:g}), and an engine's own server runs "
            "on one node; vllm over several nodes goes through Ray Serve LLM"
        )


def describe(spec: EngineSpec, *, replicas: int, gpus_per_replica: float, cpus_per_replica: float) -> list[str]:
    """What a pool would start, and where, in lines for ``plan``: the command as a shell would take it."""
    import shlex

    bundle = {"CPU": cpus_per_replica} | ({"GPU": gpus_per_replica} if gpus_per_replica else {})
    line = shlex.join(command(spec, 0, host="NODE")).replace("--port 0", "--port FREE_PORT")
    where = f"{replicas} replica{'s' if replicas > 1 else ''}, each on one node with {_in_words(bundle)}"
    return [f"{where}:", f"  {line}", *(f"  {sentence}" for sentence in ignored_settings(spec))]


def _in_words(bundle: dict[str, float]) -> str:
    return " and ".join(f"{number:g} {name}{'s' if number != 1 else ''}" for name, number in reversed(bundle.items()))
