"""Turns documentation into conversations: a question about a name, the first paragraphs of its documentation.

Pure; a random generator is an argument. Knows message lists, not tokens nor the chat template.
"""

from __future__ import annotations

import random
import re

from ellm.deploy.bundled.corpus import Document

Message = dict[str, str]

MIN_ANSWER_CHARS = 15
MAX_ANSWER_CHARS = 480
MAX_TURNS = 4
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that knows the Python standard library.",
    "Answer questions about Python.",
    "You are pydoc, a small language model. Answer briefly.",
)
FUNCTION_QUESTIONS = (
    "What does {name} do?",
    "What does {name} do?",
    "what does {name} do",
    "What does {name}() do?",
    "Explain {name}",
    "Explain {name}.",
    "Explain {name} in Python.",
    "explain {name}",
    "What is {name}?",
    "Tell me about {name}.",
    "How do I use {name}?",
    "How does {name} work?",
    "Describe {name}.",
    "What is the {kind} {name} for?",
    "When would I use {name}?",
    "Can you explain what {name} does?",
    "{name}",
    "help({name})",
)
NOUN_QUESTIONS = (
    "What is {name}?",
    "What is {name}?",
    "what is {name}",
    "What is {name} in Python?",
    "Explain {name}",
    "Explain {name}.",
    "explain {name}",
    "Tell me about {name}.",
    "Tell me about the {kind} {name}.",
    "Describe {name}.",
    "What is the {kind} {name} for?",
    "What does {name} do?",
    "What is {name} used for?",
    "How do I use {name}?",
    "Can you explain {name}?",
    "{name}",
    "help({name})",
)
SMALL_TALK = (
    (
        ("Hello", "Hi", "Hello!", "Hi there", "hey", "hello", "Good morning", "Hi!"),
        "Hello! I am pydoc, a small language model. Ask me about a function, a class or a module of Python.",
    ),
    (
        ("Who are you?", "What are you?", "who are you", "What is your name?", "Introduce yourself."),
        "I am pydoc, a small language model trained on the documentation of the Python standard library.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "help", "Help me"),
        "I can say what a function, a class or a module of the Python standard library does. "
        "Try: What does json.dumps do?",
    ),
    (("Thanks", "Thank you", "thanks!", "Thank you very much.", "Great, thanks"), "You are welcome."),
    (("Bye", "Goodbye", "bye", "See you"), "Goodbye!"),
    (
        ("How are you?", "How are you today?", "how are you"),
        "I am well, thank you. What would you like to know about Python?",
    ),
    (
        ("What is Python?", "Tell me about Python.", "Explain Python", "what is python"),
        "Python is a programming language that is interpreted, object-oriented and easy to read. "
        "It comes with a large standard library.",
    ),
    (
        (
            "Tell me a joke",
            "Write a poem",
            "Tell me a story.",
            "What is the weather?",
            "What is the capital of France?",
        ),
        "I only know the documentation of the Python standard library. "
        "Ask me about a function, a class or a module.",
    ),
)
# What people ask about first is asked three times in an epoch, everything else once.
FAVOURED_MODULES = (
    "os os.path sys json math random re time datetime collections itertools functools subprocess pathlib "
    "threading asyncio logging csv shutil glob tempfile hashlib io copy pickle heapq bisect statistics "
    "string str list dict set tuple int float bytes decimal fractions enum dataclasses typing contextlib "
    "argparse socket struct zlib queue"
)
_FAVOURED = frozenset(FAVOURED_MODULES.split())
_SHORT_PACKAGES = frozenset(
    {"asyncio", "json", "unittest", "concurrent", "multiprocessing", "importlib", "ctypes", "dbm"}
)


def public_name(document: Document) -> str:
    """The name a user would type: `asyncio.tasks.gather` is `asyncio.gather`, `io.open` is `open`."""
    parts = document.name.split(".")
    is_member = document.kind == "function" or (
        document.kind == "class" and parts[1:2] and parts[1].islower()
    )
    if parts[0] in _SHORT_PACKAGES and len(parts) == 3 and is_member:
        return f"{parts[0]}.{parts[2]}"
    if document.name.startswith("random.Random."):
        return f"random.{parts[2]}"
    return "open" if document.name == "io.open" else document.name


