"""The co-located runtime inside the engine process: decide, apply, observe; nothing of vLLM is imported here."""
