"""What a smaller model lost: perplexity, KL and agreement against the original; and proof that its runtime reads it."""
