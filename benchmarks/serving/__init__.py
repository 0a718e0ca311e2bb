"""What `mige-rt serve` does under load: latency, throughput and goodput by rate, and a soak."""
