"""What an image costs: work counts, baselines, latency and parity, as data and as reports."""
