"""What the stages have in common that train a model's answers against a frozen copy of itself.

The copy (the reference policy) is the model as the stage began: encoder, memory attention and
decoder. It reads memories that it has written itself, so that it is the policy that it was, and is
kept beside the model in checkpoints (``reference.safetensors``), so that a resumed run measures
against the same one. Neither of the two drops anything out: the policy that is improved is the one
that answers.

Shapes: M target tokens, V vocabulary, R rows of a bucket, P places: flat memories ``m * B + b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.rxt.dialogues import DialogueBatch
from rxlm.rxt.model import RxTNetwork
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import Answers, answer_with_memory, encode_turns, scan_memory
from rxlm.tokenization import Tokenizer
from rxlm.training.objective import MemorySaving
from rxlm.training.objectives.model_objective import COMPONENTS, ModelObjective

REFERENCE = "reference"
"""Name of the frozen copy among the files of a checkpoint."""
Component = Literal["encoder", "decoder", "memory_attention"]


class TokenScores(NamedTuple):
    """What a policy thinks of the target tokens of one bucket.

    ``log_probs`` ``[M, V]`` of all tokens; ``chosen`` ``[M]``: those of the tokens that are there;
    ``place`` int64 ``[M]``: the flat memory that the token's row reads.
    """

    log_probs: Tensor
    chosen: Tensor
    place: Tensor


def frozen_copy(model: ReactiveModel) -> RxTNetwork:
    """Return the networks of a model with the weights that it has now; they do not train."""
    # Built on the model's device, which may be 'meta'; its first weights are drawn for nothing.
    with torch.random.fork_rng(devices=[]), torch.device(model.device):
        copy = RxTNetwork(model.config)
    weights = model.state_dict()
    copy.to(weights[next(iter(weights))].dtype)
    copy.load_state_dict(weights)
    return copy.requires_grad_(False).eval()


class FrozenPolicyObjective(ModelObjective):
    """A stage around a model and, if it needs one, a frozen copy of it.

    Args:
        model: trained in place; it answers at once (does not think).
        tokenizer: encodes the data.
        trains: the components that learn.
        needs_reference: whether there is a frozen copy.

    Raises:
        UserError: for a model that thinks.
    """

    memory_saving = MemorySaving(
        "dialogues of the phase, in objective.phases",
        "fewer turns in objective.phases or a shorter seq_len of the model",
        ("turns",),
    )

    def __init__(
        self,
        model: ReactiveModel,
        tokenizer: Tokenizer,
        *,
        trains: Sequence[str] = COMPONENTS,
        needs_reference: bool = True,
    ) -> None:
        if model.thinks:
            raise UserError(
                f"stage {self.name} trains models that answer at once, and {type(model).__name__} "
                "thinks: the forms of its answers are not part of this stage yet. Use "
                "model.architecture: alpha."
            )
        if not trains:
            raise UserError(f"objective.trains is empty: name some of {', '.join(COMPONENTS)}.")
        reference = frozen_copy(model) if needs_reference else None
        extra = {} if reference is None else {REFERENCE: reference}
        super().__init__(model, tokenizer, trains=trains, extra_modules=extra)
        self.reference = reference

    def set_training_mode(self) -> None:
        """Put everything into evaluation mode: a policy without dropout is what is improved."""
        self._trained.eval()

    def layers(self) -> list[nn.Module]:
        """Return none: a policy that writes its own answers runs in ever new shapes."""
        return []

    def set_gradient_checkpointing(self, *, layers: bool, turns: bool) -> None:
        """Set it for turns.

        Raises:
            UserError: for layers, which forget only in training mode.
        """
        if layers:
            raise UserError(
                f"gradient_checkpointing: stage {self.name} offers turns (memory writes) only; set "
                "it to turns or none."
            )
        self.checkpoint_turns = turns

    def load_extra_modules(self, directory: Path) -> list[str]:
        """Begin with the model itself as the reference, whatever an earlier stage measured against.

        (A run that is resumed loads its own: :meth:`load_model_weights`.)
        """
        return []

    def answers(
        self,
        network: RxTNetwork,
        batch: DialogueBatch,
        backprop_turns: int | None = None,
        copies: int = 1,
    ) -> list[Answers]:
        """Predict the answers of a batch from the memories that ``network`` writes.

        Args:
            network: the model or the reference.
            batch: on its device.
            backprop_turns: cut the gradient after so many writes; None = never.
            copies: how many dialogues beside each other begin with the same memory.
        """
        encoded = encode_turns(network.encoder, batch)
        different = batch.num_dialogues // copies
        slots = network.initial_memory(different, seed=batch.memory_seed)
        memories = scan_memory(
            network.memory_attention,
            slots.repeat_interleave(copies, dim=1),
            encoded,
            batch.num_turns,
            backprop_turns,
            self.checkpoint_turns,
        )
        return answer_with_memory(
            network.decoder, batch, memories, backprop_turns, self.checkpoint_turns
        )


def token_scores(answers: Answers, temperature: float = 1.0) -> TokenScores:
    """Return the log-probabilities of the target tokens, fp32.

    Args:
        answers: of one bucket.
        temperature: at which answers are drawn.
    """
    log_probs = torch.log_softmax(answers.logits.float() / temperature, dim=-1)
    chosen = log_probs.gather(1, answers.labels[:, None])[:, 0]
    return TokenScores(log_probs, chosen, answers.place[answers.row])


def summed_by_place(values: Tensor, places: Tensor, num_places: int) -> Tensor:
    """Return the sums ``[P]`` of ``values`` ``[M]`` of each place."""
    return values.new_zeros(num_places).index_add(0, places, values)
