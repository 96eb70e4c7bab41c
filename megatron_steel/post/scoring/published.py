"""Scores that others have published, each with where it stands and how it was made; never mixed with our own.

Steel-LLM's table takes the rows of other models from several papers, whose prompts differ from Steel-LLM's, so even these
rows do not compare with each other exactly. Numbers only; must not know our scores.
"""

from dataclasses import dataclass

_STEEL = "Steel-LLM README and paper: 0-shot chat, written answers, its own extraction"
_OTHERS = "Steel-LLM README, from the C-Eval, MiniCPM and MAP-Neo papers: their prompts"


@dataclass(frozen=True)
class Published:
    """A published row: accuracies in percent by benchmark; a benchmark that the source leaves out is absent."""

    model: str
    scores: dict[str, float]
    source: str


PUBLISHED = (
    Published("Steel-LLM-chat-v1", {"ceval-valid": 38.57, "cmmlu": 33.48, "mmlu": 23.26}, _STEEL),
    Published("Steel-LLM-chat-v2", {"ceval-valid": 41.90, "cmmlu": 36.08, "mmlu": 30.82}, _STEEL),
    Published("TinyLlama-1.1B", {"ceval-valid": 25.02, "cmmlu": 24.03}, _OTHERS),
    Published("Phi-2 (2B)", {"ceval-valid": 23.37, "cmmlu": 24.18}, _OTHERS),
    Published("Deepseek-coder-1.3B-instruct", {"ceval-valid": 28.33, "cmmlu": 27.75}, _OTHERS),
    Published("Gemma-2b-it", {"ceval-valid": 32.3, "cmmlu": 33.07}, _OTHERS),
    Published("CT-LLM-SFT-2B", {"ceval-valid": 41.54, "cmmlu": 41.48}, _OTHERS),
    Published("MiniCPM-2B-sft-fp32", {"ceval-valid": 49.14, "cmmlu": 51.0}, _OTHERS),
    Published("Qwen1.5-1.8B-Chat", {"ceval-valid": 56.84, "cmmlu": 54.11}, _OTHERS),
)
