"""The unified memory allocator: KV-cache blocks that decode does not need, lent to finetuning."""
