"""instructor in its JSON and tools modes: each answer is an object of the class, whatever the model."""

import sys
from enum import Enum
from typing import Any

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL = sys.argv[1:3]
MESSAGES: Any = [{"role": "user", "content": "Ada, 36, likes lists."}]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Home(BaseModel):
    city: str = Field(max_length=12)
    number: int = Field(ge=1, le=99)


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    colour: Colour
    homes: list[Home] = Field(max_length=2)
    married: bool | None


class Anything(BaseModel):
    """JSON mode promises an object, and no more."""

    model_config = ConfigDict(extra="allow")


def check(name: str, holds: Any) -> None:
    assert holds, name
    print(name, flush=True)


def main() -> None:
    official = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", timeout=120, max_retries=0)
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(official, mode=mode)
        for seed in range(3):
            made = client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                response_model=Person,
                max_retries=0,
                seed=seed,
                max_tokens=600,
            )
            assert isinstance(made, Person)
        check(f"{mode.name}: an object of the class, three times", True)
    partial = list(
        instructor.from_openai(official, mode=instructor.Mode.TOOLS).chat.completions.create_partial(
            model=MODEL, messages=MESSAGES, response_model=Home, seed=4, max_tokens=600
        )
    )
    check("TOOLS: streamed in parts", len(partial) > 1 and partial[-1].number is not None)
    # What the object holds is the model's: what never ends is cut by max_tokens, and tried again.
    client = instructor.from_openai(official, mode=instructor.Mode.JSON)
    made = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=Anything, max_retries=4, max_tokens=700
    )
    check("JSON: an object", isinstance(made, Anything))


if __name__ == "__main__":
    main()
