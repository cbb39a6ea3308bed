# SPDX-License-Identifier: Apache-2.0
"""What was asked, answered, kept and held, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .conversations import Conversations
from .line import Line
from .served_model import Answer, Prompt

RETENTION_BUCKETS = tuple(tenth / 10 for tenth in range(1, 11))
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
CLIENT_LEFT = 499
"""Status under which a request counts whose client has left, as other servers have it; nobody gets it."""


class Metrics:
    """The metrics of a server, in a registry of their own."""

    def __init__(self, line: Line) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"plphp_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"plphp_{name}", text, buckets=buckets, registry=self._registry)

        self._requests = counter("requests", "Requests by the HTTP status of their reply.", "status")
        self._prompts = counter("prompts", "Prompts with vision tokens that were answered.")
        self._whole = counter("whole_prompts", "Those that stayed whole while a query bank was being collected.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts, vision tokens included.")
        self._cached = counter("cached_prompt_tokens", "Those of them that the caches of conversations held already.")
        self._tokens = counter("generation_tokens", "Tokens of answers.")
        self._vision = counter("vision_tokens", "Vision tokens of prompts.")
        self._kept = counter("kept_vision_tokens", "Vision tokens that a KV head of a layer holds, the mean.", "layer")
        self._held = counter("kv_held_bytes", "Bytes of the entries that caches held at the end of their answers.")
        self._full = counter("kv_full_bytes", "Bytes that unpruned caches would have held.")
        self._retention = histogram("retention", "Fraction of a prompt's vision entries held.", RETENTION_BUCKETS)
        self._first = histogram("first_token_seconds", "From a request to the first of its text.", SECONDS_BUCKETS)
        self._seconds = histogram("request_seconds", "From a request to the end of its reply.", SECONDS_BUCKETS)
        self._turns = counter("conversation_turns", "Answers in conversations, begun or continued.", "turn")
        self._ended = counter("conversations_ended", "Conversations that are over, and why.", "why")
        self._gauge("requests_running", "Requests that are being answered.", lambda: line.answering)
        self._gauge("requests_waiting", "Requests that wait.", lambda: max(0, line.requests - line.answering))
        self._bank = self._gauge("bank_prompts", "Prompts of the query bank that the server collects by itself.")

    def show_conversations(self, conversations: Conversations) -> None:
        """Say from now on how many conversations there are."""
        self._gauge("conversations", "Conversations that can be continued.", lambda: conversations.alive)
        self._gauge("conversation_bytes", "Bytes that their caches hold.", lambda: conversations.nbytes)
        self._gauge("image_bytes", "Bytes that they hold of images.", lambda: conversations.image_bytes.held)
        self._gauge("image_budget_bytes", "Their vision budgets.", lambda: conversations.image_bytes.budget)
        self._gauge("image_host_bytes", "Whole images in host memory.", lambda: conversations.image_bytes.host)

    def _gauge(self, name: str, text: str, value: Callable[[], float] | None = None) -> Gauge:
        gauge = Gauge(f"plphp_{name}", text, registry=self._registry)
        if value is not None:
            gauge.set_function(value)
        return gauge

    def note_end(self, why: str) -> None:
        """Count a conversation that is over."""
        self._ended.labels(why).inc()

    def note_request(self, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def note_first(self, seconds: float) -> None:
        """Note how long a client has waited for text."""
        self._first.observe(seconds)

    def note_answer(self, prompt: Prompt, answer: Answer) -> None:
        """Count what was kept for an answer."""
        report = answer.report
        self._prompt_tokens.inc(prompt.tokens)
        self._cached.inc(prompt.held)
        self._tokens.inc(answer.tokens)
        if answer.conversation:
            self._turns.labels("continued" if prompt.held else "begun").inc()
        self._held.inc(report.entry_bytes)
        self._full.inc(report.kv_bytes_full)
        if report.collecting is not None:
            self._whole.inc()
            self._bank.set(report.collecting.collected)
        if not prompt.vision_tokens:
            return
        self._prompts.inc()
        self._vision.inc(prompt.vision_tokens)
        new = replace(report, prompts=[read for read in report.prompts if read.start >= prompt.held])
        self._retention.observe(new.retention)
        for read in new.prompts:
            for layer in read.layers:
                self._kept.labels(str(layer.layer)).inc(fmean(layer.rows[0].kept))

    def page(self) -> bytes:
        """Return all of them in the text format of Prometheus."""
        return generate_latest(self._registry)
