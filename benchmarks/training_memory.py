"""What gradient checkpointing saves and costs in a memory-aware update, on a CPU.

Each setting runs in a process of its own, so that the peak of its resident memory is its own.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

SETTINGS = ("none", "layers", "turns", "both")


def measure(setting: str, kind: str, turns: int, repetitions: int) -> dict[str, float]:
    """Return peak memory in MB beyond that of the model, and seconds of an update (median)."""
    import torch

    from rxlm.data import DialogueGenerator, GeneratedConversations, conversation_texts
    from rxlm.rxt.dialogues import TurnEncoder
    from rxlm.rxt.reactive import ReactiveModel
    from rxlm.tokenization import TokenizerTraining, train_tokenizer
    from rxlm.training.objectives.curriculum import Phase
    from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings

    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = DialogueGenerator()
    texts = conversation_texts(generator.conversation(index, 8) for index in range(100))
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=512))
    part = {
        "num_layers": 6, "vocab_size": tokenizer.vocab_size, "embed_dim": 128, "ff_dim": 512,
        "att_heads": 4, "seq_len": 128, "stm_size": 64, "self_att_type": "mha",
        "cross_att_type": "mha", "tie_embeddings": True,
    }  # fmt: skip
    if kind != "softmax":
        part |= {"use_linear_self_attn": True, "linear_attn_type": kind}
    memory = {
        "variant": "self-interlayer", "num_layers": 6, "embed_dim": 128, "att_heads": 4,
        "att_type": "mha", "stm_size": 64, "seq_len": 128,
    }  # fmt: skip
    model = ReactiveModel({"encoder": part, "decoder": part, "memory_attention": memory}, tokenizer)
    objective = MemoryAwareObjective(
        model,
        GeneratedConversations(generator, "train"),
        GeneratedConversations(generator, "valid"),
        TurnEncoder(tokenizer, 128),
        MemoryAwareSettings(phases=(Phase(turns=turns, dialogues=8),)),
        seed=0,
    )
    objective.set_training_mode()
    objective.set_gradient_checkpointing(
        layers=setting in ("layers", "both"), turns=setting in ("turns", "both")
    )
    batch = objective.batch(0, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        model.zero_grad()
        objective.loss(batch, 0).loss.backward()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"megabytes": (peak - before) / 1024, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.turns, options.repetitions)))
        return
    print(f"{'self-attention':16}{'checkpointing':16}{'peak MB':>9}{'seconds':>9}")
    for kind in ("softmax", "md_gdn"):
        for setting in SETTINGS:
            command = [sys.executable, __file__, "--one", setting, kind]
            command += ["--turns", str(options.turns), "--repetitions", str(options.repetitions)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"{kind:16}{setting:16}{found['megabytes']:9.0f}{found['seconds']:9.2f}")


if __name__ == "__main__":
    main()
