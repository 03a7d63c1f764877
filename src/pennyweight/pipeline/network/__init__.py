"""Post-training quantization of a captured network: what happens to it between capture and the file."""
