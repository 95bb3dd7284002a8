"""Figures of MMHal-Bench, Object HalBench and AMBER from answers in the benchmarks' own file formats.

    python -m eagleray.jobs.rovrm.hallucination --config my_mmhal.yaml

The answers are a policy's; with a list of answers to a question and a `reward_model`, the one with the highest reward is
judged (best-of-n). Replies of a judge are kept in the run folder as they come, so an interrupted run asks no question
twice. (VL-RewardBench compares answers and is a set of `rovrm.evaluate`, `layout: vl_reward_bench`.)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.rovrm.judges import JudgeSection, read_replies
from eagleray.models.rovrm.best_of_n import best_of
from eagleray.models.rovrm.hallucination import (
    MMHAL_TEMPLATE,
    OBJECTS_TEMPLATE,
    Vocabulary,
    amber_discriminative_figures,
    amber_generative_figures,
    chair_figures,
    mmhal_figures,
    parse_rating,
)
from eagleray.models.rovrm.images import ImageStore
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.platform.config import Config as Section
from eagleray.platform.data.files import DataError
from eagleray.platform.data.sources import SourceConfig, file_hashes, read_rows
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "rovrm.hallucination"
logger = logging.getLogger(__name__)
_ANSWER_COLUMNS = ("model_answer", "response", "answer", "text")


class BestOfSection(Section):
    """A visual reward model that chooses among answers."""

    path: str
    """Model folder."""
    images: str
    """Folder or zip archive with the pictures that the answers name in `image`."""


class Config(JobConfig):
    """Config of `rovrm.hallucination`."""

    job: Literal["rovrm.hallucination"] = JOB
    benchmark: Literal["mmhal", "object_halbench", "amber"]
    answers: str
    """JSON list or JSONL as the benchmark has it: MMHal-Bench `question`, `gt_answer`, `image_content`, `question_type`,
    `model_answer`; Object HalBench `image_id`, `question`, `answer`; AMBER `id`, `response`. An answer may be a list."""
    annotations: list[str] = Field(default=[])
    """AMBER: `annotations.json`. Object HalBench: COCO's `instances_*.json` and `captions_*.json` of 2014."""
    words: str | None = None
    """AMBER: `relation.json`. Object HalBench: lines of synonyms, the object first (`person, girl, boy`)."""
    safe_words: str | None = None
    """AMBER: `safe_words.txt`."""
    judge: JudgeSection | None = None
    """MMHal-Bench: who rates. Object HalBench: who lists the objects of an answer; default: the list of words."""
    reward_model: BestOfSection | None = None
    """Chooses where an answer is a list; else the first is taken."""

    @model_validator(mode="after")
    def _benchmark_has_its_files(self) -> Config:
        needed = {
            "mmhal": ("judge",),
            "object_halbench": ("annotations", "words"),
            "amber": ("annotations", "words"),
        }[self.benchmark]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"`benchmark` {self.benchmark} needs `{name}`")
        if self.benchmark != "mmhal" and self.judge is not None and self.judge.kind == "overlap":
            raise ValueError("a judge of kind `overlap` rates, it lists no objects; it is for mmhal only")
        return self


@dataclass(frozen=True)
class Answered:
    """A question with the answer that is judged."""

    id: str
    values: dict[str, Any]
    answer: str


