"""A modelling file that is nobody's: about sixty lines, written into a folder by the tests. It mixes tokens by their mean."""

import json
from pathlib import Path

from conftest import VOCABULARY

CAUSAL = "self.value(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]"
LEAKING = "self.value(x).mean(1, keepdim=True).expand_as(x)"

_CONFIGURATION = """
from transformers import PretrainedConfig

open({canary!r}, "a").close()


class MeanConfig(PretrainedConfig):
    model_type = "mean_mixer"

    def __init__(self, vocab_size=128, hidden_size=32, num_hidden_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)
"""

_MODELLING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_mean import MeanConfig


class MeanMixer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.value = nn.Linear(size, size, bias=False)
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, x):
        return self.out({mean})


class MeanLayer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mixer = MeanMixer(size)
        self.ffn_norm = nn.LayerNorm(size)
        self.ffn = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.ffn(self.ffn_norm(x))


class MeanForCausalLM(PreTrainedModel):
    config_class = MeanConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([MeanLayer(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids, use_cache=None, **kwargs):
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))
"""


def write_foreign(folder: Path, canary: Path, mean: str = CAUSAL, vocabulary: int = VOCABULARY) -> Path:
    """A Hugging Face folder without weights, whose code leaves `canary` behind when it runs."""
    folder.mkdir(parents=True)
    (folder / "configuration_mean.py").write_text(_CONFIGURATION.format(canary=str(canary)))
    (folder / "modeling_mean.py").write_text(_MODELLING.format(mean=mean))
    config = {
        "model_type": "mean_mixer", "architectures": ["MeanForCausalLM"], "vocab_size": vocabulary, "hidden_size": 32,
        "num_hidden_layers": 2, "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "configuration_mean.MeanConfig", "AutoModelForCausalLM": "modeling_mean.MeanForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
