"""llama.cpp on a GGUF file, in a process of its own: it brings its own OpenMP runtime. ``python -m ... FILE THREADS CONTEXT``.

Requests: ``decode`` (tokens of a prompt, count) greedily appends ``count`` tokens and times them without the prompt;
``prefill`` (tokens) times one evaluation from an empty cache; ``logits`` (tokens, path) saves the logits after each token,
float32 (tokens, vocab), as an .npy file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from stillhouse.kernels.bench import workers


class LlamaCpp:
    """A loaded model; each request starts from an empty cache."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=context, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer; see the top of this file."""
        tokens = request["tokens"]
        self._model.reset()
        if request["op"] == "logits":
            logits = []
            for token in tokens:
                self._model.eval([token])
                logits.append(self._last_logits().copy())
            np.save(request["path"], np.stack(logits))
            return {}
        if request["op"] == "prefill":
            return {"seconds": self._timed(tokens)}
        self._model.eval(tokens)
        started = time.perf_counter()
        for _ in range(request["count"]):
            self._model.eval([int(self._last_logits().argmax())])
        return {"seconds": time.perf_counter() - started}

    def _timed(self, tokens: Sequence[int]) -> float:
        started = time.perf_counter()
        self._model.eval(tokens)
        self._last_logits()  # waits for the end of the evaluation
        return time.perf_counter() - started

    def _last_logits(self) -> np.ndarray:
        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),))


if __name__ == "__main__":
    workers.serve(LlamaCpp(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).answer)
