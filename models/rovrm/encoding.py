"""A prompt, a picture and an answer as token ids.

Special here: users' texts are encoded without the tokenizer's control tokens, so `<image>` or `USER:` typed into a
question is ordinary text and can neither open a second picture nor end a turn. Nothing is ever cut: what does not fit
is said not to fit, because a cut that reaches the picture trains a model that no longer sees it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from eagleray.models.gram.tokenization import PlainTokenizer, valid_unicode
from eagleray.models.rovrm.families import Family, Pixels
from eagleray.models.rovrm.templates import VisualTemplate

_SLOT = re.compile(r"\{(system|question|answer)\}")


class VisualEncoder:
    """Turns samples into the inputs of a `VisualRewardModel`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        family: Family,
        template: VisualTemplate,
        *,
        max_length: int = 2048,
    ) -> None:
        """Check that the tokenizer has what the template needs.

        Raises:
            ValueError: It lacks the end token or a control token of the template.
        """
        self.tokenizer, self.image_processor, self.family = tokenizer, image_processor, family
        self.template, self.max_length = template, max_length
        control = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._control = {
            content: int(tokenizer.convert_tokens_to_ids(content))  # type: ignore[arg-type]
            for content in control
        }
        if "{eos}" in template.text and tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end token, which the template closes an answer with.")
        for token in re.findall(r"<\|[^|]+\|>", template.text):
            if token not in self._control:
                raise ValueError(
                    f"The tokenizer has no token {token!r}, which template {template.name!r} needs."
                )
        # Sentencepiece-like tokenizers put a space before a text; not behind a picture or a control token.
        self._first = PlainTokenizer(tokenizer, control, inside_text=False)
        self._inner = PlainTokenizer(tokenizer, control, inside_text=True)
        self._parts = {True: self._split(template.text.replace("{image}", "{image}" + template.after_image))}
        self._parts[False] = self._split(template.text.replace("{image}", ""))

    def pixels(self, image: Image.Image) -> Pixels:
        """A picture as the model takes it."""
        found = self.image_processor(images=[image], return_tensors="pt")
        return dict(found)

    def encode(self, prompt: str, answer: str, *, image_tokens: int | None = None) -> list[int]:
        """Token ids of one answer.

        Args:
            prompt: The question, without an image marker.
            answer: The answer.
            image_tokens: How many tokens the picture takes; None for a sample without one.
        """
        texts = {
            "system": self.template.system,
            "question": valid_unicode(prompt),
            "answer": valid_unicode(answer),
        }
        ids: list[int] = []
        opening = True
        for kind, value in self._parts[image_tokens is not None]:
            if kind == "ids":
                ids += value
            elif kind == "image":
                ids += self.family.image_ids(image_tokens or 0)
            else:
                text = _SLOT.sub(lambda slot: texts[slot.group(1)], value)
                ids += (self._first if opening else self._inner).encode(text)
                opening = False
        return ids

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether a sample is short enough; if not, it is left out as a whole."""
        return len(ids) <= self.max_length

    def _split(self, text: str) -> list[tuple[str, Any]]:
        """The template in pieces: token ids, the place of the picture, and texts with their slots."""
        marks = ["{bos}", "{eos}", "{image}", *sorted(self._control, key=len, reverse=True)]
        pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        parts: list[tuple[str, Any]] = []
        ends = {"{bos}": self.tokenizer.bos_token_id, "{eos}": self.tokenizer.eos_token_id}
        for piece in filter(None, pieces):
            if piece == "{image}":
                parts.append(("image", None))
            elif piece in ends:
                parts += [("ids", [ends[piece]])] if ends[piece] is not None else []
            elif piece in self._control:
                parts.append(("ids", [self._control[piece]]))
            else:
                parts.append(("text", piece))
        return parts
