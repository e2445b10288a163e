"""A model inside a program of your own: many conversations, each with a memory that is kept.

    python docs/examples/embed_in_a_program.py runs/nano

Two callers talk to one model in turn; what the first said does not reach the second. Then the
program "restarts": everything is thrown away, read again, and the conversation goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import rxlm
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session


class Assistant:
    """What a program needs of a model: answer somebody, and remember what they said."""

    def __init__(self, model_dir: str, folder: Path) -> None:
        """Read the model once; conversations are folders in ``folder``."""
        self.model: RxTAlpha = rxlm.load(model_dir)
        self.folder = folder

    def answer(self, caller: str, text: str) -> str:
        """Answer one message of a caller."""
        path = self.folder / caller
        if path.exists():
            session = Session.load(path, self.model)
        else:
            session = self.model.session(settings={"temperature": 0}, name=caller)
        answer = session.ask(text)
        session.save(path)  # A few kilobytes, however long the conversation is.
        return answer


def main() -> None:
    """Hold the conversations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        assistant = Assistant(options.model_dir, Path(scratch))
        for caller, text in (
            ("ann", "Hi, my name is Ann."),
            ("tom", "My name is Tom."),
            ("ann", "I live in Oslo."),
        ):
            print(f"{caller}: {text}\n  {assistant.answer(caller, text)}")
        del assistant

        print("(the program is started again)")
        assistant = Assistant(options.model_dir, Path(scratch))
        for caller in ("ann", "tom"):
            text = "What is my name?"
            print(f"{caller}: {text}\n  {assistant.answer(caller, text)}")


if __name__ == "__main__":
    main()
