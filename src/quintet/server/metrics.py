"""Prometheus metrics of engines and requests."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import quintet
from quintet.server.form_figures import FormSnapshot
from quintet.server.service import Service
from quintet.serving.figures import Distribution, Snapshot

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
# Whatever else somebody calls a method is not repeated.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


Number = Callable[[Snapshot], float]
GAUGES: tuple[tuple[str, str, Number], ...] = (
    ("num_requests_running", "Requests that have a row.", lambda s: s.running),
    ("num_requests_waiting", "Requests that wait for one.", lambda s: s.waiting),
    ("rows", "Rows there are.", lambda s: s.rows),
    ("rows_bytes", "Bytes that rows under way hold, estimated.", lambda s: s.held),
    ("prefix_cache_bytes", "Bytes of what was read before.", lambda s: s.kept),
)
COUNTERS: tuple[tuple[str, str, Number], ...] = (
    ("prompt_tokens", "Tokens of prompts, read or read before.", lambda s: s.queried),
    ("generation_tokens", "Tokens that were made.", lambda s: s.generated),
    ("computed_tokens", "Tokens that were read, again after a preemption.", lambda s: s.read),
    ("prefix_cache_query_tokens", "Tokens looked for in what was read.", lambda s: s.queried),
    ("prefix_cache_hit_tokens", "Those of them that were there.", lambda s: s.cached),
    ("prefix_cache_evictions", "Parts forgotten for want of room.", lambda s: s.evicted),
    ("state_snapshots", "Recurrent states that were kept.", lambda s: s.snapshots),
    ("state_restores", "Requests that went on from what was kept.", lambda s: s.restored),
    ("preemptions", "Rows that were given back before the end.", lambda s: s.preempted),
    ("integrity_failures", "Rows that no request had any more.", lambda it: it.lost),
    ("spec_drafted_tokens", "Tokens that were drafted.", lambda s: s.drafted),
    ("spec_accepted_tokens", "Those of them that held.", lambda s: s.accepted),
    ("engine_steps", "Forwards.", lambda s: s.steps),
    ("engine_overhead_seconds", "The engine's time beside them.", lambda s: s.overhead_seconds),
    (
        "nonfinite_logits",
        "Requests that ended as their numbers were none.",
        lambda s: s.failed.get("nonfinite", 0),
    ),
    (
        "admission_rejections",
        "Requests that came when as many waited as may.",
        lambda s: s.failed.get("queue_full", 0),
    ),
)
# With the name of the label that tells them apart.
BY_KIND: tuple[tuple[str, str, str, Callable[[Snapshot], Mapping[str, float]]], ...] = (
    ("request_success", "Answers that are whole.", "finished_reason", lambda s: _whole(s)),
    (
        "disconnects",
        "Requests whose client left, by how far they were.",
        "phase",
        lambda s: s.left,
    ),
    ("engine_failures", "Requests that an engine gave up.", "kind", lambda s: s.failed),
    ("row_copy_bytes", "Bytes into rows and out of them.", "why", lambda s: s.copied),
)
HISTOGRAMS: tuple[tuple[str, str, Callable[[Snapshot], Distribution]], ...] = (
    (
        "time_to_first_token_seconds",
        "From a request's coming to its first token.",
        lambda s: s.first_token_seconds,
    ),
    (
        "inter_token_latency_seconds",
        "Between steps that gave a request tokens.",
        lambda s: s.between_seconds,
    ),
    (
        "request_queue_time_seconds",
        "Until a request got its first row.",
        lambda s: s.queue_seconds,
    ),
    (
        "request_prefill_time_seconds",
        "From there to its first token.",
        lambda s: s.prefill_seconds,
    ),
    (
        "request_decode_time_seconds",
        "From there to its last.",
        lambda s: s.decode_seconds,
    ),
    (
        "e2e_request_latency_seconds",
        "From a request's coming to its last token.",
        lambda s: s.whole_seconds,
    ),
    ("request_prompt_tokens", "Tokens of prompts.", lambda s: s.prompt_tokens),
    ("request_generation_tokens", "Tokens of answers.", lambda s: s.answer_tokens),
)
FORM_GAUGES: tuple[tuple[str, str, Callable[[FormSnapshot], float]], ...] = (
    ("grammar_compiling", "Forms of answers that are compiled.", lambda it: it.compiling),
    (
        "grammar_late",
        "Those of them that nobody waits for any more; there are at most four at once.",
        lambda it: it.late,
    ),
)
FORM_COUNTERS: tuple[tuple[str, str, Callable[[FormSnapshot], float]], ...] = (
    ("grammar_masks", "Masks of tokens that were made.", lambda it: it.masks),
    ("grammar_mask_seconds", "The time they took.", lambda it: it.mask_seconds),
    ("parser_tool_calls", "Calls of tools that were read.", lambda it: it.calls),
    (
        "parser_fallback",
        "Texts that began as a call and are content, as it had no end.",
        lambda it: it.broken,
    ),
)


class Metrics:
    """Counts requests, and exposes these and the engines' counters.

    No label holds what a request says: routes are templates, codes and reasons a few words of ours,
    models the names that they are served under.

    Args:
        service: whose.
    """

    def __init__(self, service: Service) -> None:
        # Of its own: there may be another server in this process, or none that counts.
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "quintet_http_requests",
            "Requests that ended; 499 is a client that went before.",
            ("route", "method", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "quintet_http_request_seconds",
            "From the head of a request to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._errors = Counter(
            "quintet_request_errors",
            "Requests that were refused or failed, by the code of the error.",
            ("code",),
            registry=self._registry,
        )
        self._registry.register(_Server(service))
        self._registry.register(_Engines(service))
        self._registry.register(_Forms(service))
        ProcessCollector(registry=self._registry)

    def answered(
        self, route: str, method: str, status: int, seconds: float, code: str | None
    ) -> None:
        """Count a finished request."""
        method = method if method in METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if code is not None:
            self._errors.labels(code).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in an accepted format, and its content type."""
        encoder, kind = prometheus_client.exposition.choose_encoder(accept)
        return encoder(self._registry), kind