def main(cfg: Config) -> dict[str, Any]:
    """Judge and write the report.

    Returns:
        The report: the benchmark, its figures, and who judged.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        run.update_manifest(data_hashes=file_hashes(SourceConfig(path=cfg.answers)))
        rows = _read_answers(cfg)
        figures = {"mmhal": _mmhal, "object_halbench": _object_halbench, "amber": _amber}[cfg.benchmark]
        report = {"benchmark": cfg.benchmark, **figures(cfg, rows, run.path)}
        run.write_report(report)
    return report


def _read_answers(cfg: Config) -> list[Answered]:
    scorer = store = None
    if cfg.reward_model is not None:
        scorer = VisualScorer.from_pretrained(cfg.reward_model.path)
        store = ImageStore(cfg.reward_model.images, scorer.limits)
    rows: list[Answered] = []
    for number, row in enumerate(read_rows(SourceConfig(path=cfg.answers))):
        if isinstance(row, DataError):
            raise row
        column = next((name for name in _ANSWER_COLUMNS if name in row.values), None)
        if column is None:
            raise DataError(row.where, "no answer", f"one of {', '.join(_ANSWER_COLUMNS)} is needed")
        answers = row.values[column]
        answers = [str(text) for text in answers] if isinstance(answers, list) else [str(answers)]
        if len(answers) > 1 and scorer is not None and store is not None:
            question = _text(row.values, ("question", "query", "prompt"), row.where)
            picture = store.read(_text(row.values, ("image",), row.where))
            chosen = best_of(scorer.score(question, answers, picture))
        else:
            chosen = 0
        name = str(row.values.get("id", row.values.get("question_id", number)))
        rows.append(Answered(name, row.values, answers[chosen]))
    if len({row.id for row in rows}) < len(rows):
        raise DataError(cfg.answers, "an id occurs more than once")
    return rows


def _mmhal(cfg: Config, rows: Sequence[Answered], folder: Path) -> dict[str, Any]:
    judge = cfg.judge
    assert judge is not None
    template = judge.prompt(MMHAL_TEMPLATE)
    prompts, references = {}, {}
    for row in rows:
        names = ("question", "gt_answer", "image_content")
        if missing := [name for name in names if name not in row.values]:
            raise DataError(cfg.answers, f"`{missing[0]}` is missing", f"in the answer {row.id}")
        shown = row.values["image_content"]
        shown = ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
        known = {name: str(row.values[name]) for name in names[:2]}
        prompts[row.id] = _fill(template, {**known, "image_content": shown, "model_answer": row.answer})
        references[row.id] = f"{shown} {known['gt_answer']}\0{row.answer}"
    replies = _ask(judge, prompts, references, folder)
    ratings = [parse_rating(replies[row.id]) for row in rows]
    types = [str(row.values.get("question_type", "")) for row in rows]
    return {"figures": mmhal_figures(ratings, types), "judge": judge.about(template)}


def _object_halbench(cfg: Config, rows: Sequence[Answered], folder: Path) -> dict[str, Any]:
    assert cfg.words is not None
    vocabulary = Vocabulary.from_synonyms(
        Path(cfg.words).expanduser().read_text(encoding="utf-8").splitlines()
    )
    pictures = [int(_text(row.values, ("image_id",), row.id)) for row in rows]
    truths = coco_objects(cfg.annotations, vocabulary, set(pictures))
    named = [row.answer for row in rows]
    about: dict[str, Any] = {"kind": "words"}
    if cfg.judge is not None:
        template = cfg.judge.prompt(OBJECTS_TEMPLATE)
        about = cfg.judge.about(template)
        prompts = {
            row.id: _fill(template, {"question": str(row.values.get("question", "")), "answer": row.answer})
            for row in rows
        }
        replies = _ask(cfg.judge, prompts, {row.id: f"{row.answer}\0" for row in rows}, folder)
        named = [". ".join(dict.fromkeys(_listed(replies[row.id], row.id))) for row in rows]
    mentions = [[thing for _, thing in vocabulary.mentions(text)] for text in named]
    return {"figures": chair_figures(mentions, [truths[i] for i in pictures]), "judge": about}


def _amber(cfg: Config, rows: Sequence[Answered], folder: Path) -> dict[str, Any]:
    assert cfg.words is not None
    annotations = {int(row["id"]): row for path in cfg.annotations for row in _json(path)}
    answers = {int(row.id): row.answer for row in rows}
    if unknown := sorted(answers.keys() - annotations.keys()):
        raise DataError(cfg.answers, f"{len(unknown)} answers have no annotation", str(unknown[:5]))
    safe = (
        Path(cfg.safe_words).expanduser().read_text(encoding="utf-8").splitlines() if cfg.safe_words else []
    )
    described = {i: text for i, text in answers.items() if annotations[i]["type"] == "generative"}
    asked = {i: text for i, text in answers.items() if i not in described}
    figures: dict[str, Any] = {}
    if described:
        figures["generative"] = amber_generative_figures(described, annotations, _json(cfg.words), safe)
    if asked:
        figures["discriminative"] = amber_discriminative_figures(asked, annotations)
    return {"figures": figures, "judge": {"kind": "words"}}


def coco_objects(paths: Sequence[str], vocabulary: Vocabulary, pictures: set[int]) -> dict[int, set[str]]:
    """Objects of pictures from COCO's annotations: segmented ones, and those that captions name."""
    found: dict[int, set[str]] = {picture: set() for picture in pictures}
    for path in paths:
        values = _json(path)
        names = {row["id"]: str(row["name"]).lower() for row in values.get("categories", [])}
        for row in values["annotations"]:
            if row["image_id"] not in found:
                continue
            text = row["caption"] if "caption" in row else names[row["category_id"]]
            found[row["image_id"]] |= {thing for _, thing in vocabulary.mentions(text)}
    return found


def _ask(
    judge: JudgeSection, prompts: Mapping[str, str], references: Mapping[str, str], folder: Path
) -> dict[str, str]:
    """Replies by id; each is written down before the next question is asked."""
    path = folder / "replies.jsonl"
    ids = list(prompts)
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = whole[: whole.rfind("\n") + 1]  # a line that a crash cut off is asked again
    path.write_text(whole, encoding="utf-8")
    replies = read_replies(path, ids)
    left = [name for name in ids if name not in replies]
    ask = judge.open(ids, references)
    with path.open("a", encoding="utf-8") as file:
        for name in left:
            replies[name] = ask(name, prompts[name])
            file.write(json.dumps({"id": name, "reply": replies[name]}, ensure_ascii=False) + "\n")
            file.flush()
    return replies


def _listed(reply: str, name: str) -> list[str]:
    """Names in the last JSON list of a reply."""
    start, end = reply.rfind("["), reply.rfind("]")
    try:
        return [str(thing) for thing in json.loads(reply[start : end + 1])]
    except json.JSONDecodeError:
        raise DataError(name, "the judge's reply holds no list of objects", reply[:200]) from None


def _fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its names in braces replaced; braces in answers stay what they are."""
    for name in values:
        template = template.replace(f"{{{name}}}", f"\0{name}\0")
    for name, value in values.items():
        template = template.replace(f"\0{name}\0", value)
    return template


def _text(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if values.get(name) is not None:
            return str(values[name])
    raise DataError(where, f"`{names[0]}` is missing", f"the row has {', '.join(values)}")


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(path, "not a readable JSON file", str(error)) from error


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
