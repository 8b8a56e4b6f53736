"""LoRA finetuning inside live vLLM decode instances, within the decode latency objective."""