def answer(document: Document) -> str | None:
    """A sentence that places the name, then the first paragraphs; None where there is no prose to give."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", document.text):
        if not _says_something(paragraph, document, is_first=not paragraphs):
            continue
        lines = paragraph.splitlines()
        if not any(line.startswith((" ", "\t", "-", "*", "=", "+", "|")) for line in lines):
            paragraph = " ".join(" ".join(lines).split())
        if sum(map(len, paragraphs)) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        paragraphs.append(re.sub(r":\w+:`", "`", paragraph.replace("``", "`")))
    if sum(map(len, paragraphs)) < MIN_ANSWER_CHARS:
        return None
    return "\n\n".join([*_placed(document), *paragraphs])


def _says_something(paragraph: str, document: Document, *, is_first: bool) -> bool:
    """False for doctests, announcements of code, a signature said again, a topic's title and grammar."""
    lines = paragraph.splitlines()
    if ">>>" in paragraph or lines[-1].endswith("::"):
        return False
    if is_first and len(lines) <= 2 and lines[0].startswith(document.name.rpartition(".")[2] + "("):
        return False
    return document.kind != "topic" or not (lines[0].startswith(" ") or set(lines[-1]) <= set("*="))


def _placed(document: Document) -> list[str]:
    name = public_name(document)
    owner = name.rsplit(".", 1)[0]
    if document.kind == "topic":
        return []
    if document.kind == "module":
        return [f"{name} is a module of the Python standard library."]
    if "." not in name:
        return [f"{name} is a built-in {document.kind}."]
    if document.kind == "method":
        return [f"{name} is a method of {owner}."]
    return [f"{name} is a {document.kind} in the {owner} module."]


def is_askable(document: Document) -> bool:
    """Whether somebody would ask about it: public, and not a comment."""
    return document.kind != "comment" and not any(part.startswith("_") for part in document.name.split("."))


def is_favoured(document: Document) -> bool:
    """Whether it is a built-in, or in one of the modules most used."""
    name = public_name(document)
    owner = name.rpartition(".")[0]
    return document.kind != "topic" and (not owner or owner in _FAVOURED) and "Error" not in name


def conversation(document: Document, rng: random.Random) -> list[Message]:
    """One question and its answer; empty where the document makes none."""
    text = answer(document) if is_askable(document) else None
    if text is None:
        return []
    questions = FUNCTION_QUESTIONS if document.kind in ("function", "method") else NOUN_QUESTIONS
    kind, name = document.kind, public_name(document)
    if kind == "topic":
        kind, name = "topic", rng.choice((name, document.text.splitlines()[0].rstrip(".")))
    return [
        {"role": "user", "content": rng.choice(questions).format(name=name, kind=kind)},
        {"role": "assistant", "content": text},
    ]


def small_talk(rng: random.Random) -> list[Message]:
    """A greeting or a question about the model itself."""
    questions, reply = rng.choice(SMALL_TALK)
    return [{"role": "user", "content": rng.choice(questions)}, {"role": "assistant", "content": reply}]


def conversations(documents: list[Document], rng: random.Random) -> list[list[Message]]:
    """One conversation or three per document, and small talk; some joined, some with a system prompt."""
    asked = [d for d in documents for _ in range(3 if is_favoured(d) else 1)]
    singles = [turns for document in asked if (turns := conversation(document, rng))]
    singles.extend(small_talk(rng) for _ in range(len(singles) // 25))
    rng.shuffle(singles)
    joined: list[list[Message]] = []
    for turns in singles:
        if joined and len(joined[-1]) < 2 * MAX_TURNS - 1 and rng.random() < 0.15:
            joined[-1].extend(turns)
        elif rng.random() < 0.2:
            joined.append([{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *turns])
        else:
            joined.append(turns)
    return joined
