"""chiasm: the vision encoder of a multimodal LLM in instances of its own, apart from prefill and decode."""

__version__ = "0.4.0"
