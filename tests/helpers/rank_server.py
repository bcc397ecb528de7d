"""What the server that ranks are forked from loads and computes once, before the first of them."""

from __future__ import annotations

from coterie.dp.accounting.accountant import noise_multiplier
from coterie.dp.accounting.budget import Budget
from coterie.dp.noise.discrete_gaussian import alias_tables
from helpers import rank_tasks, trainer_tasks

for rate, rounds in ((rank_tasks.LOT / 24, 4), (1 / 24, 6), (4 / 7, 4), (trainer_tasks.LOT / 24, 4)):
    noise_multiplier(Budget(*rank_tasks.BUDGET), rate, rounds, "poisson", None, None)  # as a plan asks for it
alias_tables()
