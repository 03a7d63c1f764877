"""Where weights come from: checkpoints on disk, and transformers models built without their weights."""
