"""Kill -9 of a serving process at random instants under load: is every acknowledged turn there?

    python scripts/serve_fault_test.py                    # 20 kills, some minutes
    python scripts/serve_fault_test.py --kills 3 --sessions 4

A child process serves a tiny random model from a store and answers sessions without pause; it
prints a line for every turn that is acknowledged (its ``result()`` returned), with a digest of the
answer. The parent kills it with SIGKILL after a random time, opens the store with the next child,
and has that one check what was acknowledged so far: the turn is there, with this answer, at its
place, and the state it is gone on from can be read. Exit status 0 if nothing was lost, 1 if a turn
was, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = ("My name is Ann and I live in Oslo.", "Your name is Ann.", "Hello, how are you today?")
SECONDS = (0.2, 2.5)
"""A child is killed after a time between these, from its first acknowledgement on."""
START_SECONDS = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        return serve(options.child, options.sessions)
    if options.kills < 1 or options.sessions < 1:
        parser.error("--kills and --sessions must be positive")
    with tempfile.TemporaryDirectory(prefix="rxlm-serve-faults-") as folder:
        return kill_and_look(Path(folder), options)


def kill_and_look(folder: Path, options: argparse.Namespace) -> int:
    """Start a child again and again, kill it, and compare; return the exit status."""
    instants = random.Random(options.seed)
    acknowledged: dict[str, dict[str, Any]] = {}
    for number in range(options.kills + 1):
        is_last = number == options.kills
        child = start_child(folder, options.sessions, acknowledged)
        found = json.loads(read_line(child))
        if found["missing"]:
            print(f"LOST after kill {number}: {found['missing']}")
            child.kill()
            return 1
        print(
            f"start {number}: {len(acknowledged)} acknowledged turns, all there; "
            f"{found['turns']} turns in the store",
            flush=True,
        )
        if is_last:
            child.kill()
            child.wait()
            break
        count = collect(child, acknowledged, instants.uniform(*SECONDS))
        print(f"kill {number + 1}: after {count} more turns", flush=True)
    print(f"nothing lost: {options.kills} kills, {len(acknowledged)} acknowledged turns")
    return 0


def start_child(
    folder: Path, sessions: int, acknowledged: dict[str, dict[str, Any]]
) -> subprocess.Popen[str]:
    """Start a serving process and tell it what it has to have."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", str(folder), "--sessions", str(sessions)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(list(acknowledged.values())) + "\n")
    child.stdin.flush()
    return child


def collect(
    child: subprocess.Popen[str], acknowledged: dict[str, dict[str, Any]], seconds: float
) -> int:
    """Note what a child acknowledges until it is killed; return how many turns."""
    first = json.loads(read_line(child))
    acknowledged[first["turn"]] = first
    timer = threading.Timer(seconds, os.kill, (child.pid, signal.SIGKILL))
    timer.start()
    count = 1
    assert child.stdout is not None
    for line in child.stdout:
        if line.endswith("\n"):  # Not half a line.
            turn = json.loads(line)
            acknowledged[turn["turn"]] = turn
            count += 1
    timer.join()
    child.wait()
    return count


def read_line(child: subprocess.Popen[str]) -> str:
    """Return the next line of a child that has time to start."""
    timer = threading.Timer(START_SECONDS, child.kill)
    timer.start()
    assert child.stdout is not None
    line = child.stdout.readline()
    timer.cancel()
    if not line:
        raise SystemExit(f"the child ended with status {child.wait()} before it was killed")
    return line


# --- the child ------------------------------------------------------------------------------------


def serve(folder: Path, num_sessions: int) -> int:
    """Check the store, then answer turns for ever."""
    from rxlm.serve.interface import ServeLimits, TurnRequest
    from rxlm.serve.service import ConversationService

    expected = json.loads(sys.stdin.readline())
    service = ConversationService(
        tiny_model(), folder, ServeLimits(max_sessions=10**6, keep_versions=2), model_name="tiny"
    )
    missing = missing_turns(service, expected)
    sessions = service.sessions(limit=num_sessions)
    known = {info.session_id for info in sessions}
    stored = sum(info.num_turns for info in sessions)
    print(json.dumps({"missing": missing, "turns": stored}), flush=True)
    lock = threading.Lock()

    def talk(session_id: str) -> None:
        number = service.session(session_id).num_turns
        while True:
            number += 1
            request = TurnRequest(f"Hello {number}", max_tokens=1 + number % 9)
            info = service.submit(session_id, request).result()
            line = {
                "turn": info.turn_id,
                "parent": info.parent_id,
                "session": session_id,
                "answer": digest(info.answer),
                "query": info.query,
            }
            with lock:
                print(json.dumps(line), flush=True)

    for index in range(num_sessions):
        session_id = f"session-{index}"
        if session_id not in known:
            service.create(session_id=session_id, seed=index)
        threading.Thread(target=talk, args=(session_id,), daemon=True).start()
    while True:
        time.sleep(1.0)


def missing_turns(service: Any, expected: list[dict[str, Any]]) -> list[str]:
    """Return the acknowledged turns that the store has not, or has otherwise."""
    wrong = []
    heads: dict[str, str] = {}
    for turn in expected:
        heads[turn["session"]] = turn["turn"]
    for session_id, turn_id in heads.items():
        path = {info.turn_id: info for info in service.turns(session_id)}
        for turn in (turn for turn in expected if turn["session"] == session_id):
            info = path.get(turn["turn"])
            if (
                info is None
                or (info.parent_id, info.query) != (turn["parent"], turn["query"])
                or digest(info.answer) != turn["answer"]
            ):
                wrong.append(turn["turn"])
        if turn_id in path and not path[turn_id].has_state:
            wrong.append(f"{turn_id} (memory)")
        service.memory(session_id)  # Reads the state of the head and of the turn before it.
    return wrong


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tiny_model() -> Any:
    """Return the same random model in every process."""
    import torch

    from rxlm.rxt.models import RxTAlpha
    from rxlm.tokenization import TokenizerTraining, train_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 4, TokenizerTraining(vocab_size=300))
    sizes = {"num_layers": 1, "embed_dim": 16, "att_heads": 2, "stm_size": 6, "seq_len": 64}
    part = {**sizes, "vocab_size": tokenizer.vocab_size, "ff_dim": 24}
    part |= {"self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**sizes, "att_type": "mha", "interlayer_att_type": "mha"}
    return RxTAlpha(part, part, memory, tokenizer=tokenizer).eval()


if __name__ == "__main__":
    sys.exit(main())
