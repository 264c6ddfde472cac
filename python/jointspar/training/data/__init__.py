"""Datasets: one table of what they are, readers of their official formats, batches of one rank, and their check."""
