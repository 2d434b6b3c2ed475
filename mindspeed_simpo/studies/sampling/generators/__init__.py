"""What generates answers: transformers and vLLM in this process, or a server."""
