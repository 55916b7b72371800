"""What a model's card says about the method that trained it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer


Stock: Any = Trainer if TYPE_CHECKING else object


class MethodCardMixin(Stock):
    """Goes in front of a [`~transformers.Trainer`]: model cards name the method, its teacher and its paper, and have its tags."""

    _name: str
    _tag_names: list[str]
    _paper: dict[str, str]
    """`title`, `id` on arXiv and BibTeX `citation`; nothing if empty."""

    def taught_by(self) -> str:
        """The name of a teacher that the card is to name."""
        return ""

    def create_model_card(self, *given: Any, **named: Any) -> None:
        named["tags"] = [*self._tag_names, *([tags] if isinstance(tags := named.get("tags") or [], str) else tags)]
        super().create_model_card(*given, **named)
        if not self.is_world_process_zero():
            return
        teacher = self.taught_by()
        lines = [
            "",
            "## Method",
            f"This model was trained with {self._name}" + (f" from `{teacher}`." if teacher else "."),
        ]
        if self._paper:
            lines.append(f"[{self._paper['title']}](https://huggingface.co/papers/{self._paper['id']})")
            lines.append(f"```bibtex\n{self._paper['citation']}\n```")
        with Path(str(self.args.output_dir), "README.md").open("a", encoding="utf-8") as card:
            card.write("\n\n".join(lines) + "\n")
