"""What each algorithm is made of: one table.

Invariant: every threshold that the wire knows is sent explicitly, as an absolute bound on the
ratio: eps = 0.2 is `clip_low_threshold` 0.8 and `clip_high_threshold` 1.2.

An algorithm here is an advantage estimator and a loss. A server is given some losses by name; the
others are computed here, and reach it as a custom loss. The paper's normalisation is stated, not
applied: see `datums` for who divides, and when.

The choices behind a batch, checked together before any row is read.

Invariant: options that contradict each other are an error here, not a surprise in the data.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge
from numpy.typing import NDArray

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.training import advantages
from eval_protocol_rft.training._datums import Normalization
from eval_protocol_rft.training._filters import Filters, filter_group
from eval_protocol_rft.training._types import PromptGroup, TrainingDataError

Estimator = Callable[..., NDArray[Any]]
"""[P, G] rewards (NaN: missing) to [P, G] advantages; [P, G, K] in where components are used.
A function of `advantages`, one with its arguments bound (`functools.partial`), or your own. One
with a parameter `lengths` that has no default is given the sampled tokens [P, G] of each
completion, one with `baselines` the mean reward [P] of each prompt's greedy completions, which
then do not train."""

ConfigValue = float | str | bool

_COUNT_ALONE = (advantages.reinforce, advantages.reinforce_pp, advantages.remax)
"""Estimators under which a completion trains without others in its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One row of the table."""

    estimator: Estimator
    loss_fn: str
    """Name of the loss, a key of `losses.POLICY_LOSSES`: the wire's, where the wire has it."""
    loss_fn_config: Mapping[str, float]
    """Its thresholds, absolute."""
    paper_normalization: Normalization
    """How the paper divides the sum over tokens."""
    source: str


_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

ALGORITHMS: Mapping[str, Algorithm] = {
    "grpo": Algorithm(
        estimator=advantages.grpo,
        loss_fn="ppo",
        loss_fn_config=_CLIP,
        paper_normalization="sequence",
        source="Shao et al. 2024, arXiv:2402.03300, eq. 3, without its KL term",
    ),
    "dapo": Algorithm(
        # Without dual clip, DAPO's objective is ppo with a higher upper bound.
        estimator=advantages.grpo,
        loss_fn="ppo",
        loss_fn_config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.28},
        paper_normalization="token",
        source="Yu et al. 2025, arXiv:2503.14476, eq. 8",
    ),
    "dr_grpo": Algorithm(
        estimator=advantages.dr_grpo,
        loss_fn="ppo",
        loss_fn_config=_CLIP,
        paper_normalization="constant",
        source="Liu et al. 2025, arXiv:2503.20783, section 3.2",
    ),
    "cispo": Algorithm(
        estimator=advantages.grpo,
        loss_fn="cispo",
        loss_fn_config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        paper_normalization="token",
        source="MiniMax 2025, arXiv:2506.13585, eq. 4; the paper gives no bounds",
    ),
    "gspo": Algorithm(
        estimator=advantages.grpo,
        loss_fn="gspo",
        loss_fn_config={"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        paper_normalization="sequence",
        source="Zheng et al. 2025, arXiv:2507.18071, eq. 5; bounds of section 5.1",
    ),
    "rloo": Algorithm(
        estimator=advantages.rloo,
        loss_fn="importance_sampling",
        loss_fn_config={},
        paper_normalization="none",
        source="Ahmadian et al. 2024, arXiv:2402.14740, section 2",
    ),
    "importance_sampling": Algorithm(
        estimator=advantages.dr_grpo,
        loss_fn="importance_sampling",
        loss_fn_config={},
        paper_normalization="none",
        source="policy gradient with importance weights, rewards centred per group",
    ),
    "reinforce": Algorithm(
        estimator=advantages.reinforce,
        loss_fn="reinforce",
        loss_fn_config={},
        paper_normalization="none",
        source="Williams 1992, eq. 4; the server needs the capability supports_reinforce",
    ),
    "dro": Algorithm(
        estimator=advantages.dr_grpo,
        loss_fn="dro",
        loss_fn_config={"beta": 0.05},
        paper_normalization="none",
        source="Richemond et al. 2024, arXiv:2405.19107, with the group mean as value",
    ),
    "gmpo": Algorithm(
        estimator=advantages.grpo,
        loss_fn="geo_mean",
        loss_fn_config={
            "clip_low_threshold": math.exp(-0.4),
            "clip_high_threshold": math.exp(0.4),
        },
        paper_normalization="sequence",
        source="Zhao et al. 2025, arXiv:2507.20673; its bounds are e^-0.4 and e^0.4",
    ),
    "sapo": Algorithm(
        estimator=advantages.grpo,
        loss_fn="sapo",
        loss_fn_config={"tau_pos": 1.0, "tau_neg": 1.05},
        paper_normalization="sequence",
        source="Gao et al. 2025, arXiv:2511.20347",
    ),
    "dppo_tv": Algorithm(
        estimator=advantages.dr_grpo,
        loss_fn="dppo_tv",
        loss_fn_config={
            "divergence_low_threshold": 0.15,
            "divergence_high_threshold": 0.15,
            "ratio_cap": 20.0,
        },
        paper_normalization="constant",
        source="Qi et al. 2026, arXiv:2602.04879, binary TV; settings of verl's example",
    ),
    "dppo_kl": Algorithm(
        estimator=advantages.dr_grpo,
        loss_fn="dppo_kl",
        loss_fn_config={
            "divergence_low_threshold": 0.05,
            "divergence_high_threshold": 0.05,
            "ratio_cap": 20.0,
        },
        paper_normalization="constant",
        source="Qi et al. 2026, arXiv:2602.04879, binary KL; settings of verl's example",
    ),
    "clip_cov": Algorithm(
        estimator=advantages.grpo,
        loss_fn="clip_cov",
        loss_fn_config={
            **_CLIP,
            "clip_cov_ratio": 2e-4,
            "clip_cov_lb": 1.0,
            "clip_cov_ub": 5.0,
        },
        paper_normalization="token",
        source="Cui et al. 2025, arXiv:2505.22617, Clip-Cov; settings of verl",
    ),
    "kl_cov": Algorithm(
        estimator=advantages.grpo,
        loss_fn="kl_cov",
        loss_fn_config={"kl_cov_ratio": 2e-4, "ppo_kl_coef": 1.0},
        paper_normalization="token",
        source="Cui et al. 2025, arXiv:2505.22617, KL-Cov",
    ),
    "gpg": Algorithm(
        estimator=advantages.gpg,
        loss_fn="reinforce",
        loss_fn_config={},
        paper_normalization="token",
        source="Chu et al. 2025, arXiv:2504.02546",
    ),
    "opo": Algorithm(
        estimator=advantages.opo,
        loss_fn="importance_sampling",
        loss_fn_config={},
        paper_normalization="none",
        source="Hao et al. 2025, arXiv:2505.23585; on-policy, where the ratio is 1",
    ),
    "remax": Algorithm(
        estimator=advantages.remax,
        loss_fn="importance_sampling",
        loss_fn_config={},
        paper_normalization="none",
        source="Li et al. 2023, arXiv:2310.10505, algorithm 1; needs greedy completions",
    ),
    "grpo_passk": Algorithm(
        estimator=advantages.grpo_passk,
        loss_fn="ppo",
        loss_fn_config=_CLIP,
        paper_normalization="none",
        source="Tang et al. 2025, arXiv:2503.19595; divided and clipped as in verl",
    ),
}


