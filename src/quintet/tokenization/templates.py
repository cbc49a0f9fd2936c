"""The chat templates of a tokenizer, compiled on first use."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quintet.errors import ChatTemplateError, shown

if TYPE_CHECKING:
    from quintet.tokenization.sandbox import CompiledTemplate


class ChatTemplates:
    """No template, one, or several by name.

    Raises:
        ChatTemplateError: something is not a template.
    """

    def __init__(self, source: str | Mapping[str, str] | None) -> None:
        by_name: Mapping[Any, Any] = source if isinstance(source, Mapping) else {"": source}
        if source is None:
            by_name = {}
        for name, template in by_name.items():
            if not isinstance(name, str) or not isinstance(template, str):
                raise ChatTemplateError(
                    f"chat_template has to be a string, or a dict of them; {shown(name)} is "
                    f"{type(template).__name__}"
                )
        self.source = dict(source) if isinstance(source, Mapping) else source
        self._compiled: dict[str, CompiledTemplate] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Drop compiled templates."""
        return {"source": self.source, "_compiled": {}}

    def choose(self, requested: str | None, *, has_tools: bool) -> str:
        """Return a template by name, the given one, or the default.

        Raises:
            ChatTemplateError: there is none.
        """
        if isinstance(self.source, dict):
            if requested is not None:
                return self.source.get(requested, requested)
            if has_tools and "tool_use" in self.source:
                return self.source["tool_use"]
            if "default" in self.source:
                return self.source["default"]
            raise ChatTemplateError(
                "none of the chat templates is the default; pass chat_template=, one of "
                f"{', '.join(sorted(self.source))}"
            )
        template = self.source if requested is None else requested
        if template is None:
            raise ChatTemplateError(
                "this tokenizer has no chat template, as a base model's has none; set "
                "tokenizer.chat_template, or pass chat_template= with a Jinja template"
            )
        return template

    def compiled(self, template: str) -> "CompiledTemplate":
        """Return the compiled template.

        Raises:
            ChatTemplateError: it is not a template.
        """
        if not isinstance(template, str):
            raise ChatTemplateError(
                f"chat_template is a {type(template).__name__}; it has to be text"
            )
        # Imported here: jinja2 takes longer to import than a text takes to encode.
        from quintet.tokenization.sandbox import CompiledTemplate

        if template not in self._compiled:
            self._compiled[template] = CompiledTemplate(template)
        return self._compiled[template]
