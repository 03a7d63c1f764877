"""Speed and quality of Pennyweight, and of the tools that it is measured against; results as JSON."""
