"""Attacks on a trained model: who was in its text, and which secrets it gives away.

`coterie.audit.model.target` reads what is attacked, `coterie.audit.model.attacking` does everything in order,
`coterie.audit.model.preparing` makes a run that can be audited at all: `coterie.audit.model.canaries` are put in, and
`coterie.audit.model.key` remembers which coins fell how.

`coterie.audit.model.scoring` runs the model over text, `coterie.audit.model.signals` make scores of that,
`coterie.audit.model.membership` compares members with others, and `coterie.audit.model.claim` says what a budget
allows them. `coterie.audit.model.exposure` ranks canaries, `coterie.audit.model.planted` finds them, and
`coterie.audit.model.words` says all of it.
"""

from coterie.audit.model.attacking import attack
from coterie.audit.model.planted import canary_scores
from coterie.audit.model.preparing import Amounts, PreparedAudit, prepare_audit
from coterie.audit.model.target import Design, Target

__all__ = ["Amounts", "Design", "PreparedAudit", "Target", "attack", "canary_scores", "prepare_audit"]
