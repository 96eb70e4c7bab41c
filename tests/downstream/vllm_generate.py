"""Not a test: run by `test_vllm` with the Python that has vLLM. Greedy tokens and their log-probabilities.

python vllm_generate.py EXPORT REQUEST.json ANSWER.json [trust]    REQUEST: {"ids": [[...], ...], "new": N}
"""

import json
import sys
from pathlib import Path


def main(export: str, request: str, answer: str, *trust: str) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(request).read_text())
    llm = LLM(
        model=export, dtype="float32", trust_remote_code=bool(trust), enforce_eager=True,
        max_model_len=128, max_num_seqs=2, max_num_batched_tokens=128,
    )  # fmt: skip
    how = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["ids"]], how, use_tqdm=False)
    found = []
    for output in outputs:
        best = output.outputs[0]
        chosen = list(best.token_ids)
        steps = [step[token].logprob for step, token in zip(best.logprobs, chosen, strict=True)]
        found.append({"ids": chosen, "logprobs": steps})
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
