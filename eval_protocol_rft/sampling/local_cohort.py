"""Requests that run together: one forward and one draw for all of them, then who goes on.

Invariant: which requests share a cohort changes neither their tokens nor their logprobs, beyond
float noise in the logits. A request whose logits are unusable leaves the others as they are.
Shapes: R requests of a cohort, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval_protocol_rft.sampling.local_batch import Batch
from eval_protocol_rft.sampling.local_draw import DrawPlan, draw, uniforms
from eval_protocol_rft.sampling.local_model import LocalModel
from eval_protocol_rft.sampling.local_prefixes import Joining, Prefixes
from eval_protocol_rft.sampling.local_request import Decode, Request
from eval_protocol_rft.sampling.types import Completion, SamplingError


class Outcome(NamedTuple):
    """What a request is answered with."""

    request: Request
    result: Completion | SamplingError


class Cohort:
    """R requests, each with its row of a batch of key/value caches."""

    def __init__(self, batch: Batch, requests: Sequence[Request], rows: Sequence[int]) -> None:
        self.requests = list(requests)
        self._batch = batch
        self._rows = list(rows)
        """Batch row of each request; requests with one prompt share a row until their first
        tokens are drawn."""
        self._plan = DrawPlan.build([r.settings for r in requests], batch.device)
        self._seeds_R = np.array([r.seed for r in requests], dtype=np.uint64)
        self._tokens_R: Tensor
        self._live: list[int] = []
        """Places in `requests` of those that go on."""
        self._complete: list[int] = []
        """Places of those that the last token completed."""

    @classmethod
    def start(
        cls, model: LocalModel, joining: Sequence[Joining], decode: Decode
    ) -> tuple[Cohort, list[Outcome]]:
        """Prefill, each distinct prompt once, and draw every request's first token. Something is
        known of every prompt, or of none."""
        requests = [one.request for one in joining]
        row_of: dict[tuple[int, ...], int] = {}
        rows = [row_of.setdefault(request.prompt_ids, len(row_of)) for request in requests]
        known = [joining[rows.index(row)].known for row in range(len(row_of))]
        batch, logits_BV = Batch.prefill(model, list(row_of), [one for one in known if one])
        cohort = cls(batch, requests, rows)
        return cohort, cohort._draw(logits_BV[rows], decode)

    def advance(self, decode: Decode) -> list[Outcome]:
        """One token more for every request; the cohort must come from `merge`."""
        return self._draw(self._batch.step(self._tokens_R), decode)

    def keep(self, prefixes: Prefixes) -> None:
        """Leave what was computed of the requests that just ended to the next turns of their
        sessions. The last token was drawn and never run: it has no keys and values."""
        for index in self._complete:
            request = self.requests[index]
            length = len(request.prompt_ids) + len(request.token_ids) - 1
            if request.session is not None and prefixes.fits(length):
                ids = (*request.prompt_ids, *request.token_ids[:-1])
                columns = self._batch.columns(self._rows[index], length)
                prefixes.keep(request.session, ids, columns)

    @classmethod
    def merge(cls, cohorts: Sequence[Cohort]) -> Cohort | None:
        """One cohort of all requests that go on, a row each; None if there are none. The cohorts
        given are used up."""
        cohorts = [cohort for cohort in cohorts if cohort._live]
        if not cohorts:
            return None
        if len(cohorts) > 1 or cohorts[0]._shares_rows():
            return cls._gather(cohorts)
        (cohort,) = cohorts
        return cohort if len(cohort._live) == len(cohort.requests) else cohort._shrink()

    @classmethod
    def _gather(cls, cohorts: Sequence[Cohort]) -> Cohort:
        requests = [request for c in cohorts for request in c.live]
        batch = Batch.gather([(c._batch, [c._rows[i] for i in c._live]) for c in cohorts])
        merged = cls(batch, requests, range(len(requests)))
        merged._tokens_R = torch.cat([c._tokens_R[c._live] for c in cohorts])
        return merged

    def _shrink(self) -> Cohort:
        order = self._batch.shrink(self._live)
        smaller = type(self)(self._batch, [self.requests[i] for i in order], range(len(order)))
        smaller._tokens_R = self._tokens_R[order]
        return smaller

    def _shares_rows(self) -> bool:
        return len(self._batch) < len(self.requests)

    @property
    def live(self) -> list[Request]:
        """Requests that go on."""
        return [self.requests[index] for index in self._live]

    def _draw(self, logits_RV: Tensor, decode: Decode) -> list[Outcome]:
        steps_R = np.array([len(r.token_ids) for r in self.requests], dtype=np.uint64)
        uniforms_R = uniforms(self._seeds_R, steps_R).to(logits_RV.device)
        drawn = draw(logits_RV, self._plan, uniforms_R)
        self._tokens_R = drawn.tokens_B
        values_R = zip(*(values_R.tolist() for values_R in drawn), strict=True)
        outcomes = []
        self._live, self._complete = [], []
        for index, (request, values) in enumerate(zip(self.requests, values_R, strict=True)):
            result = _take(request, *values, decode=decode)
            if result is not None:
                outcomes.append(Outcome(request, result))
                if isinstance(result, Completion):
                    self._complete.append(index)
            elif not request.dropped:
                self._live.append(index)
        return outcomes


def _take(
    request: Request, token: int, logprob: float, raw_logprob: float, *, decode: Decode
) -> Completion | SamplingError | None:
    try:
        request.add(token, logprob, raw_logprob)
        return request.ending(decode)
    except SamplingError as error:
        return error
