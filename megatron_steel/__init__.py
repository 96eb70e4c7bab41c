"""megatron_steel: raw text goes in, a trained Hugging Face model with honest numbers comes out."""

__version__ = "0.1.0"
