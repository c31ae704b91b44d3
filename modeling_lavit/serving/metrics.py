"""Figures of the server for Prometheus, at /metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from modeling_lavit.serving.requests import Answer


SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """What was asked and answered since the server's start."""

    def __init__(self):
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("lavit_requests", "Requests by route and status", ["route", "status"], **options)
        self.seconds = Histogram("lavit_request_seconds", "Of a request", ["route"], buckets=SECONDS, **options)
        self.in_flight = Gauge("lavit_requests_in_flight", "Requests that wait or run", **options)
        self.images = Counter("lavit_images", "Images drawn", **options)
        self.tokens = Counter("lavit_tokens", "Ids of prompts, and written ones", ["kind"], **options)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = Histogram("lavit_batch_size", "Requests that ran together", buckets=sizes, **options)

    def count(self, answers: list[Answer]) -> None:
        """Adds what the engine did."""
        for answer in answers:
            self.images.inc(sum(not isinstance(part, str) for part in answer.parts))
            self.tokens.labels("prompt").inc(answer.prompt_tokens)
            self.tokens.labels("completion").inc(answer.completion_tokens)
            self.batch_size.observe(answer.batch_size)
