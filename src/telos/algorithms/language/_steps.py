"""Options of methods that see answers as steps, and where an answer is cut."""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._options import LanguageConfig
from telos.core.errors import UsageError
from telos.models.language import LanguageModel
from telos.objectives.process_reward import Cut


@dataclass(frozen=True, kw_only=True)
class CutConfig(LanguageConfig):
    """Where answers are cut into steps."""

    step_separators: tuple[str, ...] = Cut.separators  # texts that end a step; default: a semicolon, a full stop, a new line
    answer_mark: str = Cut.answer  # what stands from here on is the last step, whole; '' = separators alone cut

    def __post_init__(self) -> None:
        super().__post_init__()
        cut_of(self)


def cut_of(config: CutConfig) -> Cut:
    """Raises `UsageError` for separators that cannot cut."""
    return Cut(tuple(config.step_separators), config.answer_mark)


def require_decoder(model: LanguageModel, option: str = "--model") -> LanguageModel:
    """The model itself. Raises `UsageError` for one that cannot go on from the beginning of an answer as from a longer prompt."""
    if model.is_encoder_decoder:
        raise UsageError(
            f"{option} {model.source}: an encoder–decoder reads its prompt apart from the answer; answers are continued by decoders alone"
        )
    return model
