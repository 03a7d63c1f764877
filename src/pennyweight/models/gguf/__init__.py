"""What a GGUF file says about a model, and how it stores the tensors of a checkpoint."""
