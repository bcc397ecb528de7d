"""Expert loads of a whole federation: where the parties' released loads are added up and smoothed.

Every private party releases its lot's centred loads inside the round's one Gaussian (`coterie.dp.balance`). They
travel with its push, one host adds them up over the parties and serves what follows from them, and all parties
compute the next round with that one value. All of this is post-processing of what was released.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from coterie.config import FederationConfig, PrivacyRules
from coterie.config.privacy import RELEASED_LOADS
from coterie.dp.balance import Balancer, LoadAverage

_BIAS = "bias"


def releases_loads(federation: FederationConfig) -> bool:
    """Whether the parties' releases hold expert loads."""
    rules = federation.privacy
    return isinstance(rules, PrivacyRules) and rules.balance in RELEASED_LOADS


class PublicLoads:
    """The federation's running average of expert loads; a `coterie.federation.experts.shared_trunk.Statistic`.

    Shape letters: S experts of all MoE layers together.

    Args:
        balancer: of the party that hosts them; its model's routing biases are what everybody starts from.
    """

    def __init__(self, balancer: Balancer) -> None:
        self._average = LoadAverage(balancer.sizes, balancer.balance)
        self._bias_S = balancer.bias().double() if balancer.balance.mode == "bias" else None

    def value(self) -> Tensor:
        """[S] float32: smoothed shares of each layer's tokens (even before round 1), or routing biases."""
        if self._bias_S is not None:
            return self._bias_S.float()
        return (self._average.even if self._average.load is None else self._average.load).float()

    def take(self, mean: Tensor) -> None:
        """Add the parties' released loads of a committed round, [S], over their expected lots."""
        self._average.take(mean)
        if self._bias_S is not None:
            self._bias_S = self._bias_S + self._average.bias_step()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return self._average.state() | ({} if self._bias_S is None else {_BIAS: self._bias_S})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self._average.restore(state)
        if self._bias_S is not None:
            self._bias_S = state[_BIAS]
