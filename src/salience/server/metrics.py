"""What a server does, in numbers that Prometheus reads at `/metrics`.

Each app has a registry of its own, so that two in one process do not mix.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from salience.monitor import memory
from salience.server.worker import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Told of tokens by the worker's thread, of requests by the app."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._first = Histogram(
            "salience_time_to_first_token_seconds",
            "From the request to its first token, waiting included.",
            buckets=_FIRST,
            registry=registry,
        )
        self._between = Histogram(
            "salience_inter_token_seconds",
            "Between two tokens of a reply.",
            buckets=_BETWEEN,
            registry=registry,
        )
        self._prompt = Counter("salience_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._reused = Counter(
            "salience_reused_prompt_tokens",
            "Tokens of prompts that were in the cache.",
            registry=registry,
        )
        self._generated = Counter(
            "salience_generated_tokens", "Tokens of replies.", registry=registry
        )
        self._requests = Counter(
            "salience_requests", "Answered requests.", ("route", "status"), registry=registry
        )

    def began(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A reply has its first token."""
        self._first.observe(seconds)
        self._prompt.inc(prompt_tokens)
        self._reused.inc(cached_tokens)

    def drew(self, tokens: int, seconds: float) -> None:
        """A reply has more tokens, the last ones so long ago; 0 for the first."""
        self._generated.inc(tokens)
        if seconds:
            self._between.observe(seconds / tokens)

    def answered(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def observe(self, worker: Worker) -> None:
        """Read these of a worker whenever they are asked for."""
        reads = {
            "salience_queue_length": ("Replies that wait for a slot.", lambda: worker.waiting),
            "salience_slots_in_use": ("Replies that are made.", lambda: worker.running),
            "salience_slots": ("Replies that can be made.", lambda: worker.engine.max_batch),
            "salience_cache_tokens": (
                "Tokens whose keys and values are kept.",
                lambda: worker.cache_tokens,
            ),
            "salience_tokens_per_second": (
                "Of all replies, in the last seconds.",
                lambda: worker.tokens_per_second,
            ),
            "salience_resident_memory_bytes": ("Of this process.", lambda: memory().resident),
            "salience_gpu_used_bytes": ("Of all visible GPUs.", lambda: memory().gpu_used),
        }
        for name, (text, read) in reads.items():
            Gauge(name, text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return bytes(generate_latest(self._registry))
