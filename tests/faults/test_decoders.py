"""What reads a peer's bytes gives a value or an error of ours, whatever the bytes."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from decoders import DECODERS, one_input, seeds
from record import RECORD

from coterie.federation.identity import certificates
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.frame import FrameType, encode
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.handshake import decode_hello
from coterie.federation.wire.transport import Address, Lane, Message

PART = "Messages"
QUICK = Settings(window=4, close_s=2.0, redial_s=0.05, heartbeat_s=0.3, silence_s=10.0)
INPUTS = 1_000_000


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """A byte changed, bytes taken out, put in, doubled, or cut off."""
    at, length = draw.randrange(len(raw)), draw.choice((1, 2, 4, 8, 64))
    return draw.choice(
        (
            raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :],
            raw[:at] + draw.randbytes(length) + raw[at + length :],
            raw[:at] + raw[at + length :],
            raw[:at] + draw.randbytes(length) + raw[at:],
            raw[:at] + raw[max(0, at - length) :],
            raw[:at],
        )
    )


def say(kits: dict[str, Kit], hello: bytes, chunks: list[bytes]) -> None:
    """As birch, over a channel of its own with its key, say chunks to alder and listen until the end."""
    credentials = grpc.ssl_channel_credentials(
        certificates.cert_pem(kits["alder"].certificate),
        certificates.key_pem(kits["birch"].key),
        certificates.cert_pem(kits["birch"].certificate),
    )
    options = [("grpc.ssl_target_name_override", "alder"), ("grpc.use_local_subchannel_pool", 1)]
    endpoint = load_roster(kits["alder"]).entry("alder").endpoint

    def words() -> Iterator[bytes]:
        yield hello
        yield from chunks

    with grpc.secure_channel(endpoint, credentials, options=options) as channel:
        call = channel.stream_stream("/coterie.Lanes/Open", None, None)(words(), timeout=10)
        with contextlib.suppress(grpc.RpcError, StopIteration):
            decode_hello(next(call), "alder")
            while True:
                next(call)


def mutate_over_tls(folder: Path, times: int) -> None:
    kits = local_kits(folder, ["alder", "birch", "cedar"], federation="demo")
    roster, draw = load_roster(kits["alder"]), random.Random(times)
    handled: list[str] = []

    def handle(peer: str, lane: Lane, message: Message) -> None:
        handled.append(peer)

    made = {name: GrpcTransport(name, roster, kits[name], settings=QUICK) for name in ("alder", "birch", "cedar")}
    try:
        for name in ("alder", "cedar"):
            made[name].start(handle)
        made["cedar"].connect(20.0, ["alder"])
        hello = made["birch"]._hello("alder", Lane.FORWARD).encode()
        tensors = (torch.arange(6.0).reshape(3, 2), torch.ones(4, dtype=torch.bool))
        for number in range(times):
            frame_type = draw.choice(list(FrameType))
            message = Message(
                "push",
                Address(round=3, attempt=1, micro_batch=2, layer=1, call=7),
                {"rows": [1, 2]},
                tensors[: draw.randrange(3)],
            )
            (chunk,) = encode(made["birch"]._scope, frame_type, Lane.FORWARD, draw.randrange(9), message).chunks()
            wrong = mutated(chunk, draw)
            say(kits, mutated(hello, draw) if number % 10 == 0 else hello, [chunk, wrong] if number % 3 else [wrong])
            if number % 20 == 0:
                made["cedar"].request("alder", Lane.FORWARD, Message("fine"), 10.0)
        made["cedar"].request("alder", Lane.FORWARD, Message("fine"), 10.0)
        assert handled.count("cedar") == 1 + (times + 19) // 20
    finally:
        for each in made.values():
            each.close()


def test_mutated_messages_over_tls_with_a_members_key_end_their_own_stream_alone(tmp_path: Path) -> None:
    mutate_over_tls(tmp_path / "kits", 60)


@pytest.mark.faults
def test_many_mutated_messages_over_tls_with_a_members_key(tmp_path: Path) -> None:
    mutate_over_tls(tmp_path / "kits", 1500)
    RECORD.tried(PART, "a mutated message over TLS with a member's key", "its stream ends; others are served", 1500)


def test_every_decoder_takes_its_seed_and_what_mutations_make_of_it() -> None:
    draw = random.Random(5)
    assert {seed[0] for seed in seeds()} | {1} == set(range(len(DECODERS))), (
        "the second reads frames as the first does"
    )
    for seed in seeds():
        one_input(seed)
        for _ in range(300):
            one_input(seed[:1] + mutated(seed[1:], draw))


def fuzz(folder: Path, inputs: int) -> str:
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("fuzz_decoders.py")), "--corpus", str(folder)]
    command += [f"-runs={inputs}", "-max_len=2048", "-seed=7", "-rss_limit_mb=4096", "-timeout=10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    assert int(runs) >= inputs
    return done.stderr


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install coterie[faults]"
)


@needs_atheris
def test_decoders_survive_some_thousand_fuzzed_inputs(tmp_path: Path) -> None:
    fuzz(tmp_path / "corpus", 5_000)


@pytest.mark.faults
@needs_atheris
def test_decoders_survive_a_million_fuzzed_inputs(tmp_path: Path) -> None:
    begun = time.monotonic()
    fuzz(tmp_path / "corpus", INPUTS)
    lasted = time.monotonic() - begun
    RECORD.tried(
        PART, "a fuzzed input to a decoder (atheris)", f"a value or an error of ours; {lasted:.0f} s", INPUTS
    )
