"""The gateway against its own OpenAPI document: whatever is sent, no 5xx, and every answer matches its schema."""

from __future__ import annotations

from itertools import product
from typing import Any

import schemathesis
from serving_cases import judge, language_model, listening, translator

from eagleray.serve.fleet import LocalFleet
from eagleray.serve.gateway import gateway_app

EXAMPLES = 5
"""Requests for each endpoint and mode; the whole test must stay under 20 s."""
MODELS = {"/v1/chat/completions": "lisa", "/v1/completions": "lisa", "/v1/audio/translations": "nast"}
"""Of each path; a made-up name would get 404 and nothing else be seen. Default: the judge."""


def test_no_request_breaks_the_gateway_and_answers_match_their_schemas() -> None:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    @schemathesis.serializer("audio/*")
    def audio(context: Any, value: Any) -> bytes:
        return value if isinstance(value, bytes) else str(value).encode()

    wanted = [
        schemathesis.checks.not_a_server_error,
        schemathesis.checks.status_code_conformance,
        schemathesis.checks.content_type_conformance,
        schemathesis.checks.response_schema_conformance,
    ]
    served = [judge(max_pending=2000, max_responses=40), language_model(max_new_tokens=4), translator()]
    statuses: dict[str, set[int]] = {}
    with listening(gateway_app(LocalFleet(served))) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        for found, mode in product(schema.get_all_operations(), modes):
            operation = found.ok()
            if mode == modes[1] and (operation.method == "get" or operation.path == "/translate"):
                continue  # nothing to get wrong: no body, or a body of any bytes

            @seed(0)
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                if mode == modes[0] and isinstance(case.body, dict) and "model" in case.body:  # noqa: B023
                    case.body["model"] = MODELS.get(case.path, "gram")
                response = case.call(timeout=60)
                statuses.setdefault(case.path, set()).add(response.status_code)
                case.validate_response(response, checks=wanted)

            send()
    assert len(statuses) >= 15 and all(statuses.values())
    for path in ("/healthz", "/compare", "/rank", "/reward", "/rerank", "/v1/completions"):
        assert 200 in statuses[path], (path, statuses)
