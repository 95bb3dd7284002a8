"""How a prompt, its picture and an answer are laid out as one text.

A template is data and is saved with the model. Released checkpoints want the exact words they were trained with:
give them as `system` in the config.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from eagleray.models.rovrm.records import IMAGE_MARKER

_SYSTEM = "A curious human asks and a helpful assistant answers truthfully."


@dataclass(frozen=True)
class VisualTemplate:
    """A layout; `{bos}`, `{eos}`, `{image}`, `{system}`, `{question}` and `{answer}` stand for what goes there."""

    name: str
    text: str
    after_image: str
    """Stands behind the picture; without a picture it vanishes with it."""
    system: str = _SYSTEM

    @classmethod
    def named(cls, name: str, *, system: str | None = None) -> VisualTemplate:
        """A template of ours, perhaps with another system text.

        Raises:
            ValueError: There is none of that name.
        """
        if name not in TEMPLATES:
            raise ValueError(f"There is no template {name!r}; the templates are {', '.join(TEMPLATES)}.")
        template = TEMPLATES[name]
        return template if system is None else replace(template, system=system)

    @property
    def chat(self) -> str:
        """The layout `llava` as a chat template of transformers, for a model that writes answers."""
        picture = json.dumps(f"{IMAGE_MARKER}{self.after_image}")
        return (
            "{{ bos_token }}{{ " + json.dumps(self.system) + " }}{% for message in messages %}"
            "{% if message['role'] == 'user' %} USER: {% else %} ASSISTANT: {% endif %}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{{ " + picture + " if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
            "{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
        )


# Paper: the words `USER:` and `ASSISTANT:` and the order are those of the released code (spec section 3).
TEMPLATES = {
    "llava": VisualTemplate(
        "llava", "{bos}{system} USER: {image}{question} ASSISTANT: {answer}{eos}", after_image="\n"
    ),
    "chatml": VisualTemplate(
        "chatml",
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{image}{question}<|im_end|>\n"
        "<|im_start|>assistant\n{answer}<|im_end|>",
        after_image="",
    ),
}
"""`llava` for LLaVA-1.5 and models made here, `chatml` for the Qwen family."""
