"""What the server's OpenAPI document says is what it does, found out by trying."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from helpers_server import Served, serving, tiny_engine
from salience.server.guard import Limits

pytestmark = pytest.mark.slow

# A request may fit the document and still be refused: too long for the context, another model's
# name, a role that the template does not know. So not every one that fits must be a success.
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(tiny_engine(context=128), Limits(body_bytes=2**20)) as made:
        yield made


@pytest.fixture(scope="module")
def document(served: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_document(document: schemathesis.BaseSchema, mode: schemathesis.GenerationMode) -> None:
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to be wrong

        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=CHECKS)
            if answer.status_code >= 400 and case.path != "/health":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        check()


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "what is a module" }];
const options = { model: "tiny", messages, max_tokens: 12, temperature: 0 };
const whole = await client.chat.completions.create(options);
let streamed = "", usage = null;
const stream = await client.chat.completions.create({
  ...options, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
let refused = null;
try { await client.chat.completions.create({ ...options, model: "other" }); }
catch (error) { refused = [error.constructor.name, error.status, error.code]; }
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const text = await client.completions.create({ model: "tiny", prompt: "the", max_tokens: 3 });
console.log(JSON.stringify({ whole: whole.choices[0].message.content, streamed,
  tokens: usage.completion_tokens, refused, models, texts: text.choices.length }));
"""


def test_the_client_of_javascript(served: Served, tmp_path: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("npm and node are not installed")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai@6"]
    made = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if made.returncode:
        pytest.skip(f"npm cannot install openai: {made.stderr.strip().splitlines()[-1:]}")
    (tmp_path / "test.mjs").write_text(SCRIPT)
    command = [node, "test.mjs", f"{served.url}/v1"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["whole"] == said["streamed"] and said["tokens"] == 12
    assert said["refused"] == ["NotFoundError", 404, "model_not_found"]
    assert said["models"] == ["tiny"] and said["texts"] == 1