class _Server(Collector):
    """Gauges of the server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        build = InfoMetricFamily("quintet_build", "What runs.")
        build.add_metric((), {"version": quintet.__version__})
        yield build
        for name, documentation, value in (
            ("healthy", "Whether all models answer.", service.healthy),
            ("draining", "Whether it ends and takes no new requests.", service.draining),
            ("http_requests_under_way", "Requests that are answered now.", service.under_way),
        ):
            yield GaugeMetricFamily(f"quintet_{name}", documentation, float(value))


class _Engines(Collector):
    """The engines' counters, labelled by model."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        seen = {name: engine.state for name, engine in self._service.registry.engines.items()}
        rooms = {name: loaded.room for name, loaded in self._service.registry.engines.items()}
        for name, documentation, value_of in GAUGES:
            gauge = GaugeMetricFamily(f"quintet_{name}", documentation, labels=["model"])
            for model, snapshot in seen.items():
                gauge.add_metric([model], value_of(snapshot))
            yield gauge
        limit = GaugeMetricFamily(
            "quintet_prefix_cache_limit_bytes", "How many may be kept.", labels=["model"]
        )
        used = GaugeMetricFamily(
            "quintet_kv_cache_usage_ratio", "Of the bytes rows may hold.", labels=["model"]
        )
        for model, room in rooms.items():
            limit.add_metric([model], room.kept)
            used.add_metric([model], seen[model].held / max(room.whole, 1))
        yield limit
        yield used
        for name, documentation, value_of in COUNTERS:
            counter = CounterMetricFamily(f"quintet_{name}", documentation, labels=["model"])
            for model, snapshot in seen.items():
                counter.add_metric([model], value_of(snapshot))
            yield counter
        for name, documentation, label, values_of in BY_KIND:
            counter = CounterMetricFamily(f"quintet_{name}", documentation, labels=["model", label])
            for model, snapshot in seen.items():
                for kind, value in values_of(snapshot).items():
                    counter.add_metric([model, kind], value)
            yield counter
        for name, documentation, distribution in HISTOGRAMS:
            histogram = HistogramMetricFamily(f"quintet_{name}", documentation, labels=["model"])
            for model, snapshot in seen.items():
                _add(histogram, [model], distribution(snapshot))
            yield histogram
        steps = HistogramMetricFamily(
            "quintet_engine_step_seconds",
            "Forwards, by what they do: decode, verify drafts, or read a chunk of a prompt.",
            labels=["model", "kind"],
        )
        for model, snapshot in seen.items():
            for kind, one in snapshot.step_seconds.items():
                _add(steps, [model, kind], one)
        yield steps


class _Forms(Collector):
    """The counters of forms and calls, labelled by model."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        shapes = self._service.registry.shapes
        seen = {name: loaded.figures.snapshot() for name, loaded in shapes.items()}
        for name, documentation, value_of in FORM_GAUGES:
            gauge = GaugeMetricFamily(f"quintet_{name}", documentation, labels=["model"])
            for model, snapshot in seen.items():
                gauge.add_metric([model], value_of(snapshot))
            yield gauge
        for name, documentation, value_of in FORM_COUNTERS:
            counter = CounterMetricFamily(f"quintet_{name}", documentation, labels=["model"])
            for model, snapshot in seen.items():
                counter.add_metric([model], value_of(snapshot))
            yield counter
        refused = CounterMetricFamily(
            "quintet_grammar_refusals",
            "Requests without a form: it is invalid, too late, or those of others are.",
            labels=["model", "reason"],
        )
        seconds = HistogramMetricFamily(
            "quintet_grammar_compile_seconds", "Of each form of an answer.", labels=["model"]
        )
        for model, snapshot in seen.items():
            for reason, count in snapshot.refused.items():
                refused.add_metric([model, reason], count)
            _add(seconds, [model], snapshot.compile_seconds)
        yield refused
        yield seconds


def _whole(snapshot: Snapshot) -> Mapping[str, float]:
    return {how: count for how, count in snapshot.finished.items() if how != "cancelled"}


def _add(family: HistogramMetricFamily, labels: list[str], one: Distribution) -> None:
    """Add a histogram with cumulative buckets."""
    buckets, so_far = [], 0
    for bound, count in zip((*one.bounds, float("inf")), one.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(so_far)))
    family.add_metric(labels, buckets, one.total)
