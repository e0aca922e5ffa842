"""Families of metrics, from plain values: the one place that knows how Prometheus wants them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from outboxkit.durations import LIMITS

if TYPE_CHECKING:
    from prometheus_client import Metric

    from outboxkit.durations import Distribution

__all__ = ["build_info", "counter", "gauge", "histogram"]


def gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    """Returns values that go up and down, by the values of their labels."""
    family = GaugeMetricFamily(f"outboxkit_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    """Returns values that only go up, by the values of their labels."""
    family = CounterMetricFamily(f"outboxkit_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def histogram(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, Distribution]) -> Metric:
    """Returns durations, by the values of their labels."""
    family = HistogramMetricFamily(f"outboxkit_{name}", text, labels=labels)
    upper = [*map(str, LIMITS), "+Inf"]
    for key, found in values.items():
        family.add_metric(key, list(zip(upper, accumulate(found.counts), strict=True)), found.total)
    return family


def build_info(version: str) -> Metric:
    """Returns the version that runs."""
    labels = {(version, sys.version.split()[0]): 1}
    return gauge("build_info", "What runs.", ("version", "python"), labels)
