"""Generating text: the cache, one decode step, sampling and the engine that joins them."""

from salience.runtime.engine import Engine
from salience.runtime.limits import context_limit
from salience.runtime.request import Event, Request, Result, TokenLogprob
from salience.runtime.sampling import Sampling

__all__ = ["Engine", "Event", "Request", "Result", "Sampling", "TokenLogprob", "context_limit"]