BiasedSampling = Literal["warn", "refuse"]


class BatchArguments(TypedDict, total=False):
    """`BatchOptions` as keyword arguments."""

    algorithm: str
    estimator: Estimator | None
    components: tuple[str, ...]
    loss_fn_config: Mapping[str, ConfigValue] | None
    normalization: Normalization
    constant_length: int | None
    filters: Filters
    biased_sampling: BiasedSampling
    pass_threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How rows become a batch; each is documented at `build_batch`."""

    algorithm: Annotated[str, Flag()] = "grpo"
    """grpo, dapo, dr_grpo, cispo, gspo, rloo, ... (docs/training.md)"""
    estimator: Estimator | None = None
    components: tuple[str, ...] = ()
    loss_fn_config: Mapping[str, ConfigValue] | None = None
    normalization: Annotated[Normalization, Flag()] = "none"
    """The division that goes into the weights."""
    constant_length: Annotated[int | None, Ge(1), Flag()] = None
    """L of --normalization constant, in tokens."""
    filters: Filters = field(default_factory=Filters)
    biased_sampling: BiasedSampling = "warn"
    pass_threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise TrainingDataError(
                f"unknown algorithm {self.algorithm!r}; there are {', '.join(ALGORITHMS)}"
            )
        check_options(self, TrainingDataError)
        self._check_thresholds()
        if (self.normalization == "constant") != (self.constant_length is not None):
            raise TrainingDataError(
                'normalization="constant" and constant_length (L in tokens, the same for the whole '
                f"run) go together; got {self.normalization!r} and {self.constant_length}"
            )
        if self.components and self.estimator is None:
            raise TrainingDataError(
                "components= needs an estimator of several rewards: estimator=advantages.gdpo"
            )
        if self.components and self.filters.soft_overlong is not None:
            raise TrainingDataError(
                "soft_overlong shapes the reward, which an estimator of components does not read"
            )

    def _check_thresholds(self) -> None:
        for name, low, high in (
            ("clip_low_threshold", 0.0, 1.0),
            ("clip_high_threshold", 1.0, math.inf),
        ):
            value = self.thresholds.get(name)
            if value is not None and not low <= float(value) <= high:
                raise TrainingDataError(
                    f"loss_fn_config[{name!r}] is {value}: thresholds are absolute bounds on the "
                    "ratio, so eps_low 0.2 and eps_high 0.28 are 0.8 and 1.28"
                )

    @property
    def advantage(self) -> Estimator:
        """The estimator in force."""
        return self.estimator or ALGORITHMS[self.algorithm].estimator

    @property
    def relative(self) -> bool:
        """Whether a completion needs others in its group to have an advantage."""
        function: Any = self.advantage
        while isinstance(function, functools.partial):
            function = function.func
        return function not in _COUNT_ALONE

    @property
    def estimator_inputs(self) -> frozenset[str]:
        """What the estimator wants besides rewards: `lengths`, `baselines`; see `Estimator`."""
        try:
            parameters = inspect.signature(self.advantage).parameters
        except ValueError:  # a compiled function, of which nothing more is known
            return frozenset()
        return frozenset(
            name
            for name in ("lengths", "baselines")
            if name in parameters and parameters[name].default is inspect.Parameter.empty
        )

    def filtered(self, group: PromptGroup) -> tuple[PromptGroup | None, Counter[str]]:
        """What the filters leave of a group, and what they drop; see `filter_group`."""
        return filter_group(
            group,
            self.filters,
            relative=self.relative,
            components=self.components,
            baseline="baselines" in self.estimator_inputs,
        )

    @property
    def loss_fn(self) -> str:
        """Name of the loss."""
        return ALGORITHMS[self.algorithm].loss_fn

    @property
    def thresholds(self) -> dict[str, ConfigValue]:
        """The loss's configuration in force: the table's thresholds with the caller's in their
        place; other keys travel as they are."""
        return {**ALGORITHMS[self.algorithm].loss_fn_config, **(self.loss_fn_config or {})}
