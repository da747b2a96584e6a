"""The choices behind a batch, checked together before any row is read.

Invariant: options that contradict each other are an error here, not a surprise in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

from eval_protocol_rft.training.algorithms import (
    ConfigValue,
    Estimator,
    find_algorithm,
    is_group_relative,
    merged_config,
)
from eval_protocol_rft.training.datums import Normalization
from eval_protocol_rft.training.errors import TrainingDataError
from eval_protocol_rft.training.filters import Filters

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

    algorithm: str = "grpo"
    estimator: Estimator | None = None
    components: tuple[str, ...] = ()
    loss_fn_config: Mapping[str, ConfigValue] | None = None
    normalization: Normalization = "none"
    constant_length: int | None = None
    filters: Filters = field(default_factory=Filters)
    biased_sampling: BiasedSampling = "warn"
    pass_threshold: float = 1.0

    def __post_init__(self) -> None:
        merged_config(find_algorithm(self.algorithm), self.loss_fn_config)
        _one_of("normalization", self.normalization, get_args(Normalization))
        _one_of("biased_sampling", self.biased_sampling, get_args(BiasedSampling))
        length = self.constant_length
        wanted = self.normalization == "constant"
        if wanted != (length is not None) or (length is not None and length < 1):
            raise TrainingDataError(
                'normalization="constant" and constant_length (L in tokens, at least 1, the same '
                f"for the whole run) go together; got {self.normalization!r} and {length}"
            )
        if self.components and self.estimator is None:
            raise TrainingDataError(
                "components= needs an estimator of several rewards: estimator=advantages.gdpo"
            )
        if self.components and self.filters.soft_overlong is not None:
            raise TrainingDataError(
                "soft_overlong shapes the reward, which an estimator of components does not read"
            )

    @property
    def advantage(self) -> Estimator:
        """The estimator in force."""
        return self.estimator or find_algorithm(self.algorithm).estimator

    @property
    def relative(self) -> bool:
        """Whether a completion needs others in its group."""
        return is_group_relative(self.advantage)

    @property
    def loss_fn(self) -> str:
        """The loss on the wire."""
        return find_algorithm(self.algorithm).loss_fn

    @property
    def thresholds(self) -> dict[str, ConfigValue]:
        """The loss's configuration in force."""
        return merged_config(find_algorithm(self.algorithm), self.loss_fn_config)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainingDataError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
