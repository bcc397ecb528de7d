"""Attacks on a trained model: who was in its text, and which secrets it gives away.

`coterie.audit.model.target` reads what is attacked, `coterie.audit.model.attacking` does everything in order,
`coterie.audit.model.preparing` makes a run that can be audited at all.
"""

from coterie.audit.model.attacking import attack
from coterie.audit.model.planted import canary_scores
from coterie.audit.model.preparing import Amounts, PreparedAudit, prepare_audit
from coterie.audit.model.target import Design, Target

__all__ = ["Amounts", "Design", "PreparedAudit", "Target", "attack", "canary_scores", "prepare_audit"]
