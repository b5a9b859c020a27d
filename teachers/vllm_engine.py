"""A teacher in a vLLM engine inside the Ray actor: for one node's GPUs, without a server in between.

vLLM is an extra of its own: ``.venv/bin/pip install -e '.[vllm]'`` from the clone, on the GPU nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.pipeline.errors import TeacherError, first_line
from stillhouse.pipeline.records import Completion, Sampling


class VllmGenerator:
    """Completes rendered prompts with an engine that batches them as it likes; each row has its own seed.

    Args:
        tensor_parallel: GPUs that share each layer; the actor has to own that many.
        max_model_len: longest prompt and completion together, tokens; None takes the model's own.

    Raises:
        TeacherError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "bfloat16",
        revision: str | None = None,
        tensor_parallel: int = 1,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
    ):
        try:
            import vllm
        except ImportError as error:
            raise TeacherError(
                f"the teacher {model!r} needs vLLM, which is not installed on this worker; on the GPU nodes, from the clone: "
                ".venv/bin/pip install -e '.[vllm]', or choose teacher.kind=transformers"
            ) from error
        self._sampling_params = vllm.SamplingParams
        try:
            self._engine = vllm.LLM(
                model=model,
                dtype=dtype,
                revision=revision,
                tensor_parallel_size=tensor_parallel,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise TeacherError(f"vLLM cannot load {model!r}: {first_line(error)}") from error

    def complete(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """Complete rendered prompts, in their order."""
        params = [
            self._sampling_params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                skip_special_tokens=False,
            )
            for seed in seeds
        ]
        # add_special_tokens=False: the rendered prompt already holds BOS where the template wants one.
        tokenizer = self._engine.get_tokenizer()
        encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        finished = self._engine.generate([{"prompt_token_ids": ids} for ids in encoded], params, use_tqdm=False)
        return [
            Completion(
                text=request.outputs[0].text,
                finish_reason="stop" if request.outputs[0].finish_reason == "stop" else "length",
                num_prompt_tokens=len(ids),
                num_completion_tokens=len(request.outputs[0].token_ids),
                seed=seed,
            )
            for request, ids, seed in zip(finished, encoded, seeds)
        ]
