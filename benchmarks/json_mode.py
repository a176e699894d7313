"""JSON-schema answers of a model: how many validate, how they end and what a mask takes.

    python benchmarks/json_mode.py smollm2-135m --answers 100 -o benchmarks/results/json_mode.json

Ten schemas as people write them, by turns, each answer drawn at temperature 0.7 with a seed of its
own, many at once in one engine. `jsonschema` is the judge. `free` asks the same without a guide.
Exits with 1 unless all guided answers validate. `closed` are those that would have been cut at
--max-tokens, and were ended there.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema

import salience
from salience.chat.prompt import encode
from salience.machine import describe
from salience.runtime import Engine, Request, Sampling
from salience.runtime.limits import end_tokens
from salience.server.guide import Guide, Guides

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "hobbies": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "email", "hobbies"],
    "additionalProperties": False,
}
RECIPE = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "servings": {"type": "integer", "minimum": 1},
        "ingredients": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "amount": {"type": "number"},
                    "unit": {"enum": ["g", "ml", "piece", "tablespoon"]},
                },
                "required": ["name", "amount", "unit"],
            },
        },
        "steps": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "required": ["title", "servings", "ingredients", "steps"],
}
SENTIMENT = {
    "type": "object",
    "properties": {
        "sentiment": {"type": "string", "enum": ["positive", "neutral", "negative"]},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "reason": {"type": ["string", "null"]},
    },
    "required": ["sentiment", "confidence", "reason"],
}
EVENT = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1},
        "date": {"type": "string", "format": "date"},
        "start": {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"},
        "location": {"$ref": "#/$defs/place"},
    },
    "required": ["title", "date", "start", "location"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
            "required": ["city", "country"],
        }
    },
}
INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
        "currency": {"enum": ["EUR", "USD", "JPY"]},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "quantity": {"type": "integer", "minimum": 1},
                    "price": {"type": "number", "minimum": 0},
                },
                "required": ["text", "quantity", "price"],
            },
            "minItems": 1,
            "maxItems": 5,
        },
        "paid": {"type": "boolean"},
    },
    "required": ["number", "currency", "lines", "paid"],
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["label", "children"],
        }
    },
}
SHAPE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "circle"}, "radius": {"type": "number"}},
            "required": ["kind", "radius"],
        },
        {
            "type": "object",
            "properties": {
                "kind": {"const": "polygon"},
                "points": {
                    "type": "array",
                    "minItems": 3,
                    "items": {
                        "type": "array",
                        "prefixItems": [{"type": "number"}, {"type": "number"}],
                        "items": False,
                        "minItems": 2,
                    },
                },
            },
            "required": ["kind", "points"],
        },
    ]
}
PEOPLE = {"type": "array", "items": {"type": "string"}, "minItems": 5}
SETTINGS = {
    "type": "object",
    "properties": {
        "theme": {"enum": ["dark", "light"]},
        "font_size": {"type": "integer", "multipleOf": 2, "minimum": 8, "maximum": 72},
        "shortcuts": {"type": "object", "additionalProperties": {"type": "string"}},
        "plugins": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "enabled": {"type": "boolean"}},
                "required": ["id"],
            },
        },
    },
    "required": ["theme", "shortcuts"],
}
ARTICLE = {
    "type": "object",
    "properties": {
        "headline": {"type": "string", "maxLength": 60},
        "summary": {"type": "string"},
        "topics": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "published": {"type": "string", "format": "date-time"},
    },
    "required": ["headline", "summary", "topics", "published"],
}
TASKS: list[tuple[str, str, Any]] = [
    ("person", "Describe a person who lives in Lisbon, as JSON.", PERSON),
    ("recipe", "Give me a recipe for pancakes, as JSON.", RECIPE),
    ("sentiment", "Is this positive? 'The food was cold and late.' Answer in JSON.", SENTIMENT),
    ("event", "Plan a birthday party in Paris, as JSON.", EVENT),
    ("invoice", "Write an invoice for two chairs and a desk, as JSON.", INVOICE),
    ("tree", "Draw the family tree of Queen Victoria as nested JSON.", TREE),
    ("shape", "Give me any shape, as JSON.", SHAPE),
    ("people", "List five scientists as a JSON list.", PEOPLE),
    ("settings", "Write the settings of a text editor, as JSON.", SETTINGS),
    ("article", "Write a news article on a flood, as JSON.", ARTICLE),
]


def fault(text: str, schema: Any) -> str | None:
    """Why a text does not validate; None if it does."""
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except json.JSONDecodeError as error:
        return f"not JSON: {error}"
    except jsonschema.ValidationError as error:
        return f"does not validate: {error.message}"[:200]
    return None


class Run:
    """All answers of one engine, guided or not."""

    def __init__(self, engine: Engine, guides: Guides | None) -> None:
        self.engine = engine
        self.guides = guides
        self.mask_seconds: list[float] = []

    def answers(
        self, jobs: list[tuple[list[int], Any, Sampling]]
    ) -> list[tuple[Request, Guide | None]]:
        """The finished requests, in order."""
        found: list[tuple[Request, Guide | None]] = []
        for prompt, schema, sampling in jobs:
            guide = None if self.guides is None else self.guides.json_schema(schema)
            found.append((self.engine.submit(prompt, sampling, guide is not None), guide))
        by_request = {id(request): guide for request, guide in found}
        for request, guide in found:
            self.allow(request, guide)
        while not all(request.finished for request, _ in found):
            for event in self.engine.step():
                guide = by_request[id(event.request)]
                if guide is None or event.request.finished:
                    continue
                for token in event.tokens:
                    guide.accept(token)
                self.allow(event.request, guide)
        return found

    def allow(self, request: Request, guide: Guide | None) -> None:
        """The mask of the next token."""
        if guide is not None:
            start = time.perf_counter()
            request.allow(guide.mask(request.room - len(request.tokens)))
            self.mask_seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--free", action="store_true", help="without guides, to compare")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    from salience.loading import load_source
    from salience.source import open_source

    source = open_source(options.model)
    tokenizer, model = source.tokenizer, load_source(source, "auto")
    engine = Engine(model, tokenizer, max_context=2048, max_batch=options.batch)
    size = model.config.get_text_config().vocab_size
    guides = None if options.free else Guides(tokenizer, size, end_tokens(model, tokenizer))
    start = time.perf_counter()
    if guides is not None:
        for _, _, schema in TASKS:
            guides.json_schema(schema)
    compiled = time.perf_counter() - start

    jobs, names = [], []
    for index in range(options.answers):
        name, text, schema = TASKS[index % len(TASKS)]
        prompt = encode(tokenizer, [{"role": "user", "content": text}])
        sampling = Sampling(options.max_tokens, options.temperature, seed=index)
        jobs.append((prompt, schema, sampling))
        names.append(name)
    start = time.perf_counter()
    run = Run(engine, guides)
    done = run.answers(jobs)
    seconds = time.perf_counter() - start
    answers = [
        {
            "task": name,
            "tokens": len(request.tokens),
            "fault": fault(request.text, schema),
            "closed": guide is not None and guide.closed,
            "text": request.text,
        }
        for name, (request, guide), (_, schema, _) in zip(names, done, jobs, strict=True)
    ]
    masks = sorted(run.mask_seconds)
    result = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "valid": sum(answer["fault"] is None for answer in answers),
        "answers": len(answers),
        "closed": sum(bool(answer["closed"]) for answer in answers),
        "tokens": sum(len(request.tokens) for request, _ in done),
        "seconds": round(seconds, 2),
        "compile_seconds": round(compiled, 3),
        "mask_ms_median": round(1e3 * masks[len(masks) // 2], 4) if masks else None,
        "mask_ms_p99": round(1e3 * masks[int(0.99 * len(masks))], 4) if masks else None,
        "machine": describe(),
        "salience": salience.__version__,
        "texts": answers,
    }
    print(f"{'task':12}{'valid':>8}{'closed':>12}{'tokens':>8}")
    for name, _, _ in TASKS:
        own = [answer for answer in answers if answer["task"] == name]
        if own:
            valid = sum(answer["fault"] is None for answer in own)
            near = sum(bool(answer["closed"]) for answer in own)
            tokens = sum(len(r.tokens) for (r, _), n in zip(done, names, strict=True) if n == name)
            print(f"{name:12}{valid:>4}/{len(own):<3}{near:>12}{tokens / len(own):>8.0f}")
    for answer in answers:
        if answer["fault"]:
            print(f"{answer['task']}: {answer['fault']}")
    print(
        f"{result['valid']} of {len(answers)} validate; {result['tokens']} tokens in "
        f"{seconds:.0f} s; a mask takes {result['mask_ms_median']} ms"
    )
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.exit(not options.free and result["valid"] < len(answers))


if __name__ == "__main__":
    main()
