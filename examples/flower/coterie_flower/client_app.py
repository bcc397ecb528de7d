"""A site's part: start this site's own member, with the settings that its SuperNode names, and say how it ended.

Nothing of the message is used. Only the exit code goes back; what coterie prints goes to a file beside the settings
that the site's owner alone can read, since a party's losses are in it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("take_part")
def take_part(message: Message, context: Context) -> Message:
    """Run `coterie up` or `coterie coordinator` until it ends."""
    site = {name: str(value) for name, value in context.node_config.items()}
    settings = Path(site["settings"])
    command = [site.get("coterie", "coterie"), "coordinator" if "kit" in site else "up", str(settings)]
    for option in ("kit", "run-dir"):
        if option in site:
            command += [f"--{option}", site[option]]
    log = os.open(settings.parent / "flower.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.fchmod(log, 0o600)  # whatever it was before
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    finally:
        os.close(log)
    return Message(RecordDict({"ended": ConfigRecord({"code": code})}), reply_to=message)
