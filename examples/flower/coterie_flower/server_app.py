"""The SuperLink's part: wait for all sites, let each start its member, and hear how they ended."""

from __future__ import annotations

import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Fails where a site did, or did not answer."""
    members, join_s, run_s = (int(context.run_config[name]) for name in ("members", "join-s", "run-s"))
    until = time.monotonic() + join_s
    while len(nodes := sorted(grid.get_node_ids())) < members:
        if time.monotonic() > until:
            raise RuntimeError(f"{len(nodes)} of {members} SuperNodes are here after {join_s} s")
        time.sleep(1)
    asked = [
        Message(RecordDict({"nothing": ConfigRecord()}), dst_node_id=node, message_type="query.take_part", ttl=run_s)
        for node in nodes
    ]
    codes: dict[int, object] = {}
    for reply in grid.send_and_receive(asked, timeout=run_s):
        failed = reply.has_error()
        codes[reply.metadata.src_node_id] = "an error of Flower" if failed else reply.content["ended"]["code"]
    wrong = {node: codes.get(node, "no answer") for node in nodes if codes.get(node) != 0}
    if wrong:
        raise RuntimeError(f"members that did not finish, by SuperNode: {wrong}")
