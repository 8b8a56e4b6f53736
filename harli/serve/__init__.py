"""The server: vLLM's OpenAI API, fine-tuning jobs that run inside its decode, and their adapters served."""
