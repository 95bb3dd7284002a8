"""Hallucination benchmarks from files in their own formats: our own small examples, no row of the real ones."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rovrm_cases import BLUE, RED, tiny_llava

from eagleray.jobs.rovrm import hallucination
from eagleray.models.rovrm.checkpoint import save_reward_model
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.data.files import DataError

MMHAL = [
    {
        "question_type": "counting",
        "question_topic": "animal",
        "image_id": "0",
        "image_src": "https://example.org/0.jpg",
        "image_content": ["Lamp", "Table"],
        "question": "How many lamps are on the table?",
        "gt_answer": "One lamp.",
        "model_answer": "One lamp on the table.",
    },
    {
        "question_type": "attribute",
        "image_content": ["Kettle"],
        "question": "Which colour is the kettle?",
        "gt_answer": "Green.",
        "model_answer": "Purple with spots.",
    },
]


def _run(tmp_path: Path, name: str = "run", **values: Any) -> dict[str, Any]:
    values["run"] = {"dir": str(tmp_path / name)}
    return hallucination.main(validate_config(hallucination.Config, values, "test"))


def _written(path: Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return str(path)


def test_mmhal_with_recorded_replies_in_both_formats(tmp_path: Path) -> None:
    answers = _written(tmp_path / "answers.json", MMHAL)
    completions = [{"choices": [{"message": {"content": f"Well. Rating: {n}"}}]} for n in (6, 1)]
    rows = "".join(json.dumps({"id": str(i), "reply": f"Rating: {n}"}) + "\n" for i, n in enumerate((6, 1)))
    for name, content in (("official", completions), ("lines", rows)):
        judge = {"kind": "replies", "path": _written(tmp_path / name, content), "model": "a-judge"}
        report = _run(tmp_path, f"run-{name}", benchmark="mmhal", answers=answers, judge=judge)
        assert report["figures"]["score"] == 3.5 and report["figures"]["hallucination_rate"] == 0.5
        assert report["judge"]["model"] == "a-judge" and len(report["judge"]["prompt_sha256"]) == 64
    with pytest.raises(DataError, match="1 replies to 2 answers"):
        judge["path"] = _written(tmp_path / "short", completions[:1])
        _run(tmp_path, "short-run", benchmark="mmhal", answers=answers, judge=judge)


class _Server(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - shared by the handlers of one test
    fail_at = 2

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["messages"][0]["content"])
        failed = len(self.asked) == self.fail_at
        reply = {"choices": [{"message": {"content": "Rating: 5"}}]}
        content = b"overloaded" if failed else json.dumps(reply).encode()
        self.send_response(503 if failed else 200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_an_endpoint_is_asked_once_a_question_also_after_an_interruption(tmp_path: Path) -> None:
    _Server.asked = []
    server = HTTPServer(("127.0.0.1", 0), _Server)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = {"kind": "endpoint", "url": f"http://127.0.0.1:{server.server_port}", "model": "m"}
        values = {"benchmark": "mmhal", "answers": _written(tmp_path / "a.json", MMHAL), "judge": judge}
        with pytest.raises(ValueError, match="answered 503 to 1: overloaded"):
            _run(tmp_path, **values)
        report = _run(tmp_path, **values)
    finally:
        server.shutdown()
        server.server_close()
    assert report["figures"]["score"] == 5.0
    assert len(_Server.asked) == 3 and _Server.asked[1] == _Server.asked[2]
    assert "One lamp on the table." in _Server.asked[0] and "Lamp, Table" in _Server.asked[0]
    assert "{" not in _Server.asked[0]


def test_object_halbench_by_words_and_by_a_judge(tmp_path: Path) -> None:
    answers = [
        {"image_id": 7, "question": "Describe it.", "answer": "A puppy next to two cars."},
        {"image_id": "9", "question": "Describe it.", "answer": "A cat sleeps."},
    ]
    instances = {
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 3, "category_id": 2}],
    }
    captions = {"annotations": [{"image_id": 9, "caption": "A kitten on a car."}]}
    files: dict[str, Any] = {
        "answers": _written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in answers)),
        "annotations": [_written(tmp_path / "i.json", instances), _written(tmp_path / "c.json", captions)],
        "words": _written(tmp_path / "synonyms.txt", "dog, puppy\ncat, kitten\ncar, van\n"),
    }
    found = _run(tmp_path, "words", benchmark="object_halbench", **files)["figures"]
    assert found["chair_s"] == 0.5 and found["chair_i"] == pytest.approx(1 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    replies = [{"id": str(i), "reply": f"Here: {names}"} for i, names in enumerate(('["puppy"]', "[]"))]
    path = _written(tmp_path / "r.jsonl", "".join(json.dumps(row) + "\n" for row in replies))
    judge = {"kind": "replies", "path": path}
    found = _run(tmp_path, "judged", benchmark="object_halbench", judge=judge, **files)["figures"]
    assert found["chair_s"] == 0.0 and found["answers_with_objects"] == 1
    judge["path"] = _written(
        tmp_path / "r.jsonl", path and '{"id": "0", "reply": "none"}\n{"id": "1", "reply": "[]"}'
    )
    with pytest.raises(DataError, match="the judge's reply holds no list of objects"):
        _run(tmp_path, "bad", benchmark="object_halbench", judge=judge, **files)


def test_amber_of_both_kinds(tmp_path: Path) -> None:
    annotations = [
        {"id": 1, "type": "generative", "truth": ["lamp"], "hallu": ["chair"]},
        {"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
    ]
    answers = [{"id": 1, "response": "A lamp and a chair."}, {"id": 1005, "response": "No"}]
    files: dict[str, Any] = {
        "annotations": [_written(tmp_path / "annotations.json", annotations)],
        "words": _written(tmp_path / "relation.json", {"lamp": ["light"], "chair": ["stool"]}),
        "safe_words": _written(tmp_path / "safe.txt", "photo\n"),
    }
    found = _run(tmp_path, benchmark="amber", answers=_written(tmp_path / "a.json", answers), **files)[
        "figures"
    ]
    assert found["generative"] == {"answers": 1, "chair": 0.5, "cover": 1.0, "hal": 1.0, "cog": 1.0}
    assert found["discriminative"]["existence"]["accuracy"] == 1.0
    stray = _written(tmp_path / "b.json", [{"id": 3, "response": "A lamp."}])
    with pytest.raises(DataError, match=r"1 answers have no annotation: \[3\]"):
        _run(tmp_path, "stray", benchmark="amber", answers=stray, **files)


def test_the_best_of_several_answers_is_judged(tmp_path: Path) -> None:
    save_reward_model(*tiny_llava(), tmp_path / "model")
    images = tmp_path / "images"
    images.mkdir()
    texts = ["A red circle.", "Nothing, or a blue lamp and a chair.", "Perhaps a lamp."]
    rows = []
    for name, content in (("red.png", RED), ("blue.png", BLUE)):
        (images / name).write_bytes(content)
        rows.append({**MMHAL[0], "image": name, "id": name, "model_answer": texts})
    values: dict[str, Any] = {
        "benchmark": "mmhal",
        "answers": _written(tmp_path / "a.json", rows),
        "judge": {"kind": "overlap"},
        "reward_model": {"path": str(tmp_path / "model"), "images": str(images)},
    }
    cfg = validate_config(hallucination.Config, values, "test")
    scorer = VisualScorer.from_pretrained(tmp_path / "model", device="cpu")
    for row, content in zip(hallucination._read_answers(cfg), (RED, BLUE), strict=True):
        rewards = scorer.score(MMHAL[0]["question"], texts, content)  # type: ignore[arg-type]
        assert row.answer == texts[rewards.index(max(rewards))]
    assert _run(tmp_path, **values)["figures"]["answers"] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"benchmark": "mmhal"}, "`benchmark` mmhal needs `judge`"),
        ({"benchmark": "amber", "annotations": ["x"]}, "`benchmark` amber needs `words`"),
        ({"benchmark": "mmhal", "judge": {"kind": "endpoint"}}, "of kind `endpoint` needs `model`"),
        ({"benchmark": "mmhal", "judge": {"kind": "replies"}}, "of kind `replies` needs `path`"),
        (
            {
                "benchmark": "object_halbench",
                "annotations": ["x"],
                "words": "y",
                "judge": {"kind": "overlap"},
            },
            "it is for mmhal only",
        ),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config(hallucination.Config, {"answers": "a.json", **values}, "test")
