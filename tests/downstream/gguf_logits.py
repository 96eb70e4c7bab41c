"""Not a test: run by `test_llama_cpp` with the Python that has llama.cpp. Ids, logits and greedy tokens of a GGUF file.

python gguf_logits.py MODEL.gguf REQUEST.json ANSWER.npz    REQUEST: {"texts": [...], "ids": [[...], ...], "new": N}
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

F32 = 0  # of ggml: keys and values are cached in fp16 unless asked


def main(model: str, request: str, answer: str) -> None:
    with open(request, encoding="utf-8") as stream:
        asked = json.load(stream)
    llm = Llama(model, n_ctx=256, n_threads=1, logits_all=True, type_k=F32, type_v=F32, verbose=False)
    found = {}
    for number, text in enumerate(asked["texts"]):
        found[f"tokens{number}"] = np.array(llm.tokenize(text.encode(), add_bos=False, special=True))
    for number, ids in enumerate(asked["ids"]):
        llm.reset()
        llm.eval(ids)
        found[f"logits{number}"] = np.array(llm.scores[: len(ids)])
        new: list[int] = []
        for _ in range(asked["new"]):
            new.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
            llm.eval(new[-1:])
        found[f"greedy{number}"] = np.array(new)
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
