"""The LoRA job that runs beside decode: data, layer units, unit runner, checkpoints."""
