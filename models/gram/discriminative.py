"""The discriminative baseline: a trunk with a scalar head, trained with the Bradley-Terry loss and its variants.

A conversation is scored by the head at its last token. transformers finds that token by looking for the last id
that is not the padding id, which goes wrong when padding equals the end token (every score is then read at
the wrong place); `RewardEncoder` refuses such a tokenizer.

Shapes: B conversations or pairs, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from eagleray.models.gram.batching import pad_right, token_batches
from eagleray.models.gram.judge import Comparison, Pair, read_out
from eagleray.models.gram.tokenization import ChatFrame, valid_unicode

SETTINGS_FILE = "reward_model.json"


def bradley_terry_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    margin_scale: float = 1.0,
    weight_B: Tensor | None = None,
    smoothing: float = 0.0,
    positive_regulariser: float = 0.0,
    centring: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """−log σ(d − λ m) with d = r_w − r_l, in float32 or better; the options of spec section 8 can be combined.

    Args:
        chosen_B: Rewards r_w of the chosen answers.
        rejected_B: Rewards r_l of the rejected answers.
        margin_B: m, how much better the chosen answer should be.
        margin_scale: λ; 0 gives the loss without margins, bit for bit.
        weight_B: Factor of each pair's −log σ, e.g. its margin over the mean margin.
        smoothing: ε in (1 − ε) softplus(−d) + ε softplus(d).
        positive_regulariser: λ of −λ log σ(r_w).
        centring: λ of λ (r_w + r_l)².
        reduction: A training loop that accumulates takes `sum`.

    Raises:
        ValueError: The shapes differ; broadcasting would turn B pairs into B x B without a word.

    >>> round(bradley_terry_loss(torch.tensor([1.2]).double(), torch.tensor([0.4]).double()).item(), 6)
    0.371101
    """
    for name, other in {"rejected_B": rejected_B, "margin_B": margin_B, "weight_B": weight_B}.items():
        if other is not None and other.shape != chosen_B.shape:
            raise ValueError(
                f"`{name}` has the shape {tuple(other.shape)}, but the rewards of the chosen answers have "
                f"{tuple(chosen_B.shape)}; give one value a pair, in the same shape."
            )
    dtype = torch.promote_types(chosen_B.dtype, torch.float32)
    chosen_B, rejected_B = chosen_B.to(dtype), rejected_B.to(dtype)
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        difference_B = difference_B - margin_scale * margin_B.to(dtype)
    loss_B = -F.logsigmoid(difference_B) + smoothing * difference_B
    if weight_B is not None:
        loss_B = weight_B.to(dtype) * loss_B
    if centring:
        loss_B = loss_B + centring * (chosen_B + rejected_B).square()
    if positive_regulariser:
        # Paper: the reference takes −log σ of the batch's mean reward, which depends on how a batch is split.
        loss_B = loss_B - positive_regulariser * F.logsigmoid(chosen_B)
    return loss_B.mean() if reduction == "mean" else loss_B.sum()


class RewardEncoder:
    """A prompt with its answer as token ids, as a finished conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 2048) -> None:
        """Check the tokenizer.

        Raises:
            ValueError: It has no padding token, or padding is the end token.
        """
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ValueError(
                f"The tokenizer's padding token is {tokenizer.pad_token!r} and its end token {tokenizer.eos_token!r}; a "
                "reward model needs a padding token of its own, else scores are read at the wrong token."
            )
        self.pad_id = cast(int, tokenizer.pad_token_id)
        self.max_length = max_length
        self._frame = ChatFrame(tokenizer)
        self._plain = self._frame.plain
        self._frame_length = len(self._frame.user_turn("")) + len(self._frame.assistant_turn(""))
        if max_length < self._frame_length + 8:
            raise ValueError(
                f"`max_length` is {max_length}; the frame of a conversation alone takes {self._frame_length} tokens."
            )

    def encode(self, prompt: str, answer: str) -> list[int]:
        """Token ids; a longer conversation loses the start of its prompt, then the end of its answer.

        A quarter of the length is kept for the prompt. The end-of-turn token always stays: there the score is read.
        """
        prompt, answer = valid_unicode(prompt), valid_unicode(answer)
        room = self.max_length - self._frame_length
        while True:
            end_of_prompt = self._plain.tail(prompt, room)
            room_for_answer = room - min(len(end_of_prompt.spans), room // 4)
            shown = self._plain.head(answer, room_for_answer)
            kept = end_of_prompt.last(room - len(shown.spans))
            ids = [*self._frame.user_turn(kept), *self._frame.assistant_turn(shown.first(len(shown.spans)))]
            if len(ids) <= self.max_length:
                return ids
            room -= len(ids) - self.max_length  # text may split differently beside the frame


def sequence_rewards(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Rewards [B], float32, of right-padded conversations; `model` has `num_labels` 1.

    Padding stands to the right of all that counts, so no mask is passed and attention takes its causal path.
    """
    assert bool((attention_mask_BT.diff(dim=1) <= 0).all()), "conversations must be padded on the right"
    return model(input_ids=input_ids_BT, use_cache=False).logits[:, 0].float()


@dataclass(frozen=True)
class RewardSettings:
    """What a reward model needs besides weights and tokenizer; `reward_model.json` beside them."""

    max_length: int = 2048

    def save(self, folder: str | Path) -> None:
        """Write the settings into a model folder."""
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> RewardSettings:
        """Read the settings of a model folder or hub name; the defaults if it has none."""
        file = _find(str(folder), SETTINGS_FILE)
        return cls() if file is None else cls(**json.loads(Path(file).read_text(encoding="utf-8")))


class DiscriminativeScorer:
    """A scalar reward model as a scorer of pairs: p(a better) = σ(r_a − r_b), the same in both orders."""

    def __init__(self, model: nn.Module, encoder: RewardEncoder, *, max_batch_tokens: int = 16384) -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> DiscriminativeScorer:
        """Load a model folder or hub name, or a peft adapter (merged into its base model), from safetensors.

        Args:
            path: Where weights, tokenizer and settings are.
            options: Of the constructor.

        Raises:
            ValueError: There is no trained head, or the tokenizer has no padding token of its own.
        """
        tokenizer = AutoTokenizer.from_pretrained(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = RewardEncoder(tokenizer, max_length=RewardSettings.load(path).max_length)
        return cls(_load_classifier(str(path), encoder.pad_id).to(device), encoder, **options)

    def score(self, conversations: Sequence[tuple[str, str]]) -> list[float]:
        """Rewards of (prompt, answer) conversations, in their order."""
        ids = [self.encoder.encode(prompt, answer) for prompt, answer in conversations]
        rewards = [0.0] * len(ids)
        device = next(self.model.parameters()).device
        for members in token_batches([len(row) for row in ids], max_tokens=self.max_batch_tokens):
            ids_BT, mask_BT = pad_right([ids[i] for i in members], pad_id=self.encoder.pad_id)
            with torch.inference_mode():
                found = sequence_rewards(self.model, ids_BT.to(device), mask_BT.to(device)).tolist()
            for i, reward in zip(members, found, strict=True):
                rewards[i] = reward
        return rewards

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Judge (prompt, first answer, second answer) triples; each distinct answer is scored once."""
        distinct = list(dict.fromkeys((prompt, answer) for prompt, *answers in pairs for answer in answers))
        rewards = dict(zip(distinct, self.score(distinct), strict=True))
        differences = [rewards[prompt, first] - rewards[prompt, second] for prompt, first, second in pairs]
        return [read_out(difference, -difference) for difference in differences]


def _load_classifier(path: str, pad_id: int) -> Any:
    if _find(path, "adapter_config.json") is None:
        return _classifier(path, pad_id, head_needed=True)
    # The base of an adapter is a plain language model; the trained head is in the adapter.
    base = _classifier(
        str(PeftConfig.from_pretrained(path).base_model_name_or_path), pad_id, head_needed=False
    )
    model = PeftModel.from_pretrained(base, path)
    if not any(
        name.rpartition(".")[0].endswith(("score", "classifier"))
        for name in load_peft_weights(path, device="cpu")
    ):
        raise ValueError(_NO_HEAD.format(path=path, what="adapter"))
    return model.merge_and_unload()


def _classifier(path: str, pad_id: int, *, head_needed: bool) -> Any:
    """A model with a scalar head; transformers alone would give a model without one a random head."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, pad_token_id=pad_id, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    if head_needed and loading["missing_keys"]:
        raise ValueError(_NO_HEAD.format(path=path, what="model"))
    return model


_NO_HEAD = (
    "{path}: the {what} holds no trained reward head, so its scores would be random. Give one trained as a reward "
    "model (`eagleray train configs/gram/discriminative_tiny.yaml`), or use a language model as a judge instead."
)


def _find(path: str, name: str) -> str | None:
    """A file of a model folder or hub repository, if it is there."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
