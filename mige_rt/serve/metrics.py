"""What the server counts, for Prometheus; the names are those of SGLang's diffusion server, with our own prefix.

Labels are statuses alone: no prompt, no id.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """One server's, in a registry of its own. A request is one call of the API, which may be for several images."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.queued = Gauge(
            "mige:diffusion_num_queue_reqs", "Images waiting for their first step.", registry=self.registry
        )
        self.running = Gauge(
            "mige:diffusion_num_running_reqs", "Images between first and last step.", registry=self.registry
        )
        self.requests = Counter(
            "mige:diffusion_requests", "Requests that have ended, by status.", ["status"], registry=self.registry
        )
        self.latency = Histogram(
            "mige:diffusion_request_latency_seconds",
            "From a request's acceptance to its end, by status.",
            ["status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_time = Histogram(
            "mige:diffusion_queue_time_seconds",
            "From an image's acceptance to its first step.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "mige:diffusion_generation_batch_size",
            "Images in a call of the denoiser.",
            buckets=_BATCH_SIZES,
            registry=self.registry,
        )
        self.steps = Counter("mige:diffusion_steps", "Steps of all images.", registry=self.registry)
        self.restarts = Counter(
            "mige:diffusion_worker_restarts", "Restarts of the engine worker.", registry=self.registry
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
