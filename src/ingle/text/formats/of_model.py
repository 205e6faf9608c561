"""In which formats one model answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingle.text.formats.declared import ENOUGH, ReasoningFormat, ToolFormat

if TYPE_CHECKING:
    from ingle.text.formats.template import ResponseTemplate


@dataclass(frozen=True)
class Formats:
    tools: ToolFormat | None = None
    """Of its calls of tools."""
    reasoning: ReasoningFormat | None = None
    """Of its thoughts."""
    template: ResponseTemplate | None = None
    """The model's own declaration, which goes before these."""
    template_marks: tuple[str, ...] = ()
    """Special tokens that it looks for."""

    @property
    def read_calls(self) -> bool:
        return self.tools is not None or self.template is not None

    @property
    def read_thoughts(self) -> bool:
        return self.reasoning is not None or (self.template is not None and self.template.has_thoughts)

    @property
    def ending(self) -> str | None:
        """What ends thoughts that become too long."""
        if self.template is not None:
            close = self.template.thought_close
            return None if close is None else f"{ENOUGH}\n{close}\n\n"
        return None if self.reasoning is None else self.reasoning.ending


NO_FORMATS = Formats()
