"""The form of an answer as JSON Schema: `python -m serving.schema > docs/answer.schema.json`.

It is made from the client's records, so that what is published is what the client reads.
"""

import json
from typing import Any

from pydantic import TypeAdapter

from serving.client import SCHEMA_VERSION, AnyAnswer


def answer_schema() -> dict[str, Any]:
    """The schema, JSON Schema 2020-12: of the four kinds of answer, one."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:cadx:answer:{SCHEMA_VERSION}",
        "title": "The answer of a cadx endpoint",
        **TypeAdapter[Any](AnyAnswer).json_schema(),
    }


if __name__ == "__main__":
    print(json.dumps(answer_schema(), indent=2))
