"""The configuration of one RxT component, decoder or encoder.

Not here: its fields (``component_fields``), the rules between them (``component_rules``) and the
whole model (``config``). No torch.
"""

from __future__ import annotations

from pydantic import model_validator

from rxlm.errors import UserError
from rxlm.rxt import component_rules
from rxlm.rxt.component_fields import ComponentFields


class RxTComponentConfig(ComponentFields):
    """Decoder or encoder of a Reactive Transformer.

    A configuration that validates describes a model without contradictions; whether every part
    of it is built in this version is a second question, see :meth:`unsupported_features`.
    """

    @model_validator(mode="after")
    def _check_fields_together(self) -> RxTComponentConfig:
        problems = component_rules.component_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def unsupported_features(self) -> list[str]:
        """Return one sentence per setting whose part this version does not build."""
        return component_rules.unsupported_features(self)

    def require_supported(self) -> None:
        """Raise ``UserError`` naming every setting whose part this version does not build."""
        problems = self.unsupported_features()
        if problems:
            raise UserError("\n".join(problems))

    def ignored_fields(self) -> list[str]:
        """Return the fields that differ from their default but have no effect here.

        A configuration may keep settings of parts it switches off (`num_experts=8` with
        `use_moe=False`); the model logs them once so that a mistake is seen.
        """
        return component_rules.ignored_fields(self)
